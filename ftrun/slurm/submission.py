"""What has been handed in to SLURM: arrays whose elements are runs, written down before they go in.

In the sweep's folder (a single run's own) is ``.slurm``, and in it for each array, by its name in SLURM:

================ ==============================================================================
``NAME.jsonl``   one object an element, in order: the run's folder
``NAME.json``    the array's number, the command that submitted it, when
``NAME.sh``      what each element runs
``NAME-K.log``   what the K-th element printed; the run's own output is in its ``log.txt``
``NAME-K.ended`` how the K-th element's run ended
``NAME.stop``    why the elements that had not started were not to
================ ==============================================================================
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ftrun import record
from ftrun.errors import ConfigError, Problem
from ftrun.record import Result
from ftrun.slurm import cluster
from ftrun.slurm.cluster import Element, SlurmError, State
from ftrun.sweep import ledger

if TYPE_CHECKING:
    from ftrun.hardware import Hardware

FOLDER = ".slurm"


@dataclass(frozen=True, kw_only=True)
class Terms:
    """On what terms arrays are handed in, besides what each run needs."""

    options: tuple[str, ...] = ()
    """Words for ``sbatch``: partition, account and the like."""

    setup: tuple[str, ...] = ()
    """Shell lines before each run."""

    parallel: int | None = None
    """How many elements of one array run at once."""

    signal_seconds: int = 120
    """How long before the time limit a run is told to save."""

    max_failures: int | None = None
    """After so many failures of one kind, and nothing completed, no more of an array's elements start."""


@dataclass(frozen=True)
class Resources:
    """What a run gets, on each of its nodes."""

    nodes: int
    accelerators: int
    cpus: int
    memory_gb: float | None
    minutes: int | None

    @classmethod
    def of(cls, hardware: Hardware) -> Resources:
        """Return what a run needs that is computed on this."""
        return cls(
            nodes=hardware.num_nodes,
            accelerators=hardware.accelerators,
            cpus=hardware.busy_cpus,
            memory_gb=hardware.memory_gb,
            minutes=hardware.minutes,
        )

    def words(self, options: Sequence[str]) -> Iterator[str]:
        """Yield the words for ``sbatch``; the user's own way of asking for accelerators goes before."""
        yield from (f"--nodes={self.nodes}", "--ntasks-per-node=1", f"--cpus-per-task={self.cpus}")
        if self.memory_gb is not None:
            yield f"--mem={math.ceil(self.memory_gb * 1024)}M"
        if self.minutes is not None:
            yield f"--time={self.minutes}"
        if self.accelerators and not any(word.partition("=")[0] in _ACCELERATORS for word in options):
            yield f"--gpus-per-node={self.accelerators}"


_ACCELERATORS = ("--gres", "--gpus", "--gpus-per-node", "--gpus-per-socket", "--gpus-per-task")


@dataclass(frozen=True)
class Submission:
    """One array."""

    home: Path
    """The sweep's folder, or the single run's."""

    name: str
    job: str | None = None
    """Its number; None if the driver died before it could write that down."""

    command: tuple[str, ...] = ()
    time: float = field(default_factory=time.time)
    max_failures: int | None = None

    def file(self, ending: str) -> Path:
        """Return one of its files."""
        return self.home / FOLDER / f"{self.name}{ending}"

    def log(self, index: int) -> Path:
        """Return what an element printed."""
        return self.file(f"-{index}.log")

    def runs(self) -> list[Path]:
        """Return the elements' runs, in order."""
        return [Path(os.path.normpath(self.home / line["run"])) for line in record.read_lines(self.file(".jsonl"))]

    def save(self) -> None:
        """Write ``NAME.json``."""
        values = {"job": self.job, "command": self.command, "time": self.time, "max_failures": self.max_failures}
        record.write_whole(self.file(".json"), json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, file: Path) -> Submission:
        """Read ``NAME.json``, or the one that belongs to a ``NAME.jsonl``."""
        values = json.loads(file.with_suffix(".json").read_text())
        return cls(file.parent.parent, file.stem, **values | {"command": tuple(values["command"])})


def home_of(run: Path) -> Path:
    """Return the folder that a run's submissions are written down in: its sweep's, or its own."""
    is_job = any((run.parent / name).exists() for name in (ledger.JOBS, ledger.DRIVER))
    return run.parent if is_job else run


