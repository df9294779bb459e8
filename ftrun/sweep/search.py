"""A search: the next points are chosen by what the ones before have come to, by optuna, which another process holds.

    ftrun -m hydra/sweeper=optuna hydra.sweeper.n_trials=30 optimizer.lr='tag(log,interval(1e-5,1e-3))' seed=1,2

Each trial is a point with all its seeds, told as the mean of their objectives. What was asked for and not told yet,
when something dies, is in the study's file, and its jobs, which are in the sweep's folder, are gone on with.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from ftrun import config, options, plugin
from ftrun.config import Config
from ftrun.display import console
from ftrun.errors import ConfigError, Problem
from ftrun.record import PAUSE, Result, Status
from ftrun.sweep import points
from ftrun.sweep.halving import Halving, values_so_far
from ftrun.sweep.ledger import Job
from ftrun.sweep.points import Point
from ftrun.sweep.study import Child, Sampler, Trial, Value

_TRIALS = 20
"""Points of a search where nobody says how many."""


class Kind(StrEnum):
    """What the values of a key are to the search."""

    float = "float"
    int = "int"
    choice = "choice"


@dataclass(frozen=True)
class Axis:
    """A key that is searched over."""

    key: str
    kind: Kind
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    choices: tuple[str, ...] = ()

    def word(self, value: Value) -> str:
        """Return a value as it would be typed."""
        return f"{self.key}={value:.6g}" if isinstance(value, float) else f"{self.key}={value}"

    def corners(self) -> list[str]:
        """Return the words to try beforehand: every choice; of numbers both ends, and one between them."""
        if self.kind is Kind.choice:
            return [self.word(choice) for choice in self.choices]
        between = self.low + (self.high - self.low) * 0.414
        number: type = float if self.kind is Kind.float else int
        if self.step:
            between = self.low + self.step * round((between - self.low) / self.step)
        return list(dict.fromkeys(self.word(number(value)) for value in (self.low, between, self.high)))

    @property
    def count(self) -> float:
        """How many values there are."""
        if self.kind is Kind.choice:
            return len(self.choices)
        return round((self.high - self.low) / self.step) + 1 if self.step else math.inf


@dataclass(frozen=True)
class Space:
    """Words of a search as they are understood: what all runs have, what is searched over, and the seeds of each."""

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    seeds: tuple[str, ...] = ()

    @property
    def swept(self) -> list[str]:
        """The keys that have more than one value."""
        return [axis.key for axis in self.axes] + (["seed"] if self.seeds else [])

    def corners(self) -> Iterator[Point]:
        """Yield points that show whether the keys take their values: each key's, the others' being their first."""
        first = [axis.corners()[0] for axis in self.axes]
        seed = self.seeds[:1]
        yield self._point((*first, *seed))
        for number, axis in enumerate(self.axes):
            for word in axis.corners()[1:]:
                yield self._point((*first[:number], word, *first[number + 1 :], *seed))

    def runs(self, trial: Trial) -> list[Point]:
        """Return the points of a trial, one for each seed."""
        chosen = tuple(axis.word(trial.params[axis.key]) for axis in self.axes)
        return [self._point((*chosen, *seed)) for seed in ([word] for word in self.seeds)] or [self._point(chosen)]

    def _point(self, overrides: tuple[str, ...]) -> Point:
        return Point((*self.fixed, *overrides), overrides)

    def num_trials(self, sampler: Sampler, wanted: int | None) -> int:
        """Return how many points to try: those wanted, and of a grid no more than it has."""
        if sampler is not Sampler.grid:
            return wanted or _TRIALS
        count = int(math.prod(axis.count for axis in self.axes))
        return min(count, wanted or count)

    def about(self) -> dict[str, Any]:
        """Return the space as the study takes it."""
        return {axis.key: {name: value for name, value in asdict(axis).items() if name != "key"} for axis in self.axes}

    def check(self, sampler: Sampler) -> Iterator[Problem]:
        """Yield what the sampler or the keys cannot do with the space."""
        if not self.axes:
            message = "no key but seed has several values, so there is nothing to search over"
            yield Problem("-m", message, "optimizer.lr='tag(log,interval(1e-5,1e-3))', for example")
        if sampler is Sampler.cmaes:
            yield from self._check_cmaes()
        for axis in self.axes:
            if sampler is Sampler.grid and axis.count == math.inf:
                message = "has no end of values, and hydra.sweeper.sampler=grid tries each"
                yield Problem(axis.key, message, f"{axis.key}=VALUE,VALUE, or hydra.sweeper.sampler=tpe")
        yield from self._check_numbers()

    def _check_cmaes(self) -> Iterator[Problem]:
        if not plugin.is_installed("cmaes"):
            message = "cmaes needs the package cmaes, which is not installed"
            yield Problem("hydra.sweeper.sampler", message, "pip install cmaes, or hydra.sweeper.sampler=tpe")
        if len(self.axes) == 1:
            message = "cmaes learns how keys depend on each other, and there is one"
            yield Problem("hydra.sweeper.sampler", message, "hydra.sweeper.sampler=tpe")
        for axis in self.axes:
            if axis.kind is Kind.choice:
                message = "is a choice, and cmaes searches over numbers only"
                fix = f"{axis.key}=interval(LOW,HIGH), one value, or hydra.sweeper.sampler=tpe"
                yield Problem(axis.key, message, fix)

    def _check_numbers(self) -> Iterator[Problem]:
        """Yield the keys that take something else than the numbers they are searched over with."""
        numbers = [axis for axis in self.axes if axis.kind is not Kind.choice]
        if not numbers:
            return
        cfg, _ = config.examine(list(next(self.corners()).words))
        for axis in numbers if cfg is not None else ():
            value = _value_of(cast(Config, cfg), axis.key)
            if isinstance(value, str | bool):
                kind = "true or false" if isinstance(value, bool) else "a text"
                yield Problem(axis.key, f"takes {kind}, and is searched over numbers", f"{axis.key}=VALUE,VALUE")
            elif isinstance(value, int) and axis.kind is Kind.float:
                bounds = f"{axis.low:.6g},{axis.high:.6g}"
                message = f"takes whole numbers, and interval({bounds}) has others"
                whole = f"int(interval({bounds}))"
                yield Problem(axis.key, message, f"{axis.key}={f'tag(log,{whole})' if axis.log else whole}")


def understand(words: Sequence[str]) -> Space:
    """Understand words as a search.

    Raises:
        ConfigError: With everything that is wrong with the values they give.
    """
    fixed, axes, problems = list[str](), list[Axis](), list[Problem]()
    seeds: tuple[str, ...] = ()
    for word in words:
        override = points.parse(word)
        if override is None or not override.is_sweep_override():
            fixed.append(word)
        elif override.key_or_group == "seed":
            seeds, found = _seeds(override)
            problems += found
        elif found := list(_wrong(override)):
            problems += found
        else:
            axes.append(_axis(override))
    if problems:
        raise ConfigError(problems)
    return Space(tuple(fixed), tuple(axes), seeds)


def _seeds(override: Override) -> tuple[tuple[str, ...], list[Problem]]:
    if override.is_discrete_sweep():
        return points.grid([override.input_line or ""]).axes[0], []
    message = "is not searched over: each point is tried with every seed, and judged by their mean"
    return (), [Problem("seed", message, "seed=1,2,3")]


def _wrong(override: Override) -> Iterator[Problem]:
    """Yield what is wrong with the numbers a key is searched over."""
    key, value = override.key_or_group, override.value()
    is_log = "log" in getattr(value, "tags", ())
    if key in options.GROUPS and isinstance(value, IntervalSweep | RangeSweep):
        yield Problem(key, "takes options, and not numbers", f"{key}=OPTION,OPTION")
    elif isinstance(value, IntervalSweep):
        low, high = float(cast(float, value.start)), float(cast(float, value.end))
        least = 1 if isinstance(value.start, int) else 0
        if not (math.isfinite(low) and math.isfinite(high)):
            yield Problem(key, f"{override.input_line} has no end", f"{key}=interval(LOW,HIGH)")
        elif low >= high:
            message = f"the low end {low:g} of {override.input_line} is not below the high end {high:g}"
            yield Problem(key, message, f"{key}=interval({high:g},{low:g})" if high < low else f"{key}={low:g}")
        elif is_log and (low < least or low <= 0):
            message = f"the logarithm of {low:g} is not a number to search over"
            yield Problem(
                key, message, f"a low end of {'1 or more' if least else 'more than 0'}, or without tag(log,...)"
            )
    elif is_log:
        message = "only an interval is searched over by its logarithm"
        yield Problem(key, message, f"{key}=tag(log,interval(LOW,HIGH)), or tag(log,int(interval(LOW,HIGH)))")


def _axis(override: Override) -> Axis:
    key, value = override.key_or_group, override.value()
    if isinstance(value, IntervalSweep):
        is_int = isinstance(value.start, int) and isinstance(value.end, int)
        low, high = cast(float, value.start), cast(float, value.end)
        kind, step = (Kind.int, 1) if is_int else (Kind.float, None)
        return Axis(key, kind, low=low, high=high, step=step, log="log" in value.tags)
    words = points.grid([override.input_line or ""]).axes[0]
    if isinstance(value, RangeSweep) and len(words) > 1:
        start, each = cast(float, value.start), cast(float, value.step)
        last = start + each * (len(words) - 1)
        number = Kind.int if isinstance(start, int) and isinstance(each, int) else Kind.float
        return Axis(key, number, low=min(start, last), high=max(start, last), step=abs(each))
    return Axis(key, Kind.choice, choices=tuple(word.partition("=")[2] for word in words))


def _value_of(cfg: Config, key: str) -> Any:
    node: Any = cfg
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else getattr(node, name, None)
    return node


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a search goes about it."""

    sampler: Sampler
    num_trials: int
    batch: int
    """Trials that are asked for at once."""

    seed: int
    startup_trials: int
    max_failures: int | None
    retry_failed: bool
    halving: Halving
    is_max: bool


