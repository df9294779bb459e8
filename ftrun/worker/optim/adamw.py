"""AdamW as a rule: what other rules compute in a smaller space, and what they leave the remaining weights to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ftrun.worker.optim.ruled import Rule, State, States, Tensors

_FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices for which torch has a fused kernel."""


def fused(weights: Sequence[Tensor]) -> bool:
    """Tell whether torch has a fused AdamW for these weights."""
    return all(weight.device.type in _FUSED for weight in weights)


@dataclass(frozen=True)
class AdamW(Rule):
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101), by torch's kernel."""

    elementwise = True
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def start(self, weight: Tensor, number: int = 0) -> State:
        """Two moments of the weight's shape and type."""
        return {
            "step": torch.zeros((), device=weight.device),
            "exp_avg": torch.zeros_like(weight),
            "exp_avg_sq": torch.zeros_like(weight),
        }

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Take torch's step."""
        adamw(
            list(weights),
            list(grads),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=fused(weights),
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def direction(self, grad: Tensor, state: State) -> Tensor:
        """Return what Adam would subtract from a weight at a rate of 1, with the sign turned: the way to go."""
        way = torch.zeros_like(grad)
        self.update([way], [grad], [state], lr=1.0, weight_decay=0.0)
        return way
