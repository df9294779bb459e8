"""Losses of pairs of a better and a worse reply, one value a pair, by the name that users type (`LOSSES`).

A log-ratio is how much more likely the policy makes a reply than the reference does, in nats; times beta, it is the
reply's implicit reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is known of B pairs, and the settings of the losses, most of which read only some of it.

    Log-probabilities are sums over the learned tokens of a reply, in nats, in float32, of shape (B,).
    """

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor | None = None
    """None for a loss that needs no reference."""

    reference_rejected: torch.Tensor | None = None
    whole_chosen: torch.Tensor | None = None
    """What ``policy_chosen`` is with a weight of 1 for every token; None where it is that itself."""

    whole_rejected: torch.Tensor | None = None
    chosen_length: torch.Tensor
    """Learned tokens of each better reply, of shape (B,)."""

    rejected_length: torch.Tensor
    beta: float = 0.1
    """How closely the policy stays to the reference; for simpo and cpo, how steep the loss is; for orpo, its weight."""

    label_smoothing: float = 0.0
    """Probability that a preference is the wrong way round, below 0.5."""

    gamma: float = 0.0
    """By how much the better reply's reward shall exceed the worse one's: of simpo."""

    tau: float = 0.05
    """At how large a margin discopop passes from one of its two forms to the other; smaller is more suddenly."""

    delta: float = 0.0
    """What bco takes off the rewards: their mean over training so far."""

    def __len__(self) -> int:
        return len(self.policy_chosen)

    def to(self, device: torch.device) -> Pairs:
        """Return the same on a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()
        }
        return Pairs(**moved)

    @property
    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The policy's log-probabilities of both replies, every token of which counts."""
        if self.whole_chosen is None or self.whole_rejected is None:
            return self.policy_chosen, self.policy_rejected
        return self.whole_chosen, self.whole_rejected

    @property
    def chosen_logratio(self) -> torch.Tensor:
        """The log-ratio of the better replies."""
        assert self.reference_chosen is not None, "this loss needs a reference"
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> torch.Tensor:
        """The log-ratio of the worse replies."""
        assert self.reference_rejected is not None, "this loss needs a reference"
        return self.policy_rejected - self.reference_rejected

    @property
    def margin(self) -> torch.Tensor:
        """How much the log-ratio of the better reply exceeds that of the worse one."""
        return self.chosen_logratio - self.rejected_logratio

    @property
    def chosen_mean(self) -> torch.Tensor:
        """The policy's mean log-probability of a token of the better reply."""
        return self.policy_chosen / _tokens(self.chosen_length)

    @property
    def rejected_mean(self) -> torch.Tensor:
        """The policy's mean log-probability of a token of the worse reply."""
        return self.policy_rejected / _tokens(self.rejected_length)

    @property
    def margin_of_means(self) -> torch.Tensor:
        """The margin of log-ratios that are means over the reply's tokens."""
        chosen = self.chosen_logratio / _tokens(self.chosen_length)
        return chosen - self.rejected_logratio / _tokens(self.rejected_length)


Loss = Callable[[Pairs], torch.Tensor]
"""From B pairs to their losses, of shape (B,)."""


@dataclass(frozen=True, kw_only=True)
class PairLoss:
    """A loss, and what whoever trains with it must know."""

    function: Loss
    needs_reference: bool = True
    coupled: bool = False
    """Whether the loss of a pair depends on the other pairs of the batch: see `among`."""

    normalises_by_length: bool = False
    """Whether a reply counts with the mean over its tokens rather than with their sum."""

    needs_running_mean: bool = False
    """Whether ``delta`` must be given: see `RunningMean`."""

    reads: tuple[str, ...] = ("beta",)
    """The settings in `Pairs` that change the loss."""


class RunningMean:
    """The mean of all values so far, exact to a float's precision however they are split into updates."""

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0

    @property
    def value(self) -> float:
        """The mean; 0 before the first value."""
        return self.total / self.count if self.count else 0.0

    def update(self, values: torch.Tensor) -> None:
        """Take in further values, of any shape."""
        values = values.detach().double()
        values = values[values.isfinite()]  # those of a step that is skipped would stay in it for good
        self.total += float(values.sum())
        self.count += values.numel()

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps; through JSON, it comes back as it was."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from a checkpoint."""
        self.total, self.count = float(state["total"]), int(state["count"])


