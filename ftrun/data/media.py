"""Images, videos and sounds of a row: where they are, and their places in the messages."""

from __future__ import annotations

import base64
import binascii
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ftrun.data.rows import BadRow, Medium, Message, Row
from ftrun.data.values import bad_message, clean, type_name

MEDIA = {"images": "image", "videos": "video", "audios": "audio"}
"""Columns of media, and the kind of each."""

_PARTS = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
}
"""Types of content parts that are media, and the kind of each."""

_PLACEHOLDER = re.compile("<(image|video|audio)>")


def content_of(row: Row, content: Any, index: int) -> str | list[dict[str, Any]]:
    """Read content that is a list of parts: a text if all are, else the parts, media with their ``source`` if any."""
    if not isinstance(content, list):
        raise bad_message(row, index, f"has {type_name(content)} as content, not text", '"content": "..."')
    parts = [_part(row, part, index) for part in content]
    if all(part["type"] == "text" for part in parts):
        return "".join(part["text"] for part in parts)
    return parts


def _part(row: Row, part: Any, index: int) -> dict[str, Any]:
    form = part.get("type") or "text" if isinstance(part, dict) else None
    if form in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
        return {"type": "text", "text": clean(row, part["text"], "content")}
    if isinstance(form, str) and (kind := _PARTS.get(form)):
        fields = (form, kind, f"{kind}_url", "source", "url", "path", "bytes", "data")
        given = next((part[name] for name in fields if part.get(name) is not None), None)
        return (
            {"type": kind}
            if given is None
            else {"type": kind, "source": _source(row, given, f"a part of the type {kind}")}
        )
    what = "a part of an unknown type" if isinstance(form, str) and form != "text" else "a part without text"
    fix = f'parts {{"type": "text", "text": "..."}}, or of the types {", ".join(_PARTS)}'
    raise bad_message(row, index, f"has {what} in content", fix)


def with_media(row: Row, messages: list[Message]) -> tuple[list[Message], list[Medium]]:
    """Put the media of a row where its messages have them; return both, the media in the order of the messages.

    A part with a source of its own is one medium. The columns of media fill the parts without a source and, as
    LLaMA-Factory writes them, ``<image>``, ``<video>`` and ``<audio>`` in texts, one by one. Media of which no message
    says where they belong come before the text of the first user message. In a row without a column of that kind,
    such a word is a word.
    """
    if MEDIA.keys().isdisjoint(row.value):
        for message in messages:
            if type(message["content"]) is not str:
                break
        else:
            return messages, []
    waiting = {
        kind: deque(_sources(row, row.value[name], name))
        for name, kind in MEDIA.items()
        if row.value.get(name) is not None
    }
    contents = [list(_parts(message["content"], waiting)) for message in messages]
    _place_the_rest(row, messages, contents, waiting)
    media: list[Medium] = []
    for part in (part for parts in contents for part in parts if part["type"] != "text"):
        media.append(
            Medium(part["type"], part.pop("source") if "source" in part else _next(row, part["type"], waiting))
        )
    for kind, sources in waiting.items():
        if sources:
            raise BadRow(row, f"has more {kind}s than places for them", f"a <{kind}> in the text for each {kind}")
    return [message | {"content": _simplest(parts)} for message, parts in zip(messages, contents, strict=True)], media


def _parts(content: str | list[dict[str, Any]], kinds: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the parts of a content, its texts split at placeholders of the kinds that a row has a column of."""
    for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        if part["type"] != "text":
            yield dict(part)
            continue
        text, start = part["text"], 0
        for found in _PLACEHOLDER.finditer(text):
            if found[1] in kinds:
                if found.start() > start:
                    yield {"type": "text", "text": text[start : found.start()]}
                yield {"type": found[1]}
                start = found.end()
        if start < len(text):
            yield {"type": "text", "text": text[start:]}


def _place_the_rest(
    row: Row,
    messages: Sequence[Message],
    contents: Sequence[list[dict[str, Any]]],
    waiting: Mapping[str, deque[Any]],
) -> None:
    """Give the kinds of media that no message has a place for places before the first user message's text."""
    placed = {part["type"] for parts in contents for part in parts if "source" not in part}
    unplaced = [{"type": kind} for kind, sources in waiting.items() if kind not in placed for _ in sources]
    if not unplaced:
        return
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise BadRow(row, "has media and no user message to put them in", "a user message")
    contents[first][:0] = unplaced


def _next(row: Row, kind: str, waiting: Mapping[str, deque[Any]]) -> Any:
    if not waiting.get(kind):
        raise BadRow(row, f"has more places for {kind}s than {kind}s", f"a column {kind}s with one for each")
    return waiting[kind].popleft()


def _simplest(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Return parts as a text if all of them are."""
    return parts if any(part["type"] != "text" for part in parts) else "".join(part["text"] for part in parts)


def _sources(row: Row, value: Any, name: str) -> list[Any]:
    """Read a column of media: a list, or a single one."""
    return [_source(row, medium, name) for medium in (value if isinstance(value, list) else [value])]


def _source(row: Row, value: Any, name: str) -> Any:
    """Return the path, address or bytes of a medium; for a video that is a list of its frames, of each of them."""
    if isinstance(value, dict):
        encoded = isinstance(value.get("data"), str) and value.get("path") is None
        if encoded:
            return _decoded(row, value["data"], name)
        value = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
    if isinstance(value, str) and value.startswith("data:"):
        return _decoded(row, value.partition(",")[2], name)
    if isinstance(value, list) and value and "video" in name:
        return [_source(row, frame, name) for frame in value]
    if not isinstance(value, str | bytes) or not value:
        fix = 'a path, an address, or {"bytes": ...}'
        raise BadRow(row, f"{name} has {type_name(value) if value != '' else 'an empty path'} for a medium", fix)
    return clean(row, value, name) if isinstance(value, str) else value


def _decoded(row: Row, text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise BadRow(row, f"{name} has data that is not base64", "a path, or whole base64 data") from None
