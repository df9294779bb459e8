"""APOLLO and APOLLO-Mini."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._projected import Method
from ftrun_plugins.optimizer._scaled import Scaled, Scaling

if TYPE_CHECKING:
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.training import Run


class Projection(StrEnum):
    """What gradients are projected by."""

    random = "random"
    svd = "svd"


class Side(StrEnum):
    """The side of a matrix that is projected."""

    std = "std"
    left = "left"
    right = "right"


@register
@dataclass(kw_only=True)
class Apollo(Scaled):
    """Gradients scaled by what Adam makes of a random projection of them (https://arxiv.org/abs/2412.05270).

    A matrix of m x n with m <= n keeps ``2 * rank * n`` numbers for the moments, where AdamW keeps ``2 * m * n``.
    APOLLO-Mini (``optimizer=apollo_mini``) has rank 1 and one factor for each matrix.
    """

    # With the default scale a step is as long as AdamW's, so the default rate is AdamW's, too.
    name: str = "apollo"

    scale: float | None = ranged(None, gt=0)
    """The steps of projected matrices are multiplied by its square root: 128 for APOLLO-Mini in the paper. Default: the
    projected side over the rank, which makes up for what the projection shortens, so that AdamW's rates fit."""

    projection: Projection = Projection.random
    """What gradients are projected by: random numbers, drawn again from their seed after a stop (the same ones on the
    same kind of device), or singular vectors of the gradient (svd), which take time, and memory in each state."""

    side: Side = Side.std
    """The side that is projected: the smaller one (std), always rows (left), or always columns (right)."""

    def rules(self, run: Run) -> dict[str, Rule]:
        """APOLLO's, and AdamW's for what is not projected."""
        from ftrun.worker.optim.apollo import Apollo as ApolloRule

        rule = ApolloRule(
            adam=self.adamw(),
            rank=self.rank,
            update_interval=self.update_interval,
            scale=self.scale,
            tensorwise=self.scaling is Scaling.tensor,
            left={Side.std: None, Side.left: True, Side.right: False}[self.side],
            method=Method.svd if self.projection is Projection.svd else None,
            growth=self.limiter,
            seed=run.cfg.seed,
        )
        return {"projected": rule, "adamw": self.adamw()}
