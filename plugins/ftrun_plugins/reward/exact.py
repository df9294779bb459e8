"""Whether a reply is the answer, word for word."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ftrun.plugin import Reward, register

if TYPE_CHECKING:
    from ftrun.completions import Completion


@register
@dataclass(kw_only=True)
class Exact(Reward):
    """1 for a reply that is the row's answer, 0 for any other; of a row without an answer it says nothing."""

    name: str = "exact"

    ignore_case: bool = True
    """Whether small and capital letters are the same."""

    ignore_punctuation: bool = True
    """Whether punctuation around and between the words is left out; in numbers it stays."""

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        """Compare each reply, without its thinking, with its row's answer, white space aside."""
        return [
            None if reply.answer is None else float(self._plain(reply.final) == self._plain(str(reply.answer)))
            for reply in completions
        ]

    def _plain(self, text: str) -> str:
        text = unicodedata.normalize("NFKC", text)
        if self.ignore_case:
            text = text.casefold()
        if self.ignore_punctuation:
            text = "".join(_kept(text, place) for place in range(len(text)))
        return " ".join(text.split())


def _kept(text: str, place: int) -> str:
    """Return a character, or a space for punctuation that is no part of a number."""
    char, after = text[place], text[place + 1 : place + 2]
    if not unicodedata.category(char).startswith("P"):
        return char
    inside = char in ".," and text[place - 1 : place].isdigit() and after.isdigit()
    return char if inside or (char == "-" and after.isdigit()) else " "
