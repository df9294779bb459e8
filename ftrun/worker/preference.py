"""Training on pairs of a better and a worse reply: log-probabilities, the reference's too, and losses on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ftrun import events
from ftrun.worker.batches import Batch, is_flat, sequence_of_tokens
from ftrun.worker.causal import labelled_logits, labelled_positions
from ftrun.worker.training import RunTrainer, add


def dpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the sigmoid loss of each pair (https://arxiv.org/abs/2305.18290, equation 7; smoothed as in cDPO).

    Args:
        chosen: How much more likely the policy makes the better reply than the reference does, in nats, of shape (B,).
        rejected: The same for the worse reply.
        beta: How closely the policy stays to the reference.
        label_smoothing: Probability that the preference is the wrong way round.
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * functional.logsigmoid(margin) - label_smoothing * functional.logsigmoid(-margin)


class PreferenceTrainer(RunTrainer):
    """Trains on pairs; the reference is the policy as it was before the first step.

    The reference's log-probabilities are computed once, before training, by the model itself: no second copy is held,
    and no file is loaded that might differ from what training started with.
    """

    loss_of_pairs: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    beta: float

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # have the loss normalised over the pairs of the whole step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Note what the reference thinks of every pair, then train."""
        events.send("phase", text="computing the reference's log-probabilities")
        self.model.to(self.args.device).eval()
        self._reference = self._log_probabilities_of(self.run.rows.train)
        self._eval_references = {name: self._log_probabilities_of(rows) for name, rows in self.run.rows.evals.items()}
        return super().train(*args, **kwargs)

    def _log_probabilities_of(self, rows: Any) -> torch.Tensor:
        """Return the log-probability of both replies of every pair of a data set, of shape (2, pairs).

        Each process computes its share.
        """
        found = torch.zeros(2, len(rows), device=self.args.device)
        for batch in self._batches_of(rows):
            with torch.no_grad(), self.accelerator.autocast():
                found[:, batch["index"]] = self._log_probabilities(self.model, batch)
        return self.accelerator.reduce(found)

    def _batches_of(self, rows: Any) -> Iterator[Batch]:
        for pairs in self.run.in_file_order(rows, padded=not is_flat(self.run.cfg)):
            yield self.on_device(self.collate(pairs))

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        pairs = torch.tensor(float(sum(len(batch["index"]) for batch in batch_samples)), device=device)
        return self.accelerator.reduce(pairs)

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the summed log-probability of the labelled tokens of both sides, in float32, of shape (2, B)."""
        logits, targets = labelled_logits(model, self.model, batch)
        each = -functional.cross_entropy(logits.float(), targets, reduction="none")
        row_of = sequence_of_tokens(batch)[labelled_positions(batch["labels"])]
        return torch.zeros(2 * len(batch["index"]), device=each.device).index_add(0, row_of, each).view(2, -1)

    def _loss(
        self, model: nn.Module, batch: Batch, reference: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of each pair, and the metrics of each."""
        policy = self._log_probabilities(model, batch)
        chosen, rejected = policy - reference[:, batch["index"]]
        rewards = self.beta * torch.stack([chosen, rejected]).detach()
        metrics = {
            "rewards_chosen": rewards[0],
            "rewards_rejected": rewards[1],
            "rewards_margins": rewards[0] - rewards[1],
            "rewards_accuracies": (rewards[0] > rewards[1]).float(),
            "logps_chosen": policy[0].detach(),
            "logps_rejected": policy[1].detach(),
        }
        return self.loss_of_pairs(chosen, rejected), metrics

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the summed loss of a batch over the pairs of the whole step."""
        losses, metrics = self._loss(model, inputs, self._reference)
        self.count(metrics)
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss and metrics over the evaluation pairs."""
        self.model.eval()
        sums: dict[str, list[float]] = {}
        for name, rows in self.run.rows.evals.items():
            prefix = f"eval_{name}_" if name else "eval_"
            for batch in self._batches_of(rows):
                with torch.no_grad(), self.accelerator.autocast():
                    losses, metrics = self._loss(self.model, batch, self._eval_references[name])
                add(sums, {prefix + metric: values for metric, values in ({"loss": losses} | metrics).items()})
        means = self.means(sums)
        self.log(dict(means))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)
        return means
