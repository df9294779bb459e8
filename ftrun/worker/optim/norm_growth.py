"""A limit on how fast updates grow, and the norms that it and the scaling of gradients need."""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-18
"""Least length that is divided by: the square of a shorter one would be lost in float32, and what all but vanishes
would be multiplied by the inverse of nothing."""


def norm(matrix: Tensor) -> Tensor:
    """Return the norm of each matrix in float32: ``(..., 1, 1)``."""
    return torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True, dtype=torch.float32)


def scaling(direction: Tensor, gradient: Tensor, *, together: bool = False) -> Tensor:
    """Return how much longer each row of a direction is than that of the gradient it was made of: ``(..., rows, 1)``.

    Args:
        direction: What an optimizer makes of the gradient.
        gradient: The gradient.
        together: Compare whole matrices: ``(..., 1, 1)``.
    """
    of = norm if together else _lengths
    return of(direction).div_(of(gradient).clamp_(min=_TINY))


def _lengths(rows: Tensor) -> Tensor:
    """Return the norm of each row. In whatever order they lie, this is several times as fast on a CPU as torch's."""
    return rows.float().square().sum(-1, keepdim=True).sqrt_()


def limit(length: Tensor, last: Tensor, growth: float) -> Tensor:
    """Return what to multiply an update by so that its norm grows at most by a factor, and remember what is left of it.

    The factor does not change when all updates are multiplied by one number, so it is the same whether they are scaled
    before or after it.

    Args:
        length: The update's norm.
        last: The norm of the update before, as it was limited; 0 where there was none. Becomes that of this one.
        growth: The largest factor.
    """
    factor = (growth * last / length).clamp_(max=1.0).where(last > 0, 1.0)
    last.copy_(length * factor)
    return factor
