"""AdamW, as torch has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.fields import ranged
from ftrun.plugin import Optimizer, register

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    name: str = "adamw"

    beta1: float = ranged(0.9, ge=0, lt=1)
    """Decay of the mean of gradients."""

    beta2: float = ranged(0.999, ge=0, lt=1)
    """Decay of the mean of squared gradients; 0.95 is usual for large batches."""

    eps: float = ranged(1e-8, gt=0)
    """Added to the denominator."""

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Two groups, with and without decay; the fused kernel where the device has one."""
        from torch.optim import AdamW

        from ftrun.worker.parameters import decay_groups

        assert self.lr is not None
        groups = decay_groups(model, self.weight_decay)
        fused = all(p.device.type in ("cpu", "cuda", "mps", "xpu") for group in groups for p in group["params"])
        return AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=fused)
