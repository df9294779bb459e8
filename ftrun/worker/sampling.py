"""Which rows each micro batch of an epoch holds, on every process: so many rows or tokens, grouped by length or not.

A plan depends on the seed and the epoch alone, so a resumed run draws what the uninterrupted one would have drawn.
Every row is in exactly one batch of an epoch; where the rows do not go round, batches become smaller, and a process
that is left with none gets an empty one, which stands for a batch that trains nothing.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from ftrun import events
from ftrun.train import Train

Array = np.ndarray[Any, Any]

_ROUNDS_SORTED = 50
"""Rounds of batches whose rows are sorted by length together. A larger number pads less and shuffles less."""


@dataclass(frozen=True)
class Budget:
    """How many rows a micro batch takes."""

    rows: int
    tokens: int | None
    padded: bool
    """Whether each row takes as many tokens as the longest of its batch."""

    def fill(self, lengths: Array) -> Array:
        """Cut rows into batches, in their order.

        Args:
            lengths: Tokens of each row.

        Returns:
            Where each batch begins and, at the end, the number of rows. A row longer than the budget is a batch.
        """
        if self.tokens is None:
            return np.append(np.arange(0, len(lengths), self.rows), len(lengths))
        begins = _begins_padded(lengths, self.tokens) if self.padded else _begins_flat(lengths, self.tokens)
        return np.array([*begins, len(lengths)])


def _begins_padded(lengths: Array, tokens: int) -> list[int]:
    begins: list[int] = []
    longest = math.inf
    for at, length in enumerate(lengths.tolist()):
        longest = max(longest, length)
        if longest * (at + 1 - (begins[-1] if begins else 0)) > tokens:
            begins.append(at)
            longest = length
    return begins


def _begins_flat(lengths: Array, tokens: int) -> list[int]:
    ends = np.cumsum(lengths, dtype=np.int64)
    begins, at = [], 0
    while at < len(lengths):
        begins.append(at)
        before = ends[at - 1] if at else 0
        at = max(at + 1, int(np.searchsorted(ends, before + tokens, side="right")))
    return begins


class EpochBatches(Sampler[list[int]]):
    """The micro batches of one process, epoch by epoch; every epoch and every process has equally many.

    Args:
        lengths: Tokens that each row takes in a batch; only looked at with a budget of tokens or grouping by length.
        budget: How many rows a batch takes.
        train: The loop's keys.
        seed: The run's.
        rank: Of this process.
        world_size: Number of processes.
    """

    def __init__(self, lengths: Array, budget: Budget, train: Train, *, seed: int, rank: int, world_size: int) -> None:
        self.lengths, self.budget, self.train, self.seed = lengths, budget, train, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        order, begins = self.plan(self.epoch)
        for batch in range(self.rank, len(begins) - 1, self.world_size):
            yield order[begins[batch] : begins[batch + 1]].tolist()

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch; the last one may have fewer batches than ``grad_accumulation``."""
        return max(1, math.ceil(self.num_batches / self.train.grad_accumulation))

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train.max_steps or math.ceil(self.train.epochs * self.steps_per_epoch)

    @cached_property
    def num_batches(self) -> int:
        """Batches of an epoch on each process.

        With a budget of tokens, how many batches an order makes depends on the order. All epochs are given as many as
        the one of this run that needs most.
        """
        if self.budget.tokens is None:
            return math.ceil(len(self.lengths) / (self.budget.rows * self.world_size))
        most, epoch = 0, 0
        while epoch < (1 if not self.train.shuffle else self._num_epochs(most)):
            _, begins = self._filled(epoch)
            most = max(most, math.ceil((len(begins) - 1) / self.world_size))
            epoch += 1
        return most

    def _num_epochs(self, num_batches: int) -> int:
        """Return how many epochs the run has a part in, if each has so many batches on each process."""
        if self.train.max_steps is None:
            return math.ceil(self.train.epochs)
        return math.ceil(self.train.max_steps / max(1, math.ceil(num_batches / self.train.grad_accumulation)))

    def plan(self, epoch: int) -> tuple[Array, Array]:
        """Return the rows of an epoch in their order, and where in it each batch of all processes begins.

        Batch ``n`` belongs to process ``n % world_size``.
        """
        order, begins = self._filled(epoch)
        begins = _split(begins, self.num_batches * self.world_size)
        if self.train.group_by_length:
            return _shuffle_rounds(order, begins, self.world_size, self._generator(epoch, salt=1))
        return order, begins

    def _filled(self, epoch: int) -> tuple[Array, Array]:
        order = self._order(epoch)
        if self.budget.tokens is not None:
            return order, self.budget.fill(self.lengths[order])
        # The rows that make no full round of batches are dealt out evenly.
        size = self.budget.rows * self.world_size
        full = len(order) // size * size
        rest = np.arange(self.world_size) * (len(order) - full) // self.world_size + full
        rounds = np.arange(0, full, self.budget.rows)
        return order, np.concatenate([rounds, rest if full < len(order) else [], [len(order)]]).astype(np.int64)

    def _order(self, epoch: int) -> Array:
        size = len(self.lengths)
        if not self.train.shuffle:
            return np.arange(size)
        order = torch.randperm(size, generator=self._generator(epoch)).numpy()
        return self._sorted_in_parts(order) if self.train.group_by_length else order

    def _sorted_in_parts(self, order: Array) -> Array:
        """Sort each part of an order by length, the longest rows first."""
        lengths = np.asarray(self.lengths)[order]
        rows = self.budget.rows
        if self.budget.tokens is not None:
            rows = max(1, int(self.budget.tokens // lengths.mean()))
        part = np.arange(len(order)) // (_ROUNDS_SORTED * rows * self.world_size)
        return order[np.lexsort((-lengths, part))]

    def _generator(self, epoch: int, salt: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 2**salt + salt)


def _split(begins: Array, count: int) -> Array:
    """Halve the batches of most rows until there are ``count``; where all have one row, add empty ones."""
    if len(begins) - 1 == count:
        return begins
    pieces = [(start - stop, start, stop) for start, stop in itertools.pairwise(begins.tolist())]
    heapq.heapify(pieces)
    while len(pieces) < count:
        _, start, stop = pieces[0]
        middle = (start + stop) // 2
        heapq.heapreplace(pieces, (start - middle, start, middle))
        heapq.heappush(pieces, (middle - stop, middle, stop))
    return np.array([*sorted(start for _, start, _ in pieces), begins[-1]])


def _shuffle_rounds(order: Array, begins: Array, world_size: int, generator: torch.Generator) -> tuple[Array, Array]:
    """Put the rounds, one batch for each process, into another order."""
    batches = np.split(order, begins[1:-1])
    rounds = torch.randperm(len(batches) // world_size, generator=generator).numpy()
    shuffled = [batches[number * world_size + rank] for number in rounds for rank in range(world_size)]
    sizes = [len(batch) for batch in shuffled]
    return np.concatenate(shuffled), np.cumsum([0, *sizes])


def in_file_order(lengths: Array, budget: Budget, *, rank: int = 0, world_size: int = 1) -> Iterator[list[int]]:
    """Yield one process's share of a data set's rows in batches, each row once over all processes.

    A process whose share is nothing gets one empty batch, so that it takes part in what all do after each batch.
    """
    mine = np.arange(rank, len(lengths), world_size)
    if not len(mine):
        yield []
    begins = budget.fill(np.asarray(lengths)[mine])
    for start, stop in itertools.pairwise(begins.tolist()):
        events.mark()
        yield mine[start:stop].tolist()
