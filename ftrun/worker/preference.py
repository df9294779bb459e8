"""Training on pairs of a better and a worse reply: log-probabilities, the reference's too, and losses on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn

from ftrun.config import Config
from ftrun.record import Result
from ftrun.worker import logprobs, reference, training
from ftrun.worker.batches import Batch
from ftrun.worker.losses.pairs import LOSSES, PairLoss, Pairs, RunningMean, among, chosen_nll, joined
from ftrun.worker.training import RunTrainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What is made small: a weighted sum of losses of pairs."""

    losses: Sequence[tuple[str, float]]
    """Names in `LOSSES`, each with its weight."""

    settings: dict[str, float]
    """What the losses read (`Pairs`)."""

    nll_weight: float = 0.0
    """Weight of the mean negative log-likelihood of the better reply's tokens."""

    tail_weight: float | None = None
    """How much the tokens count that are beyond the length of the shorter reply: alpha of LD-DPO
    (https://arxiv.org/abs/2409.06411); None for 1."""

    @property
    def parts(self) -> list[tuple[PairLoss, float]]:
        """The losses and their weights."""
        return [(LOSSES[name], weight) for name, weight in self.losses]

    @property
    def needs_reference(self) -> bool:
        """Whether any of the losses compares with a reference."""
        return any(loss.needs_reference for loss, _ in self.parts)

    @property
    def needs_whole_step(self) -> bool:
        """Whether a pair's loss depends on the other pairs of the step."""
        return any(loss.coupled or loss.needs_running_mean for loss, _ in self.parts)

    def of(self, pairs: Pairs, others: Pairs | None = None) -> torch.Tensor:
        """Return the loss of each pair; ``others`` are the other pairs of its step, for losses that look at them."""
        each = [weight * among(loss.function, pairs, others if loss.coupled else None) for loss, weight in self.parts]
        nll = self.nll_weight * chosen_nll(pairs) if self.nll_weight else 0.0
        return torch.stack(each).sum(0) + nll


class PreferenceTrainer(RunTrainer):
    """Trains on pairs, with one forward pass over both sides; losses are normalised over the pairs of a step."""

    objective: Objective

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # have the loss normalised over the pairs of the whole step
        self._said: reference.Said | None = None
        self._rewards_so_far = RunningMean()
        self._step: list[Pairs] = []
        """What is known of each batch of the step, of all processes, where their losses depend on each other."""

        self._at = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Note what the reference thinks of every pair, or have it at hand, then train."""
        if self.objective.needs_reference:
            self._said = reference.said(self, lambda model, batch: self._log_probabilities(model, batch)[0], count=2)
        return super().train(*args, **kwargs)

    def own_state(self) -> dict[str, Any]:
        """Return the mean of all rewards so far."""
        return self._rewards_so_far.state_dict()

    def take_own_state(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        self._rewards_so_far.load_state_dict(state)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Batch], Any]:
        """Look at all pairs of a step before the first of its batches, where their losses depend on each other."""
        found, num_items = super().get_batch_samples(*args, **kwargs)
        self._step, self._at = [], 0
        if self.objective.needs_whole_step and len(found) * self.run.world_size > 1:
            self.model.eval()  # without noise, whatever came before; a training step switches it back
            with torch.no_grad(), self.accelerator.autocast():
                self._step = self._of_all_processes([self._pairs(self.model, self.on_device(b)) for b in found])
            self._at = self.run.rank * len(found)
            self._rewards_so_far.update(torch.cat(rewards_of(joined(self._step))))
        return found, num_items

    def _of_all_processes(self, parts: list[Pairs]) -> list[Pairs]:
        if self.run.world_size == 1:
            return parts
        here = self.args.device
        # What is pickled on a GPU comes back on that very GPU, in every process.
        return [part.to(here) for part in gather_object([part.to(torch.device("cpu")) for part in parts])]

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        pairs = torch.tensor(float(sum(len(batch["index"]) for batch in batch_samples)), device=device)
        return self.accelerator.reduce(pairs)

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the summed log-probabilities of both sides, in float32, of shape (2, 2, B).

        The first is with the weights that tokens have where replies differ in length, the second without.
        """
        count, tail = 2 * len(batch["index"]), self.objective.tail_weight
        each = logprobs.of_tokens(self, model, batch)
        whole = logprobs.summed(each, batch, count).view(2, -1)
        if tail is None:
            return torch.stack([whole, whole])
        weights = tail_weights(batch, logprobs.lengths(batch, count).view(2, -1), tail)
        return torch.stack([logprobs.summed(each * weights, batch, count).view(2, -1), whole])

    def _pairs(self, model: nn.Module, batch: Batch, of: str | None = None) -> Pairs:
        """Return what policy and reference say of a batch."""
        lengths = logprobs.lengths(batch, 2 * len(batch["index"])).view(2, -1)
        policy, whole = self._log_probabilities(model, batch)
        said = self._said(batch, of) if self._said else (None, None)
        return Pairs(
            policy_chosen=policy[0],
            policy_rejected=policy[1],
            reference_chosen=said[0],
            reference_rejected=said[1],
            whole_chosen=whole[0],
            whole_rejected=whole[1],
            chosen_length=lengths[0],
            rejected_length=lengths[1],
            **self.objective.settings,
        )

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the summed loss of a batch over the pairs of the whole step."""
        pairs = self._pairs(model, inputs)
        others = [pairs_of for at, pairs_of in enumerate(self._step) if at != self._at]
        self._at += 1
        if self.objective.needs_whole_step and not self._step:
            self._rewards_so_far.update(torch.cat(rewards_of(pairs)))
        losses = self._losses(pairs, joined(others) if others else None)
        self.count(metrics_of(pairs))
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def _losses(self, pairs: Pairs, others: Pairs | None = None) -> torch.Tensor:
        shifted = dataclasses.replace(pairs, delta=self._rewards_so_far.value)
        return self.objective.of(shifted, others)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss and metrics over the evaluation pairs, all of which count as one batch."""
        self.model.eval()
        means: dict[str, float] = {}
        for name, rows in self.run.rows.evals.items():
            with torch.no_grad(), self.accelerator.autocast():
                parts = [self._pairs(self.model, batch, name) for batch in self.batches_in_file_order(rows)]
                pairs = joined(self._of_all_processes(parts))
                found = {"loss": self._losses(pairs)} | metrics_of(pairs)
            prefix = f"eval_{name}_" if name else "eval_"
            means |= {prefix + metric: float(values.mean()) for metric, values in found.items()}
        return self.evaluated(means)


