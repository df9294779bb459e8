"""A second moment of which only the means of rows and of columns are kept (https://arxiv.org/abs/1804.04235)."""

from __future__ import annotations

from torch import Tensor, float32

from ftrun.worker.optim.ruled import State

TINY = 1e-30
"""Added to squared gradients, so that a row without a gradient does not divide by zero; Adafactor's number."""


def start(matrix: Tensor) -> State:
    """Return the means of a ``(..., rows, columns)`` matrix, in float32: in bfloat16 they would soon cease to move."""
    *batch, rows, columns = matrix.shape
    empty = matrix.new_empty((), dtype=float32)
    return {"rows": empty.new_zeros(*batch, rows), "columns": empty.new_zeros(*batch, columns)}


def normalised(grad: Tensor, state: State, new: float) -> Tensor:
    """Take a gradient into the means, and return it divided by the root of what they say of its square.

    Args:
        grad: ``(..., rows, columns)``, in float32.
        state: Holds the means.
        new: What the newest square counts in them.
    """
    square = grad.square().add_(TINY)
    rows = state["rows"].lerp_(square.mean(-1), new)
    columns = state["columns"].lerp_(square.mean(-2), new)
    by_row = (rows / rows.mean(-1, keepdim=True)).rsqrt_().unsqueeze(-1)
    return (grad * by_row).mul_(columns.rsqrt().unsqueeze(-2))
