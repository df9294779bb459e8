"""The pictures of a report, as plotly.js takes them: plain dicts, so that nothing is imported to make them.

Colours of text, grid and paper are left to the page, which knows whether it is light or dark.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftrun import record
from ftrun.board import statistics
from ftrun.board.arms import Arm, Table
from ftrun.board.rows import Row
from ftrun.record import Status

Figure = dict[str, Any]

MOST_ARMS = 40
"""More are not told apart in a list of arms."""

MOST_MARKS = 1000
"""More arms are not drawn as one point or line each."""

MOST_CURVES = 150
"""More curves are not drawn: those of the best arms are."""

MOST_POINTS = 200
"""Of a longer curve every n-th point is drawn."""

_BRIGHT = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#ee8866", "#44aa99", "#9988cc", "#999933")
"""Colours that can be told apart, on light and on dark paper, also by the colour-blind (after Paul Tol)."""

_SCALE = ((68, 104, 190), (52, 158, 160), (104, 180, 96), (206, 178, 74), (214, 110, 82))
"""From the best to the worst, where there are more arms than bright colours."""


@dataclass(frozen=True)
class Picture:
    """A figure, and what to say of it."""

    title: str
    says: str
    figure: Figure


def colours(table: Table) -> list[str]:
    """Return a colour for each arm, in their order."""
    count = len(table.arms)
    if count <= len(_BRIGHT):
        return list(_BRIGHT[:count])
    return [_between(place / (count - 1)) for place in range(count)]


def _between(share: float) -> str:
    low = min(int(share * (len(_SCALE) - 1)), len(_SCALE) - 2)
    part = share * (len(_SCALE) - 1) - low
    mixed = (round(a + (b - a) * part) for a, b in zip(_SCALE[low], _SCALE[low + 1], strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def pictures(table: Table) -> Iterator[Picture]:
    """Yield the pictures that a table has enough for."""
    if any(arm.values for arm in table.arms):
        yield ranking(table)
    yield from curves(table)
    if shares := importance(table):
        yield _importance(table, shares)
    if picture := parallel(table):
        yield picture
    if picture := cost(table):
        yield picture


def ranking(table: Table) -> Picture:
    """Draw each arm's seeds as points, and their mean."""
    marks = list(zip(table.arms, colours(table), strict=True))
    valued = [(arm, colour) for arm, colour in marks if any(map(math.isfinite, arm.values))]
    shown = valued[:MOST_ARMS]
    traces = []
    for place, (arm, colour) in enumerate(shown):
        values = [value for value in arm.values if math.isfinite(value)]
        seeds = [str(seed) for seed, value in (arm.done or arm.paused).items() if math.isfinite(value)]
        traces.append(
            {
                "type": "scatter", "mode": "markers", "x": [_short(value) for value in values],
                "y": [place] * len(values), "customdata": seeds,
                "hovertemplate": f"{_text(arm.name)}<br>seed %{{customdata}}: %{{x}}<extra></extra>",
                "marker": {"color": colour, "size": 9, "opacity": 0.55 if arm.done else 0.3},
            }
        )  # fmt: skip
        middle = _short(statistics.mean(values))
        traces.append(
            {
                "type": "scatter", "mode": "markers", "x": [middle], "y": [place],
                "error_x": {"type": "data", "array": [_short(arm.sd or 0.0)], "color": colour, "thickness": 1.5},
                "hovertemplate": f"{_text(arm.name)}<br>mean %{{x}}, {_text(arm.verdict)}<extra></extra>",
                "marker": {
                    "color": colour, "size": 13, "symbol": "diamond" if arm.done else "diamond-open",
                    "line": {"color": colour, "width": 1},
                },
            }
        )  # fmt: skip
    layout = {
        "height": 110 + 26 * len(shown),
        "showlegend": False,
        "xaxis": {"title": {"text": table.objective}},
        "yaxis": {
            "autorange": "reversed", "tickvals": list(range(len(shown))),
            "ticktext": [_text(_cut(arm.name)) for arm, _ in shown], "automargin": True, "zeroline": False,
        },
    }  # fmt: skip
    says = "Each point is a run, the diamond an arm's mean, the line one standard deviation to either side."
    if any(not arm.done for arm, _ in shown):
        says += " Open diamonds: stopped early by the sweep, at their last step."
    says += _left_out(len(shown), len(valued), "arms")
    return Picture("Arms, the best on top", says, _figure(traces, layout))


