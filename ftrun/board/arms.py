"""Jobs that differ in nothing but their seed are one arm; arms are ranked, and compared over the seeds they share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ftrun.board import statistics
from ftrun.board.rows import Row
from ftrun.board.statistics import Difference, Verdict
from ftrun.record import Status


@dataclass
class Arm:
    """A point of the sweep over its seeds; what is derived from the rows is so once, when all are there."""

    point: Mapping[str, str]
    rows: list[Row]
    difference: Difference | None = None
    """From the best arm, where both have a value."""

    verdict: Verdict = Verdict.unknown
    twin: str = ""
    """Tells it from another arm with the same point, whose settings were those of an earlier ask or preset."""

    @cached_property
    def done(self) -> dict[int | None, float]:
        """The objective of each seed that is completed."""
        return self._values(Status.completed)

    @cached_property
    def paused(self) -> dict[int | None, float]:
        """The objective of each seed that its sweep has stopped."""
        return self._values(Status.paused)

    def _values(self, status: Status) -> dict[int | None, float]:
        return {row.seed: row.objective for row in self.rows if row.status is status and row.objective is not None}

    @cached_property
    def values(self) -> list[float]:
        """The objectives that stand for the arm: those of completed seeds, else those of paused ones."""
        return list((self.done or self.paused).values())

    @cached_property
    def mean(self) -> float | None:
        """The mean over the seeds; NaN if one of them is."""
        return statistics.mean(self.values) if self.values else None

    @cached_property
    def sd(self) -> float | None:
        """The sample standard deviation over the seeds."""
        return statistics.spread(self.values)

    @property
    def is_whole(self) -> bool:
        """Whether every seed has come to a finite value."""
        return len(self.done) == len(self.rows) and all(map(math.isfinite, self.done.values()))

    @property
    def name(self) -> str:
        """The point as one would type it."""
        name = " ".join(f"{key}={value}" for key, value in self.point.items()) or "all"
        return f"{name} ({self.twin})" if self.twin else name

    @cached_property
    def state(self) -> str:
        """What has become of its jobs, in words; nothing to say if all are completed."""
        counts = Counter(row.status for row in self.rows)
        parts = []
        if counts[Status.completed] < len(self.rows):
            parts += [f"{counts[Status.completed]} of {len(self.rows)} done"] if counts[Status.completed] else []
            others = [status for status in Status if status is not Status.completed and counts[status]]
            parts += [self._say(status, counts[status]) for status in others]
        if not all(map(math.isfinite, self.values)):
            parts.append("not a number")
        return ", ".join(parts)

    def _say(self, status: Status, count: int) -> str:
        of = [row for row in self.rows if row.status is status]
        many = f"{count} " if len(self.rows) > 1 else ""
        if status is Status.paused:
            return f"{many}paused at step {max(row.step for row in of)}"
        if status is Status.failed:
            return f"{many}failed: {' '.join(of[0].reason.split())[:160]}"
        return f"{many}{status}"

    @property
    def wall_seconds(self) -> float | None:
        """Mean time of its jobs that have ended."""
        times = [row.wall_seconds for row in self.rows if row.wall_seconds]
        return statistics.mean(times) if times else None

    @property
    def peak_memory_bytes(self) -> int | None:
        """The most memory that one of its jobs took."""
        return max((row.peak_memory_bytes for row in self.rows if row.peak_memory_bytes), default=None)

    @property
    def tokens_per_second(self) -> float | None:
        """Mean speed of its jobs."""
        speeds = [row.tokens_per_second for row in self.rows if row.tokens_per_second]
        return statistics.mean(speeds) if speeds else None


@dataclass
class Table:
    """The arms that can be compared, the best first: those whose objective is the same metric of the same stage."""

    stage: str
    objective: str
    low_is_good: bool
    arms: list[Arm] = field(default_factory=list)

    @property
    def best(self) -> Arm | None:
        """The first arm of which every seed is done; while there is none, the first that has a value."""
        valued = [arm for arm in self.arms if arm.done and math.isfinite(arm.mean or 0.0)]
        return next((arm for arm in valued if arm.is_whole), valued[0] if valued else None)

    @property
    def rows(self) -> list[Row]:
        """The jobs of all arms."""
        return [row for arm in self.arms for row in arm.rows]

    @cached_property
    def keys(self) -> list[str]:
        """The keys that the arms differ in."""
        return list(dict.fromkeys(key for arm in self.arms for key in arm.point))

    @cached_property
    def has_seeds(self) -> bool:
        """Whether any arm has several."""
        return any(len(arm.rows) > 1 for arm in self.arms)

    def how_sure(self) -> str:
        """Say how far the best arm is known to be the best."""
        best = self.best
        others = [arm for arm in self.arms if arm is not best and arm.done]
        if best is None:
            return "no job has come to a result yet"
        if not others:
            return "no other arm has come to a result"
        counts = Counter(arm.verdict for arm in others)
        if counts[Verdict.unknown] == len(others):
            return (
                f"unknown whether by chance: fewer than {statistics.FEWEST_PAIRS} seeds are shared with any other arm"
            )
        parts = [f"better than {counts[Verdict.worse]} of {len(others)} others"] if counts[Verdict.worse] else []
        parts += [f"{counts[Verdict.noise]} inside the noise"] if counts[Verdict.noise] else []
        parts += [f"{counts[Verdict.better]} better on shared seeds"] if counts[Verdict.better] else []
        parts += [f"{counts[Verdict.unknown]} unknown"] if counts[Verdict.unknown] else []
        return ", ".join(parts) + " (95 % paired interval over shared seeds)"


@dataclass
class Board:
    """What a sweep has come to."""

    folder: Path
    rows: list[Row]
    tables: list[Table]

    def counts(self) -> dict[Status, int]:
        """Return how many jobs stand how."""
        found = Counter(row.status for row in self.rows)
        return {status: found[status] for status in Status if found[status]}


def board(folder: Path, rows: Sequence[Row]) -> Board:
    """Group jobs into arms and tables, rank the arms, and compare each with the best of its table."""
    names = _objective_names(rows)
    tables: dict[tuple[str, str, bool], Table] = {}
    arms: dict[tuple[object, ...], Arm] = {}
    for row in rows:
        key = (row.stage, row.objective_name or names[_ask(row)], row.low_is_good)
        table = tables.setdefault(key, Table(*key))
        point = (*key, tuple(sorted(row.point.items())), row.arm)
        if point not in arms:
            arms[point] = Arm(row.point, [])
            table.arms.append(arms[point])
        arms[point].rows.append(row)
    for table in tables.values():
        points = Counter(tuple(sorted(arm.point.items())) for arm in table.arms)
        for arm in table.arms:
            if points[tuple(sorted(arm.point.items()))] > 1:
                arm.twin = f"as job {arm.rows[0].id} is set"
        _rank(table)
    return Board(folder, list(rows), list(tables.values()))


def _ask(row: Row) -> tuple[str, str | None]:
    return row.stage, row.wanted


def _objective_names(rows: Sequence[Row]) -> dict[tuple[str, str | None], str]:
    """Return what the objective of jobs without a result will be: that of the first like them that has one."""
    found: dict[tuple[str, str | None], str] = {}
    for row in rows:
        if row.objective_name:
            found.setdefault(_ask(row), row.objective_name)
    return {_ask(row): found.get(_ask(row), row.wanted or "objective") for row in rows}


def _rank(table: Table) -> None:
    def place(arm: Arm) -> tuple[int, float, float]:
        value = arm.mean if arm.mean is not None else math.nan
        good = value if table.low_is_good else -value
        step = max(row.step for row in arm.rows)
        if arm.done and math.isfinite(value):
            return 0, good, 0.0
        if arm.paused and math.isfinite(value):
            return 1, -step, good
        if arm.values:
            return 2, 0.0, 0.0
        return 3 + all(row.status is Status.failed for row in arm.rows), 0.0, 0.0

    table.arms.sort(key=place)
    best = table.best
    for arm in table.arms:
        if arm is best:
            arm.verdict = Verdict.best
        elif best and arm.done:
            arm.difference = statistics.paired(arm.done, best.done)
            arm.verdict = arm.difference.verdict(low_is_good=table.low_is_good)
