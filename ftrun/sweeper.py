"""What sweepers share: the settings of a sweep as a whole. Each says which runs there are, and in what order."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper as HydraSweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from ftrun.errors import Problem
from ftrun.keep import Keep
from ftrun.launcher import Launcher, Settings, adapted
from ftrun.sweep.halving import Halving

if TYPE_CHECKING:
    from ftrun.sweep.points import Point
    from ftrun.sweep.run import Sweep


@dataclass(kw_only=True)
class SweeperSettings(Settings):
    """What every sweeper can be told."""

    retry_failed: bool = False
    """Start jobs again that have failed, from their checkpoints where they have one; ``--retry-failed`` sets it."""

    keep: Keep = Keep.all
    """Which finished jobs keep weights and checkpoints on disk: all, those of the best arm, adapters only, none."""

    halving: Halving = field(default_factory=Halving)

    def check(self) -> Iterator[Problem]:
        """Yield what cannot be."""
        yield from self.halving.check("hydra.sweeper.halving.")


class Sweeper(HydraSweeper):
    """Base of ftrun's own sweepers."""

    settings_class: ClassVar[type[SweeperSettings]] = SweeperSettings

    def __init__(self, **given: Any) -> None:
        self._given = given

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Read the settings, and make the launcher that jobs go to.

        Raises:
            ConfigError: With everything that is wrong with them.
        """
        self.settings: Any = self.settings_class.read(self._given, "hydra.sweeper.")
        self.launcher: Launcher = adapted(Plugins.instance().instantiate_launcher(hydra_context, task_function, config))

    def sweep(self, arguments: list[str]) -> Any:
        """Hydra's way in, which is not ftrun's: a sweep has a folder, which `ftrun.sweep.run` knows."""
        raise NotImplementedError("ftrun -m calls search")

    @abstractmethod
    def swept(self, words: Sequence[str]) -> Sequence[str]:
        """Return the keys that the words give several values to."""

    @abstractmethod
    def points(self, words: Sequence[str]) -> Iterable[Point]:
        """Yield the points that are known before the first run: of a search, its corners."""

    def num_runs(self, words: Sequence[str], known: int) -> int:
        """Return how many runs there are, of which so many points are known before the first."""
        return known

    @abstractmethod
    def search(self, sweep: Sweep, words: Sequence[str]) -> None:
        """Have the sweep freeze points, note that it was asked for them, and bring their jobs to their end."""
