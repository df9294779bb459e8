"""Fira, which is GaLore and uses what GaLore leaves of the gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.errors import Problem
from ftrun.plugin import register
from ftrun_plugins.optimizer._scaled import Scaled, Scaling
from ftrun_plugins.optimizer.galore import GaLore, Projection

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class Fira(Scaled, GaLore):
    """GaLore, with the rest of the gradient scaled as its projection is (https://arxiv.org/abs/2410.01623).

    The rest is multiplied by the factors by which the inner optimizer lengthens the projection, so that no direction is
    left out. The memory is GaLore's, and one number for each matrix.
    """

    name: str = "fira"

    def check(self, cfg: Config) -> Iterator[Problem]:
        """Yield the projection that has no channels."""
        yield from super().check(cfg)
        if self.projection is Projection.full:
            message = "the rest of a gradient is scaled along the side that is not projected, and full projects both"
            yield Problem("optimizer.projection", message, "optimizer.projection=std, or optimizer=galore")

    def rules(self, run: Run) -> dict[str, Rule]:
        """Fira's, and AdamW's for what is not projected."""
        from ftrun.worker.optim.fira import Fira as FiraRule

        tensorwise = self.scaling is Scaling.tensor
        rule = FiraRule(**self._settings(run), tensorwise=tensorwise, growth=self.limiter)
        return {"projected": rule, "adamw": self.adamw()}
