"""Files into rows, each with its place, so that an error can name the file and the line.

Every reader holds a piece of its file in memory, never the whole. Where a line cannot be a row but the next one can,
it yields a `BadRow`, which the caller raises or counts; what makes the rest of a file unreadable is a `ConfigError`.
Of a key that a JSON object holds twice, the last value counts, as in every common reader.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ftrun.data import storage
from ftrun.data.rows import BadRow, Row
from ftrun.errors import ConfigError, Problem

MOST_COLUMNS = 10_000
"""A table of more columns is no table of rows to train on."""

_CHUNK = 1 << 20
"""How much of a JSON list is taken into hand at once, in bytes."""

csv.field_size_limit(1 << 28)  # a cell may hold a long document, but a quote left open must not swallow a whole disk

_MAGIC = {
    b"PAR1\x15": "a Parquet file (.parquet)",
    b"ARROW1\0": "an Arrow file (.arrow)",
    b"\x1f\x8b": "packed with gzip (.gz)",
    b"\x28\xb5\x2f\xfd": "packed with zstandard (.zst)",
    b"\xfd7zXZ\0": "packed with xz (.xz)",
    b"PK\x03\x04": "a ZIP archive",
}
"""What the first bytes of a file that is no text say it is."""


def read(file: Path | str) -> Iterator[Row]:
    """Yield the rows of a file.

    Raises:
        ConfigError: At the first thing that is no row, naming the line.
    """
    for row in each(file):
        if isinstance(row, BadRow):
            raise ConfigError([row.problem])
        yield row


def each(file: Path | str, *, documents: bool = False) -> Iterator[Row | BadRow]:
    """Yield the rows of a file or an address, and what stands where a row should.

    Args:
        file: Its ending says how it is read.
        documents: Whether the whole file is one text.

    Raises:
        ConfigError: The file is damaged, or not what its ending says.
    """
    name = str(file)
    kind, _ = storage.ending(name)
    try:
        if kind in _TABLES and not documents:
            with storage.open_seekable(name) as seekable:
                yield from _TABLES[kind](seekable, name)
        else:
            with storage.open_bytes(name) as stream:
                yield from _text_rows(stream, name, documents)
    except storage.DAMAGE as error:
        raise _damaged(name, error) from None
    except Exception as error:
        if isinstance(error, ConfigError | storage.Enough) or not storage.is_url(name):
            raise
        raise ConfigError([storage.unreachable(name, name, error)]) from None  # a network fails in a hundred ways


def head(file: str, rows: int, size: int, *, documents: bool = False) -> tuple[list[Row | BadRow], bool]:
    """Return the first rows of a text file, and whether ``size`` bytes did not hold as many.

    Args:
        file: One of a kind in `TEXTS`.
        rows: How many rows are enough.
        size: After how many bytes to stop, whatever they hold.
        documents: Whether the whole file is one text.
    """
    found: list[Row | BadRow] = []
    try:
        with storage.open_bytes(file) as whole, storage.head(whole, size) as stream:
            for row in _text_rows(stream, file, documents):
                found.append(row)
                if len(found) == rows:
                    break
    except storage.Enough:
        return found, True
    except storage.DAMAGE as error:
        raise _damaged(file, error) from None
    return found, False


def _damaged(file: str, error: Exception) -> ConfigError:
    message = f"is damaged, or not what its ending says: {_first_line(error)}"
    return ConfigError([Problem(file, message, "the whole file, copied or downloaded again")])


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _text_rows(stream: io.BufferedReader, file: str, documents: bool) -> Iterator[Row | BadRow]:
    start = stream.peek(8)[:8]
    for magic, what in _MAGIC.items():
        if start.startswith(magic):
            raise ConfigError([Problem(file, f"is {what}, which its name does not say", "the right ending")])
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in start[:2]:
        raise ConfigError([Problem(file, "is UTF-16 text, not UTF-8", f"iconv -f UTF-16 -t UTF-8 {file}")])
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    reader = _document if documents else TEXTS[storage.ending(file)[0]]
    return reader(stream, file)


_NOT_UTF8 = "is not UTF-8 text"


def _not_utf8(file: str, line: int) -> BadRow:
    return BadRow(Row({}, file, line), _NOT_UTF8, _to_utf8(file))


def _all_not_utf8(file: str, line: int) -> ConfigError:
    """Return the error for text that cannot be gone on with behind the line."""
    return ConfigError([Problem(f"{file}:{line}", _NOT_UTF8, _to_utf8(file))])


def _to_utf8(file: str) -> str:
    return f"iconv -f LATIN1 -t UTF-8 {file} (or what its encoding is)"


def _json(stream: io.BufferedReader, file: str) -> Iterator[Row | BadRow]:
    """Read JSON lines, a list of objects, or an object that holds such a list and nothing else."""
    line, column = 1, 0
    while ahead := stream.peek(1):
        begun = ahead.lstrip()
        blank = ahead[: len(ahead) - len(begun)]
        line, column = _behind(blank, line, column)
        stream.read(len(blank))
        if begun:
            break
    else:
        return iter(())
    around = _WRAPPED.match(begun) if storage.ending(file)[0] == ".json" else None
    if around or begun.startswith(b"["):
        head = stream.read(around.end() if around else 1)
        return _json_list(_Window(stream, file, *_behind(head, line, column)), "}" if around else "")
    return _json_lines(stream, file, line)


def _behind(text: bytes, line: int, column: int) -> tuple[int, int]:
    """Return the line and the column, counted from 0, behind a text."""
    last = text.rfind(b"\n")
    return line + text.count(b"\n"), column + len(text) if last < 0 else len(text) - last - 1


_WRAPPED = re.compile(rb'\{\s*"(?:data|rows|examples|instances|train)"\s*:\s*\[(?=\s*[\]{])')
"""The beginning of an object around the list of rows, by the names that are no column of any format."""


def _json_lines(stream: Iterable[bytes], file: str, line: int) -> Iterator[Row | BadRow]:
    for number, raw in enumerate(stream, line):
        if raw.isspace():
            continue
        try:
            value = json.loads(raw.decode())
        except UnicodeDecodeError:
            yield _not_utf8(file, number)
        except (ValueError, RecursionError) as error:
            bad = BadRow(Row({}, file, number), f"is not JSON: {_why_not_json(error)}", "one JSON object on each line")
            bad.reason = "is not JSON"  # without the column, so that such lines are counted together
            yield bad
        else:
            yield _row(value, file, number)


def _why_not_json(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    if isinstance(error, RecursionError):
        return "lists and objects inside one another go too deep"
    return "a whole number of more than 4300 digits"  # what int() refuses


def _row(value: Any, file: str, line: int) -> Row | BadRow:
    if type(value) is dict:
        return Row(value, file, line)
    return BadRow(Row({}, file, line), f"is {json_name(value)}, not an object", 'an object: {"messages": [...]}')


_GAP = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")
"""What stands between two rows of a JSON list."""


class _Window:
    """The piece of a long text that is in hand, and where it begins."""

    def __init__(self, stream: IO[bytes], file: str, line: int, column: int) -> None:
        self.text, self.line, self.ended, self.file = "", line, False, file
        self._column = column
        """Characters of the first line that stand before the piece."""
        self._stream, self._size = stream, _CHUNK
        self._decode = codecs.getincrementaldecoder("utf-8")().decode

    def move(self, start: int, *, begun: bool) -> None:
        """Let go what is before ``start``, and read on; ever more at once while the same row has ``begun``."""
        self.let_go(start)
        self._size = self._size * 2 if begun else _CHUNK
        raw = self._stream.read(self._size)
        self.ended = len(raw) < self._size
        try:
            self.text += self._decode(raw, self.ended)
        except UnicodeDecodeError as error:
            line = self.line + self.text.count("\n") + error.object.count(b"\n", 0, error.start)
            raise _all_not_utf8(self.file, line) from None

    def let_go(self, start: int) -> None:
        """Drop the text before ``start``."""
        last = self.text.rfind("\n", 0, start)
        self._column = self._column + start if last < 0 else start - last - 1
        self.line += self.text.count("\n", 0, start)
        self.text = self.text[start:]

    def cut_off(self, error: Exception) -> bool:
        """Tell whether a row may be broken only because the piece ends in it."""
        if self.ended or not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - _LONGEST_WORD

    def wrong(self, at: int, message: str) -> ConfigError:
        """Return the error that names the line of a place in the piece."""
        place = f"{self.file}:{self.line + self.text.count(chr(10), 0, at)}"
        return ConfigError([Problem(place, message, "a list of JSON objects")])

    def not_json(self, begin: int, error: ValueError | RecursionError) -> ConfigError:
        """Return the error for a row that begins at ``begin`` and cannot be read."""
        if not isinstance(error, json.JSONDecodeError):
            return self.wrong(begin, f"is not JSON: {_why_not_json(error)}")
        column = error.colno + (self._column if "\n" not in self.text[: error.pos] else 0)
        return self.wrong(error.pos, f"is not JSON: {error.msg} at column {column}")


_LONGEST_WORD = 16
"""A word or number that is cut off is reported no farther than this from the end; -Infinity has nine letters."""


def _json_list(window: _Window, around: str) -> Iterator[Row | BadRow]:
    """Read a list of objects one by one, from behind its bracket; ``around`` closes what it stands in."""
    file, decode = window.file, json.JSONDecoder().raw_decode
    text, position, first, begun = "", 0, True, False
    counted, number = 0, window.line  # `number` is the line of text[counted]
    while True:
        gap = _GAP.match(text, position)
        assert gap  # it may be empty
        begin = gap.end()
        end = -1
        if begin < len(text) or window.ended:
            if text.startswith("]", begin) and not gap[1]:
                _check_rest(window, begin + 1, around)
                return
            if bool(gap[1]) is first:
                raise window.wrong(begin, "is not JSON: Expecting ',' before it")
            try:
                value, end = decode(text, begin)
            except (ValueError, RecursionError) as error:
                if not window.cut_off(error):
                    raise window.not_json(begin, error) from None
        if end < 0 or (end == len(text) and not window.ended):
            window.move(position, begun=begun)
            text, position, counted, number, begun = window.text, 0, 0, window.line, True
            continue
        number += text.count("\n", counted, begin)
        counted = begin
        yield _row(value, file, number)
        position, first, begun = end, False, False


def _check_rest(window: _Window, start: int, around: str) -> None:
    """Refuse what stands behind the end of the list."""
    while True:
        rest = window.text[start:].lstrip()
        if around and rest.startswith(around):
            start, around = len(window.text) - len(rest) + len(around), ""
        elif rest:
            raise window.wrong(len(window.text) - len(rest), "is behind the end of the list of rows")
        elif window.ended:
            break
        else:
            window.move(len(window.text), begun=False)
            start = 0
    if around:
        raise window.wrong(len(window.text), f"is not JSON: Expecting {around!r} behind the list")


def json_name(value: Any) -> str:
    """Return what JSON calls a value's type."""
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")


