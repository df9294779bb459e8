"""``hydra/sweeper=grid``: every combination of the values that are typed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ftrun import record
from ftrun.launcher import register
from ftrun.sweeper import Sweeper, SweeperSettings

if TYPE_CHECKING:
    from ftrun.sweep.points import Point
    from ftrun.sweep.run import Sweep


class Grid(Sweeper):
    """Every combination of the values that are typed."""

    def swept(self, words: Sequence[str]) -> Sequence[str]:
        """Return the keys that have several values."""
        from ftrun.sweep import points

        return points.grid(words).swept

    def points(self, words: Sequence[str]) -> Iterable[Point]:
        """Yield every combination."""
        from ftrun.sweep import points

        return points.grid(words).points()

    def search(self, sweep: Sweep, words: Sequence[str]) -> None:
        """Freeze every combination, and bring all of them to their end."""
        jobs = sweep.ledger.jobs() if sweep.is_resumed else sweep.freeze(self.points(words))
        if self.settings.halving.eta is None:
            for job in jobs:
                (job.folder / record.PAUSE).unlink(missing_ok=True)  # of a time with halving
            sweep.work([job.folder for job in jobs])
            return
        from ftrun.sweep import halving

        arms = halving.arms(jobs)
        self.settings.halving.run(arms, sweep.work, is_max=halving.is_max(arms))


register("hydra/sweeper", "grid", Grid, SweeperSettings)
