"""Whether a reply has the form that is wanted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.errors import Problem
from ftrun.plugin import Reward, register

if TYPE_CHECKING:
    from ftrun.completions import Completion
    from ftrun.config import Config

_NO_TAG = r"(?!</?think>)"
_THINKING = rf"\s*<think>(?:{_NO_TAG}.)*</think>\s*{_NO_TAG}\S(?:{_NO_TAG}.)*"


@register
@dataclass(kw_only=True)
class Format(Reward):
    """1 for a reply that a regular expression matches from its first to its last character, 0 for any other."""

    name: str = "format"

    pattern: str = _THINKING
    """The expression, as Python's ``re`` reads it; its dot matches line breaks too. Default: one
    ``<think>...</think>``, and an answer after it."""

    def check(self, cfg: Config) -> Iterator[Problem]:
        """It must be an expression."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            message = f"is no regular expression: {error}"
            yield Problem("reward.format.pattern", message, r"'reward.format.pattern=\".*answer: \\d+\"', for example")

    def score(self, completions: Sequence[Completion]) -> list[float]:
        """Match each reply, thinking included."""
        pattern = re.compile(self.pattern, re.DOTALL)
        return [float(pattern.fullmatch(reply.text) is not None) for reply in completions]