def _separated(stream: io.BufferedReader, file: str) -> Iterator[Row | BadRow]:
    mark = "\t" if storage.ending(file)[0] == ".tsv" else ","
    if stream.peek(1).partition(b"\n")[0].count(mark.encode()) > MOST_COLUMNS:  # without reading such a line
        raise ConfigError([_too_many_columns(f"{file}:1")])
    reader = csv.reader(_decoded(stream, file), delimiter=mark, strict=True)
    try:
        names = next(filter(None, reader), [])
        _check_columns(names, f"{file}:{reader.line_num}")
        line = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(names):
                yield Row(dict(zip(names, cells, strict=True)), file, line)
            elif cells:
                message = f"has {'more' if len(cells) > len(names) else 'fewer'} cells than the first line has names"
                yield BadRow(Row({}, file, line), message, "quote cells that hold the separator")
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError([Problem(f"{file}:{reader.line_num}", f"is not CSV: {error}", "mend the line")]) from None


def _check_columns(names: Sequence[str], place: str) -> None:
    if len(names) > MOST_COLUMNS:
        raise ConfigError([_too_many_columns(place)])
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        message = f"has the column {twice[0]} more than once, so that which one is meant cannot be told"
        raise ConfigError([Problem(place, message, "a name of its own for each column")])


