"""``hydra/sweeper=optuna``: the next points are chosen by what the ones before have come to.

No annotations from the future here: Hydra runs this file before dataclasses could look up what they mean.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.errors import ConfigError, Problem
from ftrun.fields import ranged
from ftrun.launcher import register
from ftrun.sweep.study import FILE, Sampler
from ftrun.sweeper import Sweeper, SweeperSettings

if TYPE_CHECKING:
    from ftrun.sweep.points import Point
    from ftrun.sweep.run import Sweep
    from ftrun.sweep.search import Space


@dataclass(kw_only=True)
class OptunaSettings(SweeperSettings):
    """How many points, and who chooses them."""

    n_trials: int | None = ranged(None, ge=1)
    """How many points, those of earlier starts counted. Default: 20; with sampler=grid, as many as there are."""

    sampler: Sampler = Sampler.tpe
    """Who chooses the next point: tpe (what did well before), random, grid (each combination, in a random order), or
    cmaes (a cloud of points that moves and stretches; for numbers only)."""

    startup_trials: int | None = ranged(None, ge=1)
    """Points drawn at random before tpe or cmaes goes by what it has seen. Default: 10 with tpe, 1 with cmaes."""

    seed: int = ranged(42, ge=0, lt=2**32)
    """Seed of the choice. With batch=1, the same results lead to the same points, whatever has died in between."""

    batch: int | None = ranged(None, ge=1)
    """Points that are asked for at once, and waited for together. Default: as many as have room to run at once."""

    max_failures: int | None = ranged(5, ge=1)
    """Stop once so many points in a row have failed; null never stops."""

    def check(self) -> Iterator[Problem]:
        """Yield what cannot be."""
        yield from super().check()
        if self.startup_trials is not None and self.sampler in (Sampler.random, Sampler.grid):
            message = f"sampler={self.sampler} goes by nothing it has seen, so it would change nothing"
            yield Problem("hydra.sweeper.startup_trials", message, "hydra.sweeper.sampler=tpe, or leave it out")


class Optuna(Sweeper):
    """A search by optuna, asked and told by ftrun."""

    settings_class = OptunaSettings

    def swept(self, words: Sequence[str]) -> Sequence[str]:
        """Return the keys that are searched over, and seed where there are several."""
        from ftrun.sweep import search

        return search.understand(words).swept

    def points(self, words: Sequence[str]) -> Iterable["Point"]:
        """Yield points at the ends of the space, by which everything is checked beforehand."""
        return self._space(words).corners()

    def num_runs(self, words: Sequence[str], known: int) -> int:
        """Return how many runs there are: of the points that are asked for, one for each seed."""
        space = self._space(words)
        return space.num_trials(self.settings.sampler, self.settings.n_trials) * max(1, len(space.seeds))

    def search(self, sweep: "Sweep", words: Sequence[str]) -> None:
        """Ask, run and tell until there are as many points as wanted."""
        from ftrun.sweep.search import Plan, Search

        space, settings = self._space(words), self.settings
        plan = Plan(
            sampler=settings.sampler,
            num_trials=space.num_trials(settings.sampler, settings.n_trials),
            batch=settings.batch or max(1, -(-getattr(self.launcher, "slots", 1) // max(1, len(space.seeds)))),
            seed=settings.seed,
            startup_trials=settings.startup_trials or (1 if settings.sampler is Sampler.cmaes else 10),
            max_failures=settings.max_failures,
            retry_failed=settings.retry_failed,
            halving=settings.halving,
            is_max=self._is_max(space),
        )
        found = Search(space, plan, sweep.folder / FILE, freeze=sweep.freeze, work=sweep.work)
        found.run(sweep.ledger.jobs())

    def _space(self, words: Sequence[str]) -> "Space":
        """Understand the words.

        Raises:
            ConfigError: With everything that is wrong with them, or optuna is not installed.
        """
        from ftrun import plugin
        from ftrun.sweep import search

        space = search.understand(words)
        problems = list(space.check(self.settings.sampler))
        if not plugin.is_installed("optuna"):
            message = "optuna needs the package optuna, which is not installed"
            problems.append(Problem("hydra/sweeper", message, "pip install 'ftrun[search]'"))
        if problems:
            raise ConfigError(problems)
        return space

    @staticmethod
    def _is_max(space: "Space") -> bool:
        """Return whether a high objective is good, having checked the space's ends.

        Raises:
            ConfigError: With everything that is wrong with any of them, or they do not agree.
        """
        from ftrun.config import ObjectiveMode
        from ftrun.sweep import freeze

        modes = {cfg.objective_mode for _, cfg in freeze.check(space.corners())}
        if len(modes) > 1:
            message = "a high objective is good at some points and a low one at others, so they cannot be compared"
            raise ConfigError([Problem("objective", message, "objective=METRIC objective_mode=min, or max")])
        return modes == {ObjectiveMode.max}


register("hydra/sweeper", "optuna", Optuna, OptunaSettings)
