"""A run's folder: files are whole or absent, torn lines are ignored, and a holder is alive or not."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time

import pytest

from ftrun import record
from ftrun.record import Holder, Result, Status


def test_a_result_reads_back(tmp_path):
    result = Result(status=Status.completed, metrics={"loss": 0.1}, objective=0.1, step=3)
    result.save(tmp_path)
    assert Result.load(tmp_path) == dataclasses.replace(result, folder=str(tmp_path))


def test_a_torn_last_line_is_ignored(tmp_path):
    path = tmp_path / record.METRICS
    record.append_line(path, {"step": 1, "loss": 2.0})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert record.read_lines(path) == [{"step": 1, "loss": 2.0}]
    record.cut_back(tmp_path, 1)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_cutting_back_drops_later_steps_only(tmp_path):
    for step in range(5):
        record.append_line(tmp_path / record.METRICS, {"step": step})
    record.cut_back(tmp_path, 2)
    assert [line["step"] for line in record.read_lines(tmp_path / record.METRICS)] == [0, 1, 2]


def test_checkpoints_are_ordered_by_step_and_incomplete_ones_are_not_checkpoints(tmp_path):
    for name in ("step-9", "step-10", "checkpoint-11", "step-12.partial"):
        (tmp_path / record.CHECKPOINTS / name).mkdir(parents=True)
    assert [path.name for path in record.checkpoints(tmp_path)] == ["step-9", "step-10"]
    record.remove_incomplete_checkpoints(tmp_path)
    assert {path.name for path in (tmp_path / record.CHECKPOINTS).iterdir()} == {"step-9", "step-10"}


def test_writing_whole_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    record.write_whole(path, "old")
    with pytest.raises(UnicodeEncodeError):
        record.write_whole(path, "\ud800")
    assert path.read_text() == "old"


def test_a_holder_is_its_process_not_its_number():
    me = Holder.me()
    assert me.is_alive(0)
    assert not dataclasses.replace(me, started=me.started - 1).is_alive(time.time())  # another one, with our pid
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    holder = Holder(me.host, child.pid, record._start_ticks(child.pid))
    assert holder.is_alive(0)
    child.kill()
    time.sleep(0.2)
    assert not holder.is_alive(time.time())  # a zombie is not alive
    child.wait()


def test_a_holder_elsewhere_lives_as_long_as_it_beats(tmp_path):
    elsewhere = Holder("another-host", 1, 1.0)
    Result(holder=elsewhere).save(tmp_path)
    assert Result.load(tmp_path).status is Status.running
    long_ago = time.time() - 3600
    os.utime(tmp_path / record.RESULT, (long_ago, long_ago))
    assert Result.load(tmp_path).status is Status.interrupted
