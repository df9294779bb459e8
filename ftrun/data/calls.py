"""The tools of a row and the calls of them in its messages, brought into OpenAI's form."""

from __future__ import annotations

import re
from typing import Any

from ftrun.data.rows import BadRow, Row
from ftrun.data.values import bad_message, clean_tree, from_json

_THINKING = re.compile(r"\s*<think>.*?</think>\s*", re.DOTALL)


def tools_of(row: Row) -> list[Any] | None:
    """Return the ``tools`` of a row, a list of objects or JSON text of one, in OpenAI's form.

    Returns:
        None where the row has none, and an empty list where its text says that there are none.

    Raises:
        BadRow: They are something else.
    """
    given = row.value.get("tools")
    if given is None or given == "":
        return None
    tools = _parsed(row, given, "tools")
    tools = [_parsed(row, tool, "tools") for tool in ([tools] if isinstance(tools, dict) else tools or [])]
    if not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(row, "tools is not a list of objects", '"tools": [{"type": "function", "function": {...}}]')
    for tool in tools:
        clean_tree(row, tool, "tools")
    # Chat templates are written for OpenAI's form; a bare function is what it holds.
    bare = [isinstance(tool.get("name"), str) and "function" not in tool and "type" not in tool for tool in tools]
    wrapped = [
        {"type": "function", "function": tool} if is_bare else tool for tool, is_bare in zip(tools, bare, strict=True)
    ]
    # The text "[]" says that there are tools, none of them; some templates then write an empty system message.
    return wrapped if wrapped or isinstance(given, str) else None


def calls_of(row: Row, value: Any, index: int) -> list[dict[str, Any]]:
    """Read tool calls in OpenAI's form or bare, as a list or a single one, as objects or as JSON text."""
    if isinstance(value, str):
        value = from_json(value)
    calls = [
        from_json(call) if isinstance(call, str) else call for call in (value if isinstance(value, list) else [value])
    ]
    fix = '{"name": "...", "arguments": {...}}'
    if not calls or not all(isinstance(call, dict) for call in calls):
        raise bad_message(row, index, "has a tool call that is no JSON object", fix)
    return [_call(row, call, index, fix) for call in calls]


def _call(row: Row, call: dict[str, Any], index: int, fix: str) -> dict[str, Any]:
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise bad_message(row, index, "has a tool call without a name", fix)
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str):
        arguments = from_json(arguments) if arguments.strip() else {}
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise bad_message(row, index, "has a tool call whose arguments are no JSON object", fix)
    clean_tree(row, function["name"], "tool_calls")
    clean_tree(row, arguments, "tool_calls")
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def calls_in_text(row: Row, content: Any, index: int) -> tuple[str, list[dict[str, Any]]]:
    """Split the text of a function call, which may follow thinking, into that and the calls."""
    if not isinstance(content, str):
        raise bad_message(row, index, "has no tool call in its text", '"{\\"name\\": ..., \\"arguments\\": {...}}"')
    thought = _THINKING.match(content)
    start = thought.end() if thought else 0
    return content[:start], calls_of(row, content[start:], index)


def _parsed(row: Row, value: Any, name: str) -> Any:
    """Return a list or an object, which JSON text may hold."""
    value = from_json(value) if isinstance(value, str) else value
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, dict | str) for item in items) or isinstance(value, str):
        raise BadRow(
            row, f"{name} is not a list of objects", f'"{name}": [{{"type": "function", "function": {{...}}}}]'
        )
    return value