def submissions(home: Path) -> list[Submission]:
    """Return what has been handed in from a folder, oldest first."""
    found = [Submission.load(file) for file in (home / FOLDER).glob("*.json")]
    return sorted(found, key=lambda each: each.time)


@dataclass(frozen=True)
class Placed:
    """A run that has been handed in: last as this element."""

    submission: Submission
    element: Element
    state: State

    @property
    def log(self) -> Path:
        """What the element printed."""
        return self.submission.log(self.element.index)


def placed(runs: Iterable[Path]) -> dict[Path, Placed]:
    """Return where runs are in SLURM, of those that have been handed in.

    Raises:
        SlurmError: It does not answer.
    """
    wanted = frozenset(runs)
    known = [each for home in {home_of(run) for run in wanted} for each in submissions(home)]
    arrays = [found for each in sorted(known, key=lambda each: each.time) if (found := _numbered(each)).job]
    if not arrays:
        return {}
    states = cluster.states(each.job for each in arrays if each.job)
    last = {
        run: (array, Element(str(array.job), index))
        for array in arrays
        for index, run in enumerate(array.runs())
        if run in wanted
    }
    return {
        run: Placed(array, element, states.get(element, State(cluster.GONE))) for run, (array, element) in last.items()
    }


def states(runs: Iterable[Path]) -> dict[Path, str]:
    """Return what SLURM says of runs that it has in its hands, as a person reads it; nothing where it does not answer.

    Args:
        runs: Folders of runs.
    """
    try:
        return {run: str(place.state) for run, place in placed(runs).items() if not place.state.is_over}
    except SlurmError:
        return {}


def _numbered(submission: Submission) -> Submission:
    """Return a submission with its number, looked up by its name if its driver died too early to write it down."""
    if submission.job:
        return submission
    with _locked(submission):  # the command may be under way still
        submission = Submission.load(submission.file(".json"))
        if submission.job is None and (job := cluster.named(submission.name)):
            submission = Submission(**vars(submission) | {"job": job})
            submission.save()
    return submission


def submit(runs: Sequence[Path], terms: Terms) -> list[Submission]:
    """Hand in runs, as few arrays as there can be.

    Raises:
        ConfigError: SLURM refuses; what went in before stays in.
    """
    try:
        longest = cluster.longest_array()
    except SlurmError as error:
        raise ConfigError([Problem("hydra/launcher", f"SLURM does not answer: {error}", "try again later")]) from None
    groups: dict[tuple[Path, Resources], list[Path]] = {}
    resources = _ResourcesOf()
    for run in runs:
        groups.setdefault((home_of(run), resources(run)), []).append(run)
    parts = [
        (home, each, members[start : start + longest])
        for (home, each), members in groups.items()
        for start in range(0, len(members), longest)
    ]
    done: list[Submission] = []
    for home, each, part in parts:
        try:
            done.append(_submit(home, part, each, terms))
        except SlurmError as error:
            raise ConfigError([_refused(str(error), sum(len(each.runs()) for each in done))]) from None
    return done


class _ResourcesOf:
    """What runs need; jobs of a sweep mostly have the same lines in ``run.yaml``, which are understood once."""

    def __init__(self) -> None:
        self._known: dict[str, Resources] = {}

    def __call__(self, run: Path) -> Resources:
        from ftrun import config

        text = (run / record.RUN).read_text(encoding="utf-8")
        match = re.search(r"^hardware:\n(?:[ #].*\n|\n)*", text, re.MULTILINE)
        lines = match[0] if match else text
        if lines not in self._known:
            self._known[lines] = Resources.of(config.hardware_of(run / record.RUN))
        return self._known[lines]


