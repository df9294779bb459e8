"""Tokenised rows into batches of tensors: padded, behind one another in one row, or packed sequences above each other.

A batch holds what the model takes (``input_ids``, and ``attention_mask`` or ``position_ids``) and what only the trainer
reads: ``labels``, ``weights`` (how much each token counts in the loss, where rows say so), ``token_mask`` (true where
there is no padding, if the model gets no attention mask) and ``index`` (of pairs: where they are in their data set).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ftrun.data import Packing
from ftrun.data.tokens import IGNORED
from ftrun.worker.media.batch import with_media

if TYPE_CHECKING:
    from ftrun.config import Config
    from ftrun.worker.media.processor import MediaProcessor

Batch = dict[str, torch.Tensor]
Collate = Callable[[Sequence[Any]], Batch]

_FOR_THE_TRAINER = ("labels", "weights", "token_mask", "index")


def collator(cfg: Config, pad_id: int, media: MediaProcessor | None = None) -> Collate:
    """Return what makes a training batch of a stage's rows: of sequences, or of pairs of them."""
    collate = sequence_collator(cfg, pad_id, media)
    return partial(pairs, collate=collate) if cfg.stage.rows == "pairs" else collate


def sequence_collator(cfg: Config, pad_id: int, media: MediaProcessor | None = None) -> Collate:
    """Return what makes a training batch of sequences."""
    if is_flat(cfg):
        return flatten
    if cfg.data.packing is Packing.best_fit:
        return partial(stack, pad_id=pad_id)
    return padding_collator(pad_id, media)


def padding_collator(pad_id: int, media: MediaProcessor | None = None) -> Collate:
    """Return what makes a padded batch of sequences, some of which may have media if a model's processor is given."""
    collate = partial(pad, pad_id=pad_id)
    return partial(with_media, collate=collate, processor=media) if media else collate


def with_places(rows: Sequence[Any], collate: Collate) -> dict[str, Any]:
    """Make a batch of streamed rows, with where each stands in the stream as ``at``."""
    return {**collate(rows), "at": [row["at"] for row in rows]}


def shares_sequences(cfg: Config) -> bool:
    """Tell whether training batches hold rows in one sequence that must not see each other."""
    return cfg.train.padding_free or cfg.data.packing is Packing.best_fit


def is_flat(cfg: Config) -> bool:
    """Tell whether training batches are one row without padding.

    Flash attention keeps packed rows apart only there: transformers looks at the positions of a batch of one row. For
    the other kernels, packed sequences above each other cost less: their mask has one entry for each pair of tokens of
    a row.
    """
    packed = cfg.data.packing is Packing.best_fit
    return cfg.train.padding_free or (packed and cfg.model.attention.value.startswith("flash"))


def pad(rows: Sequence[Any], pad_id: int) -> Batch:
    """Fill rows up to the longest, on the right.

    Returns:
        ``input_ids``, ``labels``, ``attention_mask`` and, if a row has them, ``weights``; the shape is (rows, longest).
        Of no rows, a stand-in: one token that is neither learned nor counted.
    """
    if not rows:
        return _stand_in(pad_id)
    ones = [np.ones(len(row["input_ids"]), np.int64) for row in rows]
    return _filled(rows, pad_id) | {"attention_mask": _fill(ones, 0)}


def stack(rows: Sequence[Any], pad_id: int) -> Batch:
    """Put packed sequences above each other, filled up to the longest on the right.

    The positions say which tokens belong together, and there must be no attention mask beside them, or transformers
    would not look at them. The padding is given positions as if it were one more row in each sequence.

    Returns:
        ``input_ids``, ``labels``, ``position_ids``, ``token_mask`` and, if a row has them, ``weights``, each of shape
        (rows, longest). Of no rows, a stand-in: one token that is neither learned nor counted.
    """
    if not rows:
        return _stand_in(pad_id)
    longest = max(len(row["input_ids"]) for row in rows)
    positions = [
        np.concatenate([row["position_ids"], np.arange(longest - len(row["position_ids"]))]).astype(np.int64)
        for row in rows
    ]
    ones = [np.ones(len(row["input_ids"]), np.bool_) for row in rows]
    return _filled(rows, pad_id) | {"position_ids": _fill(positions, 0), "token_mask": _fill(ones, False)}


