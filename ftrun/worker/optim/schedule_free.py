"""Schedule-free AdamW: a rule that trains at one point and ends with another, the mean of where it has been."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ftrun.worker.optim.ruled import Rule, Ruled, State, States, Tensors


@dataclass(frozen=True)
class ScheduleFree(Rule):
    """Schedule-free AdamW (https://arxiv.org/abs/2405.15682).

    Adam without a first moment moves z. The run's result is x, a weighted mean of all z so far. Gradients are taken at
    y = (1 - beta1) z + beta1 x, which is what the weight holds; x follows from y and z and is not kept.

    The share of a new z in x falls below what the eight bits of bfloat16 can add to a number, so z and the moment are
    float32 whatever the weight is, and beside a weight of fewer bits y is kept in float32, too.
    """

    elementwise = True
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    r: float = 0.0
    weight_lr_power: float = 2.0

    def start(self, weight: Tensor, number: int = 0) -> State:
        """Begin with x, y and z where the weight is."""
        z = weight.to(torch.float32, copy=True)
        state = {"step": 0, "lr_max": 0.0, "weight_sum": 0.0, "z": z, "exp_avg_sq": torch.zeros_like(z)}
        return state if weight.dtype is torch.float32 else state | {"y": z.clone()}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Move z by Adam's step, and y by what that changes in x and z."""
        for weight, grad, state in zip(weights, grads, states, strict=True):
            share = self._share(state, lr)
            y, z, square = state.get("y", weight), state["z"], state["exp_avg_sq"]
            way = grad.to(z.dtype)
            square.mul_(self.beta2).addcmul_(way, way, value=1 - self.beta2)
            root = (square / (1 - self.beta2 ** state["step"])).sqrt_().add_(self.eps)
            way = torch.div(way, root, out=root).add_(y, alpha=weight_decay)
            y.lerp_(z, share).sub_(way, alpha=lr * (1 - self.beta1 * (1 - share)))
            z.sub_(way, alpha=lr)
            if y is not weight:
                weight.copy_(y)

    def _share(self, state: State, lr: float) -> float:
        """Count the step, and return what the new z counts in x: all at first, then ever less."""
        state["step"] += 1
        state["lr_max"] = max(lr, state["lr_max"])
        counts = state["step"] ** self.r * state["lr_max"] ** self.weight_lr_power
        state["weight_sum"] += counts
        return counts / state["weight_sum"] if counts else 0.0

    def average(self, weight: Tensor, state: State) -> Tensor:
        """Return x."""
        return torch.lerp(state.get("y", weight), state["z"], 1 - 1 / self.beta1)


class Averaging(Ruled):
    """Applies the rule, and shows what it comes to."""

    averages = True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While inside, the weights are x: what is evaluated, and what a run ends with.

        What they are in training is kept beside, a second copy of them, and put back as it was: nothing that is
        computed inside changes the steps that follow. Outside, a checkpoint holds y and z, from which it all goes on.
        """
        kept = [(weight, weight.detach().clone()) for weight in self.state]
        with torch.no_grad():
            for group in self.param_groups:
                rule = self.rules[group["rule"]]
                assert isinstance(rule, ScheduleFree)
                for weight in group["params"]:
                    if weight in self.state:
                        weight.copy_(rule.average(weight, self.state[weight]))
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, trained in kept:
                    weight.copy_(trained)
