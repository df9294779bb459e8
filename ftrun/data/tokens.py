"""Rows that are tokenised already."""

from __future__ import annotations

from ftrun.data.columns import MASKS, first_of
from ftrun.data.messages import Names
from ftrun.data.rows import BadRow, Item, Row, Tokens

IGNORED = -100
"""The label of a token that is not learned."""


def tokens_of(row: Row, _: Names) -> list[Item]:
    """Read token ids with labels or a mask of 0 and 1; without either, all are learned. Padding is left out."""
    value = row.value
    ids = _whole_numbers(row, "input_ids", 0, 2**31 - 1)
    if not ids:
        raise BadRow(row, "input_ids is empty", '"input_ids": [1, 2, 3]')
    name = first_of(row, MASKS)
    if name == "labels":
        labels = _whole_numbers(row, name, IGNORED, 2**31 - 1)
        if min(labels, default=0) < 0 and any(IGNORED < label < 0 for label in labels):
            raise BadRow(row, f"labels has negative numbers other than {IGNORED}", f"{IGNORED} for no loss")
    elif name:
        mask = _whole_numbers(row, name, 0, 1)
        labels = [token if learned else IGNORED for token, learned in zip(ids, mask, strict=False)]
        labels += [IGNORED] * (len(mask) - len(labels))
    else:
        labels = ids
    if len(labels) != len(ids):
        raise BadRow(row, f"{name} is not as long as input_ids", "one for each token")
    if value.get("attention_mask") is not None:
        attended = _whole_numbers(row, "attention_mask", 0, 1)
        if len(attended) != len(ids):
            raise BadRow(row, "attention_mask is not as long as input_ids", "one for each token")
        if 0 in attended:
            ids = [token for token, seen in zip(ids, attended, strict=True) if seen]
            labels = [label for label, seen in zip(labels, attended, strict=True) if seen]
    if not labels or max(labels) == IGNORED:
        raise BadRow(row, "learns none of its tokens", "labels or a mask that let some count")
    return [Tokens(ids, labels, row)]


def _whole_numbers(row: Row, name: str, least: int, most: int) -> list[int]:
    """Read a column of whole numbers; true and false are numbers in a mask."""
    value = row.value[name]
    fine = {int, bool} if most == 1 else {int}
    if not isinstance(value, list) or not set(map(type, value)) <= fine:
        raise BadRow(row, f"{name} is not a list of whole numbers", f'"{name}": [{least}, {most if most == 1 else 2}]')
    if value and (min(value) < least or max(value) > most):
        raise BadRow(row, f"{name} has numbers below {least} or above {most}", "numbers in that range")
    return value
