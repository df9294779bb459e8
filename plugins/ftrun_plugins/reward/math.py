"""Whether a reply comes to the right result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftrun.fields import ranged
from ftrun.plugin import Reward, register

if TYPE_CHECKING:
    from ftrun.completions import Completion


@register
@dataclass(kw_only=True)
class Math(Reward):
    r"""1 for a reply whose result is the row's answer, else 0; it says nothing of a row without an answer.

    The result of a reply is what follows its last ``####``; or the last ``\boxed{...}``; or what follows its last
    "answer is"; or its last number. Numbers are compared by value, without rounding: 1/2, 0.5, 50% and
    ``\frac{1}{2}`` are one number, as are 1,000 and 1000; units count for nothing. What is no number is compared as
    text, without spaces, capitals and LaTeX's dress. Of a list of answers any one will do.
    """

    name: str = "math"

    tolerance: float = ranged(0.0, ge=0)
    """How far a number may be off, as an absolute difference."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """Compare the result of each reply with its row's answer."""
        return [None if reply.answer is None else float(self._right(reply)) for reply in completions]

    def _right(self, reply: Completion) -> bool:
        from ftrun_plugins.reward import _results as results

        wanted: list[Any] = reply.answer if isinstance(reply.answer, list) else [reply.answer]
        return any(
            results.same(found, answer, self.tolerance)
            for answer in map(results.of_answer, wanted)
            for found in results.of_reply(reply.final, answer)
        )
