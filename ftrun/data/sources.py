"""The places that a run's rows come from: found, told apart by content, and read."""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from ftrun.data import Data, Source, digests, info, places, storage
from ftrun.data import hub as hubs
from ftrun.data import read as reader
from ftrun.data.hub import Hub
from ftrun.data.places import Files
from ftrun.data.rows import BadRow, Row
from ftrun.errors import ConfigError, Problem, did_you_mean


@dataclass(frozen=True)
class Opened:
    """A place of rows that has been found."""

    name: str
    """Short, for reports."""

    files: tuple[str, ...] = ()
    """Paths, absolute once `make_absolute` has been there, or addresses. Empty for a data set on a hub."""

    hub: Hub | None = None
    documents: bool = False
    """Whether each file is one text."""

    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns where they differ from the format's: ``{its name in the format: its name in the file}``."""

    tags: dict[str, str] = field(default_factory=dict)
    """What keys and roles of messages are called, by the names of `ftrun.data.info.TAGS`."""

    rows: int | None = None
    """Use no more than the first so many."""

    weight: float = 1.0


@dataclass(frozen=True)
class Resolved:
    """All places of rows of a run."""

    train: list[Opened]
    eval: dict[str, list[Opened]]
    """By the names of ``data.eval_sets``; "" is what ``data.eval_path`` names or the sources bring themselves."""


@dataclass(frozen=True)
class _Wanted:
    """What was asked for: the keys are those that were typed."""

    key: str
    path: str
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    subset: str | None = None
    split: str | None = None
    rows: int | None = None
    weight: float = 1.0
    held_out: bool = False
    """Whether it is to be evaluated on."""


def resolve(data: Data, kind: str | None = None) -> Resolved:
    """Find the rows to train on and those to evaluate on.

    Args:
        data: The config.
        kind: The kind of rows that the stage trains on, where a ``dataset_info.json`` leaves that open.

    Raises:
        ConfigError: With all that is not there.
    """
    resolved, problems = find(data, kind)
    if problems:
        raise ConfigError(problems)
    return resolved


def find(data: Data, kind: str | None = None) -> tuple[Resolved, list[Problem]]:
    """Return what `resolve` does as far as it is there, and a problem for each thing that is not."""
    problems = [
        Problem("data.eval_sets", f"{name!r} is to be part of a metric's name", "letters, digits and _ only")
        for name in data.eval_sets
        if not re.fullmatch(r"\w+", name)
    ]
    problems += [
        Problem(f"data.eval_sets.{name}", "is no path", f"data.eval_sets.{name}=rows.jsonl")
        for name, path in data.eval_sets.items()
        if not isinstance(path, str)
    ]
    if not all(isinstance(path, str) for path in data.eval_sets.values()):
        return Resolved([], {}), problems
    names: dict[str, Any] = {}

    def open_each(wanted: list[_Wanted]) -> list[tuple[Opened, Opened | None]]:
        found = []
        for one in wanted:
            try:
                found.append(_open(one, data.dataset_info, names, kind))
            except ConfigError as error:
                problems.extend(error.problems)
        return found

    try:
        names = info.load(data.dataset_info) if data.dataset_info else {}
    except ConfigError as error:
        problems.extend(error.problems)
    train = open_each(_to_train(data))
    evaluated = {name: [one for one, _ in open_each([wanted])] for name, wanted in _to_evaluate(data)}
    brought = [one for _, one in train if one is not None]
    if brought and not data.eval_path and not data.eval_size:
        evaluated = {"": brought, **evaluated}
    return Resolved(_distinct([one for one, _ in train]), evaluated), problems


def _distinct(found: list[Opened]) -> list[Opened]:
    """Number the sources that are called like an earlier one."""
    seen: Counter[str] = Counter()
    named = []
    for one in found:
        seen[one.name] += 1
        named.append(replace(one, name=f"{one.name} ({seen[one.name]})") if seen[one.name] > 1 else one)
    return named


def _to_train(data: Data) -> list[_Wanted]:
    if data.sources:
        return [_wanted(data, source, f"data.sources.{index}.path") for index, source in enumerate(data.sources)]
    if not data.path:
        return []  # said by ftrun.config
    source = Source(path=data.path, rows=data.rows, subset=data.subset, split=data.split)
    return [_wanted(data, source, "data.path")]


def _wanted(data: Data, source: Source, key: str) -> _Wanted:
    form = source.format or data.format
    columns = {**data.columns, **source.columns}
    return _Wanted(key, source.path, form, columns, source.subset, source.split, source.rows, source.weight)


def _to_evaluate(data: Data) -> list[tuple[str, _Wanted]]:
    """Return what is evaluated on, by name."""
    paths = {"": data.eval_path} if data.eval_path else {}
    return [
        (
            name,
            _Wanted(
                f"data.eval_sets.{name}" if name else "data.eval_path", path, data.format, data.columns, held_out=True
            ),
        )
        for name, path in (paths | data.eval_sets).items()
    ]


