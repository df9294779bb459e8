"""What a run has left, as tests compare it, and as a run that was stopped would have left it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ftrun import record


def comparable(folder: Path) -> list[dict[str, float]]:
    """Return a run's metrics without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in ("time", "tokens_per_second")}
        for line in record.read_lines(folder / record.METRICS)
    ]


def weights(folder: Path) -> bytes:
    """Return the bytes of the weights that a run ended with."""
    (file,) = (folder / "model").glob("*.safetensors")
    return file.read_bytes()


def cut_off(folder: Path, step: int) -> None:
    """Leave a run as one that was interrupted after a step."""
    for checkpoint in record.checkpoints(folder):
        if record.step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "model")
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {"status": "interrupted", "holder": None}))
