"""In which order the rows of several sources follow one another."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

from ftrun.data import Mix, MixUntil

T = TypeVar("T")


def order(
    lengths: Sequence[int], weights: Sequence[float], mix: Mix, until: MixUntil, seed: int
) -> Iterator[tuple[int, int]]:
    """Yield the rows of one epoch as (source, row).

    Args:
        lengths: Rows of each source.
        weights: With ``mix=concatenate``, how often each is seen; with ``weighted``, how likely it comes next.
        mix: How the sources follow one another.
        until: When interleaved sources are at an end.
        seed: Draws the sources, and the rows of a source that is not seen a whole number of times.
    """
    if mix is Mix.concatenate:
        for source, (length, weight) in enumerate(zip(lengths, weights, strict=True)):
            for chosen in passes(length, weight, seed):
                yield from ((source, row) for row in chosen)
        return
    openers = [lambda length=length: iter(range(length)) for length in lengths]
    yield from draw(openers, Drawer(weights, mix, seed), until)


def passes(length: int, weight: float, seed: int) -> list[Sequence[int]]:
    """Return the rows of each pass over a source that is seen ``weight`` times; whole passes are ranges.

    The last pass of a weight that is not whole is a seeded choice of rows, in their order.
    """
    whole: list[Sequence[int]] = [range(length)] * int(weight)
    count = round(length * (weight % 1))
    part = sorted(random.Random(seed).sample(range(length), count)) if count else []  # noqa: S311
    return [*whole, part] if part else whole


class Drawer:
    """Says which source comes next, from the seed and the count of draws alone, so that the count is all its state."""

    def __init__(self, weights: Sequence[float], mix: Mix, seed: int, count: int = 0) -> None:
        assert mix is not Mix.concatenate  # what comes next depends on when a source ends
        self.count = count
        self._mix, self._seed, self._num_sources = mix, seed, len(weights)
        self._below = list(accumulate(weights))

    def next(self) -> int:
        """Return the number of the source that comes next."""
        count, self.count = self.count, self.count + 1
        if self._mix is Mix.interleave:
            return count % self._num_sources
        point = _random(self._seed, count) * self._below[-1]
        return min(bisect_right(self._below, point), self._num_sources - 1)


def _random(seed: int, count: int) -> float:
    """Return the ``count``-th number of a stream from 0 to 1: SplitMix64 (https://doi.org/10.1145/2660193.2660195)."""
    mask = (1 << 64) - 1
    state = (seed * 0xD1342543DE82EF95 + (count + 1) * 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)


def draw(openers: Sequence[Callable[[], Iterator[T]]], drawer: Drawer, until: MixUntil) -> Iterator[tuple[int, T]]:
    """Yield the next row of the source that the drawer names, with the source, from sources of unknown lengths.

    A source is used up when its turn comes and it has no row left. With ``until=last`` it begins again, and the end is
    when the turn of a used-up source comes and all have been used up; sources without any row are passed over.

    Args:
        openers: Each begins a source anew.
        drawer: Names the sources.
        until: When to stop.
    """
    sources = [opener() for opener in openers]
    used_up: set[int] = set()
    empty: set[int] = set()
    while True:
        number = drawer.next()
        if number in empty:
            continue
        try:
            yield number, next(sources[number])
            continue
        except StopIteration:
            used_up.add(number)
        if until is MixUntil.first or len(used_up) == len(openers):
            return
        sources[number] = openers[number]()
        try:
            yield number, next(sources[number])
        except StopIteration:
            empty.add(number)
