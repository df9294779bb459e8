"""Lion as a rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftrun.worker.optim.ruled import Rule, State, States, Tensors


@dataclass(frozen=True)
class Lion(Rule):
    """Steps of one size in every element, whose signs are those of a blend of gradient and momentum."""

    elementwise = True
    beta1: float = 0.9
    beta2: float = 0.99

    def start(self, weight: Tensor, number: int = 0) -> State:
        """The momentum, of the weight's shape and type."""
        return {"momentum": torch.zeros_like(weight)}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Step by the signs of the blend, and only then take the gradients into the momentum."""
        momenta, latest = [state["momentum"] for state in states], list(grads)
        signs = torch._foreach_lerp(momenta, latest, 1 - self.beta1)
        torch._foreach_sign_(signs)
        torch._foreach_lerp_(momenta, latest, 1 - self.beta2)
        if weight_decay:
            torch._foreach_mul_(list(weights), 1 - lr * weight_decay)
        torch._foreach_add_(list(weights), signs, alpha=-lr)
