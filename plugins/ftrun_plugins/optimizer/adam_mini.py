"""Adam-mini."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.plugin import register
from ftrun_plugins.optimizer._ruled import AdamLike

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class AdamMini(AdamLike):
    """AdamW with few second moments, which halves the optimizer's memory (https://arxiv.org/abs/2406.16793).

    One is enough for elements whose gradients are of one size: the rows of a head in queries and keys, a token's row in
    embeddings and output heads, the weights of one output in all other matrices, among them those that hold queries,
    keys and values in one; and the whole of a norm. Biases have one for each element. Rates and decays are AdamW's.
    """

    name: str = "adam_mini"

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return an optimizer with a rule for each size of blocks that the model has."""
        from ftrun.worker import parameters
        from ftrun.worker.optim import adam_mini, ruled

        blocks = adam_mini.blocks(model)
        rules = {
            str(one): adam_mini.AdamMini(beta1=self.beta1, beta2=self.beta2, eps=self.eps, blocks=one)
            for one in blocks.values()
            if one
        }
        groups = parameters.groups(model, self, lambda weight: str(blocks[weight.name] or "adamw"))
        return self.finished(ruled.Ruled(groups, {"adamw": self.adamw(), **rules}), run)
