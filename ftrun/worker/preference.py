"""Training on pairs of a better and a worse reply: log-probabilities, the reference's too, and losses on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ftrun import events
from ftrun.worker.batches import Batch, pad
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
        self.data_collator = self._collate
        self.model.to(self.args.device).eval()
        for rows in (self.run.rows.train, self.run.rows.eval):
            for pairs in _chunks(rows, self.args.per_device_eval_batch_size):
                with torch.no_grad(), self.accelerator.autocast():
                    found = self._log_probabilities(self.model, self._on_device(self._collate(pairs)))
                for pair, chosen, rejected in zip(pairs, *found.view(2, -1).tolist(), strict=True):
                    pair["reference"] = (chosen, rejected)
        return super().train(*args, **kwargs)

    def _collate(self, pairs: list[Any]) -> Batch:
        """Put the chosen sequences of a batch above the rejected ones, so that one forward pass serves both."""
        batch = pad([pair[side] for side in ("chosen", "rejected") for pair in pairs], self.run.pad_id)
        if "reference" in pairs[0]:
            batch["reference"] = torch.tensor([pair["reference"] for pair in pairs]).T
        return batch

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        pairs = torch.tensor(float(sum(len(batch["input_ids"]) // 2 for batch in batch_samples)), device=device)
        return self.accelerator.reduce(pairs)

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the summed log-probability of the labelled tokens of each row, in float32, of shape (2B,)."""
        inputs = {name: value for name, value in batch.items() if name != "reference"}
        logits, targets = labelled_logits(model, self.model, inputs)
        each = -functional.cross_entropy(logits.float(), targets, reduction="none")
        row_of = labelled_positions(batch["labels"]).nonzero()[:, 0]
        return torch.zeros(len(batch["labels"]), device=each.device).index_add(0, row_of, each)

    def _loss(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of each pair, and the metrics of each."""
        policy = self._log_probabilities(model, batch).view(2, -1)
        chosen, rejected = policy - batch["reference"]
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
        losses, metrics = self._loss(model, inputs)
        self.count(metrics)
        return losses.sum() / num_items_in_batch * self.accelerator.num_processes

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss and metrics over the evaluation pairs."""
        self.model.eval()
        sums: dict[str, list[float]] = {}
        mine = self.run.rows.eval[self.args.process_index :: self.args.world_size]
        for pairs in _chunks(mine, self.args.per_device_eval_batch_size):
            with torch.no_grad(), self.accelerator.autocast():
                losses, metrics = self._loss(self.model, self._on_device(self._collate(pairs)))
            add(sums, {f"eval_{name}": values for name, values in ({"loss": losses} | metrics).items()})
        means = self.means(sums)
        self.log(dict(means))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)
        return means

    def _on_device(self, batch: Batch) -> Batch:
        return {name: value.to(self.args.device) for name, value in batch.items()}


def _chunks(rows: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