def curves(table: Table) -> Iterator[Picture]:
    """Draw the training loss, smoothed, and what is measured on held-out rows, of all jobs."""
    jobs = [(arm, row, colour) for arm, colour in zip(table.arms, colours(table), strict=True) for row in arm.rows]
    drawn = jobs[:MOST_CURVES]
    lines = [record.read_lines(row.folder / record.METRICS) for _, row, _ in drawn]
    held_out = dict.fromkeys(["eval_loss", *([table.objective] if table.objective.startswith("eval_") else [])])
    left = _left_out(len(drawn), len(jobs), "jobs")
    for name in ("loss", *held_out):
        traces = []
        named: set[int] = set()
        for (arm, row, colour), logged in zip(drawn, lines, strict=True):
            series = [(line["step"], line[name]) for line in logged if _is_number(line.get(name))]
            if len(series) < (2 if name == "loss" else 1):
                continue
            trace = _curve(arm, row, colour, series, smooth=name == "loss")
            trace["showlegend"] = id(arm) not in named and len(table.arms) <= len(_BRIGHT)
            named.add(id(arm))
            traces.append(trace)
        if traces:
            title = "Training loss, smoothed" if name == "loss" else f"{name}, on held-out rows"
            says = _SMOOTHED if name == "loss" else "Every job, in its arm's colour."
            layout = {"height": 420, "xaxis": {"title": {"text": "step"}}, "yaxis": {"title": {"text": name}}}
            layout |= {"hovermode": "closest", "legend": {"orientation": "h", "y": -0.2}}
            yield Picture(title, says + left, _figure(traces, layout))


_SMOOTHED = "Every job, in its arm's colour: an exponential mean over about a twentieth of the curve."


def _curve(arm: Arm, row: Row, colour: str, series: Sequence[tuple[int, float]], *, smooth: bool) -> Figure:
    values = _smoothed([value for _, value in series]) if smooth else [value for _, value in series]
    stride = math.ceil(len(series) / MOST_POINTS)
    kept = sorted({*range(0, len(series), stride), len(series) - 1})
    return {
        "type": "scatter", "mode": "lines" if smooth or len(kept) > 30 else "lines+markers",
        "x": [series[index][0] for index in kept], "y": [_short(values[index]) for index in kept],
        "name": _text(_cut(arm.name)), "legendgroup": _text(arm.name),
        "line": {"color": colour, "width": 1.6, "dash": "dot" if row.status is Status.failed else "solid"},
        "marker": {"size": 5}, "opacity": 0.85,
        "hovertemplate": f"{_text(arm.name)}, seed {row.seed}<br>step %{{x}}: %{{y}}<extra></extra>",
    }  # fmt: skip


def _smoothed(values: Sequence[float]) -> list[float]:
    """Return an exponential mean that the first values do not pull down."""
    keep = 1 - 1 / max(1.0, len(values) / 20)
    total, weight, out = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if weight else value)
    return out


@dataclass(frozen=True)
class Share:
    """How much of the objective's variance lies between a parameter's values."""

    key: str
    share: float
    by_chance: float
    """What is to be expected of a parameter that changes nothing: (values - 1) / (jobs - 1)."""

    trend: float | None
    """Rank correlation with the objective, of numbers."""

    binned: bool
    """Whether its values were put into four bins of as many jobs each."""


_FEW_VALUES = 6
"""A number with more values than this is binned: each job having its own, all variance would lie between them."""


def importance(table: Table) -> list[Share]:
    """Return the share of each parameter and of the seed, the largest first; none where too little is known."""
    done = [row for arm in table.arms for row in arm.rows if row.status is Status.completed]
    done = [row for row in done if row.objective is not None and math.isfinite(row.objective)]
    if len(done) < 4:
        return []
    shares = [_share(key, [row.point.get(key, "") for row in done], done) for key in table.keys]
    found = sorted((share for share in shares if share), key=lambda share: -share.share)
    seeds = _share("seed", [str(row.seed) for row in done], done) if table.has_seeds else None
    return [*found, *([seeds] if seeds else [])] if found else []


