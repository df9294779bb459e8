"""Searches: what words mean as a space, what optuna makes of it, and that nothing is lost or done twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ftrun.errors import ConfigError, RunFailed
from ftrun.record import Pause, Result, Rung, Status
from ftrun.sweep import search
from ftrun.sweep.halving import Halving
from ftrun.sweep.ledger import Job, Ledger
from ftrun.sweep.points import Point
from ftrun.sweep.search import Plan, Search, understand
from ftrun.sweep.study import FILE, Child, Sampler, Study, Trial

RATE, WIDTH, KIND = "optimizer.lr=tag(log,interval(1e-5,1e-1))", "adapter.rank=int(interval(1,8))", "adapter.init=a,b"


# Words


def test_words_are_a_space():
    space = understand(
        ["model=tiny", RATE, "a=interval(0,0.3)", "b=tag(log,int(interval(4,64)))", "c=range(1,9,2)",
         "d=range(0,1,0.25)", "optimizer=adamw,galore", "e=choice(1e-4,1e-3)", "seed=1,2"]
    )  # fmt: skip
    assert space.fixed == ("model=tiny",)
    assert space.swept == ["optimizer.lr", "a", "b", "c", "d", "optimizer", "e", "seed"]
    facts = [(axis.kind.value, axis.low, axis.high, axis.step, axis.log, axis.choices) for axis in space.axes]
    assert facts == [
        ("float", 1e-5, 1e-1, None, True, ()),
        ("float", 0.0, 0.3, None, False, ()),
        ("int", 4, 64, 1, True, ()),
        ("int", 1, 7, 2, False, ()),
        ("float", 0, 0.75, 0.25, False, ()),
        ("choice", 0, 0, None, False, ("adamw", "galore")),
        ("choice", 0, 0, None, False, ("0.0001", "0.001")),
    ]
    trial = Trial(
        0, dict(zip(space.swept, [1.23456789e-4, 0.1, 5, 3, 0.5, "galore", "0.001"], strict=False)), "running", None
    )
    runs = space.runs(trial)
    words = ("optimizer.lr=0.000123457", "a=0.1", "b=5", "c=3", "d=0.5", "optimizer=galore", "e=0.001")
    assert [run.overrides for run in runs] == [(*words, "seed=1"), (*words, "seed=2")]
    assert runs[0].words == ("model=tiny", *words, "seed=1")


def test_the_ends_of_each_key_are_tried_beforehand():
    found = [point.overrides for point in understand(["x=int(interval(4,64))", "y=a,b", "seed=7,8"]).corners()]
    assert found == [
        ("x=4", "y=a", "seed=7"),
        ("x=29", "y=a", "seed=7"),
        ("x=64", "y=a", "seed=7"),
        ("x=4", "y=b", "seed=7"),
    ]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optimizer.lr=interval(1,1e-3)", "the low end 1 .* is not below the high end 0.001"),
        ("optimizer.lr=interval(1,1)", "is not below"),
        ("optimizer.lr=tag(log,interval(0,1))", "the logarithm of 0"),
        ("adapter.rank=tag(log,int(interval(0,8)))", "the logarithm of 0"),
        ("optimizer.lr=interval(0,inf)", "has no end"),
        ("adapter.rank=tag(log,range(1,9))", "only an interval"),
        ("optimizer=interval(0,1)", "takes options, and not numbers"),
        ("seed=interval(0,9)", "judged by their mean"),
    ],
)
def test_a_wrong_word_is_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        understand(["model=tiny", word])


@pytest.mark.parametrize(
    ("words", "sampler", "message"),
    [
        (["seed=1,2"], "tpe", "nothing to search over"),
        ([RATE], "grid", "has no end of values"),
        (["adapter=lora,full", "train.epochs=1,2"], "cmaes", "searches over numbers only"),
        (["data.system=interval(0,1)"], "tpe", "takes a text, and is searched over numbers"),
        (["train.shuffle=interval(0,1)"], "random", "takes true or false"),
        (
            ["adapter.rank=tag(log,interval(4,64))"],
            "tpe",
            r"whole numbers, .* adapter.rank=tag\(log,int\(interval\(4,64",
        ),
    ],
)
def test_a_space_that_keys_or_sampler_cannot_take_is_refused(words, sampler, message):
    problems = list(understand(["model=tiny", *words]).check(Sampler(sampler)))
    text = "; ".join(f"{problem.message}: {problem.fix}" for problem in problems)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(text)


def test_a_good_space_has_no_problems():
    words = [
        "model=tiny",
        RATE,
        WIDTH,
        "adapter.dropout=interval(0,0.3)",
        "adapter=lora,dora",
        "data.max_length=range(64,512,64)",
    ]
    assert list(understand(words).check(Sampler.tpe)) == []


# optuna


class Here(Study):
    """The study in this process; what goes in and out is JSON as on the way to another one."""

    def __init__(self, file: Path, about: dict) -> None:
        super().__init__(file)
        self._do("open", about=about)

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _do(self, name: str, **values: object) -> object:
        return json.loads(json.dumps(getattr(Study, name)(self, **json.loads(json.dumps(values)))))

    def trials(self):
        return [Trial(**each | {"jobs": tuple(each["jobs"])}) for each in self._do("trials")]

    def ask(self):
        each = self._do("ask")
        return Trial(**each | {"jobs": tuple(each["jobs"])})


@pytest.fixture
def here(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search, "Child", Here)


def bowl(words: Sequence[str]) -> float:
    """Return what is least where the rate is 1e-3, the width 4 and the kind a: 0."""
    values = dict(word.split("=") for word in words)
    kind = float(values.get("adapter.init", "a") == "b")
    width = (int(values.get("adapter.rank", 4)) - 4) ** 2 / 10
    return (math.log10(float(values.get("optimizer.lr", 1e-3))) + 3) ** 2 + width + kind


class Sweep:
    """Stands in for a sweep: jobs are folders, and a run comes to what a function says of its words."""

    def __init__(self, folder: Path, objective: Callable[[Sequence[str]], float] = bowl) -> None:
        self.folder, self.objective = folder, objective
        self.jobs: dict[str, Job] = {}
        self.batches: list[list[str]] = []
        self.left = 1000
        """Runs until it is killed."""

    def freeze(self, points: Sequence[Point]) -> list[Job]:
        found = []
        for point in points:
            key = hashlib.sha256(" ".join(point.overrides).encode()).hexdigest()[:16]
            folder = self.folder / key
            folder.mkdir(exist_ok=True)
            self.jobs.setdefault(key, Job(len(self.jobs), point.overrides, key, folder))
            found.append(self.jobs[key])
        return found

    def work(self, folders: Sequence[Path]) -> None:
        todo = [folder for folder in dict.fromkeys(folders) if Result.load(folder).status is not Status.completed]
        self.batches.append([folder.name for folder in todo])
        for folder in todo:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            self.end(folder)

    def end(self, folder: Path) -> None:
        value, pause = self.objective(self.jobs[folder.name].overrides), Pause.load(folder)
        if math.isinf(value):
            Result(status=Status.failed).save(folder)
        elif pause:
            rung = Rung(pause=pause, step=pause.of(100), metrics={}, objective=value)
            rung.add_to(folder)
            rung.result().save(folder)
        else:
            Result(status=Status.completed, objective=value).save(folder)

    @property
    def started(self) -> list[str]:
        return [name for batch in self.batches for name in batch]

    def search(self, words: Sequence[str], sampler: str = "tpe", trials: int = 20, **plan: object) -> list[Trial]:
        space = understand(words)
        defaults = {"batch": 1, "seed": 1, "startup_trials": 8, "max_failures": None, "retry_failed": False}
        settings = defaults | {"halving": Halving(), "is_max": False} | plan
        number = space.num_trials(Sampler(sampler), trials)
        made = Search(
            space,
            Plan(sampler=Sampler(sampler), num_trials=number, **settings),
            self.folder / FILE,
            freeze=self.freeze,
            work=self.work,
        )
        made.run(list(self.jobs.values()))
        return Here(self.folder / FILE, made._about()).trials()


@pytest.mark.parametrize(
    ("sampler", "words", "trials", "least"),
    [
        ("random", (RATE, WIDTH, KIND), 12, 1.5),
        ("tpe", (RATE, WIDTH, KIND), 30, 0.3),
        ("cmaes", (RATE, WIDTH), 30, 0.2),
        ("grid", ("optimizer.lr=1e-4,1e-3,1e-2", "adapter.rank=range(1,9,3)", KIND), 99, 0.0),
    ],
)
def test_each_sampler_finds_the_bottom_of_a_bowl(here, tmp_path, sampler, words, trials, least):
    if sampler == "cmaes":
        pytest.importorskip("cmaes")
    found = Sweep(tmp_path).search(words, sampler, trials)
    assert len(found) == (18 if sampler == "grid" else trials)
    assert all(trial.state == "complete" for trial in found)
    assert min(trial.value for trial in found) <= least
    if sampler == "grid":
        assert len({tuple(trial.params.values()) for trial in found}) == 18
    if sampler in ("tpe", "cmaes"):  # they learn
        assert sum(trial.value for trial in found[-10:]) < sum(trial.value for trial in found[:10]) / 1.5


def test_the_same_seed_chooses_the_same_points_and_another_one_others(here, tmp_path):
    chosen = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        os.chdir(tmp_path / name)
        chosen.append(
            [
                trial.params
                for trial in Sweep(tmp_path / name).search([RATE, KIND], trials=7, seed=seed, startup_trials=4)
            ]
        )
    assert chosen[0] == chosen[1]
    assert chosen[0] != chosen[2]


def test_killed_after_every_run_it_chooses_the_same_points_and_does_none_twice(here, tmp_path):
    (tmp_path / "whole").mkdir()
    os.chdir(tmp_path / "whole")
    whole = Sweep(tmp_path / "whole").search([RATE, WIDTH, "seed=1,2"], trials=7, startup_trials=4)
    (tmp_path / "killed").mkdir()
    os.chdir(tmp_path / "killed")
    sweep, kills = Sweep(tmp_path / "killed"), 0
    while True:
        sweep.left = 1  # of a trial's two runs the first is done then, the second not
        try:
            found = sweep.search([RATE, WIDTH, "seed=1,2"], trials=7, startup_trials=4)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 13
    assert [trial.params for trial in found] == [trial.params for trial in whole]
    assert [trial.value for trial in found] == [trial.value for trial in whole]
    assert len(list(tmp_path.glob("killed/*/result.json"))) == 14
    sweep.left = 4
    assert len(sweep.search([RATE, WIDTH, "seed=1,2"], trials=9, startup_trials=4)) == 9  # two points, and nothing else
    assert sweep.left == 0


def test_a_point_is_told_the_mean_of_its_seeds(here, tmp_path):
    sweep = Sweep(tmp_path, lambda words: bowl(words) + int(words[-1].removeprefix("seed=")))
    found = sweep.search([WIDTH, "seed=1,2,6"], trials=3)
    assert [trial.value for trial in found] == pytest.approx(
        [(trial.params["adapter.rank"] - 4) ** 2 / 10 + 3 for trial in found]
    )
    assert [len(batch) for batch in sweep.batches] == [3, 3, 3]
    assert all(len(trial.jobs) == 3 for trial in found)


def test_a_high_objective_may_be_wanted(here, tmp_path):
    found = Sweep(tmp_path, lambda words: -bowl(words)).search([RATE], trials=16, is_max=True)
    assert max(trial.value for trial in found) > -0.3


def test_equal_points_are_run_once(here, tmp_path):
    sweep = Sweep(tmp_path)
    found = sweep.search(["adapter.rank=int(interval(3,5))"], "random", trials=12)
    assert len(found) == 12
    assert sorted(sweep.started) == sorted(sweep.jobs)
    assert len(sweep.jobs) == 3


def test_several_points_are_asked_for_at_once(here, tmp_path):
    sweep = Sweep(tmp_path)
    assert len(sweep.search([RATE], trials=10, batch=4)) == 10
    assert [len(batch) for batch in sweep.batches] == [4, 4, 2]


def test_a_failed_point_does_not_end_the_search_and_is_tried_again_when_asked(here, tmp_path):
    broken = True
    sweep = Sweep(tmp_path, lambda words: math.inf if broken and words[0] == "x=2" else bowl([]))
    found = sweep.search(["x=1,2,3"], "grid")
    assert sorted(trial.state for trial in found) == ["complete", "complete", "fail"]
    broken = False
    assert [trial.state for trial in sweep.search(["x=1,2,3"], "grid")] == [trial.state for trial in found]
    again = sweep.search(["x=1,2,3"], "grid", retry_failed=True)
    assert [trial.params["x"] for trial in again if trial.state == "fail"] == ["2"]
    assert (again[-1].params, again[-1].value, again[-1].instead_of is None) == ({"x": "2"}, 0.0, False)
    assert len(sweep.search(["x=1,2,3"], "grid", retry_failed=True)) == 4


def test_when_all_fail_it_stops(here, tmp_path, capsys):
    sweep = Sweep(tmp_path, lambda _: math.inf)
    assert len(sweep.search([RATE], trials=50, max_failures=3)) == 3
    assert "3 trials in a row failed" in capsys.readouterr().out


def test_a_point_that_the_checks_refuse_is_a_failed_one(here, tmp_path, monkeypatch, capsys):
    from ftrun.errors import Problem

    sweep = Sweep(tmp_path)
    freeze = sweep.freeze

    def picky(points: Sequence[Point]) -> list[Job]:
        if points[0].overrides == ("x=2",):
            raise ConfigError([Problem("x", "cannot be 2", "3")])
        return freeze(points)

    sweep.freeze = picky
    found = sweep.search(["x=1,2,3"], "grid")
    assert {trial.params["x"]: trial.state for trial in found} == {"1": "complete", "2": "fail", "3": "complete"}
    assert "x cannot be 2" in capsys.readouterr().out


def test_losing_points_are_stopped_early_and_told_what_they_had_come_to(here, tmp_path):
    sweep = Sweep(tmp_path)
    found = sweep.search([RATE], "random", trials=9, batch=9, halving=Halving(eta=3))
    assert [trial.state for trial in found].count("complete") == 1
    assert [trial.state for trial in found].count("pruned") == 8
    best = min(found, key=lambda trial: trial.value)
    assert best.state == "complete"
    assert all(trial.value is not None for trial in found)
    assert [len(batch) for batch in sweep.batches] == [9, 3, 1]
    assert len(sweep.search([RATE], "random", trials=12, batch=9, halving=Halving(eta=3))) == 12
    assert [len(batch) for batch in sweep.batches][3] == 3


def test_what_is_only_submitted_is_told_later(here, tmp_path):
    sweep = Sweep(tmp_path)
    end, sweep.end = sweep.end, lambda _: None
    assert [trial.state for trial in sweep.search([RATE], trials=4, batch=2)] == ["running"] * 2
    assert [trial.state for trial in sweep.search([RATE], trials=4, batch=2)] == ["running"] * 2
    sweep.end = end
    assert [trial.state for trial in sweep.search([RATE], trials=4, batch=2)] == ["complete"] * 4


def test_another_space_of_the_same_keys_begins_anew_beside_it(here, tmp_path):
    sweep = Sweep(tmp_path)
    sweep.search(["x=1,2"], "grid")
    assert len(sweep.search(["x=1,2,3"], "grid")) == 3
    assert sorted(sweep.started) == sorted(sweep.jobs)
    assert len(sweep.jobs) == 3


# The study's process


def about(**more: object) -> dict:
    space = understand([RATE, WIDTH, KIND]).about()
    return {
        "name": "s",
        "direction": "minimize",
        "sampler": "tpe",
        "seed": 1,
        "startup_trials": 4,
        "space": space,
    } | more


def test_the_study_outlives_its_process(tmp_path):
    pytest.importorskip("optuna")
    folder = tmp_path / "a ?folder #1%20"
    folder.mkdir()
    with Child(folder / FILE, about()) as study:
        first = study.ask()
        study.note(first.number, ["one", "two"])
        study.tell(first.number, 2.0)
        second = study.ask()
        os.kill(study._process.pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match="exit code -9"):
            study.ask()
    with Child(folder / FILE, about()) as study:
        found = study.trials()
        assert [(trial.number, trial.state, trial.value, trial.jobs) for trial in found] == [
            (0, "complete", 2.0, ("one", "two")),
            (1, "running", None, ()),
        ]
        assert found[1].params == second.params
        study.prune(1, [3.0, 2.5])
        assert [trial.value for trial in study.trials()] == [2.0, 2.5]
        with pytest.raises(RunFailed, match="no attribute 'nonsense'"):
            study._call("nonsense")
    assert (folder / FILE).exists()


def test_a_point_that_was_half_drawn_is_given_up(here, tmp_path):
    import optuna

    study = Here(tmp_path / FILE, about())
    study.ask()
    study._study.ask({"optimizer.lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)})
    again = Here(tmp_path / FILE, about())
    assert [trial.number for trial in again.trials()] == [0]
    assert again.ask().number == 2


# The command


def test_a_search_that_is_typed_stops_losers_early_and_does_nothing_twice(ftrun):
    pytest.importorskip("optuna")
    words = (
        "-m", "hydra/sweeper=optuna", "hydra.sweeper.sampler=random", "hydra.sweeper.n_trials=3",
        "hydra.sweeper.batch=3", "hydra.sweeper.halving.eta=3", "hydra.sweeper.halving.first=0.34",
        "hydra.launcher.slots=3", "model=tiny", "hardware=cpu", "data.rows=16", "data.eval_size=4", "train.max_steps=8",
        "stage.num_samples=0", RATE, "output_dir=found",
    )  # fmt: skip
    done = ftrun(*words).sees(0)
    folders = [job.folder for job in Ledger(done.folder).jobs()]
    results = [Result.load(folder) for folder in folders]
    assert sorted((result.status.value, result.step) for result in results) == [
        ("completed", 8),
        ("paused", 3),
        ("paused", 3),
    ]
    at_the_rung = [Rung.all_of(folder)[Pause(share=0.34)].objective for folder in folders]
    assert results[at_the_rung.index(min(at_the_rung))].status is Status.completed
    made = [(folder / "result.json").stat().st_mtime_ns for folder in folders]
    ftrun(*words).sees(0)
    assert [(folder / "result.json").stat().st_mtime_ns for folder in folders] == made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("optimizer.lr=interval(1,0)", "adapter.rank=tag(log,int(interval(0,4)))"),
            ("is not below", "the logarithm of 0"),
        ),
        (("data.system=interval(0,1)",), ("takes a text",)),
        (("adapter.alpha=interval(-4,4)",), ("adapter.alpha", "out of range")),
        ((RATE, "hydra.sweeper.sampler=random", "hydra.sweeper.startup_trials=3"), ("would change nothing",)),
        ((RATE, "hydra.sweeper.halving.first=0.5"), ("nothing is stopped early",)),
        ((RATE, "hydra.sweeper.n_trials=0"), ("hydra.sweeper.n_trials", "out of range")),
    ],
)  # fmt: skip
def test_a_wrong_search_is_refused_before_anything_starts(driver, words, message, tmp_path):
    done = driver("-m", "hydra/sweeper=optuna", "model=tiny", "hardware=cpu", *words)
    assert done.code == 2, done.out
    assert all(part in done.err for part in message), done.err
    assert list(tmp_path.iterdir()) == []
