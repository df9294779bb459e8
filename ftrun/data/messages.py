"""Messages as rows have them, in one form; and what no conversation may lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ftrun.data.calls import calls_in_text, calls_of
from ftrun.data.media import content_of, with_media
from ftrun.data.rows import BadRow, Medium, Message, Row
from ftrun.data.values import bad_message, clean, clean_tree, is_number, shown, type_name

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
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
"""What the roles of the common formats are called here."""

_CALLS = ("function_call", "tool_call", "tool_calls")
"""Roles whose text is the JSON of tool calls."""


@dataclass(frozen=True, slots=True)
class Names:
    """What a file of messages calls their fields and roles."""

    role: str
    content: str
    roles: Mapping[str, str]
    calls: Sequence[str]


USUAL = Names("role", "content", ROLES, _CALLS)
"""The names of OpenAI's messages; those of sharegpt are read with them, where there are none of these."""


@lru_cache(maxsize=64)
def names_of(tags: tuple[tuple[str, str], ...]) -> Names:
    """Return the names that LLaMA-Factory's ``tags`` give, as pairs of tag and name, and the usual ones of the rest."""
    given = dict(tags)
    function = given.get("function_tag", _CALLS[0])
    ours = {"user_tag": "user", "assistant_tag": "assistant", "observation_tag": "tool", "system_tag": "system"}
    roles = {given[tag]: role for tag, role in ours.items() if tag in given}
    calls = [function, *(name for name in _CALLS if name not in roles)]
    return Names(
        given.get("role_tag", "role"),
        given.get("content_tag", "content"),
        ROLES | {function: "assistant"} | roles,
        calls,
    )


def normalise(turns: Any, row: Row, tags: Mapping[str, str] | None = None) -> tuple[list[Message], list[Medium]]:
    """Read a list of messages alone, as a chat has them: no reply is asked for.

    Args:
        turns: Messages as the formats ``messages`` and ``sharegpt`` have them.
        row: What an error is said of, and where columns of media are looked for.
        tags: As for `understand`.

    Raises:
        BadRow: It is no list of messages, or one of them cannot be read.
    """
    names = names_of(tuple(tags.items())) if tags else USUAL
    return with_media(row, message_list(row, turns, "messages", names))


def message_list(row: Row, turns: Any, name: str, names: Names) -> list[Message]:
    """Read the messages in the column ``name``: a list that is not empty."""
    if not isinstance(turns, list) or not turns:
        raise BadRow(row, f"{name} is not a list of messages", f'"{name}": [{{"role": "user", "content": "..."}}, ...]')
    return [_message(row, turn, index, names) for index, turn in enumerate(turns, 1)]


def _message(row: Row, turn: Any, index: int, names: Names) -> Message:
    """Read one message in any of the formats; text in it is checked, media in it are placed later."""
    if not isinstance(turn, dict):
        raise bad_message(row, index, "is not an object", '{"role": "user", "content": "..."}')
    theirs = turn.get(names.role)
    if theirs is None:
        theirs = turn.get("from", turn.get("role"))
    role = names.roles.get(theirs) if type(theirs) is str else None
    if role is None:
        role = _unusual_role(row, index, theirs, names)
    content = turn.get(names.content)
    if content is None:
        content = turn.get("value", turn.get("content"))
    if type(content) is str:
        content = clean(row, content, "content")
    elif content is not None:
        content = content_of(row, content, index)
    message = {"role": role, "content": content}
    if len(turn) > 2:
        _more(row, turn, index, names, message)
    if theirs in names.calls and "tool_calls" not in message:
        message["content"], message["tool_calls"] = calls_in_text(row, content, index)
    if message["content"] is None:
        if "tool_calls" not in message and "reasoning_content" not in message:
            raise bad_message(row, index, "has no text in content", '"content": "..."')
        message["content"] = ""
    return message


def _unusual_role(row: Row, index: int, theirs: Any, names: Names) -> str:
    """Return the role of a name that is not written as usual."""
    known = f"one of {', '.join(names.roles)}"
    if theirs is None:
        raise bad_message(row, index, "has no role", known)
    role = names.roles.get(theirs.lower()) if isinstance(theirs, str) else None
    if role is None:
        raise bad_message(row, index, f"has the role {shown(repr(theirs), 60)}", known, "has an unknown role")
    return role


def _more(row: Row, turn: Mapping[str, Any], index: int, names: Names, message: Message) -> None:
    """Read the further fields of a message; unknown ones stay for the chat template, unless they are null."""
    known = (names.role, names.content, "role", "content", "from", "value")
    for name, field in turn.items():
        if field is None or name in known:
            continue
        if name == "tool_calls":
            if field not in ([], ""):
                message[name] = calls_of(row, field, index)
        elif name == "function_call":  # OpenAI's older name for a single one
            message["tool_calls"] = calls_of(row, field, index)
        elif name == "reasoning_content":
            if clean(row, field, name):
                message[name] = field
        elif name in ("weight", "loss_weight", "train"):
            _weigh(row, name, field, index, message)
        else:
            clean_tree(row, field, clean(row, name, "the name of a field"))
            message[name] = field
    if message.get("weight") == 1:
        del message["weight"]


def _weigh(row: Row, name: str, field: Any, index: int, message: Message) -> None:
    """Set how much a message counts in the loss."""
    if name == "train":
        if not isinstance(field, bool):
            raise bad_message(row, index, f"has {type_name(field)} as train, not true or false", '"train": false')
        weight = float(field)
    else:
        if not is_number(field) or not (field == 0 or 1e-30 < field < 1e30):  # which float32 holds
            raise bad_message(row, index, f"has a {name} that is no finite number of at least 0", f'"{name}": 0.5')
        weight = float(field)
    if message.setdefault("weight", weight) != weight:
        raise bad_message(row, index, "has two different weights", "one of weight, loss_weight and train")


def opening(messages: Sequence[Message]) -> Message | None:
    """Return the first message that is not the system's."""
    return next((message for message in messages if message["role"] != "system"), None)


def check_prompt(row: Row, messages: Sequence[Message]) -> None:
    """Refuse a conversation that begins with an answer to nothing, or in which nothing is asked."""
    if not messages or messages[0]["role"] != "user":
        _check_opening(row, messages)
    empty = False
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            if content and (type(content) is list or not content.isspace()):
                return
            empty = True
    if empty:
        raise BadRow(row, "has an empty prompt", "a user message with text")


def _check_opening(row: Row, messages: Sequence[Message]) -> None:
    if not messages:
        raise BadRow(row, "has no prompt", "a user message first")
    if messages[0]["role"] == "assistant":  # after a system message it is a greeting
        raise BadRow(row, "begins with a reply of the assistant to nothing", "a user or system message first")
    first = opening(messages)
    if first and first["role"] == "tool":
        raise BadRow(row, "begins with the answer of a tool that nobody called", "a user message first")


def check_reply(row: Row, messages: Sequence[Message], where: str = "") -> None:
    """Refuse messages without a reply of the assistant that says anything."""
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"]
            said = content and (type(content) is list or not content.isspace())
            if said or "tool_calls" in message or "reasoning_content" in message:
                return
    raise BadRow(row, f"{where}has no reply of the assistant to learn", "an assistant message with text")
