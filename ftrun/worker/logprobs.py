"""How likely a model finds whole replies: the summed log-probabilities of the labelled tokens of each sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from ftrun.worker.batches import Batch, sequence_of_tokens
from ftrun.worker.head import Head, labelled_positions

if TYPE_CHECKING:
    from ftrun.worker.training import RunTrainer


def of_sequences(
    trainer: RunTrainer, model: nn.Module, batch: Batch, count: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the summed log-probability of each sequence's labelled tokens, in nats and float32, of shape (count,).

    Args:
        trainer: Whose model it is.
        model: What is called: the trainer's model, wrapped or not, or another one.
        batch: Of ``count`` sequences.
        count: Sequences in the batch; those behind the last real one, which only fill it up, are left out.
        weights: How much each labelled token counts, of shape (N,), or 1 each.
    """
    each = of_tokens(trainer, model, batch)
    return summed(each if weights is None else each * weights, batch, count)


def of_tokens(trainer: RunTrainer, model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the log-probability of each labelled token, in nats and float32, of shape (N,).

    Args:
        trainer: Whose model it is.
        model: What is called: the trainer's model, wrapped or not, or another one.
        batch: The sequences.
    """
    plain = trainer.accelerator.unwrap_model(model)
    head = trainer.head if plain is trainer.model else Head(plain)
    (each,) = head.scores(model, batch, token_logprobs)
    return each


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
    """Return the log-probability of each target, of shape (n,), of logits of shape (n, V)."""
    return (-functional.cross_entropy(logits, targets, reduction="none"),)


def lengths(batch: Batch, count: int) -> torch.Tensor:
    """Return how many labelled tokens each sequence has, in float32, of shape (count,)."""
    return summed(
        torch.ones(int(labelled_positions(batch["labels"]).sum()), device=batch["labels"].device), batch, count
    )


def summed(values: torch.Tensor, batch: Batch, count: int) -> torch.Tensor:
    """Return the sum over each sequence of the values (N,) of its labelled tokens, of shape (count,)."""
    return torch.zeros(count, device=values.device).index_add(0, sequence_of_labelled(batch), values)


def sequence_of_labelled(batch: Batch) -> torch.Tensor:
    """Return the number of the sequence that each labelled token belongs to, of shape (N,)."""
    return sequence_of_tokens(batch)[labelled_positions(batch["labels"])]
