"""Gradient descent as a rule: with momentum one tensor of state, without it none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftrun.worker.optim.ruled import Rule, State, States, Tensors


@dataclass(frozen=True)
class SGD(Rule):
    """Gradient descent with decoupled weight decay; torch's own adds the decay to the gradient instead."""

    elementwise = True
    momentum: float = 0.0
    nesterov: bool = False

    def start(self, weight: Tensor, number: int = 0) -> State:
        """The momentum, of the weight's shape and type, if there is one."""
        return {"momentum": torch.zeros_like(weight)} if self.momentum else {}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Go down along the gradients, or along their sum in which older ones fade."""
        ways = list(grads)
        if self.momentum:
            sums = [state["momentum"] for state in states]
            torch._foreach_mul_(sums, self.momentum)
            torch._foreach_add_(sums, ways)
            if self.nesterov:
                torch._foreach_add_(ways, sums, alpha=self.momentum)
            else:
                ways = sums
        if weight_decay:
            torch._foreach_mul_(list(weights), 1 - lr * weight_decay)
        torch._foreach_add_(list(weights), ways, alpha=-lr)
