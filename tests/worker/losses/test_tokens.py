"""Losses of tokens: values against formulas in numpy, gradients against differences of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from ftrun.worker.losses import tokens

Array = Any
SIZE, VOCABULARY = 4, 30
LOGITS = np.random.default_rng(0).normal(0, 2, (SIZE, VOCABULARY))
REFERENCE = np.random.default_rng(1).normal(0, 2, (SIZE, VOCABULARY))
TARGETS = np.array([3, 29, 0, 11])


def log_softmax(logits: Array) -> Array:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def surprise(logits: Array) -> Array:
    return -log_softmax(logits)[np.arange(SIZE), TARGETS]


def smoothed(logits: Array) -> Array:
    return 0.9 * surprise(logits) + 0.1 * -log_softmax(logits).mean(-1)


def dft(logits: Array, at: Array = LOGITS) -> Array:
    """With the factor, through which no gradient goes, taken at fixed logits."""
    return surprise(logits) * np.exp(-surprise(at))


def eaft(logits: Array, at: Array = LOGITS) -> Array:
    largest = -np.sort(-at, axis=-1)[:, :20]
    p = np.exp(log_softmax(largest))
    return surprise(logits) * (-(p * np.log(p)).sum(-1) / 3.0) ** 1.5


def asft(logits: Array, at: Array = LOGITS) -> Array:
    reference, policy = log_softmax(REFERENCE), log_softmax(logits)
    return dft(logits, at) + 0.2 * (np.exp(reference) * (reference - policy)).sum(-1)


LOSSES: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., Array]]] = {
    "nll": (tokens.nll, surprise),
    "smoothed": (lambda logits, targets: tokens.smoothed(logits, targets, label_smoothing=0.1), smoothed),
    "dft": (tokens.dft, dft),
    "eaft": (lambda logits, targets: tokens.eaft(logits, targets, alpha=1.5), eaft),
    "asft": (lambda logits, targets: tokens.asft(logits, targets, torch.tensor(REFERENCE), alpha=0.2), asft),
}


@pytest.mark.parametrize("name", LOSSES)
def test_equals_its_formula(name):
    loss, formula = LOSSES[name]
    found = loss(torch.tensor(LOGITS), torch.tensor(TARGETS))
    assert found.shape == (SIZE,)
    np.testing.assert_allclose(found.numpy(), formula(LOGITS), rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_equals_differences_of_the_formula(name):
    loss, formula = LOSSES[name]
    logits = torch.tensor(LOGITS).requires_grad_()
    loss(logits, torch.tensor(TARGETS)).sum().backward()
    expected = np.zeros_like(LOGITS)
    for place in np.ndindex(*LOGITS.shape):
        moved = np.zeros_like(LOGITS)
        moved[place] = 1e-5
        expected[place] = (formula(LOGITS + moved).sum() - formula(LOGITS - moved).sum()) / 2e-5
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_smoothing_equals_that_of_transformers():
    logits, targets = torch.tensor(LOGITS), torch.tensor(TARGETS)
    expected = LabelSmoother(epsilon=0.1)({"logits": logits}, targets)
    torch.testing.assert_close(tokens.smoothed(logits, targets, label_smoothing=0.1).mean(), expected)
    torch.testing.assert_close(tokens.smoothed(logits, targets, label_smoothing=0.0), tokens.nll(logits, targets))


def test_even_odds_by_hand():
    """Four tokens, equally likely: a surprise of ln 4, a probability of 1/4, an entropy of ln 4."""
    logits, targets = torch.zeros(1, 4), torch.tensor([2])
    four = math.log(4)
    assert tokens.nll(logits, targets).item() == pytest.approx(four)
    assert tokens.smoothed(logits, targets, label_smoothing=0.3).item() == pytest.approx(four)
    assert tokens.dft(logits, targets).item() == pytest.approx(four / 4)
    assert tokens.eaft(logits, targets).item() == pytest.approx(four * four / 3)
    assert tokens.eaft(logits, targets, alpha=0.0).item() == pytest.approx(four)
    assert tokens.asft(logits, targets, logits, alpha=7.0).item() == pytest.approx(four / 4)
    certain = torch.tensor([[math.log(2), 0.0, 0.0, 0.0]])  # 2/5 and three times 1/5
    divergence = 0.4 * math.log(0.4 / 0.25) + 0.6 * math.log(0.2 / 0.25)
    assert tokens.asft(logits, targets, certain, alpha=1.0).item() == pytest.approx(four / 4 + divergence)


def test_a_model_that_is_sure_of_something_else_learns_nothing_by_eaft():
    logits = torch.full((1, 30), -200.0)
    logits[0, 0] = 200.0
    assert tokens.eaft(logits, torch.tensor([5])).item() == 0.0
    assert tokens.nll(logits, torch.tensor([5])).item() == 400.0
