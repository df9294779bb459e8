"""Look at a run's rows before anything heavy starts: the driver reads the first thousand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ftrun.data import OnBadRow, read
from ftrun.data.formats import understand
from ftrun.data.read import BadRow
from ftrun.errors import ConfigError, Problem

if TYPE_CHECKING:
    from ftrun.config import Config

FIRST_ROWS = 1000
MOST_PROBLEMS = 5
"""Bad rows reported by name; of more, the count."""


def check(cfg: Config) -> Iterator[Problem]:
    """Yield what is wrong with the files and their first rows."""
    key = "data.sources" if cfg.data.sources else "data.path"
    files: list[Path] = []
    problems: list[Problem] = []
    for index, source in enumerate(read.sources_of(cfg.data)):
        if not source.path or read.is_hub_id(source.path):
            continue
        place = f"{key}.{index}.path" if cfg.data.sources else key
        try:
            found = read.find(place, source.path)
        except ConfigError as error:
            problems += error.problems
            continue
        if not found.train:
            message = f"{source.path} holds only files to evaluate on ({', '.join(file.name for file in found.eval)})"
            problems.append(Problem(place, message, "rename the file, or name it"))
        files += found.train
    evaluated: list[Path] = []
    try:
        if cfg.data.eval_path or (cfg.data.path != "" and not problems):
            evaluated = read.eval_files(cfg.data)
    except ConfigError as error:
        problems += error.problems
    yield from dict.fromkeys(problems)
    for file in [*files, *evaluated]:
        if file.suffix in read.HEAVY_KINDS:
            continue
        try:
            yield from _check_rows(cfg, file)
        except ConfigError as error:
            yield from error.problems


def _check_rows(cfg: Config, file: Path) -> Iterator[Problem]:
    count, bad = 0, []
    for row in islice(read.read(file), FIRST_ROWS):
        count += 1
        try:
            understand(row, cfg.stage.rows, cfg.data.format)
        except BadRow as error:
            bad.append(error.problem)
    if not count:
        yield Problem(str(file), "has no rows", "a file with rows")
    elif len(bad) == count:
        first = bad[0]
        others = f" (and all of the first {count} rows are like that)" if count > 1 else ""
        yield Problem(first.key, f"{first.message}{others}", first.fix.partition("; or data.on_bad_row")[0])
    elif cfg.data.on_bad_row is OnBadRow.error:
        yield from bad[:MOST_PROBLEMS]
        if len(bad) > MOST_PROBLEMS:
            yield Problem(
                str(file),
                f"has {len(bad) - MOST_PROBLEMS} more bad rows among the first {count}",
                "data.on_bad_row=skip counts and skips them",
            )
