"""What the columns of a row mean: raw rows into conversations, pairs, texts and whatever else a stage trains on.

A row is read in three steps: its columns say which layout it has (`LAYOUTS`), the layout's reader takes messages and
texts from them, and what cannot be trained on is refused with a `BadRow`, whose `reason` holds nothing of the single
row, so that bad rows can be counted by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from ftrun import plugin
from ftrun.data.calls import tools_of
from ftrun.data.columns import (
    ALTERNATIVES,
    ANSWERS,
    LABELS,
    MASKS,
    PROMPTS,
    REPLIES,
    TURNS,
    asked,
    column_of,
    first_of,
    prompt_of,
    reply_of,
    turns_of,
)
from ftrun.data.media import MEDIA, with_media
from ftrun.data.messages import USUAL, Names, check_prompt, check_reply, names_of
from ftrun.data.preference import SCORES, pairs_of
from ftrun.data.rows import BadRow, Conversation, Feedback, Item, Message, Question, Row, Text
from ftrun.data.tokens import tokens_of
from ftrun.data.values import bad_row, clean, clean_tree, shown, type_name
from ftrun.errors import ConfigError, Problem, did_you_mean

KINDS = {
    "conversations": ("messages", "sharegpt", "alpaca", "prompt_completion", "tokens"),
    "pairs": ("preference",),
    "feedback": ("feedback",),
    "questions": ("prompt_answer", "prompt"),
    "texts": ("text", "tokens"),
}
"""The formats that each kind of row can be read from, in the order in which they are tried."""


def understand(
    row: Row,
    kind: str,
    form: str = "auto",
    columns: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> list[Item]:
    """Read one row as the kind that a stage trains on.

    Args:
        row: The row as it stands in a file.
        kind: One of `KINDS`.
        form: ``auto``, one of the formats of that kind, or a plugin of the group ``format``.
        columns: The file's names of columns, by the names they have here: ``{"prompt": "question"}``. Of alternatives
            (``final`` and ``answer``) the one that is named here is read.
        tags: LLaMA-Factory's names of a message's fields and roles (`ftrun.data.info.TAGS`).

    Returns:
        One item; several for a row of ranked replies, or one that a plugin makes several of.

    Raises:
        BadRow: Its columns are not those of the format, or not of any, or it cannot be trained on.
        ConfigError: There is no such format.
    """
    if columns:
        row = Row(_renamed(row.value, columns), row.file, row.line)
    if form != "auto" and form not in LAYOUTS:
        made = _convert(row, form, _converter(form, kind))
        return [item for one in made for item in understand(one, kind, "auto", None, tags)]
    present = tuple([name for name, cell in row.value.items() if cell is not None])
    read = _reader(kind, form, present)
    if read is None:
        raise _not_understood(row, kind, form)
    return read(row, names_of(tuple(tags.items())) if tags else USUAL)


def names() -> list[str]:
    """Return what ``data.format`` can be: auto, the built-in formats and the plugins, importing none of these."""
    return ["auto", *LAYOUTS, *plugin.names(plugin.Format.group)]


def about(form: str) -> str:
    """Return the columns of a built-in format, in words."""
    return LAYOUTS[form].columns()


def check(form: str, kind: str, key: str = "data.format") -> Iterator[Problem]:
    """Yield why rows of a kind cannot be read as a format."""
    is_plugin = plugin.exists(plugin.Format.group, form)
    known = ", ".join(["auto", *KINDS[kind], *plugin.names(plugin.Format.group)])
    if (form == "auto" or form in LAYOUTS) and is_plugin:
        yield Problem(key, f"{form} is a format of ftrun, and a plugin has its name", "another name for the plugin")
    elif form != "auto" and form in LAYOUTS and form not in KINDS[kind]:
        yield Problem(key, f"{kind} are trained on, which {form} rows are not", f"one of {known}")
    elif form != "auto" and form not in LAYOUTS and not is_plugin:
        fix = f"one of {known}, or 'plugins=[FILE.py]' with the plugin"
        yield Problem(key, f"there is no format {form}{did_you_mean(form, names())}", fix)


# Which layout a row has.

_Reader = Callable[[Row, Names], list[Item]]


@dataclass(frozen=True)
class _Layout:
    """How a format is told by its columns, and read."""

    ways: tuple[tuple[tuple[str, ...], ...], ...]
    """Sets of columns, one of which has to be there; of each column in it, one of its alternative names."""

    read: _Reader

    def fits(self, columns: Iterable[str]) -> bool:
        return any(all(any(name in columns for name in column) for column in way) for way in self.ways)

    def columns(self) -> str:
        return ", or ".join(" and ".join(column[0] for column in way) for way in self.ways)


@lru_cache(maxsize=256)
def _reader(kind: str, form: str, columns: tuple[str, ...]) -> _Reader | None:
    """Return how rows with these columns are read: rows of a file have the same ones, so this is remembered."""
    there = frozenset(columns)
    candidates = [name for name in KINDS[kind] if form in ("auto", name)]
    return next((LAYOUTS[name].read for name in candidates if LAYOUTS[name].fits(there)), None)


def _not_understood(row: Row, kind: str, form: str) -> BadRow:
    """Say why no format of a kind fits."""
    columns = list(row.value)
    candidates = [LAYOUTS[name] for name in KINDS[kind] if form in ("auto", name)]
    if not candidates:
        fix = f"data.format=auto, {' or '.join(KINDS[kind])}"
        return BadRow(row, f"{kind} are not read from rows of the format {form}", fix)
    if any(layout.fits(columns) for layout in candidates):
        null = next(name for name, cell in row.value.items() if cell is None and _is_needed(name, candidates))
        lists = (*TURNS, "ranked", "responses", "scores", "input_ids")
        wanted = "a list" if null in lists else "true or false" if null in LABELS else "text"
        return BadRow(row, f"{null} is null, not {wanted}", f"{wanted} in {null}")
    expected = "; or ".join(layout.columns() for layout in candidates)
    telling = {k: [form for form in forms if form != "prompt"] for k, forms in KINDS.items()}  # most rows have it
    others = [k for k, forms in telling.items() if k != kind and any(LAYOUTS[f].fits(columns) for f in forms)]
    first = [shown(name, 60) for name in columns[:20]]
    more = f" and {len(columns) - 20} more" if len(columns) > 20 else ""
    has = f"has the columns {', '.join(first)}{more}" if columns else "has no columns"
    has += f" (those of {' or '.join(others)})" if others else ""
    rename = "rename the columns, or say in data.columns what they are"
    fix = f"a stage that trains on {' or '.join(others)}, or rows of {kind}" if others else rename
    reason = f"has other columns than {kind} are read from"
    return bad_row(row, f"{has}, and {kind} are read from {expected}", fix, reason)


def _is_needed(name: str, layouts: Iterable[_Layout]) -> bool:
    return any(name in column for layout in layouts for way in layout.ways for column in way)


def _renamed(value: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Give columns the names they have here; one that is renamed hides what is called so in the file."""
    theirs = set(columns.values())
    chosen = {name for group in ALTERNATIVES if not columns.keys().isdisjoint(group) for name in group}
    kept = {
        name: cell for name, cell in value.items() if name not in columns and name not in theirs and name not in chosen
    }
    return kept | {ours: value[name] for ours, name in columns.items() if name in value}


