"""The page: what is drawn is right, plotly.js takes it, and nothing that a job said gets out of its text."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from html.parser import HTMLParser

import plotly.graph_objects
import pytest

from ftrun import board
from ftrun.board import pictures


def curve(level: float, steps: int = 40) -> list[dict[str, float]]:
    lines = [{"step": step, "loss": level + 2.0 / step, "lr": 1.0} for step in range(1, steps + 1)]
    return [*lines, {"step": steps, "eval_loss": level}]


@pytest.fixture
def grid(sweep):
    """Optimizers by rates by seeds: the optimizer changes the loss by 1, the rate by 0.1, the seed by 0.01."""
    for optimizer, one in (("adamw", 1.0), ("galore", 2.0)):
        for rate, tenth in (("1e-4", 0.0), ("1e-2", 0.1)):
            for seed in (1, 2, 3):
                value = one + tenth + seed / 100
                sweep.job(
                    f"optimizer={optimizer} optimizer.lr={rate}", value, seed=seed, lines=curve(value),
                    seconds=100.0 / one, memory=int(one * 2**30),
                )  # fmt: skip
    return sweep


def drawn(sweep) -> dict[str, pictures.Picture]:
    (table,) = board.load(sweep.folder).tables
    return {picture.title: picture for picture in pictures.pictures(table)}


class Page(HTMLParser):
    """What a browser would make of the page, as far as is looked at here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, str] = {}
        self.inside: list[str] = []
        self.figures: object = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside.pop() == tag

    def handle_data(self, data):
        if self.inside:
            if self.tags[-1][1].get("id") == "figures":
                self.figures = json.loads(data) if self.inside[-1] == "script" else self.figures
            self.text[self.inside[-1]] = self.text.get(self.inside[-1], "") + data


def page(sweep) -> tuple[str, Page]:
    text = board.write_report(board.load(sweep.folder)).read_text()
    return text, Page(text)


def test_the_page_is_one_file_that_reads_nothing_from_elsewhere(grid):
    text, read = page(grid)
    assert not read.inside, "every tag is closed"
    assert not [attrs for _, attrs in read.tags if {"src", "href"} & set(attrs)]
    assert "@import" not in text.split("</style>")[0]
    assert len(text.encode()) < 6_000_000
    assert text.count("plotly.js v") == 1
    places = {attrs["id"] for tag, attrs in read.tags if tag == "div" and "id" in attrs}
    assert places == {f"figure-{index}" for index in range(len(drawn(grid)))}


def test_plotly_knows_every_key_of_the_figures(grid):
    found = drawn(grid)
    assert list(found) == [
        "Arms, the best on top", "Training loss, smoothed", "eval_loss, on held-out rows", "What mattered",
        "Every arm through its values", "What it took",
    ]  # fmt: skip
    for picture in found.values():
        plotly.graph_objects.Figure(picture.figure)
    with pytest.raises(ValueError, match="Invalid property"):
        plotly.graph_objects.Figure({"data": [{"type": "scatter", "colour": 1}]})


def test_the_table_has_a_line_for_each_arm_and_numbers_to_sort_by(grid):
    text, _ = page(grid)
    body = text[text.index("<tbody>") : text.index("</tbody>")]
    rows = re.findall(r"<tr.*?</tr>", body)
    assert len(rows) == 4
    assert ">adamw<" in rows[0]
    assert 'class="pill best"' in rows[0]
    assert all('class="pill worse"' in row for row in rows[1:])
    assert 'data-value="1.02"' in rows[0]
    assert "mean of 3 seeds, standard deviation 0.01" in text
    assert "better than 3 of 3 others" in text


def test_what_jobs_said_stays_text(sweep):
    bad = "<img/src=x>'\"&</script>"
    sweep.job(f"data.path={bad}", 1.0, lines=curve(1.0))
    sweep.job("data.path=%{x}<b>", 2.0, lines=curve(2.0))
    sweep.job("data.path=other", status="failed", reason=f"no {bad}", log=f"{bad}\n")
    text, read = page(sweep)
    assert not read.inside
    assert {tag for tag, _ in read.tags} & {"img", "b", "i"} == {"b"}, "b is the headline's"
    assert len([tag for tag, _ in read.tags if tag == "script"]) == 3
    assert "no &lt;img/src=x&gt;" in text
    assert not re.search(r"<img|<b>(?!1|0)", json.dumps(read.figures)), "plotly would read it as HTML"
    assert "%{x}&lt;b&gt;" not in json.dumps(read.figures), "plotly would fill it in"


