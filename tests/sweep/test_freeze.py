"""Freezing: each job has the config of its own words, in a folder that is nobody else's, and once."""

from __future__ import annotations

import pytest
import yaml

from ftrun import board
from ftrun.errors import ConfigError
from ftrun.record import Result, Status
from ftrun.sweep import freeze, points
from ftrun.sweep.ledger import Job, Ledger

TINY = ("model=tiny", "hardware=cpu")


def frozen(folder, *words: str) -> list[Job]:
    return freeze.freeze(points.grid([*TINY, *words]).points(), Ledger(folder), slots=1)


def config(job: Job) -> dict:
    return yaml.safe_load((job.folder / "run.yaml").read_text())


def test_a_key_that_points_at_a_swept_one_has_its_value(tmp_path):
    jobs = frozen(tmp_path, "train.save_every=${train.eval_every}", "train.eval_every=2,4,8")
    assert [config(job)["train"]["save_every"] for job in jobs] == [2, 4, 8]


def test_equal_points_are_one_job_and_more_are_added_to_what_there_is(tmp_path):
    first = frozen(tmp_path, "optimizer.lr=1e-3,0.001", "seed=1,2")
    assert [job.overrides for job in first] == [("optimizer.lr=0.001", "seed=1"), ("optimizer.lr=0.001", "seed=2")]
    again = frozen(tmp_path, "optimizer.lr=0.001,2e-3", "seed=1")
    assert [job.id for job in again] == [0, 2]
    assert [job.id for job in Ledger(tmp_path).jobs()] == [0, 1, 2]
    assert len({job.arm for job in Ledger(tmp_path).jobs()}) == 2
    assert {config(job)["hardware"]["num_processes"] for job in first} == {1}


def test_wrong_points_leave_nothing_and_touch_nothing_that_is_there(tmp_path):
    theirs = tmp_path / "seed=1"
    theirs.mkdir()
    (theirs / "run.yaml").write_text("theirs")
    Result(status=Status.completed).save(theirs)
    with pytest.raises(ConfigError, match="'foo' is not a whole number"):
        frozen(tmp_path, "seed=1,foo")
    assert [path.name for path in tmp_path.iterdir()] == ["seed=1"]
    (job,) = frozen(tmp_path, "seed=1,1")
    assert job.folder != theirs
    assert (theirs / "run.yaml").read_text() == "theirs"


def test_what_a_killed_driver_had_frozen_is_not_taken_for_another_job(tmp_path):
    frozen(tmp_path, "seed=1,2", "train.max_steps=2")
    (tmp_path / "jobs.jsonl").unlink()  # as if it had not come so far
    assert [config(job)["train"]["max_steps"] for job in frozen(tmp_path, "seed=1,2", "train.max_steps=4")] == [4, 4]


def test_jobs_with_other_settings_are_another_arm(tmp_path):
    for steps, loss in ((2, 3.0), (4, 2.0)):
        for job in frozen(tmp_path, f"train.max_steps={steps}", "seed=1,2,3"):
            Result(status=Status.completed, objective=loss, metrics={"eval_loss": loss}, step=steps).save(job.folder)
    (table,) = board.load(tmp_path).tables
    assert [(arm.mean, len(arm.values), arm.twin) for arm in table.arms] == [
        (2.0, 3, "as job 3 is set"), (3.0, 3, "as job 0 is set"),
    ]  # fmt: skip


def test_a_key_is_swept_once():
    for words in (["seed=1,2", "seed=3,4"], ["seed=1,2", "seed=3"]):
        with pytest.raises(ConfigError, match="seed: is typed 2 times"):
            points.grid(words)


def test_a_long_point_in_any_script_has_a_name_for_a_folder():
    names = [freeze._name(points.Point((), (f"data.system={text}",))) for text in ("損" * 120, "損" * 121, "損")]
    assert [len(name.encode()) <= 100 for name in names] == [True] * 3
    assert len(set(names)) == 3
