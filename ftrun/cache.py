"""``ftrun cache``: the tokenised rows that are kept for later runs, listed and deleted.

What `ftrun.worker.store` leaves in ``$FTRUN_CACHE/tokens``: a folder for each source, named by the hash of all that its
tokens depend on; beside it the lock under which it was made; and what killed processes left half made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich import box
from rich.markup import escape
from rich.table import Table

from ftrun import model
from ftrun.data import Data
from ftrun.display import console, size_text

_META, _LOCK, _PARTIAL = "meta.json", ".lock", ".partial"
_DAY = 24 * 60 * 60


@dataclass(frozen=True)
class Entry:
    """The tokenised rows of one source."""

    key: str
    """Hash of all that the tokens depend on, and the folder's name."""

    name: str
    kind: str
    rows: int
    tokens: int
    bytes: int
    made: float
    """Seconds since the epoch."""

    used: float
    """When a run last started from it, in seconds since the epoch."""

    needs: dict[str, Any]
    """What the tokens depend on."""

    @classmethod
    def at(cls, place: Path) -> Entry:
        """Return the entry in a folder.

        Raises:
            OSError: There is none, or none any more.
        """
        meta = json.loads((place / _META).read_text(encoding="utf-8"))
        return cls(
            key=place.name,
            name=meta["name"],
            kind=meta["needs"]["kind"],
            rows=meta["report"]["sequences"],
            tokens=meta["report"]["tokens"],
            bytes=_size(place),
            made=meta["made"],
            used=(place / _META).stat().st_mtime,
            needs=meta["needs"],
        )

    def depends(self) -> Iterator[str]:
        """Yield, in short, what else than the rows the tokens depend on: where two entries of a source differ."""
        yield f"tokenizer {self.needs['tokenizer'][:8]}"
        if template := self.needs["template"]:
            chosen = {name: value for name, value in template.items() if name != "own"}
            named = chosen.get("chat_template") or chosen.get("user")
            yield f"{'named' if named else 'own'} template {_short(chosen if named else template.get('own'))}"
        if self.needs["rows"]:
            yield f"first {self.needs['rows']} rows"
        for name, value in self.needs["options"].items():
            if value != getattr(_DEFAULTS, name, None) and value not in (None, "", []):
                yield f"{name}={value}"


_DEFAULTS = Data()


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:8]


@dataclass
class Deleted:
    """What was deleted, and what was left because somebody is at it."""

    entries: int = 0
    leftovers: int = 0
    bytes: int = 0
    busy: list[str] = field(default_factory=list)


def folder() -> Path:
    """Return the folder that holds everything tokenised."""
    return model.cache_folder() / "tokens"


def entries() -> list[Entry]:
    """Return what is kept, the last used in front."""
    found = []
    for place in _folders():
        if place.suffix != _PARTIAL:
            with contextlib.suppress(OSError, ValueError, KeyError):  # being made, or being deleted
                found.append(Entry.at(place))
    return sorted(found, key=lambda entry: -entry.used)


def show(*, as_json: bool, unused_days: float | None) -> None:
    """Print what is kept, after deleting what has not been used for so many days, if that is asked for."""
    deleted = None if unused_days is None else delete(unused_days)
    found = entries()
    if as_json:
        lines = [dataclasses.asdict(entry) | {"folder": str(folder() / entry.key)} for entry in found]
        told = {} if deleted is None else {"deleted": dataclasses.asdict(deleted)}
        print(json.dumps({"entries": lines, "bytes": sum(entry.bytes for entry in found)} | told, indent=2))  # noqa: T201
        return
    if deleted is not None:
        _show_deleted(deleted)
    if not found:
        console.print(f"nothing is tokenised in {escape(str(folder()))}", soft_wrap=True)
        return
    console.print(_table(found))
    total = size_text(sum(entry.bytes for entry in found))
    console.print(f"{len(found)} {_plural('source', len(found))}, {total} in {escape(str(folder()))}", soft_wrap=True)


def delete(unused_days: float) -> Deleted:
    """Delete what has not been used for so many days, and what killed processes left; nothing that is being made.

    A run that has an entry's files mapped goes on undisturbed: what is unlinked stays until the last who has it open
    lets go of it.
    """
    deleted, before = Deleted(), time.time() - unused_days * _DAY
    keys = {place.name.partition(".")[0] for place in _folders()} | {lock.stem for lock in folder().glob(f"*{_LOCK}")}
    for key in sorted(keys):
        lock = FileLock(folder() / f"{key}{_LOCK}", timeout=0)
        try:
            with lock:
                _delete_key(key, before, deleted)
        except Timeout:
            deleted.busy.append(key)
    return deleted


def _delete_key(key: str, before: float, deleted: Deleted) -> None:
    """Delete what is old or half made of a key whose lock this process holds; with the last of it, the lock."""
    place = folder() / key
    for partial in folder().glob(f"{key}.*{_PARTIAL}"):
        deleted.leftovers += 1
        _remove(partial, deleted)
    if place.is_dir():
        if _is_used_since(place, before):
            return
        deleted.entries += 1
        going = place.with_name(f"{key}.{os.getpid()}{_PARTIAL}")
        place.rename(going)  # gone at once for whoever looks, not file by file
        _remove(going, deleted)
    (folder() / f"{key}{_LOCK}").unlink(missing_ok=True)


def _is_used_since(place: Path, before: float) -> bool:
    try:
        return (place / _META).stat().st_mtime > before
    except FileNotFoundError:
        return False


def _remove(place: Path, deleted: Deleted) -> None:
    deleted.bytes += _size(place)
    shutil.rmtree(place, ignore_errors=True)


def _folders() -> list[Path]:
    return [place for place in folder().glob("*") if place.is_dir()]


def _size(place: Path) -> int:
    """Return the bytes of a folder's files; one that vanishes meanwhile takes none."""
    size = 0
    for file in place.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            size += file.stat().st_size if file.is_file() else 0
    return size


def _show_deleted(deleted: Deleted) -> None:
    text = f"deleted {deleted.entries} {_plural('source', deleted.entries)}"
    if deleted.leftovers:
        text += f" and what {deleted.leftovers} killed {_plural('process', deleted.leftovers)} left"
    console.print(f"{text}, {size_text(deleted.bytes)}", soft_wrap=True)
    for key in deleted.busy:
        console.print(f"[yellow]kept[/] {key}: a process is tokenising it", soft_wrap=True)


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}es" if word.endswith("s") else f"{word}s"


def _table(found: list[Entry]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = {name: cell for name, (cell, width) in _COLUMNS.items() if console.width >= width}
    for name in columns:
        right = name in ("rows", "tokens", "size")
        folds = name in ("name", "depends on")
        table.add_column(name, justify="right" if right else "left", no_wrap=not folds, overflow="fold")
    for entry in found:
        table.add_row(*(escape(cell(entry)) for cell in columns.values()))
    return table


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


_COLUMNS: dict[str, tuple[Callable[[Entry], str], int]] = {
    "name": (lambda entry: entry.name, 0),
    "kind": (lambda entry: entry.kind, 0),
    "rows": (lambda entry: f"{entry.rows:,}", 0),
    "tokens": (lambda entry: f"{entry.tokens:,}", 0),
    "size": (lambda entry: size_text(entry.bytes), 0),
    "made": (lambda entry: _when(entry.made), 100),
    "last used": (lambda entry: _when(entry.used), 0),
    "depends on": (lambda entry: ", ".join(entry.depends()), 120),
}
"""The cells of the table, and the width of a terminal from which on there is room for each."""