def test_importance_is_the_share_of_the_variance(grid):
    (table,) = board.load(grid.folder).tables
    shares = {share.key: share for share in pictures.importance(table)}
    assert list(shares) == ["optimizer", "optimizer.lr", "seed"]
    # Mean squares around the mean: 0.25 between optimizers, 0.0025 between rates, (0.01, 0, 0.01)^2 / 3 between seeds.
    total = 0.25 + 0.0025 + 2e-4 / 3
    assert shares["optimizer"].share == pytest.approx(0.25 / total)
    assert shares["optimizer.lr"].share == pytest.approx(0.0025 / total)
    assert shares["seed"].share == pytest.approx(2e-4 / 3 / total)
    assert shares["optimizer"].by_chance == pytest.approx(1 / 11)
    assert shares["seed"].by_chance == pytest.approx(2 / 11)
    assert shares["optimizer.lr"].trend == pytest.approx(54 / math.sqrt(108 * 143))
    assert shares["optimizer"].trend is None


def test_numbers_that_every_job_has_its_own_of_are_put_into_quarters(sweep):
    for number in range(16):
        sweep.job(f"optimizer.lr={1e-5 * 2**number:g} data.path=file-{number}", float(number // 4))
    (table,) = board.load(sweep.folder).tables
    (share,) = pictures.importance(table)
    assert (share.key, share.binned) == ("optimizer.lr", True)
    assert share.share == pytest.approx(1.0), "each quarter has one value"
    assert share.by_chance == pytest.approx(3 / 15)
    assert share.trend is not None
    assert share.trend > 0.95


def test_curves_are_smoothed_thinned_and_coloured_by_arm(sweep):
    lines = [{"step": step, "loss": 1.0 + (-1) ** step} for step in range(1, 2001)]
    sweep.job("a=1", 1.0, seed=1, lines=lines)
    sweep.job("a=1", 1.0, seed=2, lines=lines)
    sweep.job("a=2", 2.0, seed=1, lines=[*lines, {"step": 2000, "loss": math.nan}])
    traces = drawn(sweep)["Training loss, smoothed"].figure["data"]
    assert [trace["line"]["color"] for trace in traces[:2]] == [traces[0]["line"]["color"]] * 2
    assert traces[2]["line"]["color"] != traces[0]["line"]["color"]
    assert [trace["showlegend"] for trace in traces] == [True, False, True]
    assert len(traces[0]["x"]) <= pictures.MOST_POINTS + 1
    assert (traces[0]["x"][0], traces[0]["x"][-1]) == (1, 2000)
    assert all(0.95 < value < 1.05 for value in traces[0]["y"][20:])


def test_the_front_is_what_nothing_cheaper_beats():
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (4.0, 2.0)]
    assert pictures._front(points, low_is_good=True) == [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    assert pictures._front(points, low_is_good=False) == [(1.0, 5.0)]


def test_a_rate_has_a_logarithmic_axis_and_an_option_one_with_names(grid):
    optimizer, rate, objective = drawn(grid)["Every arm through its values"].figure["data"][0]["dimensions"]
    assert (optimizer["ticktext"], optimizer["values"]) == (["adamw", "galore"], [0, 0, 1, 1])
    assert (rate["values"], rate["ticktext"]) == ([-4.0, -2.0, -4.0, -2.0], ["0.0001", "0.01"])
    assert objective["values"] == [1.02, 1.12, 2.02, 2.12]


def test_a_sweep_that_has_only_begun_has_a_page_too(sweep):
    sweep.job("a=1", status=None)
    sweep.job("a=2", status=None)
    text, read = page(sweep)
    assert read.figures == []
    assert "no job has come to a result yet" in text


def test_without_plotly_there_is_the_table_and_a_word(grid, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "plotly" else find_spec(name))
    text, read = page(grid)
    assert "pip install plotly" in text
    assert not [attrs for tag, attrs in read.tags if tag == "div" and "id" in attrs]
    assert ">galore<" in text


def test_many_jobs_stay_under_six_megabytes(sweep):
    for number in range(400):
        sweep.job(f"optimizer.lr={number}", float(number), lines=curve(float(number), 300) if number < 200 else None)
    text, _ = page(sweep)
    assert len(text.encode()) < 6_000_000
    assert "The first 150 of 400 jobs" in text