Freeze = Callable[[Sequence[Point]], list[Job]]


class Search:
    """Asks for points, has them run, and tells what they have come to, until there are as many as wanted.

    Args:
        space: What is searched over.
        plan: How.
        file: The study's.
        freeze: Returns the jobs of points; equal points have one job, which is done once.
        work: Brings jobs to their end, or to their pause.
    """

    def __init__(
        self, space: Space, plan: Plan, file: Path, *, freeze: Freeze, work: Callable[[Sequence[Path]], None]
    ) -> None:
        self._space, self._plan, self._file = space, plan, file
        self._freeze, self._work = freeze, work
        self._arms: dict[int, list[Path]] = {}
        """The folders of each trial's jobs."""

        self._failures = 0
        """Trials in a row that failed."""

    def run(self, known: Sequence[Job] = ()) -> None:
        """Search, or go on with a search.

        Args:
            known: The jobs that are frozen already.
        """
        plan, folders = self._plan, {job.key: job.folder for job in known}
        with Child(self._file, self._about()) as study:
            trials = study.trials()
            for trial in trials:
                if trial.jobs and all(key in folders for key in trial.jobs):
                    self._arms[trial.number] = [folders[key] for key in trial.jobs]
            if plan.retry_failed:
                self._try_again(study, trials)
            waiting = [trial for trial in trials if trial.state == "running"]
            wanted = plan.num_trials - sum(trial.instead_of is None for trial in trials)
            while (waiting or wanted > 0) and not self._is_hopeless():
                new = min(max(0, plan.batch - len(waiting)), max(0, wanted))
                wanted -= new
                batch = waiting[: plan.batch] + [study.ask() for _ in range(new)]
                waiting = waiting[plan.batch :]
                if not self._do(study, batch):
                    return  # submitted, and not over yet

    def _about(self) -> dict[str, Any]:
        space, direction = self._space.about(), "maximize" if self._plan.is_max else "minimize"
        digest = hashlib.sha256(json.dumps([space, direction], sort_keys=True).encode()).hexdigest()[:12]
        return {
            "name": f"ftrun-{digest}",  # another space is another study in the same file
            "direction": direction,
            "sampler": self._plan.sampler.value,
            "seed": self._plan.seed,
            "startup_trials": self._plan.startup_trials,
            "space": space,
        }

    def _do(self, study: Child, batch: Sequence[Trial]) -> bool:
        """Run trials and tell what they have come to; return whether all of them have been told."""
        frozen = [trial for trial in batch if self._has_jobs(study, trial)]
        self._go_on([self._arms[trial.number] for trial in frozen], self._others(frozen))
        told = [self._is_told(study, trial) for trial in frozen]
        return all(told)

    def _has_jobs(self, study: Child, trial: Trial) -> bool:
        """Have a trial's jobs, frozen now or before; a point that the checks refuse is a failed one."""
        if trial.number in self._arms:
            return True
        try:
            jobs = self._freeze(self._space.runs(trial))
        except ConfigError as error:
            self._line(trial, f"cannot be: {'; '.join(f'{each.key} {each.message}' for each in error.problems)}")
            self._tell(study, trial, None)
            return False
        study.note(trial.number, [job.key for job in jobs])
        self._arms[trial.number] = [job.folder for job in jobs]
        return True

    def _others(self, batch: Sequence[Trial]) -> list[list[Path]]:
        mine = {trial.number for trial in batch}
        return [arm for number, arm in sorted(self._arms.items()) if number not in mine]

    def _go_on(self, arms: Sequence[list[Path]], others: Sequence[list[Path]]) -> None:
        if self._plan.halving.eta is not None:
            self._plan.halving.run(arms, self._work, is_max=self._plan.is_max, seen=others)
        elif arms:
            folders = [folder for arm in arms for folder in arm]
            for folder in folders:
                (folder / PAUSE).unlink(missing_ok=True)  # of a time with halving
            self._work(folders)

    def _is_told(self, study: Child, trial: Trial) -> bool:
        """Tell what a trial has come to, if its runs are as far as they are to go."""
        arm, halving = self._arms[trial.number], self._plan.halving
        statuses = {Result.load(folder).status for folder in arm}
        if Status.failed in statuses or statuses == {Status.completed}:
            self._tell(study, trial, _mean_objective(arm))
            return True
        if halving.eta is None or not statuses <= {Status.completed, Status.paused}:
            return False
        study.prune(trial.number, values_so_far(arm, halving.rungs()))
        self._failures = 0
        return True

    def _tell(self, study: Child, trial: Trial, value: float | None) -> None:
        study.tell(trial.number, value)
        self._failures = self._failures + 1 if value is None else 0

    def _is_hopeless(self) -> bool:
        most = self._plan.max_failures
        if most is None or self._failures < most:
            return False
        console.print(
            f"[red]stopped[/] after {self._failures} trials in a row failed (hydra.sweeper.max_failures)",
            soft_wrap=True,
        )
        return True

    def _try_again(self, study: Child, trials: Sequence[Trial]) -> None:
        """Run the jobs of failed trials again, and add those that come to something."""
        tried = {trial.instead_of for trial in trials}
        failed = [
            trial
            for trial in trials
            if trial.state == "fail" and trial.number in self._arms and trial.number not in tried
        ]
        self._go_on([self._arms[trial.number] for trial in failed], self._others(failed))
        for trial in failed:
            if (value := _mean_objective(self._arms[trial.number])) is not None:
                study.again(trial.number, value)

    @staticmethod
    def _line(trial: Trial, text: str) -> None:
        console.print(f"[yellow]trial {trial.number}[/] {text}", soft_wrap=True)


def _mean_objective(arm: Sequence[Path]) -> float | None:
    """Return the mean over an arm's seeds; None where one has failed or has no number."""
    results = [Result.load(folder) for folder in arm]
    values = [result.objective for result in results if result.status is Status.completed]
    known = [value for value in values if value is not None and not math.isnan(value)]
    return math.fsum(known) / len(known) if known and len(known) == len(results) else None
