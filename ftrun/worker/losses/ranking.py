"""Losses of a reward model's scores of a better and a worse reply, one value a pair."""

from __future__ import annotations

import torch
from torch.nn import functional


def bradley_terry(
    chosen_scores: torch.Tensor, rejected_scores: torch.Tensor, margin: torch.Tensor | None = None
) -> torch.Tensor:
    """Return how unlikely the preference is under the scores (https://arxiv.org/abs/2203.02155, equation 1).

    Args:
        chosen_scores: Of the better replies, of shape (B,).
        rejected_scores: Of the worse ones.
        margin: By how much the better score shall exceed the worse one (Llama 2, https://arxiv.org/abs/2307.09288,
            equation 2), of shape (B,); None for 0.
    """
    difference = chosen_scores.float() - rejected_scores.float()
    return -functional.logsigmoid(difference if margin is None else difference - margin)


def centering(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """Return how far the scores of a pair are from a mean of 0 (https://arxiv.org/abs/2312.09244, equation 2).

    Preferences say nothing of it, so that without this the scores may drift.
    """
    return (chosen_scores.float() + rejected_scores.float()) ** 2
