"""What the measurements share: CPU seconds of a command, and taking turns."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path

RUNS = 10
ENV = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def cpu_seconds(command: list[str], folder: Path, **env: str) -> float:
    """Return the CPU seconds of a command and all its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, cwd=folder, env=ENV | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def alternate(measures: dict[str, Callable[[], float]], runs: int = RUNS) -> dict[str, list[float]]:
    """Measure each in turn, so that a machine that slows down slows all alike; the first round is not counted."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for round_ in range(runs + 1):
        for name, measure in measures.items():
            value = measure()
            if round_:
                found[name].append(value)
    return found
