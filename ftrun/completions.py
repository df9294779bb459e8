"""What a model answered: the replies that rewards judge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ftrun.data.rows import Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One reply to the prompt of one row."""

    prompt: list[Message]
    """The messages that were asked."""

    answer: Any
    """The answer that the row holds, or None if it holds none."""

    text: str
    """The reply, without its end token and other special tokens."""

    prompt_ids: list[int]
    """The prompt's tokens."""

    ids: list[int]
    """The reply's tokens, the end token included where it came."""

    finished: bool
    """Whether the reply ended by itself, and not at the limit of its length."""

    @property
    def final(self) -> str:
        """The reply without its thinking: what follows the last ``</think>``, or all of it."""
        return self.text.rpartition("</think>")[2].strip()
