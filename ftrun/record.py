"""A run's folder: what lies in it, how it is written, and who holds it.

===================== =========================================================================================
``run.yaml``          the resolved config, every default written out; all that a worker reads
``manifest.json``     what was typed, versions, hardware, git state, content keys of data and model
``metrics.jsonl``     one object a log line
``samples.jsonl``     one object a sample reply
``predictions.jsonl`` one object an evaluation row that was replied to at the end
``log.txt``           everything the workers printed
``checkpoints/``      ``step-N/``, each complete or absent
``model/``            what the run ended with: weights or adapter, tokenizer, model card
``plots/``            pictures
``result.json``       status, reason, metrics
``pause.json``        the step at which a sweep has the run wait, if it has
``rungs.jsonl``       one object a pause: what the run had come to there
===================== =========================================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from ftrun.errors import ConfigError, Problem

RUN, MANIFEST, METRICS, SAMPLES = "run.yaml", "manifest.json", "metrics.jsonl", "samples.jsonl"
PREDICTIONS = "predictions.jsonl"
LOG, CHECKPOINTS, MODEL, PLOTS, RESULT = "log.txt", "checkpoints", "model", "plots", "result.json"
PAUSE, RUNGS = "pause.json", "rungs.jsonl"

HEARTBEAT_SECONDS = 10
"""How often a running worker touches ``result.json``."""

_STARTER = "FTRUN_STARTER"

_DEAD_AFTER_SECONDS = 12 * HEARTBEAT_SECONDS


class Status(StrEnum):
    """Where a run stands."""

    running = "running"
    completed = "completed"
    failed = "failed"
    interrupted = "interrupted"
    preempted = "preempted"
    queued = "queued"
    """Frozen, and not started yet: there is no ``result.json``."""

    paused = "paused"
    """Stopped where `Pause` says, with a checkpoint; its sweep may have it go on."""


EXIT_CODES = {
    Status.completed: 0,
    Status.paused: 0,
    Status.failed: 1,
    Status.interrupted: 130,
    Status.preempted: 75,
}
"""The driver's exit code for each way a run can end (75 is sysexits' EX_TEMPFAIL: run me again)."""


@dataclass
class Holder:
    """The process that writes to a run's folder."""

    host: str
    pid: int
    started: float
    """When the process started, in clock ticks since boot: tells a reused pid from the holder."""

    @classmethod
    def me(cls) -> Holder:
        """Return this process."""
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Holder:
        """Return a process of this machine."""
        return cls(host=socket.gethostname(), pid=pid, started=_start_ticks(pid))

    def to_environment(self) -> dict[str, str]:
        """Return the environment variable by which a worker knows who has started it."""
        return {_STARTER: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Holder | None:
        """Return who has started this process, if ftrun has."""
        return cls(**json.loads(given)) if (given := os.environ.get(_STARTER)) else None

    def is_alive(self, last_sign: float) -> bool:
        """Tell whether the process lives; on another host, by its last heartbeat (seconds since the epoch)."""
        if self.host != socket.gethostname():
            return time.time() - last_sign < _DEAD_AFTER_SECONDS
        return _start_ticks(self.pid) == self.started


def _start_ticks(pid: int) -> float:
    """Return when a process started, or -1 if there is none (or it is a zombie)."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self/stat").exists():
            return -1.0
        try:  # no /proc, as on macOS: existence has to do
            os.kill(pid, 0)
        except OSError:
            return -1.0
        return 0.0
    return -1.0 if after_name[0] == "Z" else float(after_name[19])


@dataclass
class Result:
    """What a run ended with, as a person, a table and a sweep read it (``result.json``)."""

    status: Status = Status.running
    reason: str = ""
    """Why it failed or stopped."""

    folder: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of each metric; ``loss`` is the mean over all steps."""

    objective: float | None = None
    """The metric that the config's ``objective`` names."""

    step: int = 0
    """Optimizer steps done."""

    tokens_per_second: float | None = None
    """Tokens (padding not counted) per second of training, over all processes."""

    peak_memory_bytes: int | None = None
    """Most memory of one process: allocated on its accelerator, or resident on CPU."""

    checkpoint: str | None = None
    """The last complete checkpoint, relative to the run's folder."""

    wall_seconds: float = 0.0
    problems: list[dict[str, str]] = field(default_factory=list)
    """What the user can mend, where that is why it failed."""

    holder: Holder | None = None

    def save(self, folder: Path) -> None:
        """Write ``result.json`` whole."""
        values = {name: value for name, value in asdict(self).items() if name != "folder"}
        write_whole(folder / RESULT, json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Result:
        """Read ``result.json``; a ``running`` one whose holder is dead reads as ``interrupted``, none as ``queued``."""
        path = folder / RESULT
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            return cls(status=Status.queued, folder=str(folder))
        holder = Holder(**values.pop("holder")) if values.get("holder") else values.pop("holder", None)
        result = cls(**values | {"status": Status(values["status"])}, holder=holder, folder=str(folder))
        if result.status is Status.running and not (holder and holder.is_alive(path.stat().st_mtime)):
            result.status, result.reason = Status.interrupted, "its process is gone"
            result.checkpoint = checkpoint_name(folder)
        return result

    def user_problems(self) -> list[Problem]:
        """Return what the user can mend."""
        return [Problem(**problem) for problem in self.problems]


@dataclass(frozen=True)
class Pause:
    """Where a run is to stop and wait, with an evaluation and a checkpoint (``pause.json``): a rung of a sweep.

    It is no part of the config: the schedule is that of the whole run.
    """

    step: int | None = None
    """The step after which it stops."""

    share: float | None = None
    """The same as a share of all its steps, where nobody knew beforehand how many these are."""

    def of(self, total_steps: int) -> int:
        """Return the step after which a run of so many steps stops; from the last one on there is no pause."""
        if self.step is not None:
            return self.step
        assert self.share is not None
        return max(1, math.ceil(self.share * total_steps - 1e-9))  # 1 / 9 * 27 is a hair more than 3

    def save(self, folder: Path) -> None:
        """Write ``pause.json`` whole."""
        write_whole(folder / PAUSE, json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Pause | None:
        """Read ``pause.json``, if there is one."""
        try:
            return cls(**json.loads((folder / PAUSE).read_text()))
        except FileNotFoundError:
            return None


@dataclass(frozen=True)
class Rung:
    """What a run had come to where it paused: one line of ``rungs.jsonl``, which it keeps when it goes on."""

    pause: Pause
    step: int
    metrics: dict[str, float]
    objective: float | None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None

    def add_to(self, folder: Path) -> None:
        """Append the line."""
        mend_last_line(folder / RUNGS)
        append_line(folder / RUNGS, asdict(self))

    @classmethod
    def all_of(cls, folder: Path) -> dict[Pause, Rung]:
        """Return where a run has paused so far."""
        found = [cls(**line | {"pause": Pause(**line["pause"])}) for line in read_lines(folder / RUNGS)]
        return {rung.pause: rung for rung in found}

    def result(self) -> Result:
        """Return how a run ends that pauses here."""
        values = {name: value for name, value in asdict(self).items() if name != "pause"}
        return Result(status=Status.paused, **values)


class Held(ConfigError):
    """Another process is at a run."""

    @classmethod
    def by(cls, holder: Holder, folder: Path) -> Held:
        """Say which process."""
        message = f"is running: process {holder.pid} on {holder.host} holds it"
        return cls([Problem(str(folder), message, "wait for it, or stop that process")])


def claim(folder: Path, *, after: Holder | None = None) -> None:
    """Become the holder of a run's folder: of two processes that want to at once, one does.

    Args:
        folder: The run's folder.
        after: The process that holds it for this one to take over.

    Raises:
        Held: Another process holds it.
    """
    with (folder / RUN).open("r+b") as lock:  # for writing: NFS locks no other
        with contextlib.suppress(OSError):  # a file system without locks, on which two at the same moment are not seen
            fcntl.flock(lock, fcntl.LOCK_EX)
        result, me = Result.load(folder), Holder.me()
        if result.status is Status.running and result.holder and result.holder not in (me, after):
            raise Held.by(result.holder, folder)
        Result(holder=me).save(folder)


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run."""
    return (folder / RUN).is_file()


def runs(root: Path) -> Iterator[Path]:
    """Yield the run folders at or below ``root``, not looking inside one."""
    if is_run(root):
        yield root
        return
    with contextlib.suppress(PermissionError, FileNotFoundError, NotADirectoryError):
        for child in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
            yield from runs(child)


def write_whole(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a file so that it is, at any moment, either the old or the new one.

    Without ``sync`` that does not hold for a machine that loses its power before the system has written it out.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        if sync:
            os.fsync(file.fileno())
    temporary.replace(path)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append one object to a JSON-lines file in a single write."""
    line = json.dumps(value, ensure_ascii=False) + "\n"
    with path.open("a", encoding="utf-8") as file:
        file.write(line)


def mend_last_line(path: Path) -> None:
    """Cut off a torn last line, so that what is appended next starts a line of its own."""
    if path.exists() and (text := path.read_bytes()) and not text.endswith(b"\n"):
        os.truncate(path, text.rfind(b"\n") + 1)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSON-lines file; a torn last line, which a killed process leaves, is ignored."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    complete = lines[:-1]  # what follows the last newline is empty, or torn
    return [json.loads(line) for line in complete]


def last_values(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Return the last value of each metric."""
    found: dict[str, float] = {}
    for line in lines:
        found |= {
            name: value
            for name, value in line.items()
            if name not in ("step", "epoch", "time", "tokens_per_second", "lr")
        }
    return found


def so_far(folder: Path) -> dict[str, Any]:
    """Return the ``step`` and the ``metrics`` of a run that has not come to its end, as `Result` has them."""
    lines = read_lines(folder / METRICS)
    saved = latest_checkpoint(folder)
    step = max((int(line["step"]) for line in lines), default=0)
    return {"step": max(step, step_of(saved) if saved else 0), "metrics": last_values(lines)}


def conclude(folder: Path, status: Status, reason: str) -> Result:
    """Write down how a run ended that could not say so itself, with as far as it had come, and return that."""
    Result(status=status, reason=reason, checkpoint=checkpoint_name(folder), **so_far(folder)).save(folder)
    return Result.load(folder)


def cut_back(folder: Path, step: int) -> None:
    """Drop what was logged after ``step``: the steps from there are about to be done again."""
    for name in (METRICS, SAMPLES):
        if not (folder / name).exists():
            continue
        kept = [line for line in read_lines(folder / name) if line["step"] <= step]
        write_whole(folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in (folder / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Return the step a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of a run, if it has one."""
    return found[-1] if (found := checkpoints(folder)) else None


def checkpoint_name(folder: Path) -> str | None:
    """Return the newest complete checkpoint as ``result.json`` has it: from the run's folder."""
    last = latest_checkpoint(folder)
    return str(last.relative_to(folder)) if last else None


def remove_incomplete_checkpoints(folder: Path) -> None:
    """Delete what a killed process left half written."""
    for path in (folder / CHECKPOINTS).glob("*"):
        if path.is_dir() and not re.fullmatch(r"step-\d+", path.name):
            shutil.rmtree(path)
