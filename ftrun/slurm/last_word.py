"""How a run ended that could not say so itself."""

from __future__ import annotations

from pathlib import Path

from ftrun import record
from ftrun.record import Result, Status


def write(run: Path, status: Status, reason: str) -> Result:
    """Write down how a run ended, with as far as it had come, and return that."""
    last = record.latest_checkpoint(run)
    checkpoint = str(last.relative_to(run)) if last else None
    Result(status=status, reason=reason, checkpoint=checkpoint, **record.so_far(run)).save(run)
    return Result.load(run)
