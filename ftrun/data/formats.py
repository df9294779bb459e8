"""What the columns of a row mean: raw rows into conversations, pairs and texts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftrun.data import Format, Reasoning
from ftrun.data.read import BadRow, Row, json_name

Message = dict[str, Any]
"""``role``, ``content``, and whatever else the chat template reads (``tool_calls``, ``reasoning_content``)."""


@dataclass(frozen=True)
class Conversation:
    """Messages, some of them the assistant's."""

    messages: list[Message]
    row: Row
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Pair:
    """A better and a worse reply to the same messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    row: Row


@dataclass(frozen=True)
class Text:
    """Plain text, all of it to be learned."""

    text: str
    row: Row


ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
"""What the roles of the common formats are called here."""


def _messages(row: Row) -> list[Message]:
    """Read ``messages`` (role, content) or ``conversations`` (from, value)."""
    key = "messages" if "messages" in row.value else "conversations"
    turns = row.value[key]
    if not isinstance(turns, list) or not turns:
        raise BadRow(row, f"{key} is not a list of messages", f'"{key}": [{{"role": "user", "content": "..."}}, ...]')
    messages = [_message(row, turn, index) for index, turn in enumerate(turns)]
    if isinstance(system := row.value.get("system"), str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _message(row: Row, turn: Any, index: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(row, f"message {index + 1} is not an object", '{"role": "user", "content": "..."}')
    role = turn.get("role", turn.get("from"))
    if role is None:
        raise BadRow(row, f"message {index + 1} has no role", f"one of {', '.join(ROLES)}")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(row, f"message {index + 1} has the role {role!r}", f"one of {', '.join(ROLES)}")
    content = turn.get("content", turn.get("value"))
    if isinstance(content, list):  # OpenAI's parts
        content = "".join(_part(row, part, index) for part in content)
    if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
        raise BadRow(row, f"message {index + 1} has no text in content", '"content": "..."')
    more = {name: value for name, value in turn.items() if name not in ("role", "from", "content", "value")}
    return {"role": ROLES[role], "content": content or "", **more}


def _part(row: Row, part: Any, index: int) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        what = f"a part of the type {kind}" if kind not in (None, "text") else "a part without text"
        fix = '"content": "...", or parts {"type": "text", "text": "..."}'
        raise BadRow(row, f"message {index + 1} has {what} in content, and only text is trained on", fix)
    return str(part["text"])


def _alpaca(row: Row) -> list[Message]:
    value = row.value
    query = "\n".join(_text_of(row, name) for name in ("instruction", "input") if value.get(name))
    messages = [{"role": "system", "content": value["system"]}] if value.get("system") else []
    for turn in value.get("history") or []:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise BadRow(row, "history is not a list of [question, answer] pairs", '"history": [["...", "..."]]')
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*messages, {"role": "user", "content": query}, {"role": "assistant", "content": _text_of(row, "output")}]


def _prompt_completion(row: Row) -> list[Message]:
    completion = next(name for name in ("completion", "response") if name in row.value)
    return [*_as_messages(row, "prompt", "user"), *_as_messages(row, completion, "assistant")]


def _as_messages(row: Row, name: str, role: str) -> list[Message]:
    """Read a column that holds a text or a list of messages."""
    value = row.value[name]
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        return [_message(row, turn, index) for index, turn in enumerate(value)]
    return [{"role": role, "content": _text_of(row, name)}]


def _text_of(row: Row, name: str) -> str:
    value = row.value[name]
    if not isinstance(value, str):
        raise BadRow(row, f"{name} is {json_name(value)}, not text", f'"{name}": "..."')
    return value


def _pair(row: Row) -> Pair:
    if "conversations" in row.value or "messages" in row.value:
        prompt = _messages(row)
    else:
        prompt = next((_as_messages(row, name, "user") for name in ("prompt", "question") if name in row.value), [])
    if not prompt and isinstance(row.value["chosen"], list):  # both replies hold the whole conversation
        chosen, rejected = _as_messages(row, "chosen", "assistant"), _as_messages(row, "rejected", "assistant")
        common = 0
        while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
            common += 1
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    else:
        chosen, rejected = _as_messages(row, "chosen", "assistant"), _as_messages(row, "rejected", "assistant")
    if not prompt or not chosen or not rejected:
        raise BadRow(
            row,
            "chosen and rejected do not follow a common prompt",
            '"prompt": "...", "chosen": "...", "rejected": "..."',
        )
    return Pair(prompt, chosen, rejected, row)


@dataclass(frozen=True)
class _Shape:
    """How a format is told by its columns, and read."""

    needs: tuple[tuple[str, ...], ...]
    """Column names, of each of which one alternative must be there."""

    read: Callable[[Row], Any]

    def fits(self, columns: Sequence[str]) -> bool:
        return all(any(name in columns for name in alternatives) for alternatives in self.needs)

    def columns(self) -> str:
        return " and ".join(" or ".join(alternatives) for alternatives in self.needs)


# In the order in which they are tried: a row of preference pairs may also have messages.
_SHAPES = {
    Format.preference: _Shape((("chosen",), ("rejected",)), _pair),
    Format.messages: _Shape((("messages",),), _messages),
    Format.sharegpt: _Shape((("conversations",),), _messages),
    Format.alpaca: _Shape((("instruction",), ("output",)), _alpaca),
    Format.prompt_completion: _Shape((("prompt",), ("completion", "response")), _prompt_completion),
    Format.text: _Shape((("text",),), lambda row: Text(_text_of(row, "text"), row)),
}

KINDS = {
    "conversations": (Format.messages, Format.sharegpt, Format.alpaca, Format.prompt_completion),
    "pairs": (Format.preference,),
    "texts": (Format.text,),
}
"""The formats that each kind of row can be read from."""


def understand(row: Row, kind: str, form: Format, reasoning: Reasoning = Reasoning.keep) -> Conversation | Pair | Text:
    """Read one row as the kind that a stage trains on.

    Raises:
        BadRow: Its columns are not those of the format, or not of any, or it has nothing to learn.
    """
    columns = list(row.value)
    candidates = KINDS[kind] if form is Format.auto else (form,)
    shape = next((_SHAPES[name] for name in candidates if name in _SHAPES and _SHAPES[name].fits(columns)), None)
    if shape is None:
        expected = "; or ".join(_SHAPES[name].columns() for name in candidates if name in _SHAPES)
        has = f"has the columns {', '.join(columns)}" if columns else "has no columns"
        others = [k for k, forms in KINDS.items() if k != kind and any(_SHAPES[f].fits(columns) for f in forms)]
        if others:
            has += f" (those of {' or '.join(others)})"
        fix = f"a stage that trains on {' or '.join(others)}, or rows of {kind}" if others else "rename the columns"
        raise BadRow(row, f"{has}, and {kind} are read from {expected}", fix)
    value = shape.read(row)
    if isinstance(value, list):
        value = Conversation([_think(message, reasoning) for message in value], row, row.value.get("tools") or None)
        replies = [message for message in value.messages if message["role"] == "assistant"]
        if not any(message["content"] or message.get("tool_calls") for message in replies):
            raise BadRow(row, "has no reply of the assistant to learn", "an assistant message with text")
    elif isinstance(value, Text) and not value.text.strip():
        raise BadRow(row, "has an empty text", "some text")
    return value


_THINK = re.compile(r"^\s*<think>.*?</think>\s*", re.DOTALL)


def _think(message: Message, reasoning: Reasoning) -> Message:
    """Drop the thinking from a reply, where that is asked for."""
    if reasoning is Reasoning.keep or message["role"] != "assistant":
        return message
    kept = {name: value for name, value in message.items() if name != "reasoning_content"}
    return kept | {"content": _THINK.sub("", message["content"])}
