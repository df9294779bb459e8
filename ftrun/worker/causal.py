"""Training a causal language model on labelled tokens: the loss, its evaluation, and batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ftrun.worker.batches import Batch, padding_collator
from ftrun.worker.head import labelled_positions
from ftrun.worker.losses.tokens import nll
from ftrun.worker.reference import Live
from ftrun.worker.training import RunTrainer

TokenLoss = Callable[..., torch.Tensor]
"""The loss of each token, of shape (n,), from logits (n, V) in float32 and targets (n,); and, if
`CausalTrainer.compares` says so, from the reference's logits (n, V)."""


class CausalTrainer(RunTrainer):
    """Next-token prediction on the labelled tokens, normalised over all of a step's batches and processes.

    The loss of a step is the sum of weight times loss over its labelled tokens, divided by the sum of their weights. A
    token of a row without weights weighs 1: then it is the mean over the labelled tokens.
    """

    loss_of_tokens: TokenLoss = staticmethod(nll)
    compares = False
    """Whether the loss compares with the reference's logits."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # have the weights of the whole step summed
        self._reference: Live | None = None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the model as it starts, where the loss compares with it, and train."""
        self._reference = Live(self) if self.compares else None
        return super().train(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Return the summed weights of the labelled tokens of a step, over all processes; 1 if there are none."""
        here = sum((label_weight(batch) for batch in batch_samples), torch.zeros((), device=device))
        total = self.accelerator.reduce(here)
        return torch.where(total > 0, total, torch.ones_like(total))

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the summed loss of a batch over the summed weights of the whole step."""
        (total,) = self._scores(model, inputs, self._score, summed=True)
        # Processes average their gradients, so each one's share is scaled up by their number.
        return total / num_items_in_batch * self.accelerator.num_processes

    def _score(self, logits: torch.Tensor, targets: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor]:
        *compared, weights = rows
        return (self.loss_of_tokens(logits, targets, *map(self._logits_of_reference, compared)) * weights,)

    def _evaluated(self, logits: torch.Tensor, targets: torch.Tensor, *rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return of each token its weighted loss and cross-entropy, and whether it is the likeliest one."""
        (loss,) = self._score(logits, targets, *rows)
        own = self.loss_of_tokens is not nll
        return loss, nll(logits, targets) * rows[-1] if own else loss, (logits.argmax(-1) == targets).float()

    def _scores(self, model: nn.Module, batch: Batch, score: Any, *, summed: bool) -> tuple[torch.Tensor, ...]:
        rows = [labelled_weights(batch)]
        if self._reference is not None:
            with self._reference.model() as reference:
                rows.insert(0, self._reference.head.hidden(reference, batch))
        return self.head.scores(model, batch, score, further=rows, summed=summed)

    def _logits_of_reference(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self._reference is not None
        with torch.no_grad():
            return self._reference.head.of_hidden(hidden)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss over all labelled tokens of each evaluation set, however they are batched."""
        self.model.eval()
        metrics: dict[str, float] = {}
        for name, rows in self.run.rows.evals.items():
            metrics |= self._evaluate_set(f"eval_{name}_" if name else "eval_", rows)
        return self.evaluated(metrics)

    def _evaluate_set(self, prefix: str, rows: Any) -> dict[str, float]:
        sums = [0.0] * 5
        with torch.no_grad(), self.accelerator.autocast():
            collate = padding_collator(self.run.pad_id, self.run.media)
            for found in self.run.in_file_order(rows, padded=True):
                batch = self.on_device(collate(found))
                loss, plain, right = self._scores(self.model, batch, self._evaluated, summed=True)
                each = [loss, plain.sum(), label_weight(batch), right.sum(), torch.ones_like(right).sum()]
                here = torch.stack(each).tolist()
                sums = [total + new for total, new in zip(sums, here, strict=True)]
        loss_sum, plain_sum, weight, right_sum, count = self.over_processes(sums)
        if not weight:
            return {}
        return {
            f"{prefix}loss": loss_sum / weight,
            f"{prefix}token_accuracy": right_sum / count,
            f"{prefix}perplexity": math.exp(min(plain_sum / weight, 700.0)),
        }


def labelled_weights(inputs: Batch) -> torch.Tensor:
    """Return the weights of the labelled tokens, of shape (N,): 1 each where the batch has none."""
    where = labelled_positions(inputs["labels"])
    weights = inputs.get("weights")
    if weights is None:
        return torch.ones(int(where.sum()), device=where.device)
    return weights[:, 1:][where[:, :-1]]


def label_weight(inputs: Batch) -> torch.Tensor:
    """Return the summed weights of the labelled tokens of a batch: how many there are, where it has no weights."""
    return labelled_weights(inputs).sum()