# Formats of plugins.


def _converter(form: str, kind: str) -> plugin.Format:
    try:
        return _made(cast("Callable[[], plugin.Format]", plugin.get(plugin.Format.group, form)))
    except LookupError:
        raise ConfigError(list(check(form, kind))) from None


@lru_cache(maxsize=8)
def _made(cls: Callable[[], plugin.Format]) -> plugin.Format:
    return cls()  # one for all rows, so that it may remember what it has read


def _convert(row: Row, form: str, converter: plugin.Format) -> Iterator[Row]:
    """Yield what a plugin makes of a row."""
    fix = "mend the row, or the plugin"
    try:
        made = converter.convert(row.value)
    except BadRow:
        raise
    except Exception as error:  # whatever a user's code raises
        reason = f"data.format={form} cannot convert it: {type(error).__name__}"
        raise bad_row(row, f"{reason}: {shown(str(error), 500)}" if str(error) else reason, fix, reason) from error
    rows = made if isinstance(made, list) else [made]
    if not rows or not all(isinstance(value, dict) for value in rows):
        what = "no row" if not rows else f"{type_name(next(v for v in rows if not isinstance(v, dict)))}, not a row,"
        raise BadRow(row, f"data.format={form} makes {what} of it", 'a plugin that returns {"messages": [...]}')
    yield from (Row(value, row.file, row.line) for value in rows)


# Readers of layouts.


def _messages(row: Row, names: Names) -> list[Item]:
    return [_conversation(row, turns_of(row, "messages", names))]


def _sharegpt(row: Row, names: Names) -> list[Item]:
    return [_conversation(row, turns_of(row, "conversations", names))]


