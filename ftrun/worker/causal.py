"""Training a causal language model on labelled tokens: the loss, its evaluation, and batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ftrun.data.tokens import IGNORED
from ftrun.worker.batches import Batch, model_inputs, padding_collator
from ftrun.worker.training import RunTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalTrainer(RunTrainer):
    """Next-token prediction on the labelled tokens, normalised over all of a step's batches and processes.

    The loss of a step is the sum of weight times cross-entropy over its labelled tokens, divided by the sum of their
    weights. A token of a row without weights weighs 1: then it is the mean over the labelled tokens.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # have the weights of the whole step summed

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Return the summed weights of the labelled tokens of a step, over all processes; 1 if there are none."""
        here = sum((label_weight(batch) for batch in batch_samples), torch.zeros((), device=device))
        total = self.accelerator.reduce(here)
        return torch.where(total > 0, total, torch.ones_like(total))

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the summed loss of a batch over the summed weights of the whole step."""
        logits, targets = labelled_logits(model, self.model, inputs)
        total = summed_loss(logits, targets, labelled_weights(inputs))
        # Processes average their gradients, so each one's share is scaled up by their number.
        return total / num_items_in_batch * self.accelerator.num_processes

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss over all labelled tokens of each evaluation set, however they are batched."""
        self.model.eval()
        metrics: dict[str, float] = {}
        for name, rows in self.run.rows.evals.items():
            metrics |= self._evaluate_set(f"eval_{name}_" if name else "eval_", rows)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_set(self, prefix: str, rows: Any) -> dict[str, float]:
        sums = [0.0, 0.0, 0.0, 0.0]
        with torch.no_grad(), self.accelerator.autocast():
            collate = padding_collator(self.run.pad_id, self.run.media)
            for found in self.run.in_file_order(rows, padded=True):
                batch = self.on_device(collate(found))
                logits, targets = labelled_logits(self.model, self.model, batch)
                loss = summed_loss(logits, targets, labelled_weights(batch))
                right = (logits.argmax(-1) == targets).sum()
                here = (loss.item(), label_weight(batch).item(), right.item(), len(targets))
                sums = [total + new for total, new in zip(sums, here, strict=True)]
        loss_sum, weight, right_sum, count = self.over_processes(sums)
        if not weight:
            return {}
        return {
            f"{prefix}loss": loss_sum / weight,
            f"{prefix}token_accuracy": right_sum / count,
            f"{prefix}perplexity": math.exp(min(loss_sum / weight, 700.0)),
        }


def summed_loss(logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return the summed cross-entropy, in float32, each token's times its weight.

    Args:
        logits: Of shape (N, V).
        targets: Of shape (N,).
        weights: Of shape (N,), or 1 each.
    """
    if weights is None:
        return functional.cross_entropy(logits.float(), targets, reduction="sum")
    return (functional.cross_entropy(logits.float(), targets, reduction="none") * weights).sum()


def labelled_weights(inputs: Batch) -> torch.Tensor | None:
    """Return the weights of the labelled tokens, of shape (N,), if the batch has weights."""
    if "weights" not in inputs:
        return None
    return inputs["weights"][:, 1:][labelled_positions(inputs["labels"])[:, :-1]]


def label_weight(inputs: Batch) -> torch.Tensor:
    """Return the summed weights of the labelled tokens of a batch: how many there are, where it has no weights."""
    weights = labelled_weights(inputs)
    return labelled_positions(inputs["labels"]).sum().float() if weights is None else weights.sum()


def labelled_logits(model: nn.Module, plain: PreTrainedModel, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits where there is a label, and the labels: the head is computed nowhere else.

    A prompt's tokens have no label, and the head is the largest matrix of a small model.

    Args:
        model: What is called; may be wrapped, for several processes.
        plain: The model itself.
        inputs: ``input_ids``, ``labels`` and a mask or positions, of shape (B, T).

    Returns:
        Logits of shape (N, V) and labels of shape (N,), for the N positions whose next token is labelled.
    """
    labels = inputs["labels"]
    where = labelled_positions(labels)
    with _head_only_at(plain.get_output_embeddings(), where):
        output = model(**model_inputs(inputs), use_cache=False)
    return output.logits[0], labels[:, 1:][where[:, :-1]]


def labelled_positions(labels: torch.Tensor) -> torch.Tensor:
    """Return where the next token is labelled, of shape (B, T)."""
    where = torch.zeros_like(labels, dtype=torch.bool)
    where[:, :-1] = labels[:, 1:] != IGNORED
    return where


@contextlib.contextmanager
def _head_only_at(head: nn.Module, where: torch.Tensor) -> Iterator[None]:
    """While inside, have the output head see only the hidden states at ``where`` (B, T), as one row of them."""

    def select(_: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (arguments[0][where].unsqueeze(0),)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
