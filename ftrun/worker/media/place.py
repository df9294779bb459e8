"""Where the media of a row are: found, fetched, and looked at without decoding them.

Rows may come from strangers. So a path leads into the media folder or nowhere: ``..`` and absolute paths count by where
they end, and whoever wants rows to name any file says ``data.media_folder=/``. Links that lie in the folder are
followed, since rows cannot make any. Addresses are fetched only where the config says so, once, and kept with the
tokens.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ftrun.data import Data
from ftrun.data.rows import BadRow, Medium, Row
from ftrun.worker.media import images, sounds, videos

MOST_BYTES = 64 << 20
"""Largest medium that is fetched from an address."""

_SECONDS = 30
_ADDRESS = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class Located:
    """A medium that is there."""

    kind: str
    """``image``, ``video`` or ``audio``."""

    sources: tuple[str | bytes, ...]
    """Its absolute path or its bytes; of a video that is a list of frames, those of each frame."""

    frames: bool = False
    """Whether it is a video that is a list of frames."""

    size: tuple[int, int] | None = None
    """Height and width of an image."""

    num_tokens: int = 1
    """How many tokens it becomes, as far as its header tells; its placeholder alone is 1."""


def locate(media: Sequence[Medium], row: Row, data: Data) -> list[Located]:
    """Return where the media of a row are, having looked at their headers.

    Raises:
        BadRow: One is not there, not allowed, or not what it should be.
    """
    return [_checked(_located(medium, row, data), row) for medium in media]


def folder(row: Row, data: Data) -> str | None:
    """Return the folder that a row's paths start at, or None if its file is not on this machine."""
    if data.media_folder:
        return None if _ADDRESS.match(data.media_folder) else os.path.abspath(os.path.expanduser(data.media_folder))
    return os.path.dirname(os.path.abspath(row.file)) if os.path.isfile(row.file) else None


def _located(medium: Medium, row: Row, data: Data) -> Located:
    source, frames = medium.source, isinstance(medium.source, list)
    if isinstance(source, str) and medium.kind == "video" and not _ADDRESS.match(source):
        found = _path(source, medium.kind, row, data)
        if os.path.isdir(found):
            inside = sorted(str(file) for file in Path(found).iterdir() if file.is_file())
            return Located("video", tuple(inside), frames=True)
        return Located("video", (found,))
    sources = source if frames else [source]
    return Located(medium.kind, tuple(_source(one, medium.kind, row, data) for one in sources), frames)


def _source(source: Any, kind: str, row: Row, data: Data) -> str | bytes:
    if isinstance(source, bytes):
        return source
    if _ADDRESS.match(source):
        return _fetched(source, kind, row, data)
    path = _path(source, kind, row, data)
    if not os.path.isfile(path):
        what = "is not a file" if os.path.exists(path) else "is not there"
        raise _bad(row, f"names a{_n(kind)} {kind} that {what}", path, "the path from data.media_folder on")
    return path


def _path(source: str, kind: str, row: Row, data: Data) -> str:
    """Return the absolute path of a medium inside the media folder."""
    start = folder(row, data)
    if start is None:
        message = f"names a{_n(kind)} {kind} by a path, and its file is on no disk of this machine"
        raise BadRow(row, message, "data.media_folder=FOLDER of this machine, or rows with the bytes in them")
    path = os.path.normpath(os.path.join(start, source.removeprefix("file://")))
    if os.path.commonpath([start, path]) != start:
        message = f"names a{_n(kind)} {kind} outside data.media_folder={start}"
        raise _bad(row, message, source, "data.media_folder= a folder that all media are in (/ allows every file)")
    if kind == "video" and not os.path.exists(path):
        raise _bad(row, "names a video that is not there", path, "the path from data.media_folder on")
    return path


def _fetched(address: str, kind: str, row: Row, data: Data) -> bytes:
    """Return what an address gives, if the config allows it."""
    if not data.media_urls:
        message = f"names a{_n(kind)} {kind} by an address, which is not fetched unasked"
        raise _bad(row, message, address, "data.media_urls=true if you trust the rows, or files and data.media_folder")
    if not address.lower().startswith(("http://", "https://")):
        raise _bad(row, f"names a{_n(kind)} {kind} by an address of another kind", address, "https:// or a path")
    request = urllib.request.Request(address, headers={"User-Agent": "ftrun"})  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:  # noqa: S310
            found = answer.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", None) or error
        raise _bad(
            row, f"names a{_n(kind)} {kind} that cannot be fetched", f"{address}: {why}", "an address that answers"
        ) from None
    if len(found) > MOST_BYTES:
        raise _bad(
            row,
            f"names a{_n(kind)} {kind} of more than {MOST_BYTES >> 20} MiB",
            address,
            "a file instead of an address",
        )
    return bytes(found)


def _checked(found: Located, row: Row) -> Located:
    """Look at the header of each part of a medium.

    Raises:
        BadRow: It is not what it should be.
    """
    if found.frames and not found.sources:
        raise BadRow(row, "names a video of no frames", "a folder or a list of images, in order")
    kind = "image" if found.frames else found.kind
    look = {"image": images.size, "video": videos.look, "audio": sounds.look}[kind]
    try:
        sizes = [look(source) for source in found.sources]
    except ValueError as error:
        raise _bad(row, f"has a{_n(found.kind)} {found.kind} that cannot be read", str(error), "a whole file") from None
    return replace(found, size=sizes[0]) if found.kind == "image" else found


def _bad(row: Row, reason: str, detail: str, fix: str) -> BadRow:
    """Return a bad row that is counted by a reason, and told with what is its own."""
    bad = BadRow(row, f"{reason}: {detail}", fix)
    bad.reason = reason
    return bad


def _n(kind: str) -> str:
    return "" if kind == "video" else "n"
