"""APOLLO as a rule: the gradient itself, scaled by what Adam makes of a small projection of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ftrun.worker.optim.adamw import AdamW
from ftrun.worker.optim.norm_growth import limit, norm, scaling
from ftrun.worker.optim.ruled import Rule, State, States, Tensors
from ftrun.worker.optim.subspace import leading

if TYPE_CHECKING:
    from ftrun_plugins.optimizer._projected import Method


@dataclass(frozen=True, kw_only=True)
class Apollo(Rule):
    """APOLLO, and APOLLO-Mini at rank 1 with one factor a matrix (https://arxiv.org/abs/2412.05270).

    Adam's moments are kept of ``R = P G`` only, where P has ``rank`` rows. A column of G is multiplied by how much
    longer the same column of Adam's direction is than that of R. P is random and known by its seed, so a state is two
    moments of R, and a few numbers. A weight is a matrix, or several with leading dimensions.
    """

    rank: int
    update_interval: int = 200
    """Steps for which P stays."""

    scale: float | None = None
    """Its root multiplies updates. None: the projected side over the rank. A column of Adam's direction has ``rank``
    entries of about one, where that of the whole gradient would have as many as that side is long."""

    tensorwise: bool = False
    """Whether a matrix has one factor, rather than each of its columns."""

    left: bool | None = None
    """Whether P comes from the left and columns are scaled, or from the right and rows are. None: the shorter side is
    the one that is projected."""

    growth: float = 1.01
    """How much longer an update may be than the one before; 0 sets no limit."""

    method: Method | None = None
    """How the gradient's leading subspace is found, onto which P projects and which a state then keeps. None: P is
    drawn."""

    seed: int = 0
    adam: AdamW
    _drawn: dict[tuple[int, torch.device, torch.dtype], tuple[tuple[int, int], Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """For each length of a side the projection in use, and the seed and number of its draw. All matrices of one length
    share it: each needs a random one, but none of its own. No part of a state, since it is drawn again when missing."""

    def start(self, weight: Tensor, number: int = 0) -> State:
        """Two moments of R, Adam's count and ours, a seed, the norm of the last update, and a basis if one is kept."""
        rows = self._rows(weight)
        moments = self.adam.start(weight.new_empty(*rows.shape[:-1], self.rank))
        last = torch.zeros(*rows.shape[:-2], 1, 1, device=weight.device)
        state = {**moments, "last": last, "steps": 0, "seed": self.seed}
        if self.method is not None:
            state["basis"] = weight.new_zeros(*rows.shape[:-2], rows.shape[-1], self.rank)
        return state

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Update one weight after the other."""
        for weight, grad, state in zip(weights, grads, states, strict=True):
            if weight_decay:
                weight.mul_(1 - lr * weight_decay)
            self._update(self._rows(weight), self._rows(grad), state, lr)

    def _update(self, weight: Tensor, grad: Tensor, state: State, lr: float) -> None:
        projected = grad @ self._projection(grad, state)
        factors = scaling(self.adam.direction(projected, state), projected, together=self.tensorwise)
        # In place: another matrix of the gradient's size is what this rule is there to avoid.
        grad.mul_(factors.to(grad.dtype))
        step = -lr * self._alpha(grad.shape[-1])
        if self.growth:
            factor = limit(norm(grad), state["last"], self.growth)
            weight.addcmul_(grad, factor.to(grad.dtype), value=step)
        else:
            weight.add_(grad, alpha=step)
        state["steps"] += 1

    def _rows(self, matrix: Tensor) -> Tensor:
        """Return a view of which each row gets a factor, and whose columns are projected."""
        rows, columns = matrix.shape[-2:]
        left = rows < columns if self.left is None else self.left
        return matrix.mT if left else matrix

    def _alpha(self, size: int) -> float:
        return math.sqrt(size / self.rank if self.scale is None else self.scale)

    def _projection(self, grad: Tensor, state: State) -> Tensor:
        """Return P, which the columns of the gradient are projected by: ``(columns, rank)``."""
        steps = state["steps"]
        if self.method is not None:
            if steps % self.update_interval == 0:
                last = state["basis"] if steps else None
                state["basis"] = leading(grad.mT, self.rank, self.method, last).to(grad.dtype)
            return cast(Tensor, state["basis"])
        size, draw = grad.shape[-1], (state["seed"], steps // self.update_interval)
        place = (size, grad.device, grad.dtype)
        drawn, projection = self._drawn.get(place, (None, None))
        if drawn != draw or projection is None:
            projection = gaussian(size, self.rank, *draw, grad.device).to(grad.dtype)
            self._drawn[place] = (draw, projection)
        return projection


def gaussian(size: int, rank: int, seed: int, number: int, device: torch.device) -> Tensor:
    """Draw a projection from ``size`` to ``rank`` dimensions, which keeps the lengths of vectors on average.

    A kind of device draws the same again, and another one something else.
    """
    generator = torch.Generator(device).manual_seed(seed * 1_000_003 + number)
    return torch.randn(size, rank, generator=generator, device=device).div_(math.sqrt(rank))
