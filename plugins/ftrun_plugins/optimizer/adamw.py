"""AdamW, as torch has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ftrun.plugin import register
from ftrun_plugins.optimizer._ruled import AdamLike

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.worker.optim.ruled import Rule
    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class AdamW(AdamLike):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""

    elementwise: ClassVar[bool] = True
    name: str = "adamw"

    def rule(self, run: Run) -> Rule:
        """Return the one rule."""
        return self.adamw()

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return torch's optimizer, with the fused kernel where the device has one; ours takes the same steps."""
        if self.layerwise:
            return super().build(model, run)
        import torch

        from ftrun.worker import parameters
        from ftrun.worker.optim.adamw import fused

        assert self.lr is not None
        groups = parameters.groups(model, self)
        kernel = fused([weight for group in groups for weight in group["params"]])
        return torch.optim.AdamW(groups, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, fused=kernel)
