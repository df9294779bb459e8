"""How much of a reply says again what it has said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.fields import ranged
from ftrun.plugin import Reward, register

if TYPE_CHECKING:
    from ftrun.completions import Completion


@register
@dataclass(kw_only=True)
class Repetition(Reward):
    """0 for a reply that repeats nothing, down to -1 for one that does nothing else (after arXiv:2502.03373)."""

    name: str = "repetition"

    ngram: int = ranged(20, ge=1)
    """How many tokens in a row make a repetition; fewer punish also what good prose repeats."""

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Return minus the share of each reply's tokens that lie in an n-gram which the reply has had before."""
        return [-_repeated(reply.ids, self.ngram) / max(len(reply.ids), 1) for reply in completions]


def _repeated(ids: Sequence[int], size: int) -> int:
    """Return how many tokens lie in an n-gram that began earlier too."""
    seen: set[tuple[int, ...]] = set()
    counted_to = count = 0
    for start in range(len(ids) - size + 1):
        ngram = tuple(ids[start : start + size])
        if ngram in seen:
            count += start + size - max(start, counted_to)
            counted_to = start + size
        seen.add(ngram)
    return count
