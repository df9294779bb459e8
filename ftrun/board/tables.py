"""``leaderboard.md`` for a person, ``leaderboard.csv`` for a table of one's own, ``leaderboard.json`` for a program."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table as RichTable

from ftrun import record
from ftrun.board.arms import Arm, Board, Table
from ftrun.board.rows import Row
from ftrun.board.statistics import Verdict
from ftrun.display import clean, size_text

MOST_ROWS = 1000
"""A leaderboard for a person has no more arms than this; the other two have all."""


def write(board: Board) -> None:
    """Write all three."""
    record.write_whole(board.folder / "leaderboard.md", markdown(board))
    record.write_whole(board.folder / "leaderboard.csv", as_csv(board))
    record.write_whole(board.folder / "leaderboard.json", json.dumps(as_json(board), allow_nan=False) + "\n")


def number(value: float | None) -> str:
    """Return a number as tables show it."""
    return "" if value is None else f"{value:.4g}"


def duration(seconds: float | None) -> str:
    """Return a time as H:MM:SS or M:SS."""
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def against(arm: Arm) -> str:
    """Return an arm's difference from the best one, in words."""
    if arm.difference is None or math.isnan(arm.difference.mean):
        return arm.verdict if arm.verdict is Verdict.best else ""
    given = arm.difference
    if given.low is None or given.high is None:
        return f"{given.mean:+.3g}, unknown"
    return f"{given.mean:+.3g} [{given.low:+.3g}, {given.high:+.3g}], {arm.verdict}"


def headings(table: Table) -> list[str]:
    """Return the names of the columns of `cells`."""
    seeds = ["sd", "seeds"] if table.has_seeds else []
    return [*table.keys, table.objective, *seeds, "against the best", "time", "memory", "tokens/s", "state"]


def cells(table: Table, arm: Arm) -> list[str]:
    """Return an arm as a row of text."""
    seeds = [number(arm.sd), str(len(arm.values))] if table.has_seeds else []
    return [
        *(arm.point.get(key, "") for key in table.keys),
        number(arm.mean),
        *seeds,
        against(arm),
        duration(arm.wall_seconds),
        size_text(arm.peak_memory_bytes) if arm.peak_memory_bytes else "",
        f"{arm.tokens_per_second:,.0f}" if arm.tokens_per_second else "",
        ", ".join(filter(None, (arm.state, arm.twin))),
    ]


