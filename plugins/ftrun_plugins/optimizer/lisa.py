"""LISA: a few layers, drawn anew every so often, train besides the embeddings and the head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.errors import ConfigError, Problem
from ftrun.fields import ranged
from ftrun.plugin import register
from ftrun_plugins.optimizer._blocks import InTurns

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer

    from ftrun.worker.training import Run


@register
@dataclass(kw_only=True)
class Lisa(InTurns):
    """AdamW on a few random layers at a time, and on what is outside the layers (https://arxiv.org/abs/2403.17919).

    Only the weights that train at the time have gradients and moments: the embeddings, the norm before the head, the
    head, and ``n_layers`` layers. Layers start without moments whenever they are drawn. Weights that are stored in
    bfloat16 have a float32 copy while they train.
    """

    name: str = "lisa"

    n_layers: int = ranged(2, ge=1)
    """Layers that train at a time: the paper's gamma, 2 for models up to 7B, 4 for 70B. More take more memory."""

    update_interval: int = ranged(20, ge=1)
    """Steps after which layers are drawn anew."""

    def build(self, model: nn.Module, run: Run) -> TorchOptimizer:
        """Return the optimizer that draws.

        Raises:
            ConfigError: The model has fewer layers that train.
        """
        from ftrun.worker.optim.blocks import drawn, of_layers

        layers = [*of_layers(model).values()]
        if self.n_layers > len(layers):
            message = f"{len(layers)} layers of the model train, of which {self.n_layers} cannot be drawn"
            raise ConfigError([Problem("optimizer.n_layers", message, f"{len(layers) // 2 or 1}, for example")])
        turns = drawn(len(layers), self.n_layers, seed=run.cfg.seed)
        return self.in_turns(model, run, layers, turns, lambda: self.update_interval)
