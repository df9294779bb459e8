"""AdaLOMO, which keeps a number a row and a column."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._ruled import LayerwiseRuled

if TYPE_CHECKING:
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class AdaLomo(LayerwiseRuled):
    """Adafactor's second moment in updates that happen in the backward pass (https://arxiv.org/abs/2310.10195).

    About the memory of LOMO, with a rate of each element's own as Adam has, and steps in proportion to each weight's
    size. Each gradient is clipped to ``train.max_grad_norm`` by its own norm; the paper clips none (0), since the
    update is normalised.
    """

    lr_scale: ClassVar[float] = 10.0
    name: str = "adalomo"

    decay_rate: float = ranged(0.8, gt=0, le=1)
    """How fast the newest squared gradient comes to count less: step ** -decay_rate of the mean is its share. Higher
    remembers longer."""

    clip_threshold: float = ranged(1.0, gt=0)
    """Root mean square above which the update of a weight is scaled down to it."""

    eps: float = ranged(1e-3, gt=0)
    """Root mean square that a weight is taken to have at least, as updates are scaled by it: what lets a weight leave
    zero."""

    def rule(self, run: Run) -> Rule:
        """Return the one rule."""
        from ftrun.worker.optim.lomo import AdaLomo

        return AdaLomo(decay_rate=self.decay_rate, clip_threshold=self.clip_threshold, eps=self.eps)
