"""What tells one content of files from another: their SHA-256, remembered while a file stays as it is.

A digest is remembered by the file's absolute path, size and time of change, in one file of whole lines to which every
process appends: a torn line is ignored, and a lost one costs reading a file once more.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from pathlib import Path
from typing import IO, Any

from ftrun import model
from ftrun.data import storage
from ftrun.errors import ConfigError

_TAGS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id")
"""What file systems call the mark of a content, so that it need not be downloaded to be known."""


def digest(file: str) -> str:
    """Return the mark of a file's content, as it lies there (packed, if it is).

    Raises:
        ConfigError: It cannot be read.
    """
    if storage.is_url(file):
        return _digest_of_url(file)
    key, state = str(Path(file).absolute()), _state(file)
    known = _remembered().get(key)
    if known is not None and known[:2] == state:
        return str(known[2])
    began = time.time()
    with storage.open_packed(file) as content:
        found = _sha256(content)
    if _is_settled(state[1], began) and _state(file) == state:
        remember(key, [*state, found])
    return found


def _state(file: str) -> list[int]:
    try:
        stat = os.stat(file)
    except OSError as error:
        raise ConfigError([storage.cannot_read(file, error)]) from None
    return [stat.st_size, stat.st_mtime_ns]


def _is_settled(changed: int, read: float) -> bool:
    """Tell whether a change after ``read``, in seconds, must have another time than ``changed``, in nanoseconds.

    The clock of a file system ticks: every 4 ms on most, every 2 s on the coarsest, which know whole seconds only.
    """
    tick = 0.02 if changed % 1_000_000_000 else 2.0
    return changed / 1e9 + tick < read


def _sha256(content: IO[bytes]) -> str:
    found = hashlib.sha256()
    while chunk := content.read(1 << 20):
        found.update(chunk)
    return found.hexdigest()


def _digest_of_url(url: str) -> str:
    system, path = storage.filesystem(url, url)
    try:
        info: dict[str, Any] = system.info(path) if "::" not in url else {}
    except Exception:  # opening it says what is wrong
        info = {}
    mark = next((str(info[name]) for name in _TAGS if info.get(name)), "")
    if mark and not mark.startswith("W/"):  # a weak tag promises less than equal bytes
        return f"{mark} {info.get('size')}"
    with storage.open_packed(url) as content:
        return _sha256(content)


def _file() -> Path:
    return model.cache_folder() / "digests.jsonl"


def _remembered() -> dict[str, list[Any]]:
    """Return what is remembered, read anew only when a line has been added."""
    try:
        stat = _file().stat()
    except OSError:
        return {}
    return _load(_file(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _load(file: Path, _size: int, _changed: int) -> dict[str, list[Any]]:
    known: dict[str, list[Any]] = {}
    for line in file.read_bytes().splitlines():
        try:
            key, value = json.loads(line)
            known[key] = value
        except (ValueError, TypeError):
            continue  # torn
    return known


def recall(key: str) -> list[Any] | None:
    """Return what was remembered last under a key that is no path."""
    return _remembered().get(key)


def remember(key: str, value: list[Any]) -> None:
    """Append one line; a cache that cannot be written only costs time."""
    line = json.dumps([key, value]).encode() + b"\n"
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(_file(), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)
    except OSError:
        return
