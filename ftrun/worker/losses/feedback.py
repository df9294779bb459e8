"""Losses of single replies that were found good or bad, one value a reply."""

from __future__ import annotations

import torch


def kto(
    logratio: torch.Tensor,
    good: torch.Tensor,
    kl: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Return how far each reply's value is from the best there is (https://arxiv.org/abs/2402.01306).

    Args:
        logratio: How much more likely the policy makes the reply than the reference does, in nats, of shape (B,).
        good: Whether it was found good, of shape (B,).
        kl: How far the policy is from the reference, in nats: a scalar. What is below 0 counts as 0, and no gradient
            goes through it.
        beta: How steeply the value grows with the log-ratio.
        desirable_weight: Of the good replies.
        undesirable_weight: Of the bad ones.
    """
    above = beta * (logratio - kl.detach().clamp(min=0))
    return torch.where(good, desirable_weight * torch.sigmoid(-above), undesirable_weight * torch.sigmoid(above))


def apo_zero_unpaired(
    logratio: torch.Tensor,
    good: torch.Tensor,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """Return apo_zero's loss of single replies (https://arxiv.org/abs/2408.06266, equation 7): kto's without a kl."""
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto(logratio, good, logratio.new_zeros(()), beta=beta, **weights)