def _share(key: str, texts: Sequence[str], rows: Sequence[Row]) -> Share | None:
    objectives = [row.objective or 0.0 for row in rows]
    numbers = [_as_number(text) for text in texts]
    known = [value for value in numbers if value is not None]
    binned = len(known) == len(texts) and len(set(known)) > _FEW_VALUES and key != "seed"
    labels: Sequence[object] = _quarters(known) if binned else texts
    groups: dict[object, list[float]] = {}
    for label, value in zip(labels, objectives, strict=True):
        groups.setdefault(label, []).append(value)
    if not 1 < len(groups) < len(rows):
        return None
    by_chance = (len(groups) - 1) / (len(rows) - 1)
    is_ordered = len(known) == len(texts) and key != "seed"
    trend = statistics.rank_correlation(known, objectives) if is_ordered else None
    return Share(key, statistics.share_between(list(groups.values())), by_chance, trend, binned)


def _quarters(values: Sequence[float]) -> list[int]:
    """Return for each value in which quarter of all it lies; equal values lie in the same one."""
    ordered = sorted(values)
    return [bisect_left(ordered, value) * 4 // len(ordered) for value in values]


def _importance(table: Table, shares: Sequence[Share]) -> Picture:
    shares = list(reversed(shares))
    names = [share.key + (" (in quarters)" if share.binned else "") for share in shares]
    trends = ["" if share.trend is None else f"<br>rank correlation {share.trend:+.2f}" for share in shares]
    traces: list[Figure] = [
        {
            "type": "bar", "orientation": "h", "x": [_short(share.share) for share in shares],
            "y": [_text(name) for name in names], "customdata": trends, "showlegend": False,
            "text": [f"{share.share:.0%}" for share in shares], "textposition": "auto",
            "hovertemplate": "%{y}: %{x:.1%}%{customdata}<extra></extra>",
            "marker": {"color": ["#8a8f98" if share.key == "seed" else "#4477aa" for share in shares]},
        },
        {
            "type": "scatter", "mode": "markers", "x": [_short(share.by_chance) for share in shares],
            "y": [_text(name) for name in names], "name": "what is to be expected by chance",
            "hovertemplate": "by chance: %{x:.1%}<extra></extra>",
            "marker": {"symbol": "line-ns", "size": 20, "line": {"width": 2.5, "color": "#ee6677"}},
        },
    ]  # fmt: skip
    layout = {
        "height": 130 + 34 * len(shares), "legend": {"orientation": "h", "y": 1.15},
        "xaxis": {"range": [0, 1.02], "tickformat": ".0%"}, "yaxis": {"automargin": True},
    }  # fmt: skip
    says = (
        f"Which share of the variance of {table.objective}, over all completed jobs, lies between the values of one "
        "parameter (one-way analysis of variance; each by itself, so what two do only together is in neither). The "
        "red mark is what a parameter that does nothing would be expected to show."
    )
    return Picture("What mattered", says, _figure(traces, layout))


def parallel(table: Table) -> Picture | None:
    """Draw each arm as a line through its values, coloured by its objective."""
    all_arms = [arm for arm in table.arms if arm.done and math.isfinite(arm.mean or 0.0)]
    arms = all_arms[:MOST_MARKS]
    keys = [key for key in table.keys if len({arm.point.get(key, "") for arm in arms}) > 1]
    if len(arms) < 3 or not keys:
        return None
    means = [_short(arm.mean or 0.0) for arm in arms]
    scale = [[place / 20, _between(place / 20 if table.low_is_good else 1 - place / 20)] for place in range(21)]
    bar = {"title": {"text": table.objective}, "thickness": 12, "outlinewidth": 0}
    line = {"color": means, "colorscale": scale, "showscale": True, "colorbar": bar}
    axes = [_axis(key, [arm.point.get(key, "") for arm in arms]) for key in keys]
    trace = {
        "type": "parcoords",
        "line": line,
        "dimensions": [*axes, {"label": _text(table.objective), "values": means}],
    }
    says = "One line an arm, blue the best. Drag along an axis to keep some of its values, or an axis by its name."
    says += _left_out(len(arms), len(all_arms), "arms")
    layout = {"height": 430, "margin": {"l": 90, "r": 40, "t": 60, "b": 30}}
    return Picture("Every arm through its values", says, _figure([trace], layout))


def _axis(key: str, texts: Sequence[str]) -> Figure:
    numbers = [value for text in texts if (value := _as_number(text)) is not None]
    if len(numbers) < len(texts):
        values = list(dict.fromkeys(texts))
        shown = [_text(_cut(value, 24)) or "(none)" for value in values]
        places = {"tickvals": list(range(len(values))), "ticktext": shown, "range": [-0.3, len(values) - 0.7]}
        place_of = {value: place for place, value in enumerate(values)}
        return {"label": _text(key), "values": [place_of[text] for text in texts], **places}
    if min(numbers) > 0 and max(numbers) / min(numbers) >= 50:
        ticks = sorted(set(numbers)) if len(set(numbers)) <= 8 else _decades(min(numbers), max(numbers))
        marks = {"tickvals": [_short(math.log10(tick)) for tick in ticks], "ticktext": [f"{tick:g}" for tick in ticks]}
        return {"label": _text(key), "values": [_short(math.log10(value)) for value in numbers], **marks}
    marks = {"tickvals": sorted(set(numbers))} if len(set(numbers)) <= 8 else {}
    return {"label": _text(key), "values": numbers, **marks}


def _decades(low: float, high: float) -> list[float]:
    return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]


