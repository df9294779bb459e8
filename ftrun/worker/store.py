"""Tokenised rows on disk: written once, found again by their content, mapped into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from filelock import FileLock, Timeout

from ftrun import events, model, plugin
from ftrun.config import Config
from ftrun.data import Data, OnBadRow, Packing, TooLong, sources
from ftrun.data.rows import BadRow, Conversation, Row
from ftrun.data.sources import Opened
from ftrun.errors import ConfigError, Problem
from ftrun.worker import encode
from ftrun.worker.encode import SIDES, EncodedRow, RowEncoder
from ftrun.worker.media import processor
from ftrun.worker.render import dated
from ftrun.worker.report import MOST_PROBLEMS, PROMPTS, Prompt, Report, judge
from ftrun.worker.stored import META, StoredRows, record_batch, schema_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1024
"""Rows of a file that are tokenised together; no more than these are in memory."""

_CANNOT_WRITE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOENT, errno.ENOTDIR,
)  # fmt: skip
_WORTH_PROCESSES = 8_000_000
"""Bytes of a source from which on several processes tokenise it, where the config does not say how many."""


def folder() -> Path:
    """Return the folder that holds everything tokenised."""
    return model.cache_folder() / "tokens"


def material(cfg: Config, tokenizer: PreTrainedTokenizerBase, opened: Opened) -> dict[str, Any]:
    """Return everything that the tokens of a source depend on: what the key of a stored source is the hash of."""
    data, kind = cfg.data, cfg.stage.rows
    options = {name: getattr(data, name) for name in _READ[kind]}
    if data.packing is Packing.concatenate:
        options |= {"max_length": None, "too_long": None}
    return {
        "encoder": encode.VERSION,
        "kind": kind,
        "source": sources.identity(opened),
        "rows": opened.rows,
        "format": opened.format,
        "converter": _converter(opened.format),
        "columns": opened.columns,
        "tags": opened.tags,
        "tokenizer": tokenizer_digest(tokenizer),
        "processor": found.digest if (found := processor.of(tokenizer)) else None,
        "template": None if kind == "texts" else _template(cfg, tokenizer),
        "options": options,
    }


_CONVERSATION = (
    "max_length", "too_long", "cut", "system", "train_on", "train_roles", "reasoning", "history_reasoning",
    "control_tokens_in_text", "media_folder", "media_urls",
)  # fmt: skip
_READ = {
    "conversations": _CONVERSATION,
    "pairs": _CONVERSATION,
    "feedback": _CONVERSATION,
    "questions": _CONVERSATION,
    "texts": ("max_length", "too_long", "control_tokens_in_text"),
}
"""The keys of ``data`` that change tokens or labels, for each kind of row."""


def _template(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    slots = {name: value for name, value in dataclasses.asdict(cfg.template).items() if name not in ("date", "stop")}
    if cfg.template.has_slots:
        return slots
    own = tokenizer.chat_template
    texts = own.values() if isinstance(own, dict) else [own or ""]
    return {"own": [dated(text, cfg.template.date) for text in texts]}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of what a tokenizer does with text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return _digest([text, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}])


def _converter(form: str) -> str | None:
    """Return a hash of the file of a format that is a plugin of somebody's own."""
    file = plugin.source("format", form) if plugin.exists("format", form) else None
    return hashlib.sha256(file.read_bytes()).hexdigest() if file else None


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def fetch(cfg: Config, tokenizer: PreTrainedTokenizerBase, opened: Opened, say: Callable[[str], None]) -> StoredRows:
    """Return a source's tokenised rows: those on disk, or, once for all who ask, made now.

    Raises:
        ConfigError: A row cannot be trained on, and it is not to be skipped, or too many are.
    """
    needs = material(cfg, tokenizer, opened)
    stored = _fetched(cfg, tokenizer, opened, needs, say)
    if cfg.data.media_folder is None and not set(stored.report.media_folders) <= set(_folders(opened)):
        # The same rows lie elsewhere too, and the paths in them lead to other media from there.
        stored = _fetched(cfg, tokenizer, opened, needs | {"folders": _folders(opened)}, say)
    judge(stored.report, cfg.data, opened.name)
    return stored


def _folders(opened: Opened) -> list[str]:
    return sorted({os.path.dirname(file) for file in opened.files})


def _fetched(
    cfg: Config, tokenizer: PreTrainedTokenizerBase, opened: Opened, needs: dict[str, Any], say: Callable[[str], None]
) -> StoredRows:
    key = _digest(needs)[:32]
    place = folder() / key
    if (stored := _stored(place)) is not None:
        return stored
    try:
        folder().mkdir(parents=True, exist_ok=True)
        with locked(folder() / f"{key}.lock"):
            if (stored := _stored(place)) is not None:  # somebody else was at it
                return stored
            shutil.rmtree(place, ignore_errors=True)
            say(f"tokenising {opened.name}")
            _build(place, cfg, tokenizer, opened, needs)
        return StoredRows(place)
    except OSError as error:
        if error.errno not in _CANNOT_WRITE:
            raise
        message = f"{folder()} cannot be written to: {error.strerror}"
        raise ConfigError(
            [Problem("FTRUN_CACHE", message, "export FTRUN_CACHE=FOLDER of your own, with room")]
        ) from None


@contextlib.contextmanager
def locked(file: Path) -> Iterator[None]:
    """Be the only one at something. To wait for another process, which is watched itself, is not to stand still."""
    lock = FileLock(file)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=5.0)
        except Timeout:
            events.mark()
    try:
        yield
    finally:
        lock.release()


