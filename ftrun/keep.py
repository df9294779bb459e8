"""What a sweep leaves on the disk of the weights that its jobs made: all, the best arm's, adapters only, or none.

Results, metrics, logs and pictures always stay, so a job whose weights have gone is still completed and not done again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from ftrun import record
from ftrun.record import Status

if TYPE_CHECKING:
    from ftrun.board import Arm, Row, Table


class Keep(StrEnum):
    """Which weights of a sweep's jobs stay on the disk."""

    all = "all"
    best = "best"
    """Those of the best arm, all its seeds."""

    adapters = "adapters"
    """Those of adapters, which are small; whole models and checkpoints go."""

    none = "none"


@dataclass(frozen=True)
class Freed:
    """What has gone."""

    jobs: int = 0
    size: int = 0
    """In bytes."""


def apply(folder: Path, policy: Keep, *, over: bool = False) -> Freed:
    """Delete ``model/`` and ``checkpoints/`` of the jobs that may lose them.

    Only completed jobs do, and, once the sweep is over, those that it has stopped early. Of the best arm's rivals only
    those do that can no longer become the best.

    Args:
        folder: The sweep's.
        policy: What stays.
        over: Whether no job is going to be gone on with.
    """
    from ftrun import board

    if policy == Keep.all:
        return Freed()
    jobs = size = 0
    for table in board.load(folder).tables:
        for row in _losing(table, policy, over=over):
            freed = sum(_remove(path) for path in _doomed(row.folder, policy))
            jobs, size = jobs + (freed > 0), size + freed
    return Freed(jobs, size)


def _losing(table: Table, policy: Keep, *, over: bool) -> Iterator[Row]:
    best = table.best
    for arm in table.arms:
        if policy == Keep.best and (arm is best or not (over or _is_beaten(arm, best))):
            continue
        yield from (row for row in arm.rows if row.status is Status.completed)
        if over:
            yield from (row for row in arm.rows if row.status is Status.paused)


def _is_beaten(arm: Arm, best: Arm | None) -> bool:
    """Tell whether an arm has all its values, and they are not the best: the best can only get better."""
    return best is not None and best.is_whole and all(row.status is Status.completed for row in arm.rows)


def _doomed(folder: Path, policy: Keep) -> Iterator[Path]:
    model = folder / record.MODEL
    keeps_model = policy == Keep.adapters and (model / "adapter_config.json").exists()
    yield from list(folder.glob(f".*{_GOING}"))  # left by one that was killed
    yield folder / record.CHECKPOINTS
    if not keeps_model:
        yield model


_GOING = ".going"


def _remove(path: Path) -> int:
    """Delete a folder, which is there whole or not at all at any moment, and return how much that frees."""
    if not path.is_dir():
        return 0
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    going = path if path.name.endswith(_GOING) else path.with_name(f".{path.name}{_GOING}")
    if going != path:
        shutil.rmtree(going, ignore_errors=True)
        path.replace(going)
    shutil.rmtree(going)
    return size
