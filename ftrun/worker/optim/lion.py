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
        # One after the other: the signs of all of them together would take as much memory as the model.
        for weight, grad, state in zip(weights, grads, states, strict=True):
            signs = torch.lerp(state["momentum"], grad, 1 - self.beta1).sign_()
            state["momentum"].lerp_(grad, 1 - self.beta2)
            if weight_decay:
                weight.mul_(1 - lr * weight_decay)
            weight.add_(signs, alpha=-lr)
