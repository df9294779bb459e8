"""AdamW with eight bits of state, by bitsandbytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._bitsandbytes import EightBit

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class AdamW8bit(EightBit):
    """AdamW with two bytes of state a value (https://arxiv.org/abs/2110.02861). Embeddings keep 32 bits."""

    name: str = "adamw_8bit"

    beta1: float = ranged(0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""

    beta2: float = ranged(0.999, ge=0, lt=1)
    """Decay of the mean of squared gradients; 0.95 is usual for large batches."""

    eps: float = ranged(1e-8, gt=0)
    """Added to the denominator."""

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return the optimizer of bitsandbytes."""
        return self.made("AdamW8bit", model, {"betas": (self.beta1, self.beta2), "eps": self.eps})
