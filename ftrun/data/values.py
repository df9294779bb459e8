"""What a cell of a row holds, checked: texts that a tokenizer can read, numbers, JSON; and how errors name it."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from ftrun.data.rows import BadRow, Row


def clean(row: Row, text: Any, where: str) -> str:
    """Return a text that a tokenizer can read."""
    if type(text) is not str:
        raise BadRow(row, f"{where} is {type_name(text)}, not text", f'"{where}": "..."')
    if "\0" in text:
        raise BadRow(row, f"{where} has a null byte in its text", "take it out")
    if not text.isascii():
        if "\ufdd0" in text:
            raise BadRow(row, f"{where} has the noncharacter U+FDD0 in its text", "take it out")
        try:
            text.encode()
        except UnicodeEncodeError:
            fix = "write the character whole: \\ud83d\\ude00, not \\ud83d alone"
            raise BadRow(row, f"{where} has half of a surrogate pair in its text, which is no character", fix) from None
    return text


def clean_tree(row: Row, value: Any, where: str) -> None:
    """Check every text inside a JSON value."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            clean(row, value, where)
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            waiting += value
        elif value is not None and not isinstance(value, bool | int | float):
            raise BadRow(row, f"{where} holds {type_name(value)}, which is not JSON", "text, numbers, lists, objects")


def is_number(value: Any) -> bool:
    """Tell whether a value is a number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def number(row: Row, value: Any, name: str) -> float:
    """Return a number that a float can hold."""
    if not is_number(value):
        raise BadRow(row, f"{name} is {type_name(value)}, not a finite number", f'"{name}": 1.0')
    return float(value)


def from_json(text: str) -> Any:
    """Return what a JSON text says; the text itself, which nobody takes for an object, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def type_name(value: Any) -> str:
    """Return what a value is, as JSON calls it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if value != value else "infinite"
    types = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return "null" if value is None else types.get(type(value), type(value).__name__)


def shown(text: str, most: int) -> str:
    """Return a text of a row as it can be printed, cut off where it is long."""
    return text[:most].encode(errors="backslashreplace").decode() + ("..." if len(text) > most else "")


def bad_row(row: Row, message: str, fix: str, reason: str) -> BadRow:
    """Return an error that says more of the row than the reason it is counted under."""
    error = BadRow(row, message, fix)
    error.reason = reason
    return error


def bad_message(row: Row, index: int, message: str, fix: str, reason: str = "") -> BadRow:
    """Return an error of one message, counted from 1; rows are counted by ``reason``, if it is not the message."""
    return bad_row(row, f"message {index} {message}", fix, f"a message {reason or message}")