def _too_many_columns(place: str) -> Problem:
    message = f"has more than {MOST_COLUMNS:,} columns, so that it is hardly a table of rows to train on"
    return Problem(place, message, "a row on each line, with the columns that are trained on")


def _decoded(stream: Iterable[bytes], file: str) -> Iterator[str]:
    for number, raw in enumerate(stream, 1):
        try:
            yield raw.decode()
        except UnicodeDecodeError:
            raise _all_not_utf8(file, number) from None  # a quote in it may open or close


def _lines(stream: Iterable[bytes], file: str) -> Iterator[Row | BadRow]:
    """Read a document from each line."""
    for number, raw in enumerate(stream, 1):
        if not raw.isspace():
            yield _text(raw.rstrip(b"\r\n"), file, number)


def _document(stream: IO[bytes], file: str) -> Iterator[Row | BadRow]:
    """Read the whole file as one document."""
    yield _text(stream.read().replace(b"\r\n", b"\n"), file, 1)


def _text(raw: bytes, file: str, line: int) -> Row | BadRow:
    try:
        return Row({"text": raw.decode()}, file, line)
    except UnicodeDecodeError as error:
        return _not_utf8(file, line + raw.count(b"\n", 0, error.start))


def _parquet(file: IO[bytes], name: str) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(file)
        _check_columns(table.schema_arrow.names, name)
        yield from _table_rows(table.iter_batches(batch_size=_BATCH), name)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError([Problem(name, f"is not Parquet: {_first_line(error)}", "a Parquet file")]) from None


