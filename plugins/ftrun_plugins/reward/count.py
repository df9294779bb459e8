"""How often a text occurs in a reply."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ftrun.errors import Problem, RunFailed
from ftrun.fields import ranged
from ftrun.plugin import Reward, register

if TYPE_CHECKING:
    from ftrun.completions import Completion
    from ftrun.config import Config


class Measure(StrEnum):
    """What is made of the number."""

    share = "share"
    number = "number"
    answer = "answer"


@register
@dataclass(kw_only=True)
class Count(Reward):
    """How often a letter, a word or any other text occurs in a reply."""

    name: str = "count"

    text: str = "e"
    """What is counted, without overlaps; capitals are other letters than small ones."""

    measure: Measure = Measure.share
    """share: the part of the reply's characters that belong to it, 0 to 1. number: how often it occurs, up to ``most``.
    answer: 1 if that is the number which the row's answer is, less for each one too many or too few, down to 0."""

    most: int = ranged(100, ge=1)
    """With measure=number, occurrences beyond these count no more."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """There must be something to count, and every key must matter."""
        if not self.text:
            yield Problem("reward.count.text", "is empty, and nothing can be counted", "reward.count.text=e")
        if self.measure is not Measure.number and self.most != type(self).most:
            message = f"is not read with measure={self.measure}"
            yield Problem("reward.count.most", message, "reward.count.measure=number, or leave it out")

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """Count in each reply, thinking included."""
        return [self._value(reply) for reply in completions]

    def _value(self, reply: Completion) -> float | None:
        number = reply.text.count(self.text)
        if self.measure is Measure.share:
            return number * len(self.text) / max(len(reply.text), 1)
        if self.measure is Measure.number:
            return float(min(number, self.most))
        if reply.answer is None:
            return None
        wanted = _whole(reply.answer)
        return max(0.0, 1.0 - abs(number - wanted) / max(wanted, 1))


def _whole(answer: object) -> int:
    try:
        return int(str(answer).strip())
    except ValueError:
        raise RunFailed(f"reward=count compares with the row's answer, and {str(answer)[:80]!r} is no number") from None