def standing(rows: Sequence[Row]) -> str:
    """Return in one line how many jobs stand how, and what they took."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    parts = ", ".join(f"{count} {status}" for status, count in counts.items())
    took = duration(sum(row.wall_seconds for row in rows))
    return f"{len(rows)} job{'s' * (len(rows) != 1)}: {parts}; {took} of work"


def markdown(board: Board) -> str:
    """Return the leaderboard as Markdown."""
    text = [f"# {_plain(board.folder.name)}", "", standing(board.rows), ""]
    for table in board.tables:
        text += [*_section(table), ""]
    return "\n".join(text)


def _section(table: Table) -> list[str]:
    good = "low" if table.low_is_good else "high"
    text = [f"## {table.objective} of {table.stage or 'all'}, {good} is good", ""]
    if best := table.best:
        text += [f"Best: **`{best.name}`**, {number(best.mean)}; {table.how_sure()}.", ""]
    names = headings(table)
    text += [_line(["", *names]), _line(["---:", *("---" for _ in names)])]
    text += [_line([str(place), *cells(table, arm)]) for place, arm in enumerate(table.arms[:MOST_ROWS], 1)]
    if left := len(table.arms) - MOST_ROWS:
        text += ["", f"{left:,} more are in leaderboard.csv."] if left > 0 else []
    if table.has_seeds:
        text += ["", _LEGEND]
    return text


_LEGEND = (
    "sd: sample standard deviation over seeds. Against the best: mean difference over the seeds that both have, its "
    "95 % interval (paired, Student's t), and what it comes to: inside the noise, if the interval holds zero; unknown "
    "under three shared seeds."
)


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(text) for text in texts) + " |"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def terminal(table: Table, most: int, width: int) -> RichTable:
    """Return the first arms as a table for a terminal of so many columns; a narrow one gets less of each."""
    is_wide, arms = width >= _WIDE, table.arms[:most]
    keys = table.keys if len(table.keys) <= (6 if is_wide else 2) else ["arm"]
    rows = [dict(zip(headings(table), cells(table, arm), strict=True)) | {"arm": arm.name} for arm in arms]
    if not is_wide:
        for arm, row in zip(arms, rows, strict=True):
            row["state"] = row["state"][:40]
            if arm.difference and not math.isnan(arm.difference.mean):
                row["against the best"] = f"{arm.difference.mean:+.3g} {arm.verdict}"
    has_state = any(row["state"] for row in rows)
    left_out = () if is_wide else ("sd", "memory", "tokens/s", *(["time"] if has_state else []))
    names = [*keys, *(name for name in headings(table) if name not in (*table.keys, *left_out))]
    names = [name for name in names if any(row[name] for row in rows)]
    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in names:
        folds = name in ("state", *keys)
        longest = max(len(text) for text in (name, *(row[name] for row in rows)))
        shown.add_column(
            escape(name), no_wrap=not folds, overflow="fold", min_width=min(longest, 12) if folds else None
        )
    for arm, row in zip(arms, rows, strict=True):
        shown.add_row(*(escape(clean(row[name])) for name in names), style=_COLOURS.get(arm.verdict, ""))
    return shown


_WIDE = 120
"""On a terminal of this many columns there is room for everything."""

_COLOURS = {Verdict.best: "bold green", Verdict.noise: "yellow"}


def as_csv(board: Board) -> str:
    """Return one line a job: the swept keys, the objective, all metrics, costs, and how it stands."""
    keys = list(dict.fromkeys(key for row in board.rows for key in row.point))
    metrics = list(dict.fromkeys(name for row in board.rows for name in row.metrics))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["id", *keys, "seed", "stage", "objective_name", "objective", *metrics, *_COSTS, *_STANDING])
    for row in board.rows:
        values = [row.point.get(key, "") for key in keys]
        values += [row.seed, row.stage, row.objective_name, row.objective]  # type: ignore[list-item]
        values += [row.metrics.get(name) for name in metrics]  # type: ignore[misc]
        values += [getattr(row, name) for name in _COSTS]
        writer.writerow([row.id, *values, row.status.value, " ".join(row.reason.split()), _place(row, board.folder)])
    return file.getvalue()


_COSTS = ("step", "wall_seconds", "peak_memory_bytes", "tokens_per_second")
_STANDING = ("status", "reason", "folder")


def _place(row: Row, folder: Path) -> str:
    """Return a job's folder as seen from the sweep's."""
    return str(row.folder.relative_to(folder)) if row.folder.is_relative_to(folder) else str(row.folder)


def as_json(board: Board) -> dict[str, Any]:
    """Return tables with their arms, and jobs; what is no finite number is null."""
    return {
        "folder": board.folder.name,
        "counts": {status.value: count for status, count in board.counts().items()},
        "tables": [_table(table, board.folder) for table in board.tables],
        "jobs": [_job(row, board.folder) for row in board.rows],
    }


def _table(table: Table, folder: Path) -> dict[str, Any]:
    return {
        "stage": table.stage,
        "objective": table.objective,
        "low_is_good": table.low_is_good,
        "best": dict(table.best.point) if table.best else None,
        "how_sure": table.how_sure(),
        "arms": [_arm(arm, folder) for arm in table.arms],
    }


def _arm(arm: Arm, folder: Path) -> dict[str, Any]:
    values = arm.values
    given = arm.difference
    interval = [given.low, given.high] if given and given.low is not None else None
    return {
        "point": dict(arm.point),
        "mean": finite(arm.mean),
        "sd": arm.sd,
        "n": len(values),
        "min": finite(min(values, default=None)),
        "max": finite(max(values, default=None)),
        "difference": finite(given.mean) if given else None,
        "interval": interval,
        "shared_seeds": given.pairs if given else None,
        "verdict": arm.verdict.value,
        "state": arm.state,
        "wall_seconds": arm.wall_seconds,
        "peak_memory_bytes": arm.peak_memory_bytes,
        "tokens_per_second": arm.tokens_per_second,
        "jobs": [_place(row, folder) for row in arm.rows],
    }


def _job(row: Row, folder: Path) -> dict[str, Any]:
    return {
        "id": row.id,
        "folder": _place(row, folder),
        "point": dict(row.point),
        "seed": row.seed,
        "status": row.status.value,
        "reason": row.reason,
        "objective_name": row.objective_name,
        "objective": finite(row.objective),
        "metrics": {name: finite(value) for name, value in row.metrics.items()},
        **{name: getattr(row, name) for name in _COSTS},
    }


def finite(value: float | None) -> float | None:
    """Return a number that JSON has a form for."""
    return value if value is not None and math.isfinite(value) else None
