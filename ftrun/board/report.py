"""``report.html``: one file that reads nothing from elsewhere, with plotly.js inside it."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import ftrun
from ftrun import record
from ftrun.board.arms import Arm, Board, Table
from ftrun.board.pictures import Picture, colours, pictures
from ftrun.board.rows import Row, last_lines
from ftrun.board.statistics import Verdict
from ftrun.board.tables import against, cells, duration, finite, headings, number, standing
from ftrun.display import size_text
from ftrun.record import Status

MOST_ROWS = 500
"""More arms are not listed; leaderboard.csv has all."""

_MOST_FAILURES = 20
_LOG_LINES = 12


def render(board: Board) -> str:
    """Return the page."""
    drawn = [(table, list(pictures(table))) for table in board.tables]
    library = _plotly()
    start, body = 0, []
    for table, each in drawn:
        body.append(_section(table, each if library else [], start, several=len(drawn) > 1))
        start += len(each) if library else 0
    figures = [picture.figure for _, each in drawn for picture in each] if library else []
    # In a script only "<" could end it.
    data = json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{escape(board.folder.name)}: sweep</title>\n<style>{_beside('report.css')}</style>\n",
            f"<script>{library}</script>\n" if library else "",
            f"</head>\n<body>\n<main>\n<h1>{escape(board.folder.name)}</h1>\n",
            f'<p class="quiet">{escape(standing(board.rows))}</p>\n',
            "" if library else _NO_PICTURES,
            *body,
            _failures(board.rows),
            f"<footer>ftrun {ftrun.__version__}. All numbers are in leaderboard.csv and leaderboard.json.</footer>\n",
            f'</main>\n<script type="application/json" id="figures">{data}</script>\n',
            f"<script>{_beside('report.js')}</script>\n</body>\n</html>\n",
        ]
    )


_NO_PICTURES = '<p class="card">There are no pictures: the package plotly is not installed (pip install plotly).</p>\n'


def _beside(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Return plotly.js, which the package plotly holds; nothing of the package itself is imported."""
    spec = importlib.util.find_spec("plotly")
    folder = next(iter(spec.submodule_search_locations or ()), None) if spec else None
    path = Path(folder, "package_data", "plotly.min.js") if folder else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else ""


def _section(table: Table, drawn: Sequence[Picture], start: int, *, several: bool) -> str:
    text = f"<h2>{escape(table.objective)} of {escape(table.stage)}</h2>\n" if several else ""
    text += _headline(table)
    shown = [_card(picture, start + index) for index, picture in enumerate(drawn)]
    return text + "".join([*shown[:1], _table(table), *shown[1:]])


def _headline(table: Table) -> str:
    best = table.best
    good = "low" if table.low_is_good else "high"
    seeds = len(best.done) if best else 0
    winner = f"<code>{escape(best.name)}</code>" if best else "none yet"
    spread = f", standard deviation {number(best.sd)}" if best and best.sd is not None else ""
    over = f"mean of {seeds} seeds" if seeds > 1 else "one seed" if best else ""
    times = [row.wall_seconds for row in table.rows]
    memory = max((row.peak_memory_bytes or 0 for row in table.rows), default=0)
    return (
        '<div class="head">\n'
        f'<div class="card"><small>Best arm</small>{winner}<p class="quiet">{escape(table.how_sure())}</p></div>\n'
        f'<div class="card"><small>{escape(table.objective)}, {good} is good</small>'
        f'<b>{number(best.mean if best else None) or "&ndash;"}</b><p class="quiet">{over}{spread}</p></div>\n'
        f'<div class="card"><small>Cost</small><b>{duration(sum(times))}</b>'
        f'<p class="quiet">{len(table.rows)} jobs, {len(table.arms)} arms'
        f"{f', {size_text(memory)} at most' if memory else ''}</p></div>\n</div>\n"
    )


def _card(picture: Picture, index: int) -> str:
    height = picture.figure["layout"]["height"]
    says = f'<p class="quiet">{escape(picture.says.strip())}</p>' if picture.says.strip() else ""
    place = f'<div id="figure-{index}" style="height:{height}px"></div>'
    return f'<section class="card"><h3>{escape(picture.title)}</h3>{says}{place}</section>\n'


def _table(table: Table) -> str:
    marks = list(zip(table.arms, colours(table), strict=True))[:MOST_ROWS]
    rows = [dict(zip(headings(table), cells(table, arm), strict=True)) for arm, _ in marks]
    names = [name for name in headings(table) if any(row[name] for row in rows)]
    heads = "".join(f'<th tabindex="0">{escape(name)}</th>' for name in ("#", *names))
    lines = "".join(
        _row(table, arm, place, colour, {name: row[name] for name in names})
        for place, ((arm, colour), row) in enumerate(zip(marks, rows, strict=True), 1)
    )
    left = len(table.arms) - len(marks)
    more = f'<p class="quiet">{left:,} more are in leaderboard.csv.</p>' if left else ""
    says = "A click on a heading sorts. Against the best: the difference over shared seeds, and its 95 % interval."
    return (
        f'<section class="card"><h3>Leaderboard</h3><p class="quiet">{says}</p><div class="wide"><table>\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{lines}</tbody></table></div>{more}</section>\n"
    )


def _row(table: Table, arm: Arm, place: int, colour: str, texts: Mapping[str, str]) -> str:
    values = _sort_values(table, arm)
    shown = [
        f'<td class="whole" data-value="{place}"><span class="dot" style="background:{colour}"></span>{place}</td>'
    ]
    for name, text in texts.items():
        if name == "against the best":
            shown.append(_against(arm))
        else:
            value = f' data-value="{"" if values[name] is None else values[name]}"' if name in values else ""
            shown.append(f"<td{value}>{escape(text)}</td>")
    return f'<tr class="{"best" if arm.verdict is Verdict.best else ""}">{"".join(shown)}</tr>\n'


def _against(arm: Arm) -> str:
    """Return the cell that says what the difference from the best is, and what it comes to."""
    verdict = f'<span class="pill {arm.verdict.name}">{escape(arm.verdict)}</span>' if arm.done else ""
    difference = against(arm).removesuffix(f", {arm.verdict}").removesuffix(arm.verdict)
    order = finite(arm.difference.mean) if arm.difference else 0.0 if arm.verdict is Verdict.best else None
    return f'<td class="whole" data-value="{"" if order is None else order}">{verdict} {escape(difference)}</td>'


def _sort_values(table: Table, arm: Arm) -> dict[str, float | None]:
    return {
        table.objective: finite(arm.mean),
        "sd": arm.sd,
        "time": arm.wall_seconds,
        "memory": arm.peak_memory_bytes,
        "tokens/s": arm.tokens_per_second,
    }


def _failures(rows: Sequence[Row]) -> str:
    failed = [row for row in rows if row.status is Status.failed]
    if not failed:
        return ""
    cards = "".join(_failure(row) for row in failed[:_MOST_FAILURES])
    left = len(failed) - _MOST_FAILURES
    more = f'<p class="quiet">and {left:,} more, in leaderboard.csv</p>\n' if left > 0 else ""
    return f"<h2>What failed</h2>\n{cards}{more}"


def _failure(row: Row) -> str:
    log = "\n".join(last_lines(row.folder / record.LOG)[-_LOG_LINES:])
    return (
        f'<section class="card"><h3><code>{escape(row.folder.name)}</code></h3>{escape(row.reason)}'
        f"{f'<pre>{escape(log)}</pre>' if log else ''}</section>\n"
    )
