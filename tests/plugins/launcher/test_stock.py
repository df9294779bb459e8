"""Launchers that are not ftrun's do its jobs: they leave nothing in the working folder, and stop when they are told."""

from __future__ import annotations

import signal
import time

import pytest

from ftrun import record
from ftrun.record import Result, Status

TINY = ("-m", "model=tiny", "hardware=cpu", "stage.num_samples=0")
# A rate at which the loss is no number any more: that job fails.
ONE_FAILS = ("optimizer.lr=1e30,1e-3", "train.max_steps=3", "train.on_bad_loss=stop")


def statuses(folder):
    return {path.parent.name: Result.load(path.parent).status for path in sorted(folder.glob("*/run.yaml"))}


def see_that_one_fails(forked, tmp_path, *words):
    process = forked(*TINY, *ONE_FAILS, *words, "output_dir=sweep")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert statuses(tmp_path / "sweep") == {
        "optimizer.lr=1e+30": Status.failed,
        "optimizer.lr=0.001": Status.completed,
    }
    assert {path.name for path in tmp_path.iterdir()} <= {"sweep", "conf"}


def test_basic(forked, tmp_path):
    see_that_one_fails(forked, tmp_path, "hydra/launcher=basic")


def test_joblib(forked, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    see_that_one_fails(forked, tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def test_submitit(forked, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    see_that_one_fails(forked, tmp_path, "hydra/launcher=submitit_local")


def test_after_ctrl_c_the_basic_launcher_starts_no_other_job(forked, tmp_path):
    words = ("seed=1,2", "train.max_steps=2000", "train.eval_every=2000", "output_dir=sweep")
    process = forked(*TINY, *words, "hydra/launcher=basic")
    first = tmp_path / "sweep" / "seed=1"
    while len(record.read_lines(first / record.METRICS)) < 3 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert statuses(tmp_path / "sweep") == {"seed=1": Status.interrupted, "seed=2": Status.queued}
    assert Result.load(first).checkpoint
