"""Filling sequences with several rows: which rows share one, and the sequences, joined when they are asked for."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ftrun.data.tokens import IGNORED
from ftrun.worker.batches import flatten, model_inputs

Array = np.ndarray[Any, Any]


class Rows(Protocol):
    """A data set of tokenised rows."""

    @property
    def lengths(self) -> Array:
        """Tokens of each row."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Array]: ...


@dataclass(frozen=True)
class Bins:
    """Which pieces of which rows make each sequence: four flat arrays, whatever the number of rows.

    Sequence ``i`` holds the pieces ``offsets[i]`` to ``offsets[i + 1]``; piece ``p`` is the tokens ``starts[p]`` to
    ``stops[p]`` of row ``members[p]``.
    """

    members: Array
    starts: Array
    stops: Array
    offsets: Array

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Array:
        """Tokens of each sequence."""
        ends = np.concatenate([[0], np.cumsum(self.stops - self.starts, dtype=np.int64)])
        return np.diff(ends[self.offsets]).astype(np.int32)

    def efficiency(self, max_length: int) -> float:
        """Return which share of the room in all sequences is filled."""
        return int((self.stops - self.starts).sum(dtype=np.int64)) / max(1, len(self) * max_length)

    def save(self, folder: Path) -> None:
        """Write each array to a file of its name in ``folder``."""
        for field in fields(self):
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))

    @classmethod
    def load(cls, folder: Path) -> Bins:
        """Map the arrays that `save` wrote, without reading them."""
        return cls(**{field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r") for field in fields(cls)})


def best_fit(lengths: Array, max_length: int) -> Bins:
    """Fill sequences with whole rows: the longest first, each where it leaves the least room.

    Best-fit decreasing cuts no row and leaves little room unused (https://arxiv.org/abs/2404.10830). Rows of equal
    length are placed together, and so are sequences with equal room left: what takes time is the number of different
    lengths, not of rows.

    Args:
        lengths: Tokens of each row, 1 to ``max_length``.
        max_length: Tokens that a sequence has room for.

    Returns:
        The sequences in the order of their first rows, each with its rows in their order in the data set.
    """
    lengths = np.asarray(lengths)
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= max_length), "rows must fit a sequence"
    order = np.argsort(-lengths, kind="stable")
    sequence_of = np.empty(len(lengths), np.int64)
    sequence_of[order] = _place(lengths[order], max_length)
    _, first_rows, sequence_of = np.unique(sequence_of, return_index=True, return_inverse=True)
    rank = np.empty(len(first_rows), np.int64)
    rank[np.argsort(first_rows)] = np.arange(len(first_rows))
    sequence_of = rank[sequence_of]
    members = np.argsort(sequence_of, kind="stable").astype(np.int32)
    sizes = np.bincount(sequence_of, minlength=len(first_rows))
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Bins(members, np.zeros(len(members), np.int32), lengths[members].astype(np.int32), offsets)


def _place(lengths: Array, max_length: int) -> Array:
    """Return the number of the sequence that each row goes to, for rows sorted from long to short."""
    placed: list[Array] = []
    room = _Room()
    num_sequences = 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            left = room.smallest(length)
            if left is None:  # new sequences for all the rest
                left, fits = max_length, max_length // length
                sequences = np.arange(num_sequences, num_sequences + -(-count // fits))
                num_sequences += len(sequences)
            else:
                # The tightest sequence stays the tightest until no further row of this length fits.
                fits = left // length
                sequences = room.take(left, -(-count // fits))
            full = min(len(sequences), count // fits)
            placed.append(np.repeat(sequences[:full], fits))
            room.put(left - fits * length, sequences[:full])
            count -= full * fits
            if full < len(sequences):  # the last rows of this length do not fill the last sequence
                placed.append(np.repeat(sequences[full:], count))
                room.put(left - count * length, sequences[full:])
                count = 0
    return np.concatenate(placed) if placed else np.empty(0, np.int64)


class _Room:
    """Open sequences by the tokens that they have room for."""

    def __init__(self) -> None:
        self._sequences: dict[int, list[Array]] = {}
        self._sizes: list[int] = []  # the keys, sorted

    def smallest(self, length: int) -> int | None:
        """Return the least room that ``length`` tokens fit into."""
        at = bisect_left(self._sizes, length)
        return self._sizes[at] if at < len(self._sizes) else None

    def take(self, size: int, count: int) -> Array:
        """Remove and return up to ``count`` sequences with room for ``size`` tokens."""
        stack, taken = self._sequences[size], []
        while stack and count:
            sequences = stack.pop()
            taken.append(sequences[:count])
            if count < len(sequences):
                stack.append(sequences[count:])
            count -= len(taken[-1])
        if not stack:
            del self._sequences[size]
            del self._sizes[bisect_left(self._sizes, size)]
        return np.concatenate(taken)

    def put(self, size: int, sequences: Array) -> None:
        """Add sequences with room for ``size`` tokens."""
        if size == 0 or not len(sequences):
            return
        if size not in self._sequences:
            self._sequences[size] = []
            insort(self._sizes, size)
        self._sequences[size].append(sequences)


def concatenate(lengths: Array, max_length: int) -> Bins:
    """Put the rows behind one another in their order, and cut a new sequence every ``max_length`` tokens.

    The rest of a row that is cut opens the next sequence. What remains at the end is a shorter sequence, and kept.

    Args:
        lengths: Tokens of each row.
        max_length: Tokens of each sequence.
    """
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    cuts = np.arange(0, ends[-1], max_length)
    borders = np.sort(np.concatenate([ends, cuts]), kind="stable")
    borders = borders[np.diff(borders, prepend=-1) > 0]  # what np.union1d does, five times as fast
    begins = borders[:-1]
    members = np.searchsorted(ends, begins, side="right") - 1
    offsets = np.concatenate([np.searchsorted(begins, cuts), [len(begins)]])
    starts, stops = begins - ends[members], borders[1:] - ends[members]
    return Bins(members.astype(np.int32), starts.astype(np.int32), stops.astype(np.int32), offsets.astype(np.int64))


class PackedRows:
    """The sequences that `Bins` make of a data set's rows.

    Each is ``input_ids``, ``labels`` and, if any of its rows has them, ``weights``.

    - Rows kept apart (best fit): ``position_ids`` start again at each row, which is what keeps attention apart, and the
      first label of each is ignored, since it would be predicted from the row before.
    - Rows not kept apart (plain concatenation, as in pre-training): positions run through, attention crosses from one
      row to the next, and a row's first token is predicted from the end of the one before.
    """

    def __init__(self, rows: Rows, bins: Bins, *, apart: bool) -> None:
        self.rows, self.bins, self.apart = rows, bins, apart
        self.lengths = bins.lengths
        """Tokens of each sequence."""

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Array]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        pieces = list(self._pieces(index))
        names = ["input_ids", "labels", *(["weights"] if any("weights" in piece for piece in pieces) else [])]
        joined = {name: np.concatenate([_values(piece, name) for piece in pieces]) for name in names}
        if self.apart:
            sizes = [len(piece["input_ids"]) for piece in pieces]
            joined["labels"][np.cumsum([0, *sizes[:-1]])] = IGNORED
            joined["position_ids"] = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
        return joined

    def _pieces(self, index: int) -> Iterator[dict[str, Array]]:
        bins = self.bins
        for piece in range(int(bins.offsets[index]), int(bins.offsets[index + 1])):
            part = slice(int(bins.starts[piece]), int(bins.stops[piece]))
            row = self.rows[int(bins.members[piece])]
            yield {name: row[name][part] for name in ("input_ids", "labels", "weights") if name in row}


def _values(piece: dict[str, Array], name: str) -> Array:
    """Return a piece's array; a row without weights weighs 1 a token."""
    return piece[name] if name in piece else np.ones(len(piece["input_ids"]), np.float32)


def leaks(model: nn.Module) -> bool:
    """Tell whether what a model says of a row depends on another row that stands before it in the same sequence.

    Tried with two short rows, the first of which is exchanged.
    """
    device = next(model.parameters()).device
    second, was_training = np.arange(9, 13), model.training
    model.eval()
    found = []
    for first in (np.arange(1, 5), np.arange(5, 9)):
        batch = flatten([{"input_ids": row, "labels": row} for row in (first, second)])
        inputs = {name: value.to(device) for name, value in model_inputs(batch).items()}
        with torch.no_grad():
            states = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
            found.append(states[-1][0, len(first) :].float())
    model.train(was_training)
    # Rounding differs by less, where a kernel's shapes depend on the values (experts); a leak moves them by far more.
    return bool((found[0] - found[1]).abs().max() > 1e-2 * found[0].std())