def _submit(home: Path, runs: Sequence[Path], resources: Resources, terms: Terms) -> Submission:
    """Hand in one array.

    Raises:
        SlurmError: SLURM refuses.
    """
    name = f"ftrun-{uuid.uuid4().hex[:8]}"
    array = f"--array=0-{len(runs) - 1}" + (f"%{terms.parallel}" if terms.parallel else "")
    planned = Submission(home, name, max_failures=terms.max_failures)
    words = (
        f"--job-name={name}",
        array,
        *resources.words(terms.options),
        "--requeue",
        "--open-mode=append",
        f"--chdir={home / FOLDER}",
        f"--output={name}-%a.log",
        f"--signal=B:USR1@{terms.signal_seconds}",
        *terms.options,
        str(planned.file(".sh")),
    )
    planned = Submission(home, name, command=("sbatch", *words), max_failures=terms.max_failures)
    lines = "".join(json.dumps({"run": os.path.relpath(run, home)}) + "\n" for run in runs)
    record.write_whole(planned.file(".sh"), _script(planned, terms))
    record.write_whole(planned.file(".jsonl"), lines)
    with _locked(planned) as lock, _Unstarted(runs):
        planned.save()
        try:
            job = cluster.submit(words, held=[lock.fileno()])
        except SlurmError as error:
            job = _after_all(planned, error)
        submission = Submission(**vars(planned) | {"job": job})
        submission.save()
    return submission


@contextlib.contextmanager
def _locked(submission: Submission) -> Iterator[IO[bytes]]:
    """Be the only one at a submission."""
    with submission.file(".jsonl").open("r+b") as lock:  # for writing: NFS locks no other
        with contextlib.suppress(OSError):  # a file system without locks, on which two at the same moment are not seen
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


class _Unanswered(SlurmError):
    """Nobody knows whether SLURM has taken an array."""


def _after_all(planned: Submission, refusal: SlurmError) -> str:
    """Return the number of an array that SLURM seemed to refuse: an answer that comes too late looks like that.

    Raises:
        SlurmError: It has refused; or it does not answer at all, and the number is looked up when it does.
    """
    try:
        job = cluster.named(planned.name)
    except SlurmError:
        raise _Unanswered(f"{refusal}; whether it has taken the jobs it will say later") from None
    if job is None:
        planned.file(".json").unlink()
        raise refusal
    return job


def _script(submission: Submission, terms: Terms) -> str:
    element = [sys.executable, "-P", "-m", "ftrun.slurm.element", str(submission.file(".jsonl"))]
    lines = ("#!/bin/bash", f"cd -- {shlex.quote(os.getcwd())} || exit", *terms.setup)
    return "\n".join((*lines, f'exec {shlex.join(element)} "$SLURM_ARRAY_TASK_ID"', ""))


class _Unstarted:
    """Takes away how runs ended before, so that it is not taken for how they end now; if they are refused, it is back.

    It must be before SLURM has them: an element may start at once.
    """

    def __init__(self, runs: Sequence[Path]) -> None:
        self._runs = runs
        self._before: dict[Path, bytes] = {}

    def __enter__(self) -> None:
        for run in self._runs:
            if (run / record.RESULT).exists():
                self._before[run / record.RESULT] = (run / record.RESULT).read_bytes()
                (run / record.RESULT).unlink()

    def __exit__(self, error: object, raised: object, *_: object) -> None:
        if error and not isinstance(raised, _Unanswered):
            for file, content in self._before.items():
                if not file.exists():
                    file.write_bytes(content)


_KEYS = {
    "qos": "hydra.launcher.qos",
    "account": "hydra.launcher.account",
    "partition": "hydra.launcher.partition",
    "reservation": "hydra.launcher.reservation",
    "feature": "hydra.launcher.constraint",
    "time limit": "hardware.minutes",
    "memory": "hardware.memory_gb",
    "cpu": "hardware.cpus",
    "processors": "hardware.cpus",
    "gres": "hardware.num_processes",
    "node": "hardware",
    "option": "hydra.launcher.flags",
}
"""Words in SLURM's refusals, and what was typed that they are about."""


def _refused(message: str, before: int) -> Problem:
    text = message.lower()
    key = next((key for word, key in _KEYS.items() if word in text), "hydra/launcher")
    message = f"SLURM refuses: {message}"
    if before:
        fix = "the same command again once some of them have ended"
        return Problem(key, f"{message} ({before} runs went in before)", fix)
    return Problem(key, message, "what `sinfo` and `sacctmgr show assoc` list for you")


def is_active(run: Path, place: Placed | None) -> bool:
    """Tell whether a run is somebody's already: SLURM's, or a process that lives."""
    return (place is not None and not place.state.is_over) or Result.load(run).status is record.Status.running
