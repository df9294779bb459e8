"""Losses of single tokens, from the logits of their positions; they are averaged elsewhere.

All take logits of shape (N, V) in float32 and targets of shape (N,), and return losses of shape (N,).
"""

from __future__ import annotations

import torch
from torch.nn import functional

_MOST_LIKELY = 20
"""Tokens whose share of the probability eaft looks at."""

_FULL_ENTROPY = 3.0
"""What counts as full entropy of them, in nats: nearly the logarithm of 20."""


def nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood in nats, also called cross-entropy."""
    return functional.cross_entropy(logits, targets, reduction="none")


def smoothed(logits: torch.Tensor, targets: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
    """Return the cross-entropy with a label of which ``label_smoothing`` is spread over the whole vocabulary.

    From https://arxiv.org/abs/1512.00567, section 7; the same as transformers' label smoother.
    """
    surprise = torch.logsumexp(logits, -1)
    right = surprise - logits.gather(-1, targets[:, None]).squeeze(-1)
    return (1 - label_smoothing) * right + label_smoothing * (surprise - logits.mean(-1))


def dft(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the likelihood's loss times the token's own probability (https://arxiv.org/abs/2508.05629).

    No gradient goes through the probability.
    """
    each = nll(logits, targets)
    return each * torch.exp(-each.detach())


def eaft(logits: torch.Tensor, targets: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    """Return the likelihood's loss times how undecided the model is (https://arxiv.org/abs/2601.02151).

    The factor is the entropy of the 20 most likely tokens, as a share of 3 nats, to the power ``alpha``; a higher power
    learns less where the model is sure of something else. No gradient goes through it.
    """
    with torch.no_grad():
        likely = torch.topk(logits, min(_MOST_LIKELY, logits.shape[-1]), sorted=False).values.log_softmax(-1)
        entropy = -(likely.exp() * likely).sum(-1).clamp(max=0)
        share = (entropy / _FULL_ENTROPY) ** alpha
    return nll(logits, targets) * share


def asft(
    logits: torch.Tensor, targets: torch.Tensor, reference_logits: torch.Tensor, *, alpha: float = 0.1
) -> torch.Tensor:
    """Return dft's loss plus ``alpha`` times the divergence of the policy from a reference, in nats.

    From https://arxiv.org/abs/2509.23753. The divergence is KL(reference || policy) over the vocabulary, as in
    LLaMA-Factory; no gradient goes through the reference.

    Args:
        logits: Of the policy.
        targets: The tokens.
        reference_logits: Of the reference, of shape (N, V).
        alpha: Weight of the divergence.
    """
    shared = min(logits.shape[-1], reference_logits.shape[-1])  # the rest is padding, which no token has
    policy = logits.log_softmax(-1)[:, :shared]
    reference = reference_logits.detach()[:, :shared].log_softmax(-1)
    divergence = (reference.exp() * (reference - policy)).sum(-1)
    return dft(logits, targets) + alpha * divergence
