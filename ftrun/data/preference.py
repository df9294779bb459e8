"""Rows of preferences: better and worse replies to one prompt, or several that are ranked or scored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ftrun.data.calls import tools_of
from ftrun.data.columns import first_of, messages_of, prompt_of, with_system
from ftrun.data.media import with_media
from ftrun.data.messages import Names, check_prompt, check_reply, opening
from ftrun.data.rows import BadRow, Item, Message, Pair, Row
from ftrun.data.values import is_number, number

SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("chosen_rating", "rejected_rating"))
"""Columns of the scores of the better and of the worse reply."""


def pairs_of(row: Row, names: Names) -> list[Item]:
    """Read chosen and rejected, of which each may be several; or replies from the best to the worst."""
    prompt = prompt_of(row, names)
    tools = tools_of(row)
    if row.value.get("chosen") is None or row.value.get("rejected") is None:
        return [_pair(row, prompt, *better_and_worse, tools) for better_and_worse in _ranked(row, names)]
    margin = _margin(row)
    chosen, rejected = _replies(row, "chosen", names), _replies(row, "rejected", names)
    return [_pair(row, prompt, better, worse, margin, tools) for better in chosen for worse in rejected]


def _pair(
    row: Row,
    prompt: list[Message],
    chosen: list[Message],
    rejected: list[Message],
    margin: float | None,
    tools: list[Any] | None,
) -> Pair:
    if chosen == rejected:
        raise BadRow(row, "chosen and rejected are the same, so neither is better", "two replies that differ")
    both = (chosen, rejected)
    if all(reply and reply[0]["role"] in ("system", "user") for reply in both):
        common = _common(chosen, rejected)
        if not prompt or prompt[-1]["role"] != "assistant" or opening(prompt) == opening(common):
            # They are whole conversations, which hold the prompt too, and do not go on where it ends.
            prompt, chosen, rejected = common, chosen[len(common) :], rejected[len(common) :]
            prompt = with_system(row, prompt) if prompt else prompt
    if not prompt:
        fix = '"prompt": "...", "chosen": "...", "rejected": "..."'
        raise BadRow(row, "chosen and rejected do not follow a common prompt", fix)
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        check_reply(row, reply, f"{name} ")
        if any(type(message["content"]) is list for message in reply):
            raise BadRow(row, f"{name} has media in it, and only the prompt can", "replies of text")
    prompt, media = with_media(row, prompt)
    check_prompt(row, prompt)
    return Pair(prompt, chosen, rejected, row, tools, media, margin)


def _common(one: Sequence[Message], other: Sequence[Message]) -> list[Message]:
    """Return the messages that two conversations begin with together."""
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return list(one[:count])


def _replies(row: Row, name: str, names: Names) -> list[list[Message]]:
    """Read a column of one reply (a text, a message, messages) or a list of several."""
    value = row.value[name]
    if not isinstance(value, list) or (value and all(isinstance(turn, dict) for turn in value)):
        return [messages_of(row, value, name, "assistant", names)]
    if not value:
        raise BadRow(row, f"{name} is an empty list", f'"{name}": "..."')
    return [messages_of(row, reply, name, "assistant", names) for reply in value]


def _ranked(row: Row, names: Names) -> Iterator[tuple[list[Message], list[Message], float | None]]:
    """Yield every better and worse of several replies, and by how much one is better if they are scored."""
    name = first_of(row, ("ranked", "responses"))
    value, scores = row.value[name], row.value.get("scores")
    if not isinstance(value, list) or len(value) < 2:
        raise BadRow(row, f"{name} is not a list of two or more replies", f'"{name}": ["the best", "the worst"]')
    replies = [messages_of(row, reply, name, "assistant", names) for reply in value]
    if scores is None:
        yield from ((better, worse, None) for i, better in enumerate(replies) for worse in replies[i + 1 :])
        return
    if not isinstance(scores, list) or len(scores) != len(replies) or not all(map(is_number, scores)):
        raise BadRow(row, f"scores are not a number for each of {name}", '"scores": [1.0, 0.5]')
    if len(set(scores)) == 1:
        raise BadRow(row, "scores are all the same, so no reply is better", "scores that differ")
    if name == "ranked" and scores != sorted(scores, reverse=True):
        raise BadRow(row, "scores rise where ranked has the best reply first", "the column responses, in any order")
    for better, high in zip(replies, scores, strict=True):
        yield from ((better, worse, high - low) for worse, low in zip(replies, scores, strict=True) if low < high)


def _margin(row: Row) -> float | None:
    """Return how much better the better reply is: ``margin``, or the difference of the two scores."""
    value = row.value
    if (margin := value.get("margin")) is not None:
        return number(row, margin, "margin")
    for better, worse in SCORES:
        if value.get(better) is not None and value.get(worse) is not None:
            return number(row, value[better], better) - number(row, value[worse], worse)
    return None
