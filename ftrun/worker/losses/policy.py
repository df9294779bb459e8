"""Proximal policy optimization as formulas: rewards and advantages of tokens, clipped losses, the weight of the KL.

Tokens of replies stand either in matrices of shape (B, T), one reply a row, filled up on the right, or all behind one
another, of shape (N,).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

OverProcesses = Callable[[list[float]], list[float]]
"""Returns each value summed over all processes."""

_SMALLEST = 1e-8
"""Added to a variance before it divides."""


@dataclass(frozen=True)
class Moments:
    """Mean and spread of values of which no more is kept."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of the squared distances from the mean."""

    @classmethod
    def of(cls, values: torch.Tensor, over_processes: OverProcesses = list) -> Moments:
        """Return those of the values of all processes; first the mean, so that none is lost to rounding."""
        values = values.double()
        count, total = over_processes([float(len(values)), float(values.sum())])
        mean = total / count if count else 0.0
        (squares,) = over_processes([float((values - mean).square().sum())])
        return cls(count, mean, squares)

    @property
    def variance(self) -> float:
        """The mean squared distance from the mean; 0 of no values."""
        return self.squares / self.count if self.count else 0.0

    @property
    def std(self) -> float:
        """The square root of the variance."""
        return self.variance**0.5

    def with_more(self, other: Moments) -> Moments:
        """Return those of both sets of values together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return Moments(count, mean, self.squares + other.squares + apart**2 * self.count * other.count / count)

    def whitened(self, values: torch.Tensor, *, shift_mean: bool = True) -> torch.Tensor:
        """Return values divided by this standard deviation, with mean 0 or the mean that they had."""
        white = (values - self.mean) * (self.variance + _SMALLEST) ** -0.5
        return white if shift_mean else white + self.mean


@dataclass
class KLController:
    """The weight of the KL penalty: fixed, or moved so that the KL comes to a target.

    The moving one is that of https://arxiv.org/abs/1909.08593, section 2.2.
    """

    coef: float
    target: float | None = None
    """Nats a reply."""

    horizon: float = 10_000.0
    """Replies in which the weight at most changes by a fifth of itself, compounded."""

    def update(self, kl: float, count: float) -> None:
        """Take in the mean KL of ``count`` replies that were penalised with the present weight."""
        if self.target is not None:
            error = min(max(kl / self.target - 1.0, -0.2), 0.2)
            self.coef *= 1.0 + error * count / self.horizon


def kl_k1(logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the log-ratio of each token: right on average, and negative for some tokens."""
    return logps - reference


def kl_k3(logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return an estimate of each token's KL that is right on average and never negative.

    http://joschu.net/blog/kl-approx.html
    """
    return torch.expm1(reference - logps) - (reference - logps)


def token_rewards(scores: torch.Tensor, kl: torch.Tensor, lengths: torch.Tensor, kl_coef: float) -> torch.Tensor:
    """Return the reward of each token, of shape (B, T): the KL's penalty, and at a reply's last token its score.

    Args:
        scores: Of each reply, of shape (B,).
        kl: Of each token, of shape (B, T).
        lengths: Tokens of each reply, at least 1, of shape (B,).
        kl_coef: Weight of the KL.
    """
    rewards = -kl_coef * kl
    rewards[torch.arange(len(scores)), lengths - 1] += scores
    return rewards


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages and returns of each token (https://arxiv.org/abs/1506.02438, equation 16), of shape (B, T).

    What comes after a reply's last token is worth nothing, whether the reply ended or was cut off.

    Args:
        rewards: Of shape (B, T).
        values: What the value model expects from each token on, of shape (B, T).
        mask: True where there is a token.
        gamma: What a reward loses with each token that it is away.
        lam: 0 for the error of one step, 1 for the sum of all rewards; between, less bias with more variance.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    ahead = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(ahead)
    for at in reversed(range(rewards.shape[1])):
        error = rewards[:, at] + gamma * next_value - values[:, at]
        ahead = (error + gamma * lam * ahead) * mask[:, at]
        advantages[:, at], next_value = ahead, values[:, at]
    return advantages, (advantages + values) * mask


def clipped_policy_loss(
    logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of each token (https://arxiv.org/abs/1707.06347, equation 7), and where the clipped one counts.

    All arguments but the last, and both results, are of shape (N,).
    """
    ratio = (logps - old_logps).exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    return torch.maximum(plain, clipped), clipped > plain


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return half the squared error of each value, of shape (N,), and where the clipped one counts.

    A value that has moved further than ``clip_range`` from the old one is judged as if it had moved just so far, if
    that is worse.
    """
    near = torch.clamp(values, old_values - clip_range, old_values + clip_range)
    plain, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(plain, clipped), clipped > plain
