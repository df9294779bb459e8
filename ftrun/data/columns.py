"""The columns of a row that hold prompts and replies, whatever they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftrun.data.messages import Names, message_list
from ftrun.data.rows import BadRow, Message, Row
from ftrun.data.values import clean, type_name

# Of alternatives the first that a row has is read. Of worked solutions and final answers, replies are the worked
# ones, and what a reward compares with is the final one.
PROMPTS = ("prompt", "question", "problem")
REPLIES = ("completion", "response", "solution", "answer")
ANSWERS = ("final", "final_answer", "ground_truth", "expected_answer", "answer", "solution")
LABELS = ("label", "kto_tag")
TURNS = ("messages", "conversations")
MASKS = ("labels", "completion_mask", "assistant_masks", "loss_mask")
ALTERNATIVES = (PROMPTS, REPLIES, ANSWERS, LABELS, TURNS, MASKS)
"""The groups of columns of which one is read."""


def first_of(row: Row, names: Sequence[str]) -> str:
    """Return the first of alternative columns that a row has; an empty name if it has none."""
    return next((name for name in names if row.value.get(name) is not None), "")


def prompt_of(row: Row, names: Names) -> list[Message]:
    """Read what comes before a reply, from whichever columns hold it; nothing if none does."""
    if name := first_of(row, PROMPTS):
        return with_system(row, column_of(row, name, "user", names))
    if name := first_of(row, TURNS):
        return turns_of(row, name, names)
    return asked(row) if row.value.get("instruction") is not None else []


def reply_of(row: Row, names: Names) -> list[Message]:
    """Read the first column of replies that a row has."""
    return column_of(row, first_of(row, REPLIES), "assistant", names)


def turns_of(row: Row, name: str, names: Names) -> list[Message]:
    """Read a column that holds a whole list of messages."""
    return with_system(row, message_list(row, row.value[name], name, names))


def asked(row: Row) -> list[Message]:
    """Read alpaca's system, history, and instruction and input, one below the other."""
    value = row.value
    query = clean(row, value["instruction"], "instruction")
    if more := value.get("input"):
        query = f"{query}\n{clean(row, more, 'input')}" if query else clean(row, more, "input")
    messages: list[Message] = []
    if history := value.get("history"):
        if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
            raise BadRow(row, "history is not a list of [question, answer] pairs", '"history": [["...", "..."]]')
        for question, answer in history:
            messages.append({"role": "user", "content": clean(row, question, "history")})
            messages.append({"role": "assistant", "content": clean(row, answer, "history")})
    messages.append({"role": "user", "content": query})
    return with_system(row, messages)


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """Put the column ``system`` in front, unless the messages have their own."""
    system = row.value.get("system")
    if not system:
        return messages
    if clean(row, system, "system").isspace() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def column_of(row: Row, name: str, role: str, names: Names) -> list[Message]:
    """Read a column of one role: a text of it, or a message or messages that say their own."""
    return messages_of(row, row.value[name], name, role, names)


def messages_of(row: Row, value: Any, name: str, role: str, names: Names) -> list[Message]:
    """Read a text, a message, or a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": clean(row, value, name)}]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return message_list(row, value, name, names)
    raise BadRow(row, f"{name} is {type_name(value)}, not text", f'"{name}": "..."')
