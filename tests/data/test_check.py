"""The look at a run's first rows: what it costs, and where it stops."""

from __future__ import annotations

import gzip
import json
import time
from types import SimpleNamespace
from typing import Any

import pytest

from ftrun.data import Data, OnBadRow, Source
from ftrun.data.check import check

GOOD = json.dumps({"prompt": "Hello?", "completion": "Hello."}) + "\n"
BAD = json.dumps({"prompt": "Hello?", "completion": ""}) + "\n"


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def problems(**keys: Any) -> list[str]:
    stage: Any = SimpleNamespace(rows="conversations")
    cfg: Any = SimpleNamespace(data=Data(**keys), stage=stage)
    return [str(problem) for problem in check(cfg)]


def test_good_rows(write):
    write("a.jsonl", GOOD * 2000)
    assert problems(path="a.jsonl", eval_sets={"again": "a.jsonl"}) == []


def test_every_file_is_looked_at(write):
    write("a.jsonl", GOOD + "{\n" + GOOD)
    write("b.jsonl.gz", gzip.compress((GOOD + BAD).encode()))
    write("c.csv", "prompt,completion\na,b\nc\n")
    write("d.jsonl", GOOD * 2 + "[]\n")
    found = problems(
        sources=[Source(path="a.jsonl"), Source(path="gone.jsonl"), Source(path="b.jsonl.gz")],
        eval_path="c.csv", eval_sets={"more": "d.jsonl"},
    )  # fmt: skip
    assert [text.partition(": ")[0] for text in found] == [
        "data.sources.1.path", "a.jsonl:2", "b.jsonl.gz:2", "c.csv:3", "d.jsonl:3"
    ]  # fmt: skip


def test_lines_that_are_no_rows_may_be_skipped(write):
    write("a.jsonl", GOOD + "{\n" + "[]\n")
    assert len(problems(path="a.jsonl")) == 2
    assert problems(path="a.jsonl", on_bad_row=OnBadRow.skip) == []


def test_many_bad_rows_are_counted(write):
    write("a.jsonl", (GOOD + BAD) * 600)
    found = problems(path="a.jsonl")
    assert len(found) == 6
    assert found[-1].startswith("a.jsonl: has 495 more bad rows among the first 1000")
    write("b.jsonl", BAD * 600)
    (only,) = problems(path="b.jsonl")
    assert "all of the first 600 rows are like that" in only


def test_rows_that_are_not_used_are_not_looked_at(write):
    write("a.jsonl", GOOD * 2 + BAD)
    assert problems(path="a.jsonl", rows=2) == []


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_large_rows_and_files_do_not_hold_it_up(name, write):
    row = json.dumps({"prompt": "Hello?", "completion": "x" * 10_000_000})
    write(name, row * 3 if name == "a.jsonl" else f"[{row}, {row}, {row}]")
    began = time.process_time()
    assert problems(path=name) == []
    assert time.process_time() - began < 0.5


def test_tables_are_left_to_the_worker(write):
    write("a.parquet", b"no table")
    write("a.jsonl.zst", b"not packed")
    assert problems(path="*.*") == []
