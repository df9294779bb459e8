"""A sweep that is run: what it writes is what its jobs came to, and its winner, done again, comes to the same."""

from __future__ import annotations

import csv
import json

import pytest

from ftrun.record import Result


def test_a_sweep_ends_in_its_leaderboard_and_the_winner_can_be_done_again(ftrun, tmp_path):
    words = ("model=tiny", "hardware=cpu", "train.max_steps=3", "train.log_every=1", "stage.num_samples=0")
    done = ftrun("-m", *words, "optimizer.lr=1e-4,1e-2", "seed=1,2", "output_dir=grid").sees(0)
    with (done.folder / "leaderboard.csv").open(newline="") as file:
        lines = {line["folder"]: line for line in csv.DictReader(file)}
    assert len(lines) == 4
    for name, line in lines.items():
        result = Result.load(done.folder / name)
        assert float(line["objective"]) == result.objective == result.metrics["eval_loss"]
        assert int(line["peak_memory_bytes"]) == result.peak_memory_bytes
    (table,) = json.loads((done.folder / "leaderboard.json").read_text())["tables"]
    best, other = table["arms"]
    assert best["point"]["optimizer.lr"] == "0.01"
    assert best["mean"] == pytest.approx(sum(float(lines[name]["objective"]) for name in best["jobs"]) / 2)
    assert (other["verdict"], other["shared_seeds"]) == ("unknown", 2)
    assert (done.folder / "report.html").stat().st_size > 1_000_000
    assert "winner ftrun experiment=best_grid" in done.out

    again = ftrun("experiment=best_grid", "seed=2").sees(0)
    won = next(line for name, line in lines.items() if name in best["jobs"] and line["seed"] == "2")
    assert again.result.objective == float(won["objective"])
