"""How near a reply's length is to the one that is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.fields import ranged
from ftrun.plugin import Reward, register

if TYPE_CHECKING:
    from ftrun.completions import Completion


class Side(StrEnum):
    """Which lengths cost something."""

    both = "both"
    longer = "longer"
    shorter = "shorter"


@register
@dataclass(kw_only=True)
class Length(Reward):
    """1 for a reply of the wanted length, falling evenly to 0 for one that is off by as much again."""

    name: str = "length"

    target_tokens: int = ranged(128, ge=1)
    """The wanted length, in tokens, the end token included."""

    side: Side = Side.both
    """Which replies are worth less: those of any other length, only longer ones, or only shorter ones."""

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Return 1 less how far off each reply is, as a share of the target."""
        return [max(0.0, 1.0 - self._off(len(reply.ids)) / self.target_tokens) for reply in completions]

    def _off(self, tokens: int) -> int:
        over = tokens - self.target_tokens
        return {Side.both: abs(over), Side.longer: max(over, 0), Side.shorter: max(-over, 0)}[self.side]
