"""Successive halving: who goes on, on numbers; nothing is remembered but what the runs' folders say."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest

from ftrun.errors import ConfigError
from ftrun.record import Pause, Result, Rung, Status
from ftrun.sweep import halving
from ftrun.sweep.halving import Halving
from ftrun.sweep.ledger import Job


class Runs:
    """Runs of 100 steps, of which the objective at each step is known. Stands in for a launcher."""

    def __init__(self, root: Path, total: int = 100) -> None:
        self.root, self.total = root, total
        self.curves: dict[str, list[float]] = {}
        self.steps: Counter[str] = Counter()
        self.calls: list[list[str]] = []
        self.left = 1000
        """Runs that it brings further before it is killed."""

    def add(self, name: str, *values: float) -> list[Path]:
        """Add an arm of one run for each value: what it comes to at every step."""
        folders = []
        for seed, value in enumerate(values):
            folder = self.root / f"{name}{seed or ''}"
            folder.mkdir()
            self.curves[folder.name] = [value] * (self.total + 1)
            folders.append(folder)
        return folders

    def work(self, folders: list[Path]) -> None:
        self.calls.append([folder.name for folder in folders])
        for folder in folders:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.go_on(folder)

    def go_on(self, folder: Path) -> None:
        pause, begun = Pause.load(folder), Result.load(folder).step
        step = min(pause.of(self.total), self.total) if pause else self.total
        assert step >= begun, "no run goes back"
        self.steps[folder.name] += step - begun
        value = self.curves[folder.name][step]
        if value == math.inf:
            Result(status=Status.failed, step=step).save(folder)
        elif pause and step < self.total:
            rung = Rung(pause=pause, step=step, metrics={}, objective=value)
            rung.add_to(folder)
            rung.result().save(folder)
        else:
            Result(status=Status.completed, step=step, objective=value).save(folder)


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path)


def came_to(runs: Runs) -> dict[str, int]:
    return {name: Result.load(runs.root / name).step for name in runs.curves}


def test_sixteen_arms_fourgo_on_and_one_to_the_end(runs):
    arms = [runs.add(f"arm{number:02}", (number * 7 + 3) % 16) for number in range(16)]  # a permutation of 0 ... 15
    assert Halving(eta=4).run(arms, runs.work, is_max=False)
    assert Counter(came_to(runs).values()) == {7: 12, 25: 3, 100: 1}  # 100/16 and 100/4 steps, rounded up
    order = sorted(runs.curves, key=lambda name: runs.curves[name][0])
    assert [came_to(runs)[name] for name in order[:5]] == [100, 25, 25, 25, 7]
    assert sum(runs.steps.values()) == 12 * 7 + 3 * 25 + 100  # of 1600
    assert [len(call) for call in runs.calls] == [16, 4, 1]


def test_a_high_objective_may_be_the_good_one(runs):
    arms = [runs.add(f"arm{number}", number) for number in range(9)]
    assert Halving(eta=3).run(arms, runs.work, is_max=True)
    assert came_to(runs) == {f"arm{n}": 12 for n in range(6)} | {"arm6": 34, "arm7": 34, "arm8": 100}


def test_an_arm_is_the_mean_of_its_seeds_and_ties_keep_the_earlier(runs):
    arms = [runs.add("a", 1.0, 9.0), runs.add("b", 4.0, 5.0), runs.add("c", 5.0, 4.0), runs.add("d", 0.0, 20.0)]
    assert Halving(eta=2, first=0.5).run(arms, runs.work, is_max=False)
    assert came_to(runs) == {"a": 50, "a1": 50, "b": 100, "b1": 100, "c": 100, "c1": 100, "d": 50, "d1": 50}
    more = [*arms, runs.add("e", 4.5), runs.add("f", 4.5)]
    assert Halving(eta=2, first=0.5).run(more, runs.work, is_max=False)
    assert [came_to(runs)[name] for name in "bcef"] == [100, 100, 100, 50]


def test_what_fails_or_is_no_number_never_goes_on(runs):
    arms = [runs.add("fails", math.inf), runs.add("nan", math.nan), runs.add("half", 0.0, math.inf)]
    assert Halving(eta=2).run(arms, runs.work, is_max=False)
    assert [len(call) for call in runs.calls] == [4]
    assert Halving(eta=2).run([*arms, runs.add("bad", 99.0)], runs.work, is_max=False)
    assert came_to(runs)["bad"] == 100


def test_curves_that_cross_are_judged_where_they_are(runs):
    arms = [runs.add("slow", 1.0), runs.add("fast", 1.0), runs.add("third", 1.0), runs.add("fourth", 1.0)]
    runs.curves["slow"] = [10.0 - step / 10 for step in range(101)]  # 7.5 at step 25, 0.0 at the end
    runs.curves["fast"] = [5.0] * 101
    runs.curves["third"] = [6.0 + (step > 30) for step in range(101)]
    runs.curves["fourth"] = [9.0] * 101
    assert Halving(eta=2).run(arms, runs.work, is_max=False)
    assert came_to(runs) == {"slow": 25, "fast": 100, "third": 50, "fourth": 25}


def test_rungs_in_steps_end_where_the_runs_do(runs):
    arms = [runs.add(f"arm{number}", number) for number in range(8)]
    assert Halving(eta=2, first=30).run(arms, runs.work, is_max=False)
    # 30, 60, then 120, which is beyond the end: the two that come there are completed.
    assert came_to(runs) == {"arm0": 100, "arm1": 100, "arm2": 60, "arm3": 60} | {f"arm{n}": 30 for n in range(4, 8)}
    assert [len(call) for call in runs.calls] == [8, 4, 2]


def test_killed_again_and_again_it_ends_the_same_and_does_nothing_twice(runs, tmp_path):
    arms = [runs.add(f"arm{number}", (number * 5) % 9) for number in range(9)]
    kills = 0
    while True:
        runs.left = 2
        try:
            assert Halving(eta=3).run(arms, runs.work, is_max=False)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 6  # after each two of the 9 + 3 + 1 times that a run was started
    whole = Runs(tmp_path / "whole")
    whole.root.mkdir()
    again = [whole.add(f"arm{number}", (number * 5) % 9) for number in range(9)]
    Halving(eta=3).run(again, whole.work, is_max=False)
    assert came_to(runs) == came_to(whole)
    assert runs.steps == whole.steps
    before = len(runs.calls)
    runs.left = 0
    assert Halving(eta=3).run(arms, runs.work, is_max=False)
    assert len(runs.calls) == before


def test_a_batch_is_measured_against_those_before_it(runs):
    plan, seen = Halving(eta=2), []
    for batch in ([5.0, 6.0], [7.0, 8.0], [4.0, 9.0]):
        arms = [runs.add(f"arm{value:g}", value) for value in batch]
        assert plan.run(arms, runs.work, is_max=False, seen=seen)
        seen += arms
    # At the first rung 1 of 2 goes on, then 2 of 4 (5 and 6, which waits), then 3 of 6 (4, 5, 6).
    assert came_to(runs) == {"arm5": 100, "arm6": 25, "arm7": 25, "arm8": 25, "arm4": 100, "arm9": 25}


def test_what_is_only_submitted_is_decided_later(runs):
    arms = [runs.add(f"arm{number}", number) for number in range(4)]
    submitted: list[list[Path]] = []
    assert not Halving(eta=2).run(arms, submitted.append, is_max=False)
    assert len(submitted) == 1
    assert all(Pause.load(folder) == Pause(share=0.25) for folder in submitted[0])
    for folder in submitted[0]:
        runs.go_on(folder)
    assert not Halving(eta=2).run(arms, submitted.append, is_max=False)
    assert [folder.name for folder in submitted[1]] == ["arm0", "arm1"]


def test_arms_are_jobs_that_differ_in_the_seed_alone(tmp_path):
    words = [("a=1", "seed=1"), ("a=1", "seed=2"), ("a=2", "seed=1"), ("a=2", "seed=2")]
    jobs = [Job(number, each, str(number), tmp_path / str(number)) for number, each in enumerate(words)]
    assert [[folder.name for folder in arm] for arm in halving.arms(jobs)] == [["0", "1"], ["2", "3"]]


def test_which_end_of_the_objective_is_good_is_in_each_run(tmp_path):
    for name, mode in (("low", "min"), ("high", "max")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.yaml").write_text(f"seed: 1\nobjective: x\nobjective_mode: {mode}\n")
    assert not halving.is_max([[tmp_path / "low"], [tmp_path / "low"]])
    assert halving.is_max([[tmp_path / "high"]])
    with pytest.raises(ConfigError, match="cannot be compared"):
        halving.is_max([[tmp_path / "low"], [tmp_path / "high"]])


@pytest.mark.parametrize(
    ("plan", "key"),
    [(Halving(first=0.5), "first"), (Halving(eta=3, first=2.5), "first"), (Halving(eta=3, first=2), None)],
)
def test_settings_that_cannot_be_are_refused(plan, key):
    assert [problem.key for problem in plan.check("x.")] == ([f"x.{key}"] if key else [])
