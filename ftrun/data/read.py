"""Files into rows, each with its place, so that an error can name the file and the line."""

from __future__ import annotations

import csv
import glob
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ftrun.data import Data, Source
from ftrun.errors import ConfigError, Problem, did_you_mean

DEMO = "demo:"
_DEMOS = Path(__file__).resolve().parent.parent / "demo"

csv.field_size_limit(2**31 - 1)  # a cell may hold a long document

_EVAL_NAMES = ("eval", "validation", "valid", "val", "dev", "test")
"""Files of a folder that hold rows to evaluate on, by the first part of their name."""


@dataclass(frozen=True)
class Row:
    """One row of a file."""

    value: dict[str, Any]
    file: str
    line: int

    @property
    def place(self) -> str:
        """Where the row stands, as a person writes it."""
        return f"{self.file}:{self.line}"


class BadRow(Exception):
    """A row that cannot be trained on."""

    def __init__(self, row: Row, message: str, fix: str) -> None:
        super().__init__(message)
        self.problem = Problem(row.place, message, f"{fix}; or data.on_bad_row=skip")
        self.reason = message


def demos() -> list[str]:
    """Return the names of the data sets that ship with ftrun."""
    return sorted(folder.name for folder in _DEMOS.iterdir() if folder.is_dir())


@dataclass(frozen=True)
class Files:
    """The files behind one source."""

    train: list[Path]
    eval: list[Path]


def is_hub_id(path: str) -> bool:
    """Tell whether ``path`` can only be a data set on the hub."""
    local = Path(path).expanduser()
    looks_local = path.startswith((DEMO, "/", "./", "../", "~")) or glob.has_magic(path) or local.suffix in _READERS
    return not (looks_local or local.exists()) and path.count("/") == 1


def find(key: str, path: str) -> Files:
    """Return the files that a path names: a file, a folder, a glob or a demo set.

    Raises:
        ConfigError: There are none, or one of them is of an unknown kind.
    """
    if path.startswith(DEMO):
        name = path.removeprefix(DEMO)
        if name not in demos():
            message = f"ftrun ships no data set {name}{did_you_mean(name, demos())}"
            raise ConfigError([Problem(key, message, f"one of {', '.join(DEMO + demo for demo in demos())}")])
        local = _DEMOS / name
    else:
        local = Path(path).expanduser()
    if local.is_dir():
        found = sorted(file for file in local.rglob("*") if file.suffix in _READERS and not file.name.startswith("."))
        if not found:
            kinds = ", ".join(_READERS)
            raise ConfigError(
                [Problem(key, f"the folder {path} holds no file of rows ({kinds})", "a folder that does")]
            )
        held_out = [file for file in found if file.stem.split(".")[0].split("-")[0] in _EVAL_NAMES]
        return Files([file for file in found if file not in held_out], held_out)
    files = [Path(file) for file in sorted(glob.glob(str(local), recursive=True))] if glob.has_magic(path) else [local]
    problems = [_not_a_file(key, file) for file in files if not file.is_file()]
    problems += [_unknown_kind(key, file) for file in files if file.is_file() and file.suffix not in _READERS]
    if not files:
        problems.append(Problem(key, f"no file matches {path}", "a glob that matches, or a file"))
    if problems:
        raise ConfigError(problems)
    return Files(files, [])


def _not_a_file(key: str, file: Path) -> Problem:
    parent = file.parent if str(file.parent) else Path()
    beside = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    return Problem(
        key, f"there is no file {file}{did_you_mean(file.name, beside)}", f"{key}=FILE (paths start at {Path.cwd()})"
    )


def _unknown_kind(key: str, file: Path) -> Problem:
    return Problem(key, f"{file} is of no kind that is read", f"a file that ends in one of {', '.join(_READERS)}")


def read(file: Path) -> Iterator[Row]:
    """Yield the rows of a file.

    Raises:
        ConfigError: At the first thing that is no row, naming the line.
    """
    try:
        yield from _READERS[file.suffix](file)
    except UnicodeDecodeError:  # counted from the start of a buffer
        data = file.read_bytes()
        try:
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
        message = "is not UTF-8 text"
        raise ConfigError(
            [Problem(f"{file}:{line}", message, f"iconv -f LATIN1 -t UTF-8 {file} (or what its encoding is)")]
        ) from None


def rows(sources: list[Source], seed: int = 0, *, key: str = "data.path", limit: int | None = None) -> Iterator[Row]:
    """Yield the training rows of several sources, in order, each source as often as its weight says.

    Args:
        sources: Where to read.
        seed: Chooses the rows of a source whose weight is not whole.
        key: The config key to name when a source is not there.
        limit: Read no more than so many rows of each file.
    """
    for source in sources:
        limits = [n for n in (limit, source.rows) if n is not None]
        found = (row for file in find(key, source.path).train for row in read(file))
        yield from _weighted(islice(found, min(limits) if limits else None), source.weight, seed)


