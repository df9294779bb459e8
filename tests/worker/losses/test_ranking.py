"""Losses of scores: values by hand and by the formula, gradients by differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ftrun.worker.losses import ranking

BETTER = np.array([1.0, -0.5, 3.0, 0.2])
WORSE = np.array([0.0, 0.5, 3.0, -1.3])
MARGIN = np.array([0.0, 1.0, 2.0, 0.5])


def formula(better: np.ndarray, worse: np.ndarray, margin: float | np.ndarray = 0.0) -> np.ndarray:
    return -np.log(1 / (1 + np.exp(-(better - worse - margin))))


def test_bradley_terry_equals_its_formula():
    found = ranking.bradley_terry(torch.tensor(BETTER), torch.tensor(WORSE))
    np.testing.assert_allclose(found.numpy(), formula(BETTER, WORSE), rtol=1e-6)
    assert found[2].item() == pytest.approx(math.log(2))
    with_margin = ranking.bradley_terry(torch.tensor(BETTER), torch.tensor(WORSE), torch.tensor(MARGIN))
    np.testing.assert_allclose(with_margin.numpy(), formula(BETTER, WORSE, MARGIN), rtol=1e-6)
    assert with_margin[2].item() == pytest.approx(math.log(1 + math.exp(2)))


def test_gradient_pulls_the_scores_apart():
    better, worse = torch.tensor(BETTER).requires_grad_(), torch.tensor(WORSE).requires_grad_()
    ranking.bradley_terry(better, worse).sum().backward()
    step = 1e-6
    expected = (formula(BETTER + step, WORSE) - formula(BETTER - step, WORSE)) / (2 * step)
    np.testing.assert_allclose(better.grad.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(worse.grad.numpy(), -expected, rtol=1e-5)


def test_centering_is_the_square_of_the_sum():
    found = ranking.centering(torch.tensor(BETTER), torch.tensor(WORSE))
    np.testing.assert_allclose(found.numpy(), [1.0, 0.0, 36.0, 1.21], rtol=1e-6, atol=1e-12)


def test_is_computed_in_float32():
    scores = torch.tensor([2.0], dtype=torch.bfloat16)
    assert ranking.bradley_terry(scores, scores).dtype is torch.float32
    assert ranking.bradley_terry(-300 * scores, 300 * scores).isfinite().all()
