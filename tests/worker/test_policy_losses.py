"""The formulas of PPO by value, against examples worked by hand and against slow loops."""

from __future__ import annotations

import math

import pytest
import torch

from ftrun.worker.losses import policy
from ftrun.worker.losses.policy import KLController, Moments


def test_advantages_of_an_example_worked_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.25, 0.75]])
    advantages, returns = policy.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=0.5)
    # Errors from the end: 1 - 0.75 = 0.25; 0.75 - 0.25 = 0.5; 0.25 - 0.5 = -0.25. Each takes half of what follows.
    assert advantages.tolist() == [[0.0625, 0.625, 0.25]]
    assert returns.tolist() == [[0.5625, 0.875, 1.0]]


def slow_advantages(rewards, values, gamma, lam):
    """The sum over all later errors, for one reply."""
    ahead = [*values[1:], 0.0]
    errors = [r + gamma * later - now for r, later, now in zip(rewards, ahead, values, strict=True)]
    return [
        sum((gamma * lam) ** (later - at) * errors[later] for later in range(at, len(errors)))
        for at in range(len(errors))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_of_replies_of_several_lengths(gamma, lam):
    lengths = [5, 1, 3]
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 5, generator=generator)  # what stands in the padding must not count
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    advantages, returns = policy.gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, length in enumerate(lengths):
        mine = [matrix[row, :length].tolist() for matrix in (rewards, values)]
        expected = slow_advantages(*mine, gamma, lam)
        assert advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-5)
        assert returns[row, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, mine[1], strict=True)], abs=1e-5
        )
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_with_lam_1_returns_are_the_sums_of_later_rewards():
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[9.0, -3.0, 7.0]])
    _, returns = policy.gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), gamma=1.0, lam=1.0)
    assert returns.tolist() == [[7.0, 6.0, 4.0]]


def test_a_score_falls_to_the_last_token_and_the_kl_to_each():
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]])
    rewards = policy.token_rewards(torch.tensor([10.0, -5.0]), kl, torch.tensor([3, 1]), kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, -1.0, 8.5], [-7.0, 0.0, 0.0]]


def test_the_policy_loss_by_value():
    ratios = torch.tensor([1.0, 1.5, 1.5, 0.5, 0.5])
    advantages = torch.tensor([2.0, 2.0, -2.0, 2.0, -2.0])
    losses, clipped = policy.clipped_policy_loss(ratios.log(), torch.zeros(5), advantages, 0.2)
    # Gains are cut off beyond the range, losses are not.
    assert losses.tolist() == pytest.approx([-2.0, -2.4, 3.0, -1.0, 1.6])
    assert clipped.tolist() == [False, True, False, False, True]


def test_the_gradient_of_the_policy_loss_is_the_policy_gradient_at_first_and_none_where_it_is_clipped():
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    advantages = torch.tensor([3.0, -4.0, 1.0])
    old = torch.tensor([-1.0, -2.0, -2.0])  # the last has become far likelier, and was good
    policy.clipped_policy_loss(logps, old, advantages, 0.2)[0].sum().backward()
    assert logps.grad.tolist() == pytest.approx([-3.0, 4.0, 0.0])


def test_the_value_loss_by_value():
    values, old = torch.tensor([1.0, 1.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])
    losses, clipped = policy.clipped_value_loss(values, old, torch.tensor([3.0, 2.0, 2.0]), 0.5)
    # 1 - 3; then 0.5 - 2 instead of 1 - 2; then 0.5 - 2 instead of 3 - 2.
    assert losses.tolist() == [2.0, 1.125, 1.125]
    assert clipped.tolist() == [False, True, True]


def test_both_estimates_of_the_kl_are_right_on_average():
    logits, other = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    mine, reference = logits.log_softmax(0), other.log_softmax(0)
    exact = float((mine.exp() * (mine - reference)).sum())
    for estimate in (policy.kl_k1, policy.kl_k3):
        assert float((mine.exp() * estimate(mine, reference)).sum()) == pytest.approx(exact, abs=1e-6)
    assert (policy.kl_k3(mine, reference) >= 0).all()
    assert (policy.kl_k1(mine, reference) < 0).any()
    assert float(policy.kl_k3(torch.tensor(-1.0), torch.tensor(-2.0))) == pytest.approx(math.exp(-1.0) - 1.0 + 1.0)


def test_the_weight_of_the_kl_follows_its_target():
    controller = KLController(0.2, target=6.0, horizon=1000)
    controller.update(6.6, 100)  # a tenth too much: up by a tenth of a tenth
    assert controller.coef == pytest.approx(0.2 * 1.01)
    controller.update(600.0, 100)  # never by more than a fifth of a tenth
    assert controller.coef == pytest.approx(0.2 * 1.01 * 1.02)
    controller.update(0.0, 100)
    assert controller.coef == pytest.approx(0.2 * 1.01 * 1.02 * 0.98)


def test_a_weight_without_a_target_stays():
    controller = KLController(0.2)
    controller.update(600.0, 100)
    assert controller.coef == 0.2


def test_moments_of_parts_are_those_of_the_whole():
    values = 1e3 + torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = Moments()
    for part in values.split([1, 0, 400, 599]):
        found = found.with_more(Moments.of(part))
    assert found.count == 1000
    assert found.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert found.variance == pytest.approx(float(values.var(correction=0)), rel=1e-9)


def test_moments_over_processes_are_those_of_all_values():
    mine, others = torch.tensor([1.0, 2.0]), torch.tensor([4.0, 9.0, 4.0])
    everything = torch.cat([mine, others])
    # What the other process adds to the sums: of the values first, then of the squares around the mean of all.
    further = iter([[3.0, 17.0], [float((others - everything.mean()).square().sum())]])
    found = Moments.of(mine, lambda sums: [a + b for a, b in zip(sums, next(further), strict=True)])
    assert (found.count, found.mean, found.variance) == pytest.approx((5, 4.0, float(everything.var(correction=0))))


def test_whitened_values_have_the_wanted_mean_and_spread():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0])
    moments = Moments.of(values)
    white, kept = moments.whitened(values), moments.whitened(values, shift_mean=False)
    for found, mean in ((white, 0.0), (kept, 3.0)):
        assert float(found.mean()) == pytest.approx(mean, abs=1e-6)
        assert float(found.std(correction=0)) == pytest.approx(1.0)
    assert Moments.of(torch.full((3,), 5.0)).whitened(torch.full((3,), 5.0)).tolist() == [0.0, 0.0, 0.0]
    assert Moments.of(torch.zeros(0)).whitened(torch.zeros(0)).tolist() == []
