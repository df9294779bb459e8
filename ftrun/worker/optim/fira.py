"""Fira as a rule: GaLore's update, and beside it the rest of the gradient, scaled as GaLore scales its part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ftrun.worker.optim.galore import GaLore, add_product
from ftrun.worker.optim.norm_growth import limit, norm, scaling
from ftrun.worker.optim.ruled import State, States, Tensors

_NOTHING = 1e-4
"""Share of the square of a gradient's norm below which its rest counts as none, from which growth has no limit. A short
batch has a gradient of low rank, of which a new basis leaves hardly anything but rounding; limited to a hundredth of
growth a step from there, the rest of later gradients would be lost for good."""


@dataclass(frozen=True, kw_only=True)
class Fira(GaLore):
    """Adds to GaLore's update what the projection leaves of the gradient (https://arxiv.org/abs/2410.01623).

    Of that rest ``G - P R``, with ``R = P^T G``, a column is multiplied by how much longer the same column of the inner
    optimizer's direction is than that of R. One side is projected; full projection has no such columns.
    """

    tensorwise: bool
    """Whether a matrix has one factor, rather than each of its columns."""

    growth: float
    """How much longer the scaled rest may be than in the step before; 0 sets no limit."""

    def start(self, weight: Tensor, number: int = 0) -> State:
        """GaLore's, and the norm of the last rest of each matrix."""
        return {**super().start(weight, number), "last": torch.zeros(*weight.shape[:-2], 1, 1, device=weight.device)}

    def update(self, weights: Tensors, grads: Tensors, states: States, *, lr: float, weight_decay: float) -> None:
        """Make the update of each weight in the place of its gradient, and add it."""
        for weight, grad, state in zip(weights, grads, states, strict=True):
            if self._is_due(state):
                self._choose_bases(grad, state)
            state["count"] += 1
            self._make_update(grad, state)
            if weight_decay:
                weight.mul_(1 - lr * weight_decay)
            weight.add_(grad, alpha=lr * self.scale)

    def _make_update(self, grad: Tensor, state: State) -> None:
        """Turn a gradient into the way to go, ``P way - limit * factors * (G - P R)``, with two products.

        That is ``P (way + limit * factors * R) - limit * factors * G``. P is orthonormal, so the square of the rest's
        norm is what that of G has more than that of R.
        """
        left = "left" in state
        basis = state["left" if left else "right"]
        projected = basis.mT @ grad if left else grad @ basis
        way = self.inner.direction(projected, state)
        # As rows: what has one factor each.
        whole, part, turned = (grad.mT, projected.mT, way.mT) if left else (grad, projected, way)
        factors = scaling(turned, part, together=self.tensorwise).to(grad.dtype)
        whole.mul_(factors)
        part.mul_(factors)
        if self.growth:
            square = norm(whole).square_()
            rest = square - norm(part).square_()
            rest = rest.where(rest > _NOTHING * square, 0.0).sqrt_()
            factor = limit(rest, state["last"], self.growth).to(grad.dtype)
            whole.mul_(factor)
            part.mul_(factor)
        way.add_(projected)
        first, second = (basis, way) if left else (way, basis.mT)
        add_product(grad, first, second, beta=-1.0, alpha=1.0)