def _arrow(file: IO[bytes], name: str) -> Iterator[Row | BadRow]:
    """Read an Arrow file or stream; `datasets` writes streams."""
    import pyarrow as pa

    try:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            table = pa.ipc.open_file(file)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            table = pa.ipc.open_stream(file)
            batches = iter(table)
        _check_columns(table.schema.names, name)
        yield from _table_rows(batches, name)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ConfigError([Problem(name, f"is not Arrow: {_first_line(error)}", "an Arrow file or stream")]) from None


_BATCH = 256
"""Rows of a table that are held as Python objects at once."""


def _table_rows(batches: Iterable[Any], name: str) -> Iterator[Row | BadRow]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            try:
                values = batch.slice(start, _BATCH).to_pylist()
            except UnicodeDecodeError:
                message = f"its rows from {number + 1} on hold what {_NOT_UTF8}"
                raise ConfigError([Problem(name, message, "a file whose texts are UTF-8")]) from None
            for number, value in enumerate(values, number + 1):  # noqa: B020 - it counts on
                yield Row({column: _without_fillers(cell) for column, cell in value.items()}, name, number)


def _without_fillers(cell: Any) -> Any:
    """Return a cell without the nulls that a table fills objects up with: in a column, all have the same members."""
    if isinstance(cell, dict):
        return {name: _without_fillers(member) for name, member in cell.items() if member is not None}
    return [_without_fillers(member) for member in cell] if isinstance(cell, list) else cell


TEXTS: dict[str, Callable[[io.BufferedReader, str], Iterator[Row | BadRow]]] = {
    ".jsonl": _json,
    ".ndjson": _json,
    ".json": _json,
    ".csv": _separated,
    ".tsv": _separated,
    ".txt": _lines,
}
"""How the kinds of text files are read, by their endings."""

_TABLES: dict[str, Callable[[IO[bytes], str], Iterator[Row | BadRow]]] = {".parquet": _parquet, ".arrow": _arrow}

KINDS = (*TEXTS, *_TABLES)
"""Endings of the files that are read, each also with one of `ftrun.data.storage.PACKINGS` behind it."""
