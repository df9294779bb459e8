"""Tokenised rows on disk: written once, found again by their content, mapped into memory."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from ftrun import model, plugin
from ftrun.config import Config
from ftrun.data import Data, OnBadRow, Packing, TooLong, sources
from ftrun.data.rows import BadRow, Conversation, Message, Row
from ftrun.data.sources import Opened
from ftrun.errors import ConfigError, Problem
from ftrun.worker import encode
from ftrun.worker.encode import SIDES, EncodedRow, RowEncoder, TooLongRow
from ftrun.worker.media import processor
from ftrun.worker.media.place import Located
from ftrun.worker.render import dated

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1024
"""Rows of a file that are tokenised together; no more than these are in memory."""

MOST_PROBLEMS = 5
"""Bad rows that are reported by name."""

PROMPTS = 8
"""Prompts that are kept as messages, to be replied to while training."""

_META = "meta.json"
_WORTH_PROCESSES = 8_000_000
"""Bytes of a source from which on several processes tokenise it, where the config does not say how many."""


@dataclass(frozen=True)
class Prompt:
    """What a reply is wanted to."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass
class Report:
    """What became of a source's rows."""

    read: int = 0
    rows: int = 0
    sequences: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    """Rows left out for their length, as ``data.too_long=drop`` asks."""

    truncated: int = 0
    special_as_text: int = 0
    """Rows whose own text holds special tokens."""

    tokens: int = 0
    learned: int = 0
    problems: list[dict[str, str]] = field(default_factory=list)
    """The first bad rows."""

    prompts: list[Prompt] = field(default_factory=list)
    """What comes before the last reply, of the first conversations."""

    weighted: bool = False
    """Whether any message counts more or less than others."""

    media: Counter[str] = field(default_factory=Counter)
    """Images, videos and sounds."""

    media_folders: list[str] = field(default_factory=list)
    """The folders of the files whose rows name media by their paths."""

    def take(self, found: EncodedRow | BadRow) -> EncodedRow | None:
        """Count a row; return it if it is to be trained on."""
        if isinstance(found, TooLongRow):
            self.dropped += 1
            return None
        if isinstance(found, BadRow):
            self.skipped[found.reason] += 1
            if len(self.problems) < MOST_PROBLEMS:
                self.problems.append(dataclasses.asdict(found.problem))
            return None
        self.sequences += 1
        self.truncated += found.truncated
        self.special_as_text += found.special_as_text
        self.tokens += sum(len(sequence.ids) + found.grown for sequence in found.sequences)
        self.learned += sum(sequence.learned for sequence in found.sequences)
        self.weighted |= any(weight != 1.0 for sequence in found.sequences for weight in sequence.weights)
        if found.media:
            self.media.update(medium.kind for medium in found.media)
            folder = os.path.dirname(found.row.file)
            on_disk = any(isinstance(source, str) for medium in found.media for source in medium.sources)
            self.media_folders += [folder] if on_disk and folder not in self.media_folders else []
        return found

    def add(self, other: Report) -> None:
        """Add another part's counts."""
        for name in ("read", "rows", "sequences", "dropped", "truncated", "special_as_text", "tokens", "learned"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.skipped += other.skipped
        self.problems = (self.problems + other.problems)[:MOST_PROBLEMS]
        self.prompts = (self.prompts + other.prompts)[:PROMPTS]
        self.weighted |= other.weighted
        self.media += other.media
        self.media_folders = sorted({*self.media_folders, *other.media_folders})

    @property
    def bad(self) -> int:
        """Rows that cannot be trained on."""
        return self.skipped.total()

    def reasons(self) -> str:
        """Return the reasons for which rows were skipped, most frequent first."""
        found = [f"{count} x {reason}" for reason, count in self.skipped.most_common()]
        found += [f"{self.dropped} x longer than data.max_length"] if self.dropped else []
        return "; ".join(found) or "none was read"

    def summary(self) -> dict[str, Any]:
        """Return the counts, for the log and the manifest."""
        counts = {
            "rows_read": self.read,
            "rows": self.rows,
            "skipped": dict(self.skipped),
            "truncated": self.truncated,
            "tokens": self.tokens,
            "tokens_learned": self.learned,
        }
        some: dict[str, Any] = {"sequences": self.sequences} if self.sequences != self.rows else {}
        some |= {"too_long": self.dropped} if self.dropped else {}
        some |= {"media": dict(self.media)} if self.media else {}
        return counts | some | ({"special_as_text": self.special_as_text} if self.special_as_text else {})

    def saved(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        plain = {"prompts": [dataclasses.asdict(prompt) for prompt in self.prompts]}
        return {**vars(self), **plain, "skipped": dict(self.skipped), "media": dict(self.media)}

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Report:
        """Return a report that was saved as JSON."""
        prompts = [Prompt(**prompt) for prompt in saved["prompts"]]
        counts = {name: Counter(saved[name]) for name in ("skipped", "media")}
        return cls(**saved | counts | {"prompts": prompts})


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
    if not (place / _META).is_file():
        folder().mkdir(parents=True, exist_ok=True)
        with FileLock(folder() / f"{key}.lock"):
            if not (place / _META).is_file():
                say(f"tokenising {opened.name}")
                _build(place, cfg, tokenizer, opened, needs)
    os.utime(place / _META)  # when it was last of use
    return StoredRows(place)


def _build(place: Path, cfg: Config, tokenizer: PreTrainedTokenizerBase, opened: Opened, needs: dict[str, Any]) -> None:
    """Tokenise a source into a folder that is complete or absent."""
    with made_whole(place) as partial:
        report = _encode(partial, cfg, tokenizer, opened)
        judge(report, cfg.data, opened.name)
        meta = {"name": opened.name, "made": time.time(), "needs": needs, "report": report.saved()}
        (partial / _META).write_text(json.dumps(meta, default=str, indent=1))


@contextlib.contextmanager
def made_whole(place: Path) -> Iterator[Path]:
    """Give a folder to write to, which becomes ``place`` at the end, and is removed if anything goes wrong."""
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
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
    found = [_received(receiver) for receiver, _ in pipes]
    for worker in workers:
        worker.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    report = Report()
    for one in found:
        report.add(one)
    return report


def _received(receiver: Any) -> Any:
    try:
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


def judge(report: Report, data: Data, name: str) -> None:
    """Stop where bad rows are not to be borne.

    Raises:
        ConfigError: With the first of them.
    """
    problems = [Problem(**saved) for saved in report.problems]
    if report.bad and data.on_bad_row is OnBadRow.error:
        if report.bad > len(problems):
            more = f"has at least {report.bad - len(problems)} more bad rows"
            problems.append(Problem(name, more, "data.on_bad_row=skip counts and skips them"))
        raise ConfigError(problems)
    if report.bad > data.max_bad_share * report.read:
        share = f"{report.bad} of {report.read} rows are bad: {report.reasons()}"
        raise ConfigError([Problem(name, share, "data.max_bad_share=, or better rows"), *problems[:1]])


def refuse_packing(report: Report, cfg: Config) -> None:
    """Stop where rows with media are to share a sequence: their positions are not those of the tokens alone.

    Raises:
        ConfigError: Some are.
    """
    key = "data.packing" if cfg.data.packing is not Packing.none else "train.padding_free"
    if report.media and (cfg.data.packing is not Packing.none or cfg.train.padding_free):
        what = ", ".join(f"{count} {kind}" for kind, count in report.media.items())
        message = f"rows with media ({what}) cannot share a sequence: the model finds their positions from whole rows"
        raise ConfigError([Problem(key, message, f"{key}={'none' if key == 'data.packing' else 'false'}")])


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
        schema = _schema(self.sides)
        with pa.OSFile(str(self.file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for batch in self._batches():
                rows = [kept for found in self._encoded(batch) if (kept := self.report.take(found))]
                writer.write_batch(_record_batch(rows, self.sides, schema))
                if self.report.bad >= MOST_PROBLEMS and self.cfg.data.on_bad_row is OnBadRow.error:
                    break
        return self.report

    def _batches(self) -> Iterator[list[Row | BadRow]]:
        rows = iter(sources.read(self.opened))
        number = 0
        while batch := list(islice(rows, BATCH)):
            if number % self.count == self.number:
                yield batch
            number += 1

    def _encoded(self, batch: list[Row | BadRow]) -> list[EncodedRow | BadRow]:
        """Understand and tokenise a batch of rows."""
        items, bad = encode.understood(((self.opened, row) for row in batch), self.cfg.stage.rows)
        found = self.encoder.encode(items)
        self._keep_prompts(items)
        self._refuse_too_long(found)
        self.report.read += len(batch)
        self.report.rows += len({(one.row.file, one.row.line) for one in found if isinstance(one, EncodedRow)})
        return [*bad, *found]

    def _refuse_too_long(self, found: list[EncodedRow | BadRow]) -> None:
        if self.cfg.data.too_long is TooLong.error:
            problems = [one.problem for one in found if isinstance(one, TooLongRow)]
            if problems:
                raise ConfigError(problems[:MOST_PROBLEMS])

    def _keep_prompts(self, items: list[Any]) -> None:
        for item in items[: PROMPTS - len(self.report.prompts)]:
            if isinstance(item, Conversation) and not item.media:
                replies = [i for i, message in enumerate(item.messages) if message["role"] == "assistant"]
                if replies and replies[-1]:
                    self.report.prompts.append(Prompt(item.messages[: replies[-1]], item.tools))


_MEDIUM = pa.struct(
    {
        "kind": pa.string(),
        "paths": pa.list_(pa.string()),
        "bytes": pa.list_(pa.large_binary()),
        "frames": pa.bool_(),
        "num_tokens": pa.int32(),
    }
)
"""A medium: of each of its sources, the path or the bytes."""


def _saved(medium: Located) -> dict[str, Any]:
    return {
        "kind": medium.kind,
        "paths": [source if isinstance(source, str) else None for source in medium.sources],
        "bytes": [source if isinstance(source, bytes) else None for source in medium.sources],
        "frames": medium.frames,
        "num_tokens": medium.num_tokens,
    }


def _read(saved: dict[str, Any]) -> Located:
    pairs = zip(saved["paths"], saved["bytes"], strict=True)
    sources = tuple(path if given is None else given for path, given in pairs)
    return Located(saved["kind"], sources, saved["frames"], num_tokens=saved["num_tokens"])


def _schema(sides: tuple[str, ...]) -> pa.Schema:
    tokens, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    columns = [("file", pa.dictionary(pa.int32(), pa.string())), ("line", pa.int64()), ("extra", pa.string())]
    columns += [("media", pa.list_(_MEDIUM)), ("grown", pa.int32())]
    for side in sides:
        columns += [
            (f"{side}ids", tokens), (f"{side}spans", tokens), (f"{side}weights", floats), (f"{side}labels", tokens),
        ]  # fmt: skip
    return pa.schema(columns)


def _record_batch(rows: list[EncodedRow], sides: tuple[str, ...], schema: pa.Schema) -> pa.RecordBatch:
    columns: list[Any] = [
        [row.row.file for row in rows],
        [row.row.line for row in rows],
        [None if row.extra is None else json.dumps(row.extra) for row in rows],
        [[_saved(medium) for medium in row.media] for row in rows],
        [row.grown for row in rows],
    ]
    for number in range(len(sides)):
        each = [row.sequences[number] for row in rows]
        columns += [
            [sequence.ids for sequence in each],
            [sequence.spans for sequence in each],
            [sequence.weights for sequence in each],
            [sequence.labels for sequence in each],
        ]
    arrays = [_array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _array(column: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(column, pa.string()).dictionary_encode()
    return pa.array(column, kind)


@dataclass(frozen=True)
class _Lists:
    """A column of lists in one batch, as views into the mapped file."""

    starts: np.ndarray[Any, Any]
    values: np.ndarray[Any, Any]

    @classmethod
    def of(cls, column: pa.Array) -> _Lists:
        return cls(column.offsets.to_numpy(), column.values.to_numpy())

    def __getitem__(self, row: int) -> np.ndarray[Any, Any]:
        return self.values[self.starts[row] : self.starts[row + 1]]


class StoredRows:
    """The tokenised rows of one source, mapped into memory: rows that are not looked at take none.

    ``rows[i]`` is a dict with ``input_ids`` and ``labels`` of shape (T,) as int32, and ``weights`` (T,) as float32 if
    any message of the source has a weight; of a row with media also ``media``, a list of them, and ``place``. Of a
    pair, ``chosen`` and ``rejected`` are such dicts.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        meta = json.loads((place / _META).read_text())
        self.name, self.report = str(meta["name"]), Report.of(meta["report"])
        self.sides = SIDES.get(meta["needs"]["kind"], ("",))
        files = [pa.ipc.open_file(pa.memory_map(str(file))) for file in sorted(place.glob("part-*.arrow"), key=_number)]
        count = sum(file.num_record_batches for file in files)
        self._batches = [files[n % len(files)].get_batch(n // len(files)) for n in range(count)]
        sizes = [batch.num_rows for batch in self._batches]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._columns: dict[tuple[int, str], _Lists] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """The tokens of each row; of a pair, of its longer side."""
        each = [
            np.max([np.diff(batch.column(f"{side}ids").offsets.to_numpy()) for side in self.sides], axis=0)
            + batch.column("grown").to_numpy()
            for batch in self._batches
        ]
        return np.concatenate(each) if each else np.zeros(0, np.int32)

    @property
    def origins(self) -> np.ndarray[Any, Any]:
        """A number for each row that is the same for those that come from one row of a file."""
        lines = [batch.column("line").to_numpy() for batch in self._batches]
        flat = np.concatenate(lines) if lines else np.zeros(0, np.int64)
        return np.concatenate([[0], np.cumsum(np.diff(flat) != 0)])[: len(flat)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch, row = self._find(index)
        media = self._media(batch, row) if self.report.media else {}
        if self.sides == ("",):
            return self._sequence(batch, row, "") | media
        return {side: self._sequence(batch, row, side) | media for side in self.sides}

    def place_of(self, index: int) -> str:
        """Return the file and line that a row comes from."""
        batch, row = self._find(index)
        columns = self._batches[batch]
        return f"{columns.column('file')[row].as_py()}:{columns.column('line')[row].as_py()}"

    def extra(self, index: int) -> Any:
        """Return what else is kept of a row: a pair's margin, feedback's label, a question's answer."""
        batch, row = self._find(index)
        text = self._batches[batch].column("extra")[row].as_py()
        return None if text is None else json.loads(text)

    def _media(self, batch: int, row: int) -> dict[str, Any]:
        """Return a row's media, and where the row stands, for errors; nothing if it has none."""
        columns = self._batches[batch]
        media = [_read(saved) for saved in columns.column("media")[row].as_py()]
        place = f"{columns.column('file')[row].as_py()}:{columns.column('line')[row].as_py()}"
        return {"media": media, "place": place} if media else {}

    def _find(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = bisect_right(self._starts, index) - 1
        return batch, index - self._starts[batch]

    def _lists(self, batch: int, column: str) -> _Lists:
        found = self._columns.get((batch, column))
        if found is None:
            found = self._columns[batch, column] = _Lists.of(self._batches[batch].column(column))
        return found

    def _sequence(self, batch: int, row: int, side: str) -> dict[str, Any]:
        ids, spans, weights, labels = (
            self._lists(batch, f"{side}{name}")[row] for name in ("ids", "spans", "weights", "labels")
        )
        return encode.arrays(ids, spans, weights if self.report.weighted else None, labels)


def _number(file: Path) -> int:
    return int(file.name.split("-")[1])