def rewards_of(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the implicit rewards of both replies, of shape (B,) each: beta times the log-ratio to the reference.

    Without a reference, beta times the mean log-probability of a token.
    """
    if pairs.reference_chosen is None:
        return pairs.beta * pairs.chosen_mean.detach(), pairs.beta * pairs.rejected_mean.detach()
    return pairs.beta * pairs.chosen_logratio.detach(), pairs.beta * pairs.rejected_logratio.detach()


def metrics_of(pairs: Pairs) -> dict[str, torch.Tensor]:
    """Return what is logged of each pair."""
    chosen, rejected = rewards_of(pairs)
    return {
        "rewards_chosen": chosen,
        "rewards_rejected": rejected,
        "rewards_margins": chosen - rejected,
        "rewards_accuracies": (chosen > rejected).float(),
        "logps_chosen": pairs.whole[0].detach(),
        "logps_rejected": pairs.whole[1].detach(),
        "nll_chosen": chosen_nll(pairs).detach(),
    }


def tail_weights(batch: Batch, lengths: torch.Tensor, weight: float) -> torch.Tensor:
    """Return how much each labelled token of pairs counts, of shape (N,).

    Args:
        batch: Of pairs, the better sides before the worse ones.
        lengths: Labelled tokens of both sides, of shape (2, B).
        weight: Of tokens beyond the length of the pair's shorter reply.
    """
    of_sequence = logprobs.sequence_of_labelled(batch)
    begins = lengths.flatten().cumsum(0) - lengths.flatten()
    place = torch.arange(len(of_sequence), device=of_sequence.device) - begins[of_sequence]
    common = lengths.min(0).values.repeat(2)[of_sequence]
    return torch.where(place < common, 1.0, weight)


def train(cfg: Config, objective: Objective) -> Result:
    """Load, encode, train on pairs, and say how it went."""
    model, run = training.prepare(cfg)
    trainer = training.build(PreferenceTrainer, model, run)
    trainer.objective = objective
    return training.fit(trainer)
