"""A share of each weight's entries, which another share follows: BAdam with blocks that cut through the matrices."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ftrun.worker.optim.ruled import Rule, State, States, Tensors


@dataclass(frozen=True)
class Share(Rule):
    """Updates a share of a weight's entries for some steps, then the share after it, round and round."""

    rule: Rule
    """What they are updated by, as if they were a weight."""

    ratio: float
    """The share, of 1."""

    interval: Callable[[], int]
    """Gives the steps that a share has. It is asked when training begins."""

    scattered: bool
    """Whether a share is of entries from all over the weight, or of neighbours in memory."""

    seed: int
    """What the places of scattered entries follow from. Weights of one size have the same."""

    def start(self, weight: Tensor, number: int = 0) -> State:
        """The state of the first share, and how many steps there have been."""
        return self.rule.start(weight.detach().view(-1)[self.places(weight, 0)]) | {"steps": 0}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Update the entries whose turn it is."""
        for weight, grad, state in zip(weights, grads, states, strict=True):
            turn, step = divmod(state["steps"], self.interval())
            entries, where = weight.view(-1), self.places(weight, turn)
            part = entries[where]
            if turn and step == 0:
                state |= self.rule.start(part)
            self.rule.update([part], [grad.reshape(-1)[where]], [state], lr=lr, weight_decay=weight_decay)
            entries[where] = part
            state["steps"] += 1

    def places(self, weight: Tensor, turn: int) -> Tensor:
        """Return where the entries of a turn are in the flat weight.

        Scattered ones are a stride apart that has no divisor in common with the weight's size: so each entry is reached
        once in a round, and no order need be kept.
        """
        size = weight.numel()
        count = max(1, int(size * self.ratio))
        ranks = torch.arange(turn * count % size, turn * count % size + count, device=weight.device)
        return ranks * (_stride(size, self.seed) if self.scattered else 1) % size


def _stride(size: int, seed: int) -> int:
    """Return a number that has no divisor in common with ``size``."""
    draws = random.Random(f"{seed} {size}")  # noqa: S311
    while math.gcd(stride := draws.randint(1, max(1, size - 1)), size) > 1:
        pass
    return stride