def cost(table: Table) -> Picture | None:
    """Draw what each arm took, in time and memory, against what it came to; and those that no other beats in both."""
    marks = list(zip(table.arms, colours(table), strict=True))
    all_known = [
        (arm, colour) for arm, colour in marks if arm.done and arm.wall_seconds and math.isfinite(arm.mean or 0.0)
    ]
    known = all_known[:MOST_MARKS]
    if len(known) < 2:
        return None
    traces, layout = [], {"height": 420, "showlegend": False, "yaxis": {"title": {"text": table.objective}}}
    panels = [("x", "seconds a job", [arm.wall_seconds or 0.0 for arm, _ in known])]
    if all(arm.peak_memory_bytes for arm, _ in known):
        panels.append(("x2", "GiB at most", [(arm.peak_memory_bytes or 0) / 2**30 for arm, _ in known]))
    means = [arm.mean or 0.0 for arm, _ in known]
    for index, (axis, title, spent) in enumerate(panels):
        front = _front(list(zip(spent, means, strict=True)), low_is_good=table.low_is_good)
        traces.append(
            {
                "type": "scatter", "mode": "lines", "x": [_short(x) for x, _ in front],
                "y": [_short(y) for _, y in front], "xaxis": axis, "hoverinfo": "skip",
                "line": {"color": "#8a8f98", "width": 1.5, "dash": "dash", "shape": "hv"},
            }
        )  # fmt: skip
        traces.append(
            {
                "type": "scatter", "mode": "markers", "x": [_short(value) for value in spent],
                "y": [_short(value) for value in means], "xaxis": axis,
                "error_y": {"type": "data", "array": [_short(arm.sd or 0.0) for arm, _ in known],
                            "thickness": 1, "color": "#8a8f98"},
                "customdata": [_text(arm.name) for arm, _ in known],
                "hovertemplate": f"%{{customdata}}<br>%{{x}} {title}<br>{table.objective} %{{y}}<extra></extra>",
                "marker": {"color": [colour for _, colour in known], "size": 11},
            }
        )  # fmt: skip
        width = 1 / len(panels)
        domain = [index * width + (0.04 if index else 0), (index + 1) * width - (0.02 if len(panels) > 1 else 0)]
        layout[f"xaxis{index + 1 if index else ''}"] = {"title": {"text": title}, "domain": domain}
    says = "One point an arm. No arm is both cheaper and better than one on the dashed line."
    says += _left_out(len(known), len(all_known), "arms")
    return Picture("What it took", says, _figure(traces, layout))


def _front(points: Sequence[tuple[float, float]], *, low_is_good: bool) -> list[tuple[float, float]]:
    """Return the points that are better than every cheaper one."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], point[1] if low_is_good else -point[1])):
        if not front or (y < front[-1][1] if low_is_good else y > front[-1][1]):
            front.append((x, y))
    return front


def _figure(traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> Figure:
    margin = {"l": 60, "r": 20, "t": 20, "b": 50}
    return {"data": list(traces), "layout": {"margin": margin, **layout}}


def _left_out(drawn: int, all_of_them: int, what: str) -> str:
    return f" The first {drawn} of {all_of_them} {what}, in the order of the table." if drawn < all_of_them else ""


def _short(value: float) -> float | None:
    """Return a number with as many digits as a picture can show; null for what is none."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def _text(text: str) -> str:
    """Return a text that plotly shows as it stands: it would read some HTML, and %{...} in templates."""
    for letter, instead in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("%{", "%&#123;")):
        text = text.replace(letter, instead)
    return text
