"""Losses of single replies: values by hand, by the formula, and by TRL's own code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ftrun.worker.losses import feedback

RATIOS = torch.tensor([1.2, -0.4, 3.0, 0.3, -2.0], dtype=torch.float64)
GOOD = torch.tensor([True, False, False, True, True])
WEIGHTS = {"desirable_weight": 1.3, "undesirable_weight": 0.7}


def value(ratio: float, good: bool, kl: float, beta: float) -> float:
    """How far the reply's value is from the largest, written as the paper writes it."""
    if good:
        return 1.3 * (1 - 1 / (1 + math.exp(-beta * (ratio - kl))))
    return 0.7 * (1 - 1 / (1 + math.exp(-beta * (kl - ratio))))


@pytest.mark.parametrize("kl", [0.0, 0.8, -0.5])
def test_kto_equals_its_formula(kl):
    found = feedback.kto(RATIOS, GOOD, torch.tensor(kl, dtype=torch.float64), beta=0.4, **WEIGHTS)
    rows = zip(RATIOS.tolist(), GOOD.tolist(), strict=True)
    expected = [value(ratio, good, max(kl, 0.0), 0.4) for ratio, good in rows]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_before_the_first_step_every_reply_counts_half():
    found = feedback.kto(torch.zeros(5), GOOD, torch.zeros(()), beta=0.1)
    assert found.tolist() == [0.5] * 5


def test_a_reply_by_hand():
    """A log-ratio of 3 above a divergence of 1, at beta 0.5: one e-fold."""
    kl = torch.tensor(1.0)
    good = feedback.kto(torch.tensor([3.0]), torch.tensor([True]), kl, beta=0.5)
    bad = feedback.kto(torch.tensor([3.0]), torch.tensor([False]), kl, beta=0.5)
    assert good.item() == pytest.approx(1 / (1 + math.e))
    assert bad.item() == pytest.approx(math.e / (1 + math.e))


def test_gradient_is_that_of_the_ratio_alone():
    ratios = RATIOS.clone().requires_grad_()
    kl = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    feedback.kto(ratios, GOOD, kl, beta=0.4, **WEIGHTS).sum().backward()
    assert kl.grad is None
    step = 1e-6
    differences = [
        (value(ratio + step, good, 0.8, 0.4) - value(ratio - step, good, 0.8, 0.4)) / (2 * step)
        for ratio, good in zip(RATIOS.tolist(), GOOD.tolist(), strict=True)
    ]
    np.testing.assert_allclose(ratios.grad.numpy(), differences, rtol=1e-6)


def test_apo_zero_unpaired_is_the_paired_loss_split_in_two():
    """Its good half is 1 - sigmoid(reward), its bad half sigmoid(reward)."""
    found = feedback.apo_zero_unpaired(RATIOS, GOOD, beta=0.4)
    rewards = 1 / (1 + np.exp(-0.4 * RATIOS.numpy()))
    np.testing.assert_allclose(found.numpy(), np.where(GOOD.numpy(), 1 - rewards, rewards), rtol=1e-12)


def test_equals_the_lines_of_trl():
    """The lines of TRL 1.16's KTO trainer, on the two kinds of replies apart, with its sigmoid of float32."""
    ratios, beta, kl = RATIOS.float(), 0.4, torch.tensor(0.8)
    chosen = 1 - torch.sigmoid(beta * (ratios[GOOD] - kl))
    rejected = 1 - torch.sigmoid(beta * (kl - ratios[~GOOD]))
    expected = torch.cat((1.3 * chosen, 0.7 * rejected)).mean()
    torch.testing.assert_close(feedback.kto(ratios, GOOD, kl, beta=beta, **WEIGHTS).mean(), expected)


def test_stays_finite_and_exact_where_the_sigmoid_has_no_more_digits():
    found = feedback.kto(torch.tensor([40.0, 4000.0]), torch.tensor([True, True]), torch.zeros(()), beta=1.0)
    assert found[0].item() == pytest.approx(math.exp(-40), rel=1e-5)
    assert found.isfinite().all()
