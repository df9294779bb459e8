"""The search for the subspace in which most of a matrix lies: exactly, or at a small part of that cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ftrun.errors import RunFailed

if TYPE_CHECKING:
    from ftrun_plugins.optimizer._projected import Method

_OVERSAMPLING = 16
"""Directions that a search carries beyond those asked for: the last of these are then found as well as the first."""


def leading(matrix: Tensor, rank: int, method: Method, start: Tensor | None = None, seed: int = 0) -> Tensor:
    """Return an orthonormal basis of the space that a matrix's largest left singular vectors span.

    All methods order it by singular values, so that a coordinate keeps its meaning as well as the spectrum allows.

    Args:
        matrix: ``(..., rows, columns)``: one matrix, or a batch of them. For the right space, pass its ``mT``.
        rank: Size of the basis, at most the smaller side.
        method: ``svd`` decomposes the matrix. ``randomized`` starts from random directions in each search
            (https://arxiv.org/abs/0909.4061), ``subspace`` from the last basis.
        start: The last basis. A new one found by search points the way that the last one did, vector by vector.
        seed: Of random directions, which are drawn from no common generator.

    Returns:
        ``(..., rows, rank)`` in float32.

    Raises:
        RunFailed: The matrix is not finite.
    """
    matrix = matrix.float()
    try:
        basis = _leading(matrix, rank, method, start, seed)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise RunFailed("a gradient is not finite, so it has no leading subspace") from error
    if start is None:
        return basis
    # Of several matrices, experts for one, some may have no gradient in this step: they keep what they have.
    is_zero = matrix.abs().amax((-2, -1), keepdim=True) == 0
    return torch.where(is_zero, start.float(), basis)


def _leading(matrix: Tensor, rank: int, method: Method, start: Tensor | None, seed: int) -> Tensor:
    if method == "svd":
        return _svd(matrix, rank)
    width = min(rank + _OVERSAMPLING, *matrix.shape[-2:])
    if 2 * width >= min(matrix.shape[-2:]):
        basis = _of_gram(matrix, rank)
    else:
        known = start.float() if start is not None and method == "subspace" else matrix[..., :0]
        drawn = matrix @ _random(matrix, width - known.shape[-1], seed)
        basis = _searched(matrix, rank, torch.cat([known, drawn], -1))
    if start is not None:
        basis.mul_(torch.where((basis * start).sum(-2, keepdim=True) < 0, -1.0, 1.0))
    return basis


def _svd(matrix: Tensor, rank: int) -> Tensor:
    """Decompose the matrix as it lies in memory: the signs of its singular vectors depend on that."""
    if matrix.is_contiguous():
        return torch.linalg.svd(matrix, full_matrices=False)[0][..., :rank].contiguous()
    return torch.linalg.svd(matrix.mT, full_matrices=False)[2][..., :rank, :].mT.contiguous()


def _of_gram(matrix: Tensor, rank: int) -> Tensor:
    """Return the basis from the eigenvectors of the smaller Gram matrix: cheapest where few directions are left out."""
    rows, columns = matrix.shape[-2:]
    if rows <= columns:
        return _last(matrix @ matrix.mT, rank)
    return torch.linalg.qr(matrix @ _last(matrix.mT @ matrix, rank))[0]


def _searched(matrix: Tensor, rank: int, basis: Tensor) -> Tensor:
    """Turn a basis towards the leading space, and within that into singular vectors."""
    across = torch.linalg.qr(matrix.mT @ basis)[0]
    basis, inner = torch.linalg.qr(matrix @ across)
    return basis @ _last(inner @ inner.mT, rank)


def _last(gram: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors of the largest eigenvalues, largest first."""
    return torch.linalg.eigh(gram)[1][..., -rank:].flip(-1)


def _random(matrix: Tensor, width: int, seed: int) -> Tensor:
    generator = torch.Generator(matrix.device).manual_seed(seed)
    shape = (*matrix.shape[:-2], matrix.shape[-1], width)
    return torch.randn(shape, generator=generator, device=matrix.device)
