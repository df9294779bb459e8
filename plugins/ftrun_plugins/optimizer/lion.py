"""Lion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._ruled import Ruled

if TYPE_CHECKING:
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class Lion(Ruled):
    """The sign of a blend of gradient and momentum (https://arxiv.org/abs/2302.06675): half of AdamW's state.

    A rate that is three to ten times lower than AdamW's wants a ``weight_decay`` that is as much higher.
    """

    # Every element moves by the whole rate, and in AdamW most move by less; the paper's section 5 says 3 to 10 times.
    lr_scale: ClassVar[float] = 0.2
    elementwise: ClassVar[bool] = True
    name: str = "lion"

    beta1: float = ranged(0.9, ge=0, lt=1)
    """Share of the momentum in the direction of a step; the rest is the gradient's."""

    beta2: float = ranged(0.99, ge=0, lt=1)
    """Decay of the momentum. The paper trains language models with 0.95 and 0.98."""

    def rule(self, run: Run) -> Rule:
        """Return the one rule."""
        from ftrun.worker.optim import lion

        return lion.Lion(beta1=self.beta1, beta2=self.beta2)
