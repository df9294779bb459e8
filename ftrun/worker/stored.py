"""The file format of tokenised rows: Arrow record batches, mapped into memory when they are read."""

from __future__ import annotations

import json
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ftrun.worker.encode import EXTRA, SIDES, EncodedRow
from ftrun.worker.media.place import Located
from ftrun.worker.report import Report
from ftrun.worker.sequence import arrays

META = "meta.json"
"""Beside the rows: what they are, what they were made of, and what became of the file's rows."""

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


def schema_of(sides: tuple[str, ...]) -> pa.Schema:
    """Return the columns of rows that have a sequence for each of these names."""
    tokens, floats = pa.list_(pa.int32()), pa.list_(pa.float32())
    columns = [("file", pa.dictionary(pa.int32(), pa.string())), ("line", pa.int64()), ("extra", pa.string())]
    columns += [("media", pa.list_(_MEDIUM)), ("grown", pa.int32()), ("origin", pa.int64())]
    for side in sides:
        columns += [
            (f"{side}ids", tokens), (f"{side}spans", tokens), (f"{side}weights", floats), (f"{side}labels", tokens),
        ]  # fmt: skip
    return pa.schema(columns)


def record_batch(rows: list[EncodedRow], sides: tuple[str, ...], schema: pa.Schema) -> pa.RecordBatch:
    """Return rows as they are written."""
    columns: list[Any] = [
        [row.row.file for row in rows],
        [row.row.line for row in rows],
        [None if row.extra is None else json.dumps(row.extra) for row in rows],
        [[_saved(medium) for medium in row.media] for row in rows],
        [row.grown for row in rows],
        [row.origin for row in rows],
    ]
    for number in range(len(sides)):
        each = [row.sequences[number] for row in rows]
        columns += [
            [sequence.ids for sequence in each],
            [sequence.spans for sequence in each],
            [sequence.weights for sequence in each],
            [sequence.labels for sequence in each],
        ]
    filled = [_array(column, kind) for column, kind in zip(columns, schema.types, strict=True)]
    return pa.RecordBatch.from_arrays(filled, schema=schema)


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
        meta = json.loads((place / META).read_text())
        self.name, self.report = str(meta["name"]), Report.of(meta["report"])
        kind = meta["needs"]["kind"]
        self.sides = SIDES.get(kind, ("",))
        self.keeps_extra = kind in EXTRA
        """Whether a stage reads of a row more than its sequences."""

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
        found = [batch.column("origin").to_numpy() for batch in self._batches]
        flat = np.concatenate(found) if found else np.zeros(0, np.int64)
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

    def extra_of(self, index: int) -> Any:
        """Return what else is kept of a row (`ftrun.worker.encode.EXTRA`)."""
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
        return arrays(ids, spans, weights if self.report.weighted else None, labels)


def _number(file: Path) -> int:
    return int(file.name.split("-")[1])