def _stored(place: Path) -> StoredRows | None:
    """Return what lies there, or nothing if there is nothing whole."""
    try:
        stored = StoredRows(place)
    except (OSError, ValueError, KeyError, TypeError):  # pyarrow's errors are of the first two kinds
        return None
    with contextlib.suppress(OSError):  # a cache of somebody else's
        os.utime(place / META)  # when it was last of use
    return stored


def _build(place: Path, cfg: Config, tokenizer: PreTrainedTokenizerBase, opened: Opened, needs: dict[str, Any]) -> None:
    """Tokenise a source into a folder that is complete or absent."""
    with made_whole(place) as partial:
        report = _encode(partial, cfg, tokenizer, opened)
        judge(report, cfg.data, opened.name)
        meta = {"name": opened.name, "made": time.time(), "needs": needs, "report": report.saved()}
        (partial / META).write_text(json.dumps(meta, default=str, indent=1))


@contextlib.contextmanager
def made_whole(place: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes ``place`` at the end, and is removed if anything goes wrong."""
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{place.name}.", suffix=".partial", dir=place.parent))
    try:
        yield partial
        try:
            partial.rename(place)
        except OSError:
            if not place.is_dir():  # else somebody was faster, with the same
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _encode(place: Path, cfg: Config, tokenizer: PreTrainedTokenizerBase, opened: Opened) -> Report:
    """Tokenise a source, by several processes if there is much of it, each writing a file of its own."""
    encoder = RowEncoder(cfg, tokenizer)
    count = _processes(cfg.data, opened)
    if count == 1:
        return _Part(place, cfg, encoder, opened, 0, 1).write()
    fork = get_context("fork")
    pipes = [fork.Pipe(duplex=False) for _ in range(count)]
    workers = [
        fork.Process(target=_write_part, args=(_Part(place, cfg, encoder, opened, number, count), pipe[1]))
        for number, pipe in enumerate(pipes)
    ]
    for worker, (_, sender) in zip(workers, pipes, strict=True):
        worker.start()
        sender.close()
    found = [_received(receiver, place) for receiver, _ in pipes]
    for worker in workers:
        worker.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    report = Report()
    for one in found:
        report.add(one)
    return report


def _received(receiver: Any, place: Path) -> Any:
    """Return what a process has to say, and show that it moves as long as the files there grow."""
    size = -1
    try:
        while not receiver.poll(timeout=5.0):
            before, size = size, sum(file.stat().st_size for file in place.iterdir())
            if size > before:
                events.mark()
        return receiver.recv()
    except EOFError:
        return RuntimeError("a process that tokenised rows was killed")


def _write_part(part: _Part, sender: Any) -> None:
    try:
        sender.send(part.write())
    except BaseException as error:
        sender.send(error)


def _processes(data: Data, opened: Opened) -> int:
    if data.processes is not None:
        return data.processes
    size = sources.size(opened) or 0
    return max(1, min(len(os.sched_getaffinity(0)), size // _WORTH_PROCESSES))


class _Part:
    """One process's part of a source: every so many-th batch of its rows."""

    def __init__(self, place: Path, cfg: Config, encoder: RowEncoder, opened: Opened, number: int, count: int) -> None:
        self.cfg, self.encoder, self.opened = cfg, encoder, opened
        self.number, self.count = number, count
        self.file = place / f"part-{number}-of-{count}.arrow"
        self.sides = SIDES.get(cfg.stage.rows, ("",))
        self.report = Report()

    def write(self) -> Report:
        """Read all rows, tokenise this part of them, and write them batch by batch."""
        schema = schema_of(self.sides)
        with pa.OSFile(str(self.file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for first, batch in self._batches():
                rows = [kept for found in self._encoded(first, batch) if (kept := self.report.take(found))]
                writer.write_batch(record_batch(rows, self.sides, schema))
                events.mark()
                if self._enough():
                    break
        return self.report

    def _enough(self) -> bool:
        """Tell whether so many rows are wrong that the others need not be looked at."""
        bad = self.cfg.data.on_bad_row is OnBadRow.error and self.report.bad >= MOST_PROBLEMS
        return bad or (self.cfg.data.too_long is TooLong.error and self.report.dropped > 0)

    def _batches(self) -> Iterator[tuple[int, list[Row | BadRow]]]:
        """Yield this part's batches, each with the number of its first row."""
        rows = iter(sources.read(self.opened))
        number = 0
        while batch := list(islice(rows, BATCH)):
            if number % self.count == self.number:
                yield number * BATCH, batch
            number += 1

    def _encoded(self, first: int, batch: list[Row | BadRow]) -> list[EncodedRow | BadRow]:
        """Understand and tokenise a batch of rows."""
        items, origins, bad = encode.understood(((self.opened, row) for row in batch), self.cfg.stage.rows)
        found = self.encoder.encode(items, [first + origin for origin in origins])
        self._keep_prompts(items)
        self.report.read += len(batch)
        self.report.rows += len({one.origin for one in found if isinstance(one, EncodedRow)})
        return [*bad, *found]

    def _keep_prompts(self, items: list[Any]) -> None:
        for item in items[: PROMPTS - len(self.report.prompts)]:
            if isinstance(item, Conversation) and not item.media:
                replies = [i for i, message in enumerate(item.messages) if message["role"] == "assistant"]
                if replies and replies[-1]:
                    self.report.prompts.append(Prompt(item.messages[: replies[-1]], item.tools))