def among(loss: Loss, pairs: Pairs, others: Pairs | None) -> torch.Tensor:
    """Return the losses of some pairs of a larger batch, for a loss whose pairs depend on each other.

    Added up over all parts of the batch, the values and the gradients are those of the batch as a whole: the gradient
    of these losses' sum is that of everybody's loss with respect to these pairs.

    Args:
        loss: The loss of a whole batch.
        pairs: A part of it, with a gradient.
        others: The rest of it, without one; None if there is no rest.
    """
    if others is None or not len(others):
        return loss(pairs)
    losses = loss(joined([pairs, others]))
    through = losses.sum() / len(pairs)
    return losses[: len(pairs)].detach() + (through - through.detach())


def chosen_nll(pairs: Pairs) -> torch.Tensor:
    """Return the mean negative log-likelihood of a token of each better reply: the term that cpo adds, and ftx."""
    return -pairs.whole[0] / _tokens(pairs.chosen_length)


def sigmoid(pairs: Pairs) -> torch.Tensor:
    """DPO (https://arxiv.org/abs/2305.18290, equation 7); with label smoothing, conservative DPO.

    The smoothed form is the one of https://ericmitchell.ai/cdpo.pdf. TRL 1.16 has no smoothing in this loss.
    """
    return _smoothed(pairs.beta * pairs.margin, pairs.label_smoothing)


def robust(pairs: Pairs) -> torch.Tensor:
    """Unbiased under preferences that are flipped at the known rate (https://arxiv.org/abs/2403.00409).

    The factor 1 / (1 - 2 label_smoothing) of the paper is there, as in TRL. Without smoothing it is the sigmoid loss.
    """
    scaled, flipped = pairs.beta * pairs.margin, pairs.label_smoothing
    kept = -(1 - flipped) * functional.logsigmoid(scaled) + flipped * functional.logsigmoid(-scaled)
    return kept / (1 - 2 * flipped)


def hinge(pairs: Pairs) -> torch.Tensor:
    """The hinge in place of DPO's sigmoid (https://arxiv.org/abs/2309.06657, whose gamma is beta)."""
    return torch.relu(1 - pairs.beta * pairs.margin)


def ipo(pairs: Pairs) -> torch.Tensor:
    """Squared distance to the margin 1 / (2 beta) (https://arxiv.org/abs/2310.12036, equation 17; beta is its tau).

    The log-ratios are means over a reply's tokens, where the equation has sums: that is what the authors measured, as
    TRL reports and does, and without it the target would suit one length only.
    """
    return (pairs.margin_of_means - 1 / (2 * pairs.beta)) ** 2


def exo(pairs: Pairs) -> torch.Tensor:
    """Reverse KL from the policy's preference to the smoothed label (https://arxiv.org/abs/2402.00856, equation 16).

    ``label_smoothing`` must be above 0: at 0 the divergence is infinite. The paper takes 1e-3.
    """
    assert pairs.label_smoothing > 0, "without label smoothing, exo is infinite"
    scaled, flipped = pairs.beta * pairs.margin, pairs.label_smoothing
    right = torch.sigmoid(scaled) * (functional.logsigmoid(scaled) - math.log1p(-flipped))
    return right + torch.sigmoid(-scaled) * (functional.logsigmoid(-scaled) - math.log(flipped))


def nca(pairs: Pairs) -> torch.Tensor:
    """Noise contrastive alignment of two replies (https://arxiv.org/abs/2402.05369): each reward on its own."""
    chosen, rejected = _rewards(pairs)
    both = functional.logsigmoid(-chosen) + functional.logsigmoid(-rejected)
    return -functional.logsigmoid(chosen) - 0.5 * both


def bco(pairs: Pairs) -> torch.Tensor:
    """Telling better replies from worse ones by their rewards above ``delta`` (https://arxiv.org/abs/2404.04656).

    With ``delta`` 0 it is what TRL 1.16 computes, which has dropped the shift that the paper takes.
    """
    chosen, rejected = _rewards(pairs)
    return -functional.logsigmoid(chosen - pairs.delta) - functional.logsigmoid(pairs.delta - rejected)


