"""Look at a run's rows before anything heavy starts: the driver reads the first thousand."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ftrun.data import OnBadRow, formats, read, sources, storage
from ftrun.data.formats import understand
from ftrun.data.rows import BadRow, Row
from ftrun.data.sources import Opened
from ftrun.errors import ConfigError, Problem

if TYPE_CHECKING:
    from ftrun.config import Config

FIRST_ROWS = 1000
FIRST_BYTES = 8 << 20
"""Of each file; a check that reads a long line or a large file for minutes helps nobody."""

MOST_BYTES = 64 << 20
"""Of all files together, as far as their sizes tell."""

MOST_PROBLEMS = 5
"""Bad rows reported by name; of more, the count."""


def check(cfg: Config) -> Iterator[Problem]:
    """Yield what is wrong with the files and their first rows."""
    resolved, problems = sources.find(cfg.data, cfg.stage.rows)
    yield from dict.fromkeys(problems)
    left = MOST_BYTES
    counts: list[int | None] = [None] * len(problems)  # what was not found has rows that nobody has counted
    for opened in resolved.train:
        count, left = yield from _check_files(cfg, opened, left)
        counts.append(count)
    for opened in (one for found in resolved.eval.values() for one in found):
        _, left = yield from _check_files(cfg, opened, left)
    known = [count for count in counts if count is not None]
    if len(known) == len(counts):
        yield from _held_out(cfg, sum(known))


def _held_out(cfg: Config, total: int) -> Iterator[Problem]:
    """Yield a problem if of ``total`` rows, all there are, none would be left to train on."""
    size = cfg.data.eval_size
    count = int(size) if size >= 1 else math.ceil(size * total)
    if count >= total > 0:
        message = f"{count:,} rows are to be held out, and there are {total:,}, so none is left to train on"
        yield Problem("data.eval_size", message, f"data.eval_size= less than {total}")


def _check_files(cfg: Config, opened: Opened, left: int) -> Generator[Problem, None, tuple[int | None, int]]:
    """Yield what is wrong with the first rows of a place.

    Args:
        cfg: The run.
        opened: The place.
        left: How many bytes may be read.

    Returns:
        How many rows there are, good and bad, or None where that is not known; and how many bytes may still be read.
    """
    if any(formats.check(opened.format, cfg.stage.rows)):  # said of the key, and not once more of each file
        return None, left
    total = None if opened.hub else 0
    for file in opened.files:
        count = None
        if left > 0 and _is_light(file, opened.documents):
            try:
                left -= min(FIRST_BYTES, Path(file).stat().st_size)
                count = yield from _check_rows(cfg, opened, file)
            except ConfigError as error:
                yield from error.problems
        total = None if total is None or count is None else total + count
    if total is not None and opened.rows is not None:
        total = min(total, opened.rows)
    return total, left


def _is_light(file: str, documents: bool) -> bool:
    """Tell whether a file can be read here: without a network, and without packages that the driver must not import."""
    kind, packing = storage.ending(file)
    return not storage.is_url(file) and packing != ".zst" and (documents or kind in read.TEXTS)


def _check_rows(cfg: Config, opened: Opened, file: str) -> Generator[Problem, None, int | None]:
    """Yield what is wrong with the first rows of a file, and return how many it has, or None if these are not all."""
    most = min(FIRST_ROWS, opened.rows or FIRST_ROWS)
    rows, cut_off = read.head(file, most, FIRST_BYTES, documents=opened.documents)
    bad = [problem for row in rows if (problem := _what_is_wrong(cfg, opened, row))]
    if not rows and not cut_off:
        yield Problem(file, "has no rows", "a file with rows")
    elif rows and len(bad) == len(rows):
        first = bad[0]
        others = f" (and all of the first {len(rows)} rows are like that)" if len(rows) > 1 else ""
        yield Problem(first.key, f"{first.message}{others}", first.fix.partition("; or data.on_bad_row")[0])
    elif cfg.data.on_bad_row is OnBadRow.error:
        yield from bad[:MOST_PROBLEMS]
        if len(bad) > MOST_PROBLEMS:
            message = f"has {len(bad) - MOST_PROBLEMS} more bad rows among the first {len(rows)}"
            yield Problem(file, message, "data.on_bad_row=skip counts and skips them")
    ended = not cut_off and (len(rows) < most or most == opened.rows)
    return len(rows) if ended else None


def _what_is_wrong(cfg: Config, opened: Opened, row: Row | BadRow) -> Problem | None:
    if isinstance(row, BadRow):
        return row.problem
    try:
        understand(row, cfg.stage.rows, opened.format, opened.columns, opened.tags)
    except BadRow as bad:
        return bad.problem
    return None
