"""LOMO, which keeps no state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.plugin import register
from ftrun_plugins.optimizer._ruled import LayerwiseRuled

if TYPE_CHECKING:
    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class Lomo(LayerwiseRuled):
    """Gradient descent in the backward pass, without a state (https://arxiv.org/abs/2306.09782).

    Each weight is updated as soon as its gradient is there, and the gradient freed, so that training takes hardly more
    memory than the weights and activations. Each gradient is clipped to ``train.max_grad_norm`` by its own norm.
    """

    lr_scale: ClassVar[float] = 600.0
    name: str = "lomo"

    def rule(self, run: Run) -> Rule:
        """Return the one rule."""
        from ftrun.worker.optim.lomo import Lomo

        return Lomo()
