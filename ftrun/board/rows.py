"""A job as one row: what its own folder says, of which no more is parsed than is needed: thousands take a second.

Nothing but the files is asked: the job may be running, its driver may be dead, the folder may have come from elsewhere.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ftrun import plugin, record
from ftrun.record import Result, Status
from ftrun.sweep.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Row:
    """One job, or any run, and how it stands."""

    id: int
    folder: Path
    arm: str = ""
    """Tells jobs with the same point apart whose other settings differ: see `ftrun.sweep.ledger.Job`."""

    point: Mapping[str, str]
    """The keys in which it differs from the others, but for the seed, and their values as they were typed."""

    seed: int | None
    stage: str
    wanted: str | None
    """The metric that its config names as the objective, if it names one."""

    low_is_good: bool
    status: Status
    reason: str
    objective: float | None
    objective_name: str | None
    """The metric that the objective is, where it has come to one."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    step: int = 0
    wall_seconds: float = 0.0
    peak_memory_bytes: int | None = None
    tokens_per_second: float | None = None

    @property
    def is_open(self) -> bool:
        """Whether it may still come to another end without being asked to."""
        return self.status not in (Status.completed, Status.failed, Status.paused)


def read(folder: Path) -> list[Row]:
    """Return the jobs of a sweep's folder, in the order in which they were frozen."""
    rows = []
    for job in Ledger(folder).jobs():
        words = [word.lstrip("+").partition("=") for word in job.overrides]
        point = {key: value for key, _, value in words if key != "seed"}
        rows.append(replace(row(job.folder, point, job.id), arm=job.arm))
    return rows


def row(folder: Path, point: Mapping[str, str], number: int = 0) -> Row:
    """Return a run's folder as a row."""
    try:
        config = _Config.read(folder / record.RUN)
    except OSError:
        result, config = Result(status=Status.failed, reason="its folder holds no run.yaml"), _Config()
    else:
        result = _result(folder)
    logged = {} if result.metrics else last_values(folder / record.METRICS)
    metrics = result.metrics or record.last_values([logged])
    return Row(
        id=number,
        folder=folder,
        point=point,
        seed=config.seed,
        stage=config.stage,
        wanted=config.objective,
        low_is_good=config.low_is_good,
        status=result.status,
        reason=result.reason,
        objective=result.objective,
        objective_name=_name(result, config),
        metrics={name: value for name, value in metrics.items() if isinstance(value, int | float)},
        step=result.step or int(logged.get("step", 0)),
        wall_seconds=result.wall_seconds,
        peak_memory_bytes=result.peak_memory_bytes,
        tokens_per_second=result.tokens_per_second,
    )


def _result(folder: Path) -> Result:
    try:
        return Result.load(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Result(status=Status.failed, reason=f"its result.json cannot be read: {error}")


@dataclass(frozen=True)
class _Config:
    """What a row needs of ``run.yaml``: found by its lines, since to parse all of it takes a hundred times longer."""

    stage: str = ""
    seed: int | None = None
    objective: str | None = None
    low_is_good: bool = True

    @classmethod
    def read(cls, path: Path) -> _Config:
        text = path.read_text(encoding="utf-8")
        top = {match[1]: match[2].strip("'\"") for match in _TOP.finditer(text)}
        stage = _STAGE.search(text)
        return cls(
            stage=stage[1] if stage else "",
            seed=int(top["seed"]) if top.get("seed", "").isdigit() else None,
            objective=None if top.get("objective", "null") == "null" else top["objective"],
            low_is_good=top.get("objective_mode") != "max",
        )


_TOP = re.compile(r"^(seed|objective|objective_mode): (.*)$", re.MULTILINE)
_STAGE = re.compile(r"^stage:\n(?:  .*\n)*?  name: (\S+)$", re.MULTILINE)


def _name(result: Result, config: _Config) -> str | None:
    """Return which metric an objective is: the one that was asked for, or the first of its stage's that equals it."""
    if result.objective is None or config.objective:
        return config.objective
    same = [name for name, value in result.metrics.items() if _equal(value, result.objective)]
    return next((name for name in _of_stage(config.stage) if name in same), same[0] if same else None)


def _equal(value: Any, objective: float) -> bool:
    return value == objective or (value != value and objective != objective)


@functools.cache
def _of_stage(stage: str) -> Sequence[str]:
    """Return a stage's metrics, the first of which there are being its objective."""
    try:
        cls = plugin.get("stage", stage)
    except (LookupError, plugin.PluginError):  # of another installation, or a file of the user's own
        return ("eval_loss", "loss")
    return (*cls.metrics, "loss") if issubclass(cls, plugin.Stage) else ()


_END = 8192
"""How many bytes at the end of a file hold the last value of each metric, in all but long lines."""


def last_values(path: Path) -> dict[str, Any]:
    """Return the last value of each name that the end of ``metrics.jsonl`` holds."""
    found: dict[str, Any] = {}
    for line in last_lines(path):
        try:
            found |= json.loads(line)
        except ValueError:
            continue  # torn, or not ours
    return found


def last_lines(path: Path, size: int = _END) -> list[str]:
    """Return the whole lines at the end of a file."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(0, length - size))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = text.split("\n")
    return lines[1 if length > size else 0 : -1]
