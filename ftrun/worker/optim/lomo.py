"""LOMO and AdaLOMO: rules with next to no state, for updates in the backward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftrun.worker.optim import factored
from ftrun.worker.optim.ruled import Rule, State, States, Tensors


@dataclass(frozen=True)
class Lomo(Rule):
    """Gradient descent without a state (https://arxiv.org/abs/2306.09782), computed in float32."""

    elementwise = True

    def start(self, weight: Tensor, number: int = 0) -> State:
        """Nothing."""
        return {}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Go against the gradient."""
        for weight, grad in zip(weights, grads, strict=True):
            exact = weight.float()  # the weight itself, where it is float32 already
            exact.mul_(1 - lr * weight_decay).sub_(grad.float(), alpha=lr)
            weight.copy_(exact)


@dataclass(frozen=True)
class AdaLomo(Rule):
    """Adafactor's second moment without a first, in steps as large as the weights (https://arxiv.org/abs/2310.10195).

    A matrix keeps the means of its rows' and columns' squared gradients only, so the state is hardly any memory.
    """

    decay_rate: float = 0.8
    clip_threshold: float = 1.0
    eps: float = 1e-3

    def start(self, weight: Tensor, number: int = 0) -> State:
        """A number a row and a column; of a vector, one an element. In float32."""
        if weight.ndim >= 2:
            return {"step": 0, **factored.start(weight)}
        return {"step": 0, "exp_avg_sq": torch.zeros_like(weight, dtype=torch.float32)}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Take a step whose root mean square is at most ``clip_threshold`` times that of the weight."""
        for weight, grad, state in zip(weights, grads, states, strict=True):
            state["step"] += 1
            way = self._normalised(grad.float(), state)
            way.div_((_rms(way) / self.clip_threshold).clamp_(min=1.0))
            exact = weight.float()  # the weight itself, where it is float32 already
            way.mul_(_rms(exact).clamp_(min=self.eps))
            exact.mul_(1 - lr * weight_decay).sub_(way, alpha=lr)
            weight.copy_(exact)

    def _normalised(self, grad: Tensor, state: State) -> Tensor:
        """Take the gradient into the moments, and return it divided by the root of what they say of its square."""
        new = state["step"] ** -self.decay_rate  # what the newest square counts: all at first
        if "exp_avg_sq" not in state:
            return factored.normalised(grad, state, new)
        return state["exp_avg_sq"].lerp_(grad.square().add_(factored.TINY), new).rsqrt().mul_(grad)


def _rms(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor) / tensor.numel() ** 0.5
