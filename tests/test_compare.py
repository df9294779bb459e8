"""Runs side by side: what differs between them, and nothing else."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from ftrun import board, compare, config, record, summary
from ftrun.errors import ConfigError
from ftrun.record import Result, Status
from tests.fake_sweep import FakeSweep


@pytest.fixture(autouse=True)
def at_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(name: str, *words: str, objective: float = 1.0, manifest: Any = None, **more: Any) -> Path:
    """Write the folder of a completed run."""
    folder = Path(name).resolve()
    cfg = config.compose(["model=tiny", *words])
    cfg.output_dir = str(folder)
    folder.mkdir(parents=True)
    cfg.save(folder / record.RUN)
    metrics = {"eval_loss": objective, "loss": objective + 1}
    Result(status=Status.completed, metrics=metrics, objective=objective, **more).save(folder)
    (folder / record.MANIFEST).write_text(json.dumps(manifest or {}))
    return folder


def compared(capsys, *folders: Path) -> dict[str, Any]:
    capsys.readouterr()
    compare.show(folders, as_json=True)
    return json.loads(capsys.readouterr().out)


def diffed(capsys, first: Path, second: Path) -> dict[str, Any]:
    capsys.readouterr()
    compare.diff(first, second, as_json=True)
    return json.loads(capsys.readouterr().out)


def test_only_the_keys_that_differ_are_shown_and_seeds_are_one_arm(capsys):
    folders = [make(f"a{seed}", f"seed={seed}", objective=1 + seed / 100) for seed in (1, 2, 3)]
    folders += [make(f"b{seed}", f"seed={seed}", "adapter.rank=4", objective=2 + seed / 50) for seed in (1, 2, 3)]
    (table,) = compared(capsys, *folders)["tables"]
    assert [arm["point"] for arm in table["arms"]] == [{"adapter.rank": "16"}, {"adapter.rank": "4"}]
    assert table["arms"][1]["difference"] == pytest.approx(1.02)
    assert table["arms"][1]["verdict"] == "worse"
    assert table["arms"][1]["jobs"] == ["b1", "b2", "b3"]
    compare.show(folders, as_json=False)
    shown = capsys.readouterr().out
    assert "adapter.rank" in shown
    assert "optimizer" not in shown
    assert re.search(r"4 +2\.04 +0\.02 +3 +\+1\.02 \[", shown)


def test_options_with_other_keys_differ_in_those_that_one_has(capsys):
    (table,) = compared(capsys, make("a"), make("b", "adapter=full", objective=2.0))["tables"]
    first, second = (arm["point"] for arm in table["arms"])
    assert (first["adapter.name"], second["adapter.name"]) == ("lora", "full")
    assert first["adapter.rank"] == "16"
    assert "adapter.rank" not in second
    assert (first["optimizer.lr"], second["optimizer.lr"]) == ("0.0005", "5e-05")


def test_a_key_that_another_version_does_not_have_says_nothing(capsys):
    old = make("old")
    text = (old / record.RUN).read_text()
    (old / record.RUN).write_text(text.replace("  log_every: 5\n", ""))
    assert "log_every" not in (old / record.RUN).read_text()
    (table,) = compared(capsys, old, make("new", "adapter.rank=4"))["tables"]
    assert [set(arm["point"]) for arm in table["arms"]] == [{"adapter.rank"}] * 2
    assert diffed(capsys, old, Path("new"))["config"]["train.log_every"] == [None, 5]


def test_a_sweep_writes_its_leaderboard_and_report_and_stands_among_runs(capsys, tmp_path):
    sweep = FakeSweep(tmp_path / "grid")
    won = make("run", objective=0.5)
    for rank in (2, 4):
        folder = sweep.job(f"adapter.rank={rank}", float(rank))
        cfg = config.compose(["model=tiny", f"adapter.rank={rank}", "seed=1"])
        cfg.save(folder / record.RUN)
    found = compared(capsys, sweep.folder)
    assert [arm["point"] for arm in found["tables"][0]["arms"]] == [{"adapter.rank": "2"}, {"adapter.rank": "4"}]
    assert {path.name for path in sweep.folder.iterdir() if path.is_file()} >= {
        "leaderboard.md", "leaderboard.csv", "leaderboard.json", "report.html",
    }  # fmt: skip
    assert Path("conf/experiment/best_grid.yaml").is_file()
    found = compared(capsys, won, sweep.folder)
    assert [arm["point"]["adapter.rank"] for arm in found["tables"][0]["arms"]] == ["16", "2", "4"]
    compare.show([sweep.folder], as_json=False)
    assert "grid/report.html" in capsys.readouterr().out


def test_a_winner_that_cannot_be_read_harms_nothing_else(capsys, tmp_path):
    sweep = FakeSweep(tmp_path / "grid")
    sweep.job("a=1", 1.0)
    compare.show([sweep.folder], as_json=False)
    shown = capsys.readouterr().out
    assert "no winner" in shown
    assert "grid/report.html" in shown


def test_a_narrow_terminal_gets_less_and_no_empty_column(capsys, monkeypatch, tmp_path):
    sweep = FakeSweep(tmp_path / "grid")
    for seed in (1, 2, 3):
        for rank in (2, 4):
            sweep.job(f"adapter.rank={rank} optimizer.lr=1e-4", float(rank) + seed / 10, seed=seed)
    for columns in (80, 160):
        monkeypatch.setattr(compare.console, "width", columns)
        compare.show([sweep.folder], as_json=False)
        shown = capsys.readouterr().out
        assert re.search(r"^ 4 +1e-4 +4\.2 .*\+2\b.* worse", shown, re.M)
        assert ("1.0 GiB" in shown) == (columns == 160)


def test_a_folder_that_holds_nothing_is_refused(tmp_path):
    run = make("run")
    with pytest.raises(ConfigError, match="neither a run"):
        compare.show([run, tmp_path / "nothing"], as_json=False)
    with pytest.raises(ConfigError, match="holds no run"):
        compare.diff(run, tmp_path / "nothing", as_json=False)
    sweep = FakeSweep(tmp_path / "grid")
    with pytest.raises(ConfigError, match="is a sweep"):
        compare.diff(run, sweep.folder, as_json=False)


def test_diff_says_what_differs_in_each_respect(capsys):
    manifest = {
        "ftrun": "1", "versions": {"torch": "2.13", "peft": "0.21"}, "machine": {"host": "a", "cpus": 2},
        "git": {"commit": "abc", "changed": False}, "model": {"path": "builtin:tiny", "revision": None},
        "data": {"content_key": "1234", "train": {"rows": 10}},
    }  # fmt: skip
    other = manifest | {"versions": {"torch": "2.14", "peft": "0.21"}, "git": None}
    other |= {"data": {"content_key": "5678", "train": {"rows": 12}}}
    first = make("a", objective=2.0, manifest=manifest, step=5)
    second = make("b", "optimizer.lr=0.1", "seed=7", objective=1.0, manifest=other, step=5)
    found = diffed(capsys, first, second)
    assert found["config"] == {"optimizer.lr": [0.0005, 0.1], "seed": [42, 7]}
    assert found["versions and machine"] == {
        "torch": ["2.13", "2.14"], "git commit": ["abc", None], "git changed": [False, None],
    }  # fmt: skip
    assert found["model and data"] == {"data.content_key": ["1234", "5678"], "data.train.rows": [10, 12]}
    assert found["results"] == {"eval_loss": [2.0, 1.0], "loss": [3.0, 2.0], "objective": [2.0, 1.0]}
    compare.diff(first, second, as_json=False)
    shown = capsys.readouterr().out
    assert re.search(r"eval_loss +2 +1 +-1 \(-50\.0%\)", shown)
    assert "peft" not in shown


def test_equal_runs_have_no_difference(capsys):
    first, second = make("a"), make("b")
    found = diffed(capsys, first, second)
    assert found.pop("runs") == [str(first), str(second)]
    assert list(found) == ["config", "versions and machine", "model and data", "results"]
    assert not any(found.values())
    compare.diff(first, second, as_json=False)
    assert capsys.readouterr().out.count("no difference") == 4


def test_what_is_no_number_is_null_in_json(capsys):
    assert diffed(capsys, make("a", objective=math.nan), make("b"))["results"]["objective"] == [None, 1.0]


def test_the_end_of_a_sweep_says_who_won_and_what_failed(capsys, tmp_path):
    sweep = FakeSweep(tmp_path / "grid")
    for seed in (1, 2, 3):
        for rank in (2, 4):
            folder = sweep.job(f"adapter.rank={rank}", float(rank) + seed / 10, seed=seed)
            config.compose(["model=tiny", f"adapter.rank={rank}", f"seed={seed}"]).save(folder / record.RUN)
    assert summary.conclude_sweep(sweep.folder) == 0
    shown = capsys.readouterr().out
    assert "best adapter.rank=2: better than 1 of 1 others" in shown
    assert "winner ftrun experiment=best_grid" in shown
    assert (sweep.folder / board.REPORT).is_file()
    log = "".join(f"line {number}\n" for number in range(20))
    for number in range(7):
        sweep.job(f"adapter.rank={100 + number}", status="failed", reason=f"[bold]reason {number}", log=log)
    assert summary.conclude_sweep(sweep.folder) == 1
    shown = capsys.readouterr().out
    assert "failed adapter.rank=100,seed=1: [bold]reason 0" in shown
    assert "line 19" in shown
    assert "line 14" not in shown
    assert "and 2 more" in shown
    assert "--retry-failed" in shown


@pytest.mark.parametrize(("status", "code"), [("interrupted", 130), ("preempted", 75), (None, 0), ("paused", 0)])
def test_the_exit_code_of_a_sweep(capsys, tmp_path, status, code):
    sweep = FakeSweep(tmp_path / "grid")
    sweep.job("a=1", status=status)
    sweep.job("a=2", status="failed" if code else "completed", reason="bad")
    assert summary.conclude_sweep(sweep.folder) == code
    assert ("ftrun resume grid" in capsys.readouterr().out) == bool(code)
    assert not Path("conf").exists(), "there is no winner"


def test_ten_thousand_runs_are_listed_by_the_newest(capsys, tmp_path):
    sweep = FakeSweep(tmp_path / "grid")
    for number in range(230):
        sweep.job(f"a={number}", 1.0)
    summary.show_runs(tmp_path, as_json=False)
    shown = capsys.readouterr().out
    assert "230 completed" in shown
    assert "and 30 that changed before these" in shown
    assert len(re.findall(r"a=\d+", shown)) == 200
    summary.show_runs(tmp_path, as_json=True)
    assert len(json.loads(capsys.readouterr().out)) == 230