def flatten(rows: Sequence[Any]) -> Batch:
    """Put rows or packed sequences behind one another, in one row.

    The positions say which tokens belong together: without an attention mask, transformers keeps apart what they say is
    apart, on every kernel (flash attention takes its sequence borders from them).

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` and, if a row has them, ``weights``, each of shape (1, all tokens).
        Of no rows, a stand-in: one token that is neither learned nor counted.
    """
    if not rows:
        stand_in = _stand_in(0)
        return {**stand_in, "position_ids": torch.zeros_like(stand_in["input_ids"])}
    labels = [np.concatenate([[IGNORED], row["labels"][1:]]) for row in rows]  # nothing of its own comes before
    positions = [row["position_ids"] if "position_ids" in row else np.arange(len(row["input_ids"])) for row in rows]
    columns = {"input_ids": [row["input_ids"] for row in rows], "labels": labels, "position_ids": positions}
    batch = {name: torch.from_numpy(np.concatenate(values).astype(np.int64))[None] for name, values in columns.items()}
    if any("weights" in row for row in rows):
        batch["weights"] = torch.from_numpy(np.concatenate([_weights(row) for row in rows]))[None]
    return batch


def pairs(rows: Sequence[Any], collate: Collate) -> Batch:
    """Put the chosen sequences of pairs before the rejected ones, so that one forward pass serves both.

    Returns:
        What ``collate`` makes of them, and ``index``, of shape (pairs,).
    """
    batch = collate([row[side] for side in ("chosen", "rejected") for row in rows])
    return batch | {"index": torch.tensor([int(row["index"]) for row in rows], dtype=torch.int64)}


def model_inputs(batch: Batch) -> Batch:
    """Return what of a batch the model takes."""
    return {name: value for name, value in batch.items() if name not in _FOR_THE_TRAINER}


def num_tokens(batch: Batch) -> int:
    """Return how many tokens of a batch are not padding."""
    for name in ("token_mask", "attention_mask"):
        if name in batch:
            return int(batch[name].sum())
    return batch["input_ids"].numel()


def sequence_of_tokens(batch: Batch) -> torch.Tensor:
    """Return the number of the sequence that each token belongs to, of the shape of ``input_ids``."""
    ids = batch["input_ids"]
    if "position_ids" in batch:
        return ((batch["position_ids"] == 0).flatten().cumsum(0) - 1).view_as(ids)
    return torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)


def _stand_in(pad_id: int) -> Batch:
    """Return a batch for a process that has no rows left when others do: all of them must take part in a step."""
    one = torch.ones((1, 1), dtype=torch.int64)
    return {"input_ids": one * pad_id, "labels": one * IGNORED, "token_mask": one == 0}


def _filled(rows: Sequence[Any], pad_id: int) -> Batch:
    batch = {
        "input_ids": _fill([row["input_ids"] for row in rows], pad_id),
        "labels": _fill([row["labels"] for row in rows], IGNORED),
    }
    if any("weights" in row for row in rows):
        batch["weights"] = _fill([_weights(row) for row in rows], 0.0)
    return batch


def _fill(values: list[Any], filler: float) -> torch.Tensor:
    """Return sequences as the rows of one matrix; whole numbers become int64."""
    longest = max(len(value) for value in values)
    kind = np.asarray(values[0]).dtype
    matrix = np.full((len(values), longest), filler, np.int64 if kind.kind == "i" else kind)
    for row, value in zip(matrix, values, strict=True):
        row[: len(value)] = value
    return torch.from_numpy(matrix)


def _weights(row: Any) -> Any:
    """Return how much each token of a row counts in the loss; 1 where the row does not say."""
    ones = np.ones(len(row["input_ids"]), np.float32)
    return np.asarray(row["weights"], np.float32) if "weights" in row else ones
