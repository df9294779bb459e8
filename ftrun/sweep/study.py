"""The process that holds a search's optuna study, so that the one that starts runs need not import optuna.

    python -m ftrun.sweep.study STUDY_DB

It reads one JSON object a line from standard input, and answers each with one on standard output; `Child` is the other
end. What a point has come to is in the file the moment that it is answered for: whoever opens it again, whatever has
died in between, goes on from there.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ftrun.errors import RunFailed

if TYPE_CHECKING:
    import optuna

Value = str | int | float

FILE = "study.db"
"""The sqlite file in a sweep's folder."""

_JOBS, _INSTEAD_OF = "jobs", "instead_of"
"""What a trial is told besides its values: the keys of its jobs; the failed trial of which it is the second attempt."""


class Sampler(StrEnum):
    """Who chooses the next point of a search."""

    tpe = "tpe"
    random = "random"
    grid = "grid"
    cmaes = "cmaes"


@dataclass(frozen=True)
class Trial:
    """One point of a search."""

    number: int
    params: Mapping[str, Value]
    state: str
    """running, complete, pruned or fail."""

    value: float | None
    jobs: tuple[str, ...] = ()
    """Keys of its jobs, once these are frozen."""

    instead_of: int | None = None
    """The failed trial that this one is another attempt at."""


