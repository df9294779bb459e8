"""Training a causal language model on labelled tokens: the loss, its evaluation, and batches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ftrun.worker.batches import Batch, collator, pad
from ftrun.worker.encode import IGNORED
from ftrun.worker.training import RunTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalTrainer(RunTrainer):
    """Next-token prediction on the labelled tokens, normalised over all of a step's batches and processes."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = True  # have the labelled tokens of the whole step counted

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the summed loss of a batch over the labelled tokens of the whole step."""
        logits, targets = labelled_logits(model, self.model, inputs)
        total = functional.cross_entropy(logits.float(), targets, reduction="sum")
        # Processes average their gradients, so each one's share is scaled up by their number.
        return total / num_items_in_batch * self.accelerator.num_processes

    def get_train_dataloader(self) -> Any:
        """Batch the rows as the config says."""
        self.data_collator = collator(self.run.cfg.data, self.run.pad_id)
        return super().get_train_dataloader()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the mean loss over all labelled tokens of the evaluation rows, however they are batched."""
        sums = [0.0, 0.0, 0.0]
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            for batch in self._eval_batches():
                logits, targets = labelled_logits(self.model, self.model, batch)
                loss = functional.cross_entropy(logits.float(), targets, reduction="sum")
                right = (logits.argmax(-1) == targets).sum()
                here = (loss.item(), right.item(), len(targets))
                sums = [total + new for total, new in zip(sums, here, strict=True)]
        loss_sum, right_sum, count = self.over_processes(sums)
        metrics = {
            "eval_loss": loss_sum / count,
            "eval_token_accuracy": right_sum / count,
            "eval_perplexity": math.exp(min(loss_sum / count, 700.0)),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _eval_batches(self) -> Iterator[Batch]:
        """Yield this process's share of the evaluation rows, each row once over all processes."""
        size = self.args.per_device_eval_batch_size
        mine = self.run.rows.eval[self.args.process_index :: self.args.world_size]
        for start in range(0, len(mine), size):
            batch = pad(mine[start : start + size], self.run.pad_id)
            yield {name: value.to(self.args.device) for name, value in batch.items()}


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
    features = {name: value for name, value in inputs.items() if name != "labels"}
    with _head_only_at(plain.get_output_embeddings(), where):
        output = model(**features, use_cache=False)
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
