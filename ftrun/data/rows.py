"""What rows are: as they stand in a file, and as what a stage trains on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ftrun.errors import Problem


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file."""

    value: dict[str, Any]
    file: str
    line: int

    @property
    def place(self) -> str:
        """Where the row stands, as a person writes it."""
        return f"{self.file}:{self.line}"


class BadRow(Exception):
    """A row that cannot be trained on."""

    def __init__(self, row: Row, message: str, fix: str) -> None:
        super().__init__(row, message, fix)
        self.problem = Problem(row.place, message, f"{fix}; or data.on_bad_row=skip")
        self.reason = message
        """What bad rows are counted by: it holds nothing of the single row."""

    def __str__(self) -> str:
        return self.problem.message


Message = dict[str, Any]
"""One message of a conversation, as `ftrun.data.messages` leaves it:

- ``role``: system, user, assistant or tool.
- ``content``: a text; with images, videos or audio a list of parts ``{"type": "text", "text": ...}``,
  ``{"type": "image"}`` and so on, in the order of `Conversation.media`.
- ``tool_calls``, if there are any: ``{"type": "function", "function": {"name": ..., "arguments": {...}}}`` each, the
  arguments an object and not a text.
- ``reasoning_content``, if there is any: the thinking before the content.
- ``weight``, if it is not 1: how much the message counts in the loss, 0 for a reply that is not learned.
- Whatever else a chat template may read (``name``, ``tool_call_id``).
"""


@dataclass(frozen=True, slots=True)
class Medium:
    """An image, a video or a sound: where it is, or what it is."""

    kind: str
    """``image``, ``video`` or ``audio``."""

    source: Any
    """A path, a URL, or the bytes."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages, some of them the assistant's."""

    messages: list[Message]
    row: Row
    tools: list[Any] | None = None
    media: list[Medium] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pair:
    """A better and a worse reply to the same messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    row: Row
    tools: list[Any] | None = None
    media: list[Medium] = field(default_factory=list)
    margin: float | None = None
    """How much better the better reply is, where the row says so."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """A reply that somebody liked or did not."""

    prompt: list[Message]
    reply: list[Message]
    good: bool
    row: Row
    tools: list[Any] | None = None
    media: list[Medium] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt whose replies are generated while training, with what a reward needs to judge them."""

    prompt: list[Message]
    answer: Any
    """None where the row has none."""

    row: Row
    tools: list[Any] | None = None
    media: list[Medium] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, all of it to be learned."""

    text: str
    row: Row


@dataclass(frozen=True, slots=True)
class Tokens:
    """A sequence that is tokenised already."""

    input_ids: list[int]
    labels: list[int]
    row: Row


Item = Conversation | Pair | Feedback | Question | Text | Tokens
"""A row, understood."""