def sppo(pairs: Pairs) -> torch.Tensor:
    """Self-play with certain preferences (https://arxiv.org/abs/2405.00675, equation 4.7, with P 1 and 0).

    The paper estimates P with a model of preferences; its eta is 1 / beta.
    """
    half = 0.5 / pairs.beta
    return (pairs.chosen_logratio - half) ** 2 + (pairs.rejected_logratio + half) ** 2


def aot(pairs: Pairs) -> torch.Tensor:
    """Stochastic dominance of the policy's margins over the reference's (https://arxiv.org/abs/2406.05882, paired).

    Returns:
        The loss of each pair, compared with the reference's margin of the same rank among all pairs.
    """
    assert pairs.reference_chosen is not None, "this loss needs a reference"
    assert pairs.reference_rejected is not None, "this loss needs a reference"
    policy = pairs.policy_chosen - pairs.policy_rejected
    reference = torch.sort(pairs.reference_chosen - pairs.reference_rejected, stable=True).values
    return _smoothed(pairs.beta * (policy - reference[_ranks(policy)]), pairs.label_smoothing)


def aot_unpaired(pairs: Pairs) -> torch.Tensor:
    """Stochastic dominance of better replies' log-ratios over worse ones' (https://arxiv.org/abs/2406.05882).

    Returns:
        The loss of each better reply, compared with the worse reply of the same rank among all pairs.
    """
    chosen = pairs.chosen_logratio
    rejected = torch.sort(pairs.rejected_logratio, stable=True).values
    return _smoothed(pairs.beta * (chosen - rejected[_ranks(chosen)]), pairs.label_smoothing)


def apo_zero(pairs: Pairs) -> torch.Tensor:
    """Up with the better reply, down with the worse one (https://arxiv.org/abs/2408.06266, equation 7).

    It is the paper's plus 1, as in TRL, so that it is never negative.
    """
    chosen, rejected = _rewards(pairs)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs) -> torch.Tensor:
    """Down with both, and with the worse reply more (https://arxiv.org/abs/2408.06266, equation 8; plus 1)."""
    chosen, rejected = _rewards(pairs)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


def discopop(pairs: Pairs) -> torch.Tensor:
    """Log-ratio modulated loss, found by a search (https://arxiv.org/abs/2406.08414, equation 5)."""
    scaled = pairs.beta * pairs.margin
    logistic = -functional.logsigmoid(scaled) * torch.sigmoid(-scaled / pairs.tau)
    # The exponential alone would overflow where its share is 0.
    return logistic + torch.exp(functional.logsigmoid(scaled / pairs.tau) - scaled)


def kto_pair(pairs: Pairs) -> torch.Tensor:
    """KTO (https://arxiv.org/abs/2402.01306) of prompts that have a good and a bad reply.

    The mean log-ratio of the bad replies stands for the divergence that the good ones are compared with, and the other
    way round; one below 0 counts as 0, and no gradient goes through them, as the paper asks.

    Returns:
        The mean of both replies' losses.
    """
    chosen, rejected = pairs.chosen_logratio, pairs.rejected_logratio
    chosen_kl, rejected_kl = (ratios.detach().mean().clamp(min=0) for ratios in (chosen, rejected))
    of_chosen = torch.sigmoid(pairs.beta * (rejected_kl - chosen))
    return (of_chosen + torch.sigmoid(pairs.beta * (rejected - chosen_kl))) / 2


def sigmoid_norm(pairs: Pairs) -> torch.Tensor:
    """DPO on log-ratios that are means over a reply's tokens (Tulu 3, https://arxiv.org/abs/2411.15124)."""
    return -functional.logsigmoid(pairs.beta * pairs.margin_of_means)


def orpo(pairs: Pairs) -> torch.Tensor:
    """Likelihood of the better reply and odds ratio of both (https://arxiv.org/abs/2403.07691, equations 6 and 7).

    Probabilities are geometric means over a reply's tokens; beta is the paper's lambda. The likelihood is over the
    reply, as in the paper; TRL's is over the prompt too.
    """
    return chosen_nll(pairs) - pairs.beta * functional.logsigmoid(log_odds_ratio(pairs))


def log_odds_ratio(pairs: Pairs) -> torch.Tensor:
    """Return the logarithm of how much higher the better reply's odds are, of which orpo's loss is made."""
    chosen, rejected = pairs.chosen_mean, pairs.rejected_mean
    return (chosen - rejected) - (_log_of_rest(chosen) - _log_of_rest(rejected))


