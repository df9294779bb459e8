"""BAdam with blocks that cut through the matrices: a share of each one's entries at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._blocks import InParts, told

if TYPE_CHECKING:
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.parameters import Weight
    from ftrun.worker.training import Run


class Mask(StrEnum):
    """Which entries make a share."""

    adjacent = "adjacent"
    """Neighbours, row by row."""

    scatter = "scatter"
    """Some from all over the matrix."""


@register
@dataclass(kw_only=True)
class BAdamRatio(InParts):
    """AdamW on a share of the entries of every matrix at a time, the ratio mode of BAdam's authors.

    https://arxiv.org/abs/2404.02827 is the method; its authors' code has this mode besides. Moments are of the share
    whose turn it is: ``8 * ratio`` bytes an entry, and half as many again for float32 copies of weights that are stored
    in bfloat16. Each turn starts without moments, and weight decay is of the share, too. Norms and biases always train.
    The gradient is that of the whole model; ``layerwise`` frees it piece by piece.
    """

    name: str = "badam_ratio"

    ratio: float = ranged(0.05, gt=0, le=1)
    """Share of each matrix's entries that is updated at a time."""

    mask: Mask = Mask.adjacent
    """Which entries make a share: ``adjacent``, neighbours row by row, or ``scatter``, from all over the matrix."""

    update_interval: int | None = ranged(None, ge=1)
    """Steps that a share is updated for. Default: an epoch's steps divided by the number of shares, but 50 to 100;
    fewer in a run that would end before every entry was in one. The run says how many."""

    def rules(self, run: Run) -> dict[str, Rule]:
        """One for matrices, embeddings and the head among them, and Adam's for what is left."""
        from ftrun.worker.optim.badam import Share

        steps = told(self.update_interval, run, math.ceil(1 / self.ratio), "shares of each matrix")
        scattered, seed = self.mask is Mask.scatter, run.cfg.seed
        share = Share(rule=self.adamw(), ratio=self.ratio, interval=steps, scattered=scattered, seed=seed)
        return {"share": share, "adamw": self.adamw()}

    def rule_of(self, weight: Weight) -> str:
        """What has two dimensions has shares."""
        return "share" if weight.parameter.ndim >= 2 else "adamw"
