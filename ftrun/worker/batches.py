"""Encoded rows into batches of tensors: padded, or packed sequences behind one another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ftrun.data import Data, Packing
from ftrun.worker.encode import IGNORED

Batch = dict[str, torch.Tensor]


def collator(data: Data, pad_id: int) -> Callable[[list[Any]], Batch]:
    """Return what makes a batch of encoded rows."""
    return flatten if data.packing is Packing.best_fit else lambda rows: pad(rows, pad_id)


def pad(rows: list[Any], pad_id: int) -> Batch:
    """Fill rows up to the longest, on the right.

    Returns:
        ``input_ids``, ``labels`` and ``attention_mask``, each of shape (rows, longest).
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([filled(row["input_ids"], pad_id) for row in rows]),
        "labels": torch.tensor([filled(row["labels"], IGNORED) for row in rows]),
        "attention_mask": torch.tensor([filled([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def flatten(rows: list[Any]) -> Batch:
    """Put packed sequences behind one another, in one row.

    Without an attention mask, transformers keeps apart what the positions say are different rows.

    Returns:
        ``input_ids``, ``labels`` and ``position_ids``, each of shape (1, all tokens).
    """
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([[value for row in rows for value in row[name]]]) for name in names}