def simpo(pairs: Pairs) -> torch.Tensor:
    """Mean log-probabilities as rewards, which differ by ``gamma`` (https://arxiv.org/abs/2405.14734, equation 6).

    With label smoothing, as in TRL; the paper has none.
    """
    scaled = pairs.beta * (pairs.chosen_mean - pairs.rejected_mean) - pairs.gamma
    return _smoothed(scaled, pairs.label_smoothing)


def cpo(pairs: Pairs) -> torch.Tensor:
    """DPO with a uniform reference (https://arxiv.org/abs/2401.08417, equation 3), without its likelihood term.

    That term is `chosen_nll`, which whoever trains weights and adds.
    """
    return _smoothed(pairs.beta * (pairs.policy_chosen - pairs.policy_rejected), pairs.label_smoothing)


def cpo_hinge(pairs: Pairs) -> torch.Tensor:
    """The hinge in place of cpo's sigmoid, as in TRL."""
    return torch.relu(1 - pairs.beta * (pairs.policy_chosen - pairs.policy_rejected))


_SMOOTHED = ("beta", "label_smoothing")

LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(function=sigmoid, reads=_SMOOTHED),
    "robust": PairLoss(function=robust, reads=_SMOOTHED),
    "hinge": PairLoss(function=hinge),
    "ipo": PairLoss(function=ipo, normalises_by_length=True),
    "exo": PairLoss(function=exo, reads=_SMOOTHED),
    "nca": PairLoss(function=nca),
    "bco": PairLoss(function=bco, needs_running_mean=True, reads=("beta", "delta")),
    "sppo": PairLoss(function=sppo),
    "aot": PairLoss(function=aot, coupled=True, reads=_SMOOTHED),
    "aot_unpaired": PairLoss(function=aot_unpaired, coupled=True, reads=_SMOOTHED),
    "apo_zero": PairLoss(function=apo_zero),
    "apo_down": PairLoss(function=apo_down),
    "discopop": PairLoss(function=discopop, reads=("beta", "tau")),
    "kto_pair": PairLoss(function=kto_pair, coupled=True),
    "sigmoid_norm": PairLoss(function=sigmoid_norm, normalises_by_length=True),
    "orpo": PairLoss(function=orpo, needs_reference=False, normalises_by_length=True),
    "simpo": PairLoss(
        function=simpo, needs_reference=False, normalises_by_length=True, reads=(*_SMOOTHED, "gamma")
    ),
    "cpo": PairLoss(function=cpo, needs_reference=False, reads=_SMOOTHED),
    "cpo_hinge": PairLoss(function=cpo_hinge, needs_reference=False),
}  # fmt: skip
"""Every loss, by its name."""


def _rewards(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    return pairs.beta * pairs.chosen_logratio, pairs.beta * pairs.rejected_logratio


def _smoothed(scaled: torch.Tensor, flipped: float) -> torch.Tensor:
    """Return the logistic loss of a margin whose sign is wrong with the probability ``flipped``."""
    return -(1 - flipped) * functional.logsigmoid(scaled) - flipped * functional.logsigmoid(-scaled)


def _tokens(length: torch.Tensor) -> torch.Tensor:
    """Return lengths to divide by: a reply of which nothing is learned has a sum of 0, and a mean of 0."""
    return length.clamp(min=1)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Return where each value stands when they are sorted; of equal ones, the earlier first."""
    order = torch.argsort(values.detach(), stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


def _log_of_rest(logarithm: torch.Tensor) -> torch.Tensor:
    """Return log(1 - p) of log p, exact where p is close to 0 and where it is close to 1."""
    # A reply without tokens has p = 1, whose odds are infinite; so close to it, they are large.
    below = logarithm.clamp(max=-1e-6)
    small = below < -0.6931
    far = torch.log1p(-torch.exp(torch.where(small, below, -1.0)))
    return torch.where(small, far, torch.log(-torch.expm1(torch.where(small, -0.5, below))))


def joined(parts: Sequence[Pairs]) -> Pairs:
    """Return all pairs of several parts, which have the settings of the first."""
    values = {field.name: getattr(parts[0], field.name) for field in fields(Pairs)}
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            values[name] = torch.cat([getattr(part, name) for part in parts])
    return Pairs(**values)
