"""Successive halving: all arms train a little, the best of them go on, and so on; the others wait where they are.

Nothing is remembered here: who has come how far with what is in the runs' folders, so that the same call goes on after
anything has died. A run that goes on does so from its checkpoint, on the schedule of its full length.

The rule is that of https://arxiv.org/abs/1810.05934 for arms that come batch by batch; with one batch it is the
classic one. Tried for 16 arms with eta=4: 16 train to the first rung, 4 to the second, 1 to the end.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ftrun.errors import ConfigError, Problem
from ftrun.fields import ranged
from ftrun.record import PAUSE, RUN, Pause, Result, Rung, Status

if TYPE_CHECKING:
    from ftrun.sweep.ledger import Job

Arm = Sequence[Path]
"""The runs of one point, one for each seed."""

Work = Callable[[Sequence[Path]], None]
"""Brings the runs in these folders to their end, or to where they are to pause."""


@dataclass(kw_only=True)
class Halving:
    """Stop what does badly early: ``hydra.sweeper.halving.eta=3``."""

    eta: int | None = ranged(None, ge=2)
    """Of all arms that have come to a rung, the best one in so many goes on, and each rung comes after so many times as
    many steps as the one before. Default: all runs train to their end."""

    first: float | None = ranged(None, gt=0)
    """Where the first rung is: a share of each run's steps, or, from 1 on, this many steps. Default: 1 / eta², so that
    there are two rungs."""

    def check(self, prefix: str) -> Iterator[Problem]:
        """Yield what cannot be; ``prefix`` is what stands before the keys."""
        if self.first is None:
            return
        if self.eta is None:
            message = "nothing is stopped early, so it would change nothing"
            yield Problem(f"{prefix}first", message, f"{prefix}eta=3 beside it")
        if self.first >= 1 and self.first != int(self.first):
            message = f"{self.first} is neither a share nor a count of steps"
            yield Problem(f"{prefix}first", message, "a share below 1, or whole steps")

    def rungs(self) -> Iterator[Pause]:
        """Yield the rungs; shares end before 1, and steps where the runs do."""
        assert self.eta is not None
        first = self.first or 1 / self.eta**2
        for number in itertools.count():
            if first >= 1:
                yield Pause(step=int(first) * self.eta**number)
            elif (share := first * self.eta**number) < 1 - 1e-9:
                yield Pause(share=share)
            else:
                return

    def run(self, arms: Sequence[Arm], work: Work, *, is_max: bool, seen: Sequence[Arm] = ()) -> bool:
        """Bring the best arms to their end, and the others as far as the rung at which better ones were known.

        Args:
            arms: Whose turn it is.
            work: Brings runs to their end or pause.
            is_max: Whether a high objective is good.
            seen: Arms of earlier batches, which these are measured against and which stay where they are.

        Returns:
            Whether all have come as far as they are to go; not so, if ``work`` has only submitted them.
        """
        assert self.eta is not None
        known = [*seen, *arms]
        mine = range(len(seen), len(known))
        climbing = list(mine)
        for rung in self.rungs():
            self._climb([known[arm] for arm in climbing], rung, work)
            values = {arm: value_at(known[arm], rung) for arm in range(len(known))}
            if any(values[arm] is None for arm in climbing):
                return False
            climbing = [arm for arm in self._best(values, is_max=is_max) if arm in climbing]
            if all(_is_over(known[arm]) for arm in climbing):  # those that end before the rung are not compared again
                return True
        self._climb([known[arm] for arm in climbing], None, work)
        return all(_is_over(known[arm]) for arm in climbing)

    @staticmethod
    def _climb(arms: Sequence[Arm], rung: Pause | None, work: Work) -> None:
        """Bring the runs of arms to a rung, or to their end."""
        todo = [folder for arm in arms for folder in arm if not _is_beyond(folder, rung)]
        for folder in todo:
            if rung is None:
                (folder / PAUSE).unlink(missing_ok=True)
            elif Pause.load(folder) != rung:
                rung.save(folder)
        if todo:
            work(todo)

    def _best(self, values: dict[int, float | None], *, is_max: bool) -> list[int]:
        """Return which arms go on, of those that have come to a rung: ties keep the earlier, failures never do."""
        assert self.eta is not None
        there = {arm: value for arm, value in values.items() if value is not None}
        good = sorted((-value if is_max else value, arm) for arm, value in there.items() if not math.isnan(value))
        return [arm for _, arm in good[: max(1, len(there) // self.eta)]]


def arms(jobs: Iterable[Job]) -> list[list[Path]]:
    """Group jobs that differ in nothing but the seed."""
    found: dict[tuple[object, ...], list[Path]] = {}
    for job in jobs:
        found.setdefault(job.group, []).append(job.folder)
    return list(found.values())


def is_max(arms: Iterable[Arm]) -> bool:
    """Return whether a high objective is good, as the runs' ``run.yaml`` say.

    Raises:
        ConfigError: They do not agree.
    """
    saved = ((folder / RUN).read_text(encoding="utf-8") for arm in arms for folder in arm)
    modes = {mode for text in saved for mode in re.findall(r"^objective_mode: (\w+)$", text, re.MULTILINE)}
    if len(modes) > 1:
        message = "a high objective is good in some runs and a low one in others, so they cannot be compared"
        raise ConfigError([Problem("objective", message, "objective=METRIC objective_mode=min, or max")])
    return modes == {"max"}


def value_at(arm: Arm, rung: Pause) -> float | None:
    """Return an arm's objective at a rung, the mean over its seeds: NaN if one has failed, None if one is under way."""
    values = [_value_at(folder, rung) for folder in arm]
    known = [value for value in values if value is not None]
    if any(math.isnan(value) for value in known):
        return math.nan
    return math.fsum(known) / len(known) if len(known) == len(values) else None


def values_so_far(arm: Arm, rungs: Iterable[Pause]) -> list[float]:
    """Return an arm's objective at each rung that it has come to."""
    found = itertools.takewhile(lambda value: value is not None, (value_at(arm, rung) for rung in rungs))
    return [value for value in found if value is not None]


def _value_at(folder: Path, rung: Pause) -> float | None:
    if (there := Rung.all_of(folder).get(rung)) is not None:
        return math.nan if there.objective is None else there.objective
    result = Result.load(folder)
    if result.status is Status.completed:  # before it came to the rung
        return math.nan if result.objective is None else result.objective
    return math.nan if result.status is Status.failed else None


def _is_beyond(folder: Path, rung: Pause | None) -> bool:
    """Tell whether a run is at a rung or beyond it, or at its end."""
    done = Result.load(folder).status is Status.completed
    return done or (rung is not None and rung in Rung.all_of(folder))


def _is_over(arm: Arm) -> bool:
    return all(Result.load(folder).status in (Status.completed, Status.failed) for folder in arm)