def _open(wanted: _Wanted, place: str | None, names: dict[str, Any], kind: str | None) -> tuple[Opened, Opened | None]:
    """Return the rows that were asked for, and those to evaluate on that lie beside them."""
    if wanted.path in names:
        assert place
        entry = info.entry(place, wanted.path, names[wanted.path], kind)
        opened, wanted = _from_entry(wanted, entry)
        on_hub = entry.on_hub
        folder = entry.folder
    else:
        _refuse_unknown_name(wanted, names)
        opened = Opened(_short(wanted.path), format=wanted.format, columns=wanted.columns)
        on_hub, folder = places.is_hub_id(wanted.path), None
    opened = replace(opened, rows=wanted.rows, weight=wanted.weight)
    if on_hub:
        hub = Hub(wanted.key, wanted.path, wanted.subset, wanted.split, folder, wanted.held_out)
        return replace(opened, hub=hub), None
    files = places.find(wanted.key, wanted.path, subset=wanted.subset, split=wanted.split)
    return _with_files(wanted, opened, files)


def _from_entry(wanted: _Wanted, entry: info.Entry) -> tuple[Opened, _Wanted]:
    """Join an entry of a ``dataset_info.json`` with what was typed, which goes before it."""
    form = wanted.format if wanted.format != "auto" else entry.format
    opened = Opened(wanted.path, format=form, columns=entry.columns | wanted.columns, tags=entry.tags)
    joined = replace(
        wanted,
        path=entry.path,
        subset=wanted.subset or entry.subset,
        split=wanted.split or entry.split,
        rows=wanted.rows or entry.rows,
    )
    return opened, joined


def _refuse_unknown_name(wanted: _Wanted, names: dict[str, Any]) -> None:
    """Refuse what can only be a name, and is none."""
    looks_like_name = not ("/" in wanted.path or ":" in wanted.path or "." in wanted.path)
    if names and looks_like_name and not Path(wanted.path).exists():
        near = did_you_mean(wanted.path, list(names))
        message = f"data.dataset_info has no data set {wanted.path}{near}"
        raise ConfigError([Problem(wanted.key, message, f"one of its {len(names)} names, or a path")])


def _with_files(wanted: _Wanted, opened: Opened, files: Files) -> tuple[Opened, Opened | None]:
    opened = replace(opened, documents=files.documents)
    if wanted.held_out:  # a folder that was named to be evaluated on is, all of it
        return replace(opened, files=files.train + files.eval), None
    if not files.train:
        listed = ", ".join(Path(file).name for file in files.eval)
        message = f"{wanted.path} holds only files to evaluate on ({listed})"
        raise ConfigError([Problem(wanted.key, message, "rename the file, or name it")])
    beside = replace(opened, files=files.eval, rows=None, weight=1.0) if files.eval else None
    return replace(opened, files=files.train), beside


def _short(path: str) -> str:
    if path.startswith(places.DEMO) or places.is_hub_id(path):
        return path
    return path.rstrip("/").rpartition("/")[2] or path


def read(opened: Opened) -> Iterator[Row | BadRow]:
    """Yield the rows of a place, one by one; of what stands where a row should, the `BadRow`.

    Raises:
        ConfigError: A file is damaged, or the hub cannot be reached.
    """
    if opened.hub is not None:
        return islice(hubs.rows(opened.hub), opened.rows)
    found = (row for file in opened.files for row in reader.each(file, documents=opened.documents))
    return islice(found, opened.rows)


def identity(opened: Opened) -> str:
    """Return what tells the content of a place from another: a hash of its files' bytes in order, or a hub's commit.

    Raises:
        ConfigError: A file cannot be read.
    """
    if opened.hub is not None:
        return hubs.identity(opened.hub)
    found = hashlib.sha256()
    for file in opened.files:
        kind = "document" if opened.documents else storage.ending(file)
        found.update(f"{kind} {digests.digest(file)}\n".encode())
    return found.hexdigest()


def size(opened: Opened) -> int | None:
    """Return the bytes of a place's files as they lie there, or None where that is not known."""
    if opened.hub is not None or any(storage.is_url(file) for file in opened.files):
        return None
    return sum(os.stat(file).st_size for file in opened.files)


def make_absolute(data: Data) -> None:
    """Replace relative paths by absolute ones, in place, so that a run can be gone on with from any folder."""
    names = info.load(data.dataset_info) if data.dataset_info else {}

    def absolute(path: str) -> str:
        return path if path in names else places.absolute(path)

    data.path = absolute(data.path) if data.path else data.path
    data.eval_path = absolute(data.eval_path) if data.eval_path else data.eval_path
    data.eval_sets = {name: absolute(path) for name, path in data.eval_sets.items()}
    for source in data.sources:
        source.path = absolute(source.path)
    if data.dataset_info:
        data.dataset_info = str(Path(data.dataset_info).expanduser().absolute())
    if data.media_folder and not storage.is_url(data.media_folder):
        data.media_folder = str(Path(data.media_folder).expanduser().absolute())