def _weighted(found: Iterator[Row], weight: float, seed: int) -> Iterator[Row]:
    """Repeat rows ``weight`` times; a fraction is a seeded choice of rows, in their order."""
    if weight == 1:
        yield from found
        return
    kept = list(found)
    for _ in range(int(weight)):
        yield from kept
    chosen = random.Random(seed).sample(range(len(kept)), round(len(kept) * (weight % 1)))  # noqa: S311
    yield from (kept[index] for index in sorted(chosen))


def make_absolute(data: Data) -> None:
    """Replace relative paths by absolute ones, in place, so that a run can be gone on with from any folder."""

    def absolute(path: str) -> str:
        return path if path.startswith(DEMO) or is_hub_id(path) else str(Path(path).expanduser().absolute())

    data.path = absolute(data.path) if data.path else None
    data.eval_path = absolute(data.eval_path) if data.eval_path else None
    for source in data.sources:
        source.path = absolute(source.path)


def sources_of(data: Data) -> list[Source]:
    """Return the sources of training rows, whether one path or several were given."""
    return data.sources or [Source(path=data.path or "", rows=data.rows)]


def eval_files(data: Data) -> list[Path]:
    """Return the files of rows to evaluate on: the ones asked for, else those the data sets bring."""
    if data.eval_path:
        files = find("data.eval_path", data.eval_path)
        return files.train + files.eval
    if data.eval_size:
        return []
    return [
        file
        for source in sources_of(data)
        if not is_hub_id(source.path)
        for file in find("data.path", source.path).eval
    ]


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                message = f"is not JSON: {error.msg} at column {error.colno}"
                raise ConfigError([Problem(f"{file}:{number}", message, "one JSON object on each line")]) from None
            yield _row(value, file, number)


_GAP = re.compile(r"[ \t\r\n]*(,?)[ \t\r\n]*")
"""What stands between two rows of a JSON list."""


def _json_array(file: Path) -> Iterator[Row]:
    """Read a list of objects one by one, so that each has its line; a file of JSON lines is taken too."""
    text = file.read_text(encoding="utf-8-sig")
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        yield from _json_lines(file)
        return

    def wrong(at: int, message: str) -> ConfigError:
        return ConfigError([Problem(f"{file}:{text.count(chr(10), 0, at) + 1}", message, "a list of JSON objects")])

    decoder, position, line, first = json.JSONDecoder(), start + 1, text.count("\n", 0, start) + 1, True
    while True:
        gap = _GAP.match(text, position)
        assert gap  # it may be empty
        begin = gap.end()
        if text.startswith("]", begin):
            rest = text[begin + 1 :].lstrip()
            if rest:
                raise wrong(len(text) - len(rest), "is behind the end of the list of rows")
            return
        if bool(gap[1]) is first:
            raise wrong(begin, "is not JSON: Expecting ',' before it")
        line += text.count("\n", position, begin)
        try:
            value, position = decoder.raw_decode(text, begin)
        except json.JSONDecodeError as error:
            raise wrong(error.pos, f"is not JSON: {error.msg} at column {error.colno}") from None
        yield _row(value, file, line)
        line += text.count("\n", begin, position)
        first = False


def _row(value: Any, file: Path, line: int) -> Row:
    if not isinstance(value, dict):
        message = f"is {json_name(value)}, not an object"
        raise ConfigError([Problem(f"{file}:{line}", message, 'an object: {"messages": [...]}')])
    return Row(value, str(file), line)


def json_name(value: Any) -> str:
    """Return what JSON calls a value's type."""
    names = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
    return "null" if value is None else names[type(value)]


def _separated(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        try:
            for value in reader:
                if None in value or None in value.values():
                    message = f"has {'more' if None in value else 'fewer'} cells than the first line has names"
                    raise ConfigError(
                        [Problem(f"{file}:{reader.line_num}", message, "quote cells that hold the separator")]
                    )
                yield Row(dict(value), str(file), reader.line_num)
        except csv.Error as error:
            raise ConfigError([Problem(f"{file}:{reader.line_num}", f"is not CSV: {error}", "mend the line")]) from None


def _text(file: Path) -> Iterator[Row]:
    with file.open(encoding="utf-8-sig") as lines:
        yield from (
            Row({"text": line.rstrip("\n")}, str(file), number) for number, line in enumerate(lines, 1) if line.strip()
        )


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = pq.ParquetFile(file).iter_batches(batch_size=256)
        number = 0
        for batch in batches:
            for value in batch.to_pylist():
                number += 1
                yield Row(value, str(file), number)
    except pa.ArrowInvalid as error:
        raise ConfigError(
            [Problem(str(file), f"is not Parquet: {str(error).splitlines()[0]}", "a Parquet file")]
        ) from None


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".csv": _separated,
    ".tsv": _separated,
    ".txt": _text,
    ".parquet": _parquet,
}
HEAVY_KINDS = (".parquet",)
"""Kinds of files whose reader needs a package that the driver must not import."""