def _alpaca(row: Row, _: Names) -> list[Item]:
    messages = asked(row)
    messages.append({"role": "assistant", "content": clean(row, row.value["output"], "output")})
    return [_conversation(row, messages)]


def _prompt_completion(row: Row, names: Names) -> list[Item]:
    return [_conversation(row, [*prompt_of(row, names), *reply_of(row, names)])]


def _conversation(row: Row, messages: list[Message]) -> Conversation:
    messages, media = with_media(row, messages)
    check_prompt(row, messages)
    check_reply(row, messages)
    return Conversation(messages, row, tools_of(row), media)


def _feedback(row: Row, names: Names) -> list[Item]:
    name = first_of(row, LABELS)
    good = row.value[name]
    if not isinstance(good, bool):
        raise BadRow(row, f"{name} is {type_name(good)}, not true or false", f'"{name}": true')
    if first_of(row, PROMPTS) and first_of(row, REPLIES):
        messages = [*prompt_of(row, names), *reply_of(row, names)]
    elif turns := first_of(row, TURNS):
        messages = turns_of(row, turns, names)
    else:
        messages = [*asked(row), *column_of(row, "output", "assistant", names)]
    if messages[-1]["role"] != "assistant":
        raise BadRow(row, "does not end with a reply of the assistant to judge", "an assistant message at the end")
    messages, media = with_media(row, messages)
    prompt, reply = messages[:-1], messages[-1:]
    check_reply(row, reply)
    check_prompt(row, prompt)
    return [Feedback(prompt, reply, good, row, tools_of(row), media)]


def _prompt_answer(row: Row, names: Names) -> list[Item]:
    name = first_of(row, ANSWERS)
    answer = row.value[name]
    clean_tree(row, answer, name)
    if answer in ("", [], {}) or (isinstance(answer, str) and answer.isspace()) or answer != answer:
        what = "NaN" if answer != answer else "empty"
        raise BadRow(row, f"{name} is {what}, and a reply is judged by it", f'"{name}": "42"')
    return [_question(row, names, answer)]


def _prompt(row: Row, names: Names) -> list[Item]:
    return [_question(row, names, None)]


def _question(row: Row, names: Names, answer: Any) -> Question:
    prompt, media = with_media(row, prompt_of(row, names))
    check_prompt(row, prompt)
    if prompt[-1]["role"] == "assistant":
        raise BadRow(row, "ends with a reply of the assistant, so there is none to generate", "only the prompt")
    return Question(prompt, answer, row, tools_of(row), media)


def _text(row: Row, _: Names) -> list[Item]:
    text = clean(row, row.value["text"], "text")
    if not text or text.isspace():
        raise BadRow(row, "has an empty text", "some text")
    return [Text(text, row)]


def _columns(*ways: str) -> tuple[tuple[tuple[str, ...], ...], ...]:
    """Read sets of columns: words, or the alternatives that a word in capitals stands for."""
    stand_for = {
        "PROMPT": PROMPTS,
        "REPLY": REPLIES,
        "ANSWER": ANSWERS,
        "LABEL": LABELS,
        "TURNS": TURNS,
    }
    return tuple(tuple(stand_for.get(word, (word,)) for word in way.split()) for way in ways)


LAYOUTS = {
    "messages": _Layout(_columns("messages"), _messages),
    "sharegpt": _Layout(_columns("conversations"), _sharegpt),
    "alpaca": _Layout(_columns("instruction output"), _alpaca),
    "prompt_completion": _Layout(_columns("PROMPT REPLY"), _prompt_completion),
    "preference": _Layout(_columns("chosen rejected", "ranked", "responses scores"), pairs_of),
    "feedback": _Layout(_columns("PROMPT REPLY LABEL", "TURNS LABEL", "instruction output LABEL"), _feedback),
    "prompt_answer": _Layout(_columns("PROMPT ANSWER", "TURNS ANSWER"), _prompt_answer),
    "prompt": _Layout(_columns("PROMPT", "TURNS", "instruction"), _prompt),
    "text": _Layout(_columns("text"), _text),
    "tokens": _Layout(_columns("input_ids"), tokens_of),
}
"""The built-in formats."""

COLUMNS = frozenset(
    [
        *(name for layout in LAYOUTS.values() for way in layout.ways for column in way for name in column),
        *("input", "history", "system", "tools", *MEDIA),
        *("margin", *(name for scores in SCORES for name in scores)),
        *(*MASKS, "attention_mask"),
    ]
)
"""Every column that a built-in format reads."""
