"""The leading subspace of a matrix, against a full decomposition."""

from __future__ import annotations

import pytest
import torch

from ftrun.worker.optim.subspace import leading
from ftrun_plugins.optimizer._projected import Method

SEARCHES = [Method.randomized, Method.subspace]
SHAPES = [(96, 400), (400, 96), (30, 40), (3, 90, 120)]


def matrix(shape, decay=1.0, seed=0):
    """A matrix whose n-th singular value is ``n ** -decay``."""
    generator = torch.Generator().manual_seed(seed)
    *batch, rows, columns = shape
    size = min(rows, columns)
    left = torch.linalg.qr(torch.randn(*batch, rows, size, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(*batch, columns, size, generator=generator))[0]
    return (left * torch.arange(1, size + 1).float().pow(-decay)) @ right.mT


def energy(of, basis):
    return float((basis.mT @ of).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", Method)
def test_it_is_orthonormal_ordered_and_holds_what_can_be_held(shape, method):
    of = matrix(shape)
    basis = leading(of, 8, method, seed=3)
    assert basis.shape == (*shape[:-1], 8)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8).expand(*shape[:-2], 8, 8), atol=1e-5, rtol=0)
    best = torch.linalg.svd(of, full_matrices=False)[0][..., :8]
    assert energy(of, basis) > 0.999 * energy(of, best)
    # The coordinates are the singular vectors: orthogonal to each other, of the singular values' lengths, in order.
    lengths = torch.linalg.vector_norm(basis.mT @ of, dim=-1)
    torch.testing.assert_close(lengths, torch.arange(1, 9).pow(-1.0).expand_as(lengths), rtol=0.05, atol=0)


@pytest.mark.parametrize("method", SEARCHES)
def test_a_flat_spectrum_is_searched_as_well_as_can_be_wanted(method):
    of = matrix((256, 700), decay=0.5)
    basis = leading(of, 32, method, seed=3)
    best = torch.linalg.svd(of, full_matrices=False)[0][:, :32]
    assert energy(of, basis) > 0.97 * energy(of, best)


def test_the_last_basis_is_a_start_that_gets_better():
    of = matrix((256, 700), decay=0.25)
    found = [energy(of, basis := leading(of, 32, Method.randomized, seed=3))]
    for seed in range(3):
        basis = leading(of, 32, Method.subspace, basis, seed)
        found.append(energy(of, basis))
    assert found == sorted(found)
    best = torch.linalg.svd(of, full_matrices=False)[0][:, :32]
    assert found[0] < 0.95 * energy(of, best)
    assert found[-1] > 0.97 * energy(of, best)


@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("shape", [(96, 400), (30, 40)])
def test_a_new_basis_points_the_way_the_last_one_did(method, shape):
    of = matrix(shape)
    last = leading(of, 8, method, seed=1)
    for seed in range(5):
        basis = leading(of + 1e-3 * matrix(shape, seed=seed + 1), 8, method, -last if seed % 2 else last, seed)
        products = (basis * last).sum(-2)
        assert bool((products > 0.9).all() if seed % 2 == 0 else (products < -0.9).all())


@pytest.mark.parametrize("method", SEARCHES)
def test_the_seed_says_all_and_nothing_else_is_drawn(method):
    of = matrix((96, 400))
    before = torch.get_rng_state()
    one, again, other = (leading(of, 8, method, seed=seed) for seed in (5, 5, 6))
    assert bool((one == again).all())
    assert bool((one != other).any())
    assert bool((torch.get_rng_state() == before).all())


@pytest.mark.parametrize("method", Method)
def test_the_right_space_is_that_of_the_transpose(method):
    of = matrix((96, 400))
    basis = leading(of.mT, 8, method)
    best = torch.linalg.svd(of, full_matrices=False)[2][:8].mT
    torch.testing.assert_close((basis.mT @ best).abs(), torch.eye(8), atol=0.05, rtol=0)


def test_a_decomposition_has_the_signs_of_the_matrix_as_it_lies():
    of = matrix((50, 70))
    left, _, right = torch.linalg.svd(of, full_matrices=False)
    assert bool((leading(of, 8, Method.svd) == left[:, :8]).all())
    assert bool((leading(of.mT, 8, Method.svd) == right[:8].mT).all())


@pytest.mark.parametrize("method", Method)
def test_half_precision_and_nothing_at_all(method):
    of = matrix((96, 400)).bfloat16()
    basis = leading(of, 8, method)
    assert basis.dtype == torch.float32
    torch.testing.assert_close(basis.mT @ basis, torch.eye(8), atol=1e-5, rtol=0)
    assert bool(leading(of * 0, 8, method, basis.bfloat16()).isfinite().all())