class Child:
    """The study's process, seen from the one that starts runs.

    Args:
        file: The sqlite file.
        about: ``name``, ``direction`` (minimize, maximize), ``sampler``, ``seed``, ``startup_trials``, and ``space``:
            for each key the ``kind`` (float, int, choice) with ``low``, ``high``, ``step``, ``log``, or ``choices``.
    """

    def __init__(self, file: Path, about: Mapping[str, Any]) -> None:
        self._file, self._about = file.resolve(), about
        self._printed: IO[str]

    def __enter__(self) -> Child:
        with contextlib.ExitStack() as opened:
            self._printed = opened.enter_context(tempfile.TemporaryFile("w+"))
            # A session of its own: Ctrl-C in the terminal is for the process that starts runs.
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(self._file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._printed,
                text=True,
                start_new_session=True,
            )
            opened.callback(self._process.communicate)
            self._call("open", about=self._about)
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.close()

    def trials(self) -> list[Trial]:
        """Return the points so far, oldest first; those that were lost on their way are left out."""
        return [_trial(each) for each in self._call("trials")]

    def ask(self) -> Trial:
        """Return a new point."""
        return _trial(self._call("ask"))

    def note(self, number: int, jobs: Sequence[str]) -> None:
        """Note which jobs are those of a point."""
        self._call("note", number=number, jobs=list(jobs))

    def tell(self, number: int, value: float | None) -> None:
        """Say what a point has come to; None: it failed."""
        self._call("tell", number=number, value=value)

    def prune(self, number: int, rungs: Sequence[float]) -> None:
        """Say that a point was not gone on with, and what it had come to at each rung."""
        self._call("prune", number=number, rungs=list(rungs))

    def again(self, number: int, value: float) -> None:
        """Say what a point has come to that has failed before."""
        self._call("again", number=number, value=value)

    def _call(self, do: str, **values: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(json.dumps({"do": do, **values}) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self._process.wait()
            self._printed.seek(0)
            last = (self._printed.read().strip().splitlines() or ["nothing was printed"])[-1]
            raise RunFailed(f"the search's study ended with exit code {self._process.returncode}: {last}")
        return json.loads(answer)


def _trial(values: dict[str, Any]) -> Trial:
    return Trial(**values | {"jobs": tuple(values["jobs"])})


class Study:
    """The study itself: where optuna is."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def open(self, about: dict[str, Any]) -> bool:
        """Open the study of that name, or make it; a point that a dying process has left half drawn is given up."""
        import optuna

        warnings.simplefilter("ignore")  # which of optuna's parts are called experimental
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._about = about
        self._space = {name: _distribution(each) for name, each in about["space"].items()}
        self._study = optuna.create_study(
            storage=f"sqlite:///{self._file.name}",
            study_name=about["name"],
            direction=about["direction"],
            sampler=optuna.samplers.RandomSampler(),
            load_if_exists=True,
        )
        for trial in self._study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
            if not self._is_whole(trial):
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        return True

    def trials(self) -> list[dict[str, Any]]:
        """Return the points so far."""
        return [_facts(trial) for trial in self._study.get_trials(deepcopy=False) if self._is_whole(trial)]

    def ask(self) -> dict[str, Any]:
        """Draw a point.

        Each has a generator of its own, so that the same results give the same next point, whether or not the process
        that drew the ones before is still the same.
        """
        import optuna

        number = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = self._sampler(number)
        trial = self._study.ask(self._space)
        self._study.sampler = optuna.samplers.RandomSampler()
        return _facts(self._study.get_trials(deepcopy=False)[trial.number])

    def note(self, number: int, jobs: list[str]) -> bool:
        """Note a point's jobs."""
        self._study._storage.set_trial_user_attr(self._id(number), _JOBS, jobs)
        return True

    def tell(self, number: int, value: float | None) -> bool:
        """Note what a point has come to."""
        import optuna

        state = optuna.trial.TrialState.FAIL if value is None else optuna.trial.TrialState.COMPLETE
        self._study.tell(number, value, state)
        return True

    def prune(self, number: int, rungs: list[float]) -> bool:
        """Note what a point had come to that is not gone on with."""
        import optuna

        for step, value in enumerate(rungs):
            self._study._storage.set_trial_intermediate_value(self._id(number), step, value)
        self._study.tell(number, state=optuna.trial.TrialState.PRUNED)
        return True

    def again(self, number: int, value: float) -> bool:
        """Add a point that has failed before as another one: optuna takes back nothing that it was told."""
        import optuna

        failed = self._study.get_trials(deepcopy=False)[number]
        attributes = {_JOBS: failed.user_attrs.get(_JOBS, []), _INSTEAD_OF: number}
        self._study.add_trial(
            optuna.trial.create_trial(
                params=failed.params, distributions=failed.distributions, value=value, user_attrs=attributes
            )
        )
        return True

    def _is_whole(self, trial: optuna.trial.FrozenTrial) -> bool:
        return set(trial.params) == set(self._space)

    def _id(self, number: int) -> int:
        return self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        import optuna

        seed, startup = (self._about["seed"] * 1_000_003 + number) % 2**32, self._about["startup_trials"]
        match self._about["sampler"]:
            case "random":
                return optuna.samplers.RandomSampler(seed=seed)
            case "grid":
                values = {name: _values(each) for name, each in self._about["space"].items()}
                return optuna.samplers.GridSampler(values, seed=self._about["seed"])
            case "cmaes":
                return optuna.samplers.CmaEsSampler(
                    seed=seed, n_startup_trials=startup, warn_independent_sampling=False
                )
            case _:
                # Together: where one key's best value depends on another's, as a rank's on the learning rate.
                return optuna.samplers.TPESampler(
                    seed=seed, n_startup_trials=startup, multivariate=True, constant_liar=True
                )


def _distribution(axis: dict[str, Any]) -> optuna.distributions.BaseDistribution:
    from optuna import distributions

    if axis["kind"] == "choice":
        return distributions.CategoricalDistribution(axis["choices"])
    if axis["kind"] == "int":
        return distributions.IntDistribution(axis["low"], axis["high"], log=axis["log"], step=axis["step"] or 1)
    return distributions.FloatDistribution(axis["low"], axis["high"], log=axis["log"], step=axis["step"])


def _values(axis: dict[str, Any]) -> list[Value]:
    """Return all values of what has an end."""
    if axis["kind"] == "choice":
        return list(axis["choices"])
    count = round((axis["high"] - axis["low"]) / axis["step"]) + 1
    return [axis["low"] + number * axis["step"] for number in range(count)]


def _facts(trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
    has_value = trial.values is not None
    return {
        "number": trial.number,
        "params": trial.params,
        "state": trial.state.name.lower(),
        "value": trial.values[0] if has_value else None,
        "jobs": trial.user_attrs.get(_JOBS, []),
        "instead_of": trial.user_attrs.get(_INSTEAD_OF),
    }


def answers(study: Study, lines: IO[str]) -> Iterator[Any]:
    """Yield the answer to each line."""
    for line in lines:
        asked = json.loads(line)
        yield getattr(study, asked.pop("do"))(**asked)


if __name__ == "__main__":
    os.chdir(Path(sys.argv[1]).parent)  # what is in the folder's name means nothing in a URL then
    for answer in answers(Study(Path(sys.argv[1])), sys.stdin):
        print(json.dumps(answer), flush=True)  # noqa: T201
