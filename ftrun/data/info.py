"""``dataset_info.json`` as LLaMA-Factory reads it: names of data sets, where each is, and what its columns mean.

Columns and tags that an entry does not list keep their defaults; there, listing one unsets all others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftrun.data import places
from ftrun.data.formats import KINDS
from ftrun.errors import ConfigError, Problem, did_you_mean

FILE = "dataset_info.json"

_KEYS = (
    "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name", "formatting", "ranking",
    "subset", "split", "folder", "num_samples", "columns", "tags",
)  # fmt: skip

_MESSAGES = {"sharegpt": "conversations", "openai": "messages"}
"""What the column of messages is called, by ``formatting``; alpaca rows have none."""

_TURN_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
"""What the columns of alpaca rows are called here."""

_COMMON_COLUMNS = {
    "system": "system", "tools": "tools", "images": "images", "videos": "videos", "audios": "audios",
    "chosen": "chosen", "rejected": "rejected", "kto_tag": "label",
}  # fmt: skip

TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
"""What an entry may say about messages: the fields of their role and content, and what roles are called."""

_FIELDS = {
    "sharegpt": {"role_tag": "from", "content_tag": "value"},
    "openai": {"role_tag": "role", "content_tag": "content"},
}
"""What the fields of a message are called where an entry renames roles only."""


@dataclass(frozen=True)
class Entry:
    """One data set of a ``dataset_info.json``."""

    path: str
    """A path, an address, or an id on a hub."""

    on_hub: bool = False
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    """The part of a hub's repository that is read."""

    rows: int | None = None


def load(place: str) -> dict[str, Any]:
    """Return the entries of a file, or of the one in a folder, by name.

    Raises:
        ConfigError: It is not there, or not such a file.
    """
    if why := places.why_unreadable(place):
        message = f"{places.shortened(place)} cannot be read: {why}"
        raise ConfigError([Problem("data.dataset_info", message, f"a {FILE}, or the folder of one")])
    file = _file(place)
    try:
        entries = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        message = f"{file} cannot be read: {error.strerror}"
        raise ConfigError([Problem("data.dataset_info", message, f"a {FILE}, or the folder of one")]) from None
    except ValueError as error:
        raise ConfigError(
            [Problem(str(file), f"is not JSON: {error}", "an object with an entry for each name")]
        ) from None
    if not isinstance(entries, dict):
        raise ConfigError([Problem(str(file), "is not a JSON object", "an object with an entry for each name")])
    return entries


def _file(place: str) -> Path:
    file = Path(place).expanduser()
    return file / FILE if file.is_dir() else file


def entry(place: str, name: str, found: Any, kind: str | None) -> Entry:
    """Read one entry.

    Args:
        place: The ``dataset_info.json``, or its folder: file names start there.
        name: The entry's name.
        found: What the file has under it.
        kind: The kind of rows that the stage trains on, where the entry leaves that open.

    Raises:
        ConfigError: With everything wrong with the entry.
    """
    file = _file(place)
    key = f"{file}: {name}"
    if not isinstance(found, dict):
        raise ConfigError([Problem(key, "is not a JSON object", f'"{name}": {{"file_name": "..."}}')])
    problems = _unknown(key, found)
    formatting = found.get("formatting", "alpaca")
    if formatting not in ("alpaca", *_MESSAGES):
        known = ["alpaca", *_MESSAGES]
        message = f"has the formatting {formatting!r}{did_you_mean(str(formatting), known)}"
        problems.append(Problem(key, message, f"one of {', '.join(known)}"))
    samples = found.get("num_samples")
    if samples is not None and (type(samples) is not int or samples < 1):
        problems.append(Problem(key, f"has num_samples {samples!r}", "a whole number of rows from 1 on"))
    where = _where(file, found)
    if where is None:
        problems.append(Problem(key, *_nowhere(found)))
    if problems:
        raise ConfigError(problems)
    assert where
    form, columns = _meaning(found, formatting, kind)
    return Entry(
        path=where[0],
        on_hub=where[1],
        format=form,
        columns=columns,
        tags=_tags(found, formatting),
        subset=found.get("subset"),
        split=found.get("split"),
        folder=found.get("folder"),
        rows=samples,
    )


def _unknown(key: str, found: Mapping[str, Any]) -> list[Problem]:
    """Return a problem for each name that looks like a mistyped one; other keys are notes of the file's owner."""
    columns = ("messages", *_TURN_COLUMNS, *_COMMON_COLUMNS)
    problems = [
        Problem(key, f"has the key {name}{near}", "the name as it is spelled there")
        for name in found
        if name not in _KEYS and (near := did_you_mean(name, _KEYS))
    ]
    for part, known in (("columns", columns), ("tags", TAGS)):
        listed = found.get(part) or {}
        if not isinstance(listed, dict) or not all(isinstance(value, str | None) for value in listed.values()):
            problems.append(
                Problem(key, f"has {part} that are no object of names", f'"{part}": {{"{known[0]}": "..."}}')
            )
            continue
        for name in listed:
            if name not in known:
                message = f"{part} has no name {name}{did_you_mean(name, known)}"
                problems.append(Problem(key, message, f"some of {', '.join(known)}"))
    return problems


def _where(file: Path, found: Mapping[str, Any]) -> tuple[str, bool] | None:
    """Return where an entry's rows are, and whether that is a hub, in the order in which LLaMA-Factory looks."""
    if found.get("hf_hub_url"):
        return str(found["hf_hub_url"]), True
    if found.get("ms_hub_url"):
        return places.MODELSCOPE + str(found["ms_hub_url"]), True
    if found.get("script_url"):
        return None
    if found.get("cloud_file_name"):
        return str(found["cloud_file_name"]), False
    return (str(file.parent / str(found["file_name"])), False) if found.get("file_name") else None


def _nowhere(found: Mapping[str, Any]) -> tuple[str, str]:
    """Return what is wrong with an entry without rows, and what mends it."""
    fix = "file_name, cloud_file_name, hf_hub_url or ms_hub_url"
    if found.get("script_url"):
        return "has a script_url: rows would come from Python code of the data set, which is not run", f"{fix} instead"
    if found.get("om_hub_url"):
        return "is only on the OpenMind hub, which is not read", f"{fix} as well"
    return "does not say where its rows are", fix


def _tags(found: Mapping[str, Any], formatting: str) -> dict[str, str]:
    listed = {tag: name for tag, name in (found.get("tags") or {}).items() if name}
    return _FIELDS[formatting] | listed if listed and formatting in _FIELDS else {}


def _meaning(found: Mapping[str, Any], formatting: str, kind: str | None) -> tuple[str, dict[str, str]]:
    """Return the format of an entry's rows, and the names of its columns that differ from the format's own."""
    listed = {name: column for name, column in (found.get("columns") or {}).items() if column}
    if kind == "texts" and formatting == "alpaca":
        columns = {"text": listed["prompt"]} if "prompt" in listed else {}
        return "text", {name: column for name, column in columns.items() if name != column}
    turns = {"messages": _MESSAGES[formatting]} if formatting in _MESSAGES else _TURN_COLUMNS
    names = turns | _COMMON_COLUMNS
    columns = {names[name]: column for name, column in listed.items() if name in names and names[name] != column}
    if found.get("ranking"):
        form = "preference"
    elif "kto_tag" in listed:
        form = "feedback"
    else:
        form = {"openai": "messages"}.get(formatting, formatting)
    return (form if kind is None or form in KINDS[kind] else "auto"), columns
