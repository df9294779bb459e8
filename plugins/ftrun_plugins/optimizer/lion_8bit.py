"""Lion with eight bits of state, by bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._bitsandbytes import EightBit

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class Lion8bit(EightBit):
    """Lion (https://arxiv.org/abs/2302.06675) with one byte of state a value. Embeddings keep 32 bits."""

    lr_scale: ClassVar[float] = 0.2  # as optimizer=lion
    name: str = "lion_8bit"

    beta1: float = ranged(0.9, ge=0, lt=1)
    """Share of the momentum in the direction of a step; the rest is the gradient's."""

    beta2: float = ranged(0.99, ge=0, lt=1)
    """Decay of the momentum."""

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return the optimizer of bitsandbytes."""
        return self.made("Lion8bit", model, {"betas": (self.beta1, self.beta2)})
