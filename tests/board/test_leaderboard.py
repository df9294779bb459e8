"""A sweep's folder becomes arms, ranked and compared, whatever its jobs have come to."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import socket
import time

import pytest

from ftrun import board
from ftrun.board import tables
from ftrun.board.statistics import Verdict
from ftrun.record import Status


def arms(sweep):
    (table,) = board.load(sweep.folder).tables
    return {arm.name: arm for arm in table.arms}


def three_seeds(sweep, point: str, *values: float, **more) -> None:
    for seed, value in enumerate(values, 1):
        sweep.job(point, value, seed=seed, **more)


def test_jobs_that_differ_in_the_seed_are_one_arm(sweep):
    three_seeds(sweep, "optimizer.lr=1e-4 adapter.rank=8", 2.0, 2.2, 2.4)
    three_seeds(sweep, "optimizer.lr=1e-3 adapter.rank=8", 1.0, 1.1, 1.2)
    found = arms(sweep)
    assert list(found) == ["optimizer.lr=1e-3 adapter.rank=8", "optimizer.lr=1e-4 adapter.rank=8"]
    best, other = found.values()
    assert (best.mean, best.sd) == (pytest.approx(1.1), pytest.approx(0.1))
    assert (min(other.values), max(other.values), len(other.values)) == (2.0, 2.4, 3)
    assert best.verdict is Verdict.best
    assert other.verdict is Verdict.worse
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(1.1)
    assert other.difference.low == pytest.approx(1.1 - 4.3027 * 0.1 / math.sqrt(3), abs=1e-4)


def test_what_is_high_is_good_where_the_config_says_so(sweep):
    three_seeds(sweep, "a=1", 0.5, 0.51, 0.52, name="eval_accuracy", wanted="eval_accuracy", mode="max")
    three_seeds(sweep, "a=2", 0.9, 0.91, 0.92, name="eval_accuracy", wanted="eval_accuracy", mode="max")
    (table,) = board.load(sweep.folder).tables
    assert [arm.name for arm in table.arms] == ["a=2", "a=1"]
    assert (table.objective, table.low_is_good) == ("eval_accuracy", False)
    assert table.arms[1].verdict is Verdict.worse


def test_what_seeds_cannot_tell_apart_is_noise_and_under_three_unknown(sweep):
    three_seeds(sweep, "a=1", 1.0, 2.0, 3.0)
    three_seeds(sweep, "a=2", 2.5, 1.5, 2.9)
    three_seeds(sweep, "a=3", 9.0, 9.0)
    found = arms(sweep)
    assert {name: arm.verdict for name, arm in found.items()} == {
        "a=1": Verdict.best, "a=2": Verdict.noise, "a=3": Verdict.unknown,
    }  # fmt: skip
    (table,) = board.load(sweep.folder).tables
    assert table.how_sure() == "1 inside the noise, 1 unknown (95 % paired interval over shared seeds)"


def test_unfinished_arms_are_ranked_and_marked_and_the_rest_come_in_their_order(sweep):
    three_seeds(sweep, "a=whole", 2.0, 2.1, 2.2)
    sweep.job("a=lucky", 1.0, seed=1)
    sweep.job("a=lucky", seed=2, status="failed", reason="out of memory\nwhile it trained")
    sweep.job("a=lucky", seed=3, status=None)
    sweep.job("a=paused-early", 1.5, seed=1, status="paused", step=20)
    sweep.job("a=paused-late", 1.9, seed=1, status="paused", step=40)
    sweep.job("a=nan", math.nan, seed=1)
    sweep.job("a=waiting", seed=1, status=None)
    sweep.job("a=broke", seed=1, status="failed", reason="bad luck")
    found = arms(sweep)
    names = ["lucky", "whole", "paused-late", "paused-early", "nan", "waiting", "broke"]
    assert list(found) == [f"a={name}" for name in names]
    assert [arm.state for arm in found.values()] == [
        "1 of 3 done, 1 failed: out of memory while it trained, 1 queued", "", "paused at step 40",
        "paused at step 20", "not a number", "queued", "failed: bad luck",
    ]  # fmt: skip
    (table,) = board.load(sweep.folder).tables
    assert table.best
    assert table.best.name == "a=whole", "every seed of it is done"


def test_a_nan_among_the_seeds_is_not_averaged_away(sweep):
    three_seeds(sweep, "a=1", 1.0, math.nan, 1.0)
    three_seeds(sweep, "a=2", 5.0, 5.0, 5.0)
    found = arms(sweep)
    assert list(found) == ["a=2", "a=1"]
    assert found["a=1"].state == "not a number"


def test_other_stages_and_objectives_are_not_compared(sweep):
    sweep.job("stage=sft", 2.0)
    sweep.job("stage=dpo", 0.6, stage="dpo")
    sweep.job("stage=kto", 0.9, stage="kto", name="eval_rewards_accuracy", wanted="eval_rewards_accuracy", mode="max")
    sweep.job("stage=dpo optimizer.lr=1", stage="dpo", status=None)
    found = board.load(sweep.folder)
    assert [(table.stage, table.objective, len(table.arms)) for table in found.tables] == [
        ("sft", "eval_loss", 1), ("dpo", "eval_loss", 2), ("kto", "eval_rewards_accuracy", 1),
    ]  # fmt: skip
    assert "## eval_rewards_accuracy of kto, high is good" in tables.markdown(found)


def test_the_objective_is_named_after_the_stages_first_metric_that_equals_it(sweep):
    sweep.job("a=1", 2.0, metrics={"eval_token_accuracy": 2.0, "loss": 2.0})
    sweep.job("a=2", 3.0, name="loss", metrics={"loss": 3.0})
    found = board.load(sweep.folder)
    assert [table.objective for table in found.tables] == ["eval_loss", "loss"]


def test_a_running_job_counts_while_its_holder_lives_and_shows_what_it_has_logged(sweep):
    lines = [{"step": step, "loss": 5.0 - step, "lr": 1.0} for step in range(1, 4)]
    folder = sweep.job("a=1", status="running", lines=lines, step=0)
    holder = {"host": "another-host", "pid": 1, "started": 1.0}
    written = json.loads((folder / "result.json").read_text()) | {"holder": holder, "metrics": {}}
    (folder / "result.json").write_text(json.dumps(written))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    (row,) = board.load(sweep.folder).rows
    assert (row.status, row.step, dict(row.metrics)) == (Status.running, 3, {"loss": 2.0})
    long_ago = time.time() - 3600
    os.utime(folder / "result.json", (long_ago, long_ago))
    (row,) = board.load(sweep.folder).rows
    assert row.status is Status.interrupted
    assert holder["host"] != socket.gethostname()


def test_folders_that_are_damaged_or_gone_are_failures_of_their_own(sweep):
    sweep.job("a=1", 1.0)
    torn = sweep.job("a=2", 1.0)
    (torn / "result.json").write_text('{"status": "comp')
    shutil.rmtree(sweep.job("a=3", 1.0))
    with (sweep.folder / "jobs.jsonl").open("a") as file:
        file.write('{"id": 9, "overr')
    rows = board.load(sweep.folder).rows
    assert [row.status for row in rows] == [Status.completed, Status.failed, Status.failed]
    assert "result.json cannot be read" in rows[1].reason
    assert rows[2].reason == "its folder holds no run.yaml"


def test_the_folder_may_be_moved(sweep, tmp_path):
    three_seeds(sweep, "a=1", 1.0, 1.1, 1.2)
    moved = tmp_path / "elsewhere" / "grid"
    moved.parent.mkdir()
    sweep.folder.rename(moved)
    found = board.write(moved)
    assert [row.status for row in found.rows] == [Status.completed] * 3
    assert str(tmp_path) not in (moved / "leaderboard.csv").read_text()


def test_the_files_say_the_same(sweep):
    three_seeds(sweep, "optimizer.lr=1e-4", 2.0, 2.1, 2.2, seconds=30.0, memory=2**31)
    three_seeds(sweep, "optimizer.lr=1e-3", 1.0, 1.1)
    sweep.job("optimizer.lr=1", math.nan, seed=1)
    sweep.job("data.path='a,b|c.jsonl'", seed=1, status="failed", reason='broke:\n"line", two')
    board.write(sweep.folder)

    with (sweep.folder / "leaderboard.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 7
    assert lines[0]["optimizer.lr"] == "1e-4"
    assert [lines[0][name] for name in ("seed", "objective_name", "objective", "eval_loss", "status", "folder")] == [
        "1", "eval_loss", "2.0", "2.0", "completed", "optimizer.lr=1e-4,seed=1",
    ]  # fmt: skip
    assert [lines[0][name] for name in ("wall_seconds", "peak_memory_bytes", "tokens_per_second", "step")] == [
        "30.0", str(2**31), "1000.0", "10",
    ]  # fmt: skip
    assert (lines[-1]["status"], lines[-1]["reason"], lines[-1]["optimizer.lr"]) == ("failed", 'broke: "line", two', "")

    found = json.loads((sweep.folder / "leaderboard.json").read_text())
    (table,) = found["tables"]
    assert table["best"] == {"optimizer.lr": "1e-3"}
    assert [(arm["mean"], arm["n"]) for arm in table["arms"]] == [
        (pytest.approx(1.05), 2), (pytest.approx(2.1), 3), (None, 1), (None, 0),
    ]  # fmt: skip
    assert table["arms"][1]["shared_seeds"] == 2
    assert found["counts"] == {"completed": 6, "failed": 1}
    assert len(found["jobs"]) == 7

    text = (sweep.folder / "leaderboard.md").read_text()
    assert "Best: **`optimizer.lr=1e-3`**, 1.05; unknown whether by chance" in text
    assert "| 2 | 1e-4 |  | 2.1 | 0.1 | 3 | +1, unknown | 0:30 | 2.0 GiB | 1,000 |  |" in text
    assert "'a,b\\|c.jsonl'" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1, "every line has as many cells"


def test_a_folder_without_jobs_gives_empty_files(sweep):
    found = board.write(sweep.folder)
    assert found.tables == []
    assert "0 jobs" in (sweep.folder / "leaderboard.md").read_text()


def test_a_hundred_jobs_take_no_time(sweep):
    for number in range(100):
        sweep.job(f"optimizer.lr={number // 3}", 1.0 + number, seed=number % 3)
    board.write(sweep.folder)
    began = time.process_time()
    board.write(sweep.folder)
    assert time.process_time() - began < 0.1
