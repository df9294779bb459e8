"""Rows with media into batches: placeholders become the tokens of the media, and what the model sees is added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ftrun.errors import Problem
from ftrun.worker.media.errors import UnreadableMedium
from ftrun.worker.media.place import Located
from ftrun.worker.media.processor import Expansion, MediaProcessor

if TYPE_CHECKING:
    from ftrun.worker.batches import Batch

_IGNORED = -100


def with_media(rows: Sequence[Any], *, collate: Callable[[Sequence[Any]], Batch], processor: MediaProcessor) -> Batch:
    """Make a batch of rows, some of which may have media.

    Args:
        rows: As the other collators take them; of a row with media also ``media`` and ``place``.
        collate: Puts rows above each other, filled up on the right.
        processor: The model's.

    Raises:
        UnreadableMedium: One cannot be opened, or a row becomes longer than the model takes.
    """
    found, inputs = _expansions(rows, processor)
    if not inputs:
        return collate([_bare(row) for row in rows])
    expanded = [_expanded(row, found, processor) if row.get("media") else _bare(row) for row in rows]
    names = sorted({name for row in expanded for name in row.get("columns", {})})
    batch = collate([{name: value for name, value in row.items() if name != "columns"} for row in expanded])
    for name in names:
        batch[name] = _column([row.get("columns", {}).get(name, []) for row in expanded], batch["input_ids"].shape)
    return batch | inputs


def _bare(row: Any) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("media", "place")}


def _expansions(rows: Sequence[Any], processor: MediaProcessor) -> tuple[dict[str, list[Expansion]], dict[str, Any]]:
    """Return the tokens of all media of a batch by kind, in order, and what the model takes beside them."""
    media: dict[str, list[Any]] = {}
    for row in rows:
        for medium in row.get("media", ()):
            media.setdefault(medium.kind, []).append(_loaded(medium, row["place"], processor))
    found: dict[str, list[Expansion]] = {}
    inputs: dict[str, Any] = {}
    for kind, opened in media.items():
        try:
            found[kind], more = processor.expand(kind, opened)
        except (ValueError, RuntimeError) as error:
            places = ", ".join(row["place"] for row in rows if any(m.kind == kind for m in row.get("media", ())))
            message = f"the model's processor refuses a {kind} of the rows {places}: {error}"
            raise UnreadableMedium(Problem("data.path", message, f"another {kind}")) from error
        if both := inputs.keys() & more.keys():
            message = f"the model takes {' and '.join(media)} under one name ({', '.join(both)}), not in one batch"
            raise UnreadableMedium(Problem("train.micro_batch_size", message, "1, or rows of one kind of media"))
        inputs |= more
    return {kind: list(reversed(each)) for kind, each in found.items()}, inputs


def _loaded(medium: Located, place: str, processor: MediaProcessor) -> Any:
    try:
        return processor.load(medium)
    except ValueError as error:
        message = f"has a{'' if medium.kind == 'video' else 'n'} {medium.kind} that cannot be read: {error}"
        raise UnreadableMedium(Problem(place, message, "a whole file")) from None


def _expanded(row: Any, found: dict[str, list[Expansion]], processor: MediaProcessor) -> dict[str, Any]:
    """Return a row with the tokens of its media in place of their placeholders, taking those from the ends of lists."""
    ids, start = row["input_ids"], 0
    pieces: dict[str, list[Any]] = {name: [] for name in ("input_ids", "labels", "weights") if name in row}
    columns: dict[str, list[int]] = {}
    length = 0
    for at in np.flatnonzero(np.isin(ids, list(processor.kinds))):
        expansion = found[processor.kinds[int(ids[at])]].pop()
        for name, each in pieces.items():
            filler = {"input_ids": expansion.ids, "labels": [_IGNORED] * len(expansion.ids)}
            each += [row[name][start:at], np.asarray(filler.get(name, [1.0] * len(expansion.ids)), row[name].dtype)]
        length += int(at) - start
        for name, values in expansion.columns.items():
            columns.setdefault(name, []).extend([0] * (length - len(columns.get(name, []))) + values)
        length, start = length + len(expansion.ids), int(at) + 1
    out = {name: np.concatenate([*each, row[name][start:]]) for name, each in pieces.items()}
    if processor.max_length is not None and len(out["input_ids"]) > processor.max_length:
        message = f"has {len(out['input_ids'])} tokens with its media, and the model takes {processor.max_length}"
        raise UnreadableMedium(Problem(row["place"], message, "fewer or smaller media, or a smaller data.max_length"))
    return out | {"columns": columns}


def _column(values: Sequence[list[int]], shape: torch.Size) -> torch.Tensor:
    column = torch.zeros(shape, dtype=torch.int64)
    for row, value in zip(column, values, strict=True):
        row[: len(value)] = torch.tensor(value, dtype=torch.int64)
    return column
