"""A run that was stopped and resumed equals the one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from ftrun import record
from tests.ended import comparable, cut_off, weights

# Dropout, so that the state of the random generator counts; accumulation and a log interval that saves fall between;
# an epoch of 6 steps, so that the resumed steps lie in the second and third.
RUN = (
    "model=tiny", "data.rows=24", "train.micro_batch_size=2", "train.grad_accumulation=2", "train.max_steps=16",
    "train.log_every=3", "train.eval_every=5", "train.neftune=5", "optimizer.weight_decay=0.1", "optimizer.lr=1e-2",
)  # fmt: skip


@pytest.mark.parametrize(
    "adapter", [("adapter=lora", "adapter.dropout=0.2"), ("adapter=full",), ("adapter.init=pissa",)]
)
@pytest.mark.parametrize("stage", [("stage=sft", "stage.num_samples=1"), ("stage=dpo",), ("stage=kto",)])
def test_resumed_from_any_checkpoint_equals_uninterrupted(ftrun, stage, adapter):
    whole = ftrun(*stage, *RUN, *adapter, "train.save_every=2", "train.keep_checkpoints=99").sees(0)
    for step in (4, 6, 14):  # within an epoch, at its end, near the end of the run
        copy = whole.folder.with_name(f"from{step}")
        shutil.copytree(whole.folder, copy)
        _make_it_look_killed(copy, step)
        ftrun("resume", copy.name).sees(0)
        assert comparable(copy) == comparable(whole.folder), step
        assert weights(copy) == weights(whole.folder), step


def _make_it_look_killed(folder: Path, step: int) -> None:
    """Leave a run as a kill after ``step`` would have: later checkpoints gone, one half written, a torn line."""
    cut_off(folder, step)
    (folder / "checkpoints" / "checkpoint-99").mkdir()
    with (folder / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 17, "lo')
    result = json.loads((folder / "result.json").read_text())
    gone = {"host": os.uname().nodename, "pid": 2**22 + 1, "started": 1.0}
    (folder / "result.json").write_text(json.dumps(result | {"status": "running", "holder": gone}))


def _wait_for_step(folder: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in record.read_lines(folder / "metrics.jsonl")):
        assert time.monotonic() < deadline, "the run did not get going"
        time.sleep(0.02)


LONG = (
    "model=tiny", "adapter=full", "train.max_steps=150", "train.log_every=1", "train.micro_batch_size=4",
    "train.save_every=40", "stage.num_samples=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(ftrun_in, tmp_path_factory):
    """A run that nothing happens to."""
    return ftrun_in(tmp_path_factory.mktemp("uninterrupted"))(*LONG).sees(0)


@pytest.mark.parametrize(
    ("number", "status", "code"),
    [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "preempted", 75), (signal.SIGUSR1, "preempted", 75)],
)
def test_a_signal_saves_and_the_rest_follows(forked, ftrun, uninterrupted, tmp_path, number, status, code):
    process = forked(*LONG, "output_dir=stopped")
    _wait_for_step(tmp_path / "stopped", 5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert "ftrun resume stopped" in out
    result = record.Result.load(tmp_path / "stopped")
    assert result.status == status
    assert result.checkpoint == f"checkpoints/step-{comparable(tmp_path / 'stopped')[-1]['step']}"
    ftrun("resume", "stopped").sees(0)
    assert comparable(tmp_path / "stopped") == comparable(uninterrupted.folder)
    assert weights(tmp_path / "stopped") == weights(uninterrupted.folder)


def test_killed_without_warning_goes_on_from_the_last_checkpoint(forked, ftrun, uninterrupted, tmp_path):
    process = forked(*LONG, "output_dir=killed")
    _wait_for_step(tmp_path / "killed", 45)
    holder = record.Result.load(tmp_path / "killed").holder
    os.kill(holder.pid, signal.SIGSTOP)  # or it might be done before it is killed
    refused = ftrun("resume", "killed").sees(2)
    assert "is running" in refused.err
    os.kill(holder.pid, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "killed with signal 9" in err
    ftrun("resume", "killed").sees(0)
    assert comparable(tmp_path / "killed") == comparable(uninterrupted.folder)
    assert weights(tmp_path / "killed") == weights(uninterrupted.folder)


def test_a_dead_driver_reads_as_interrupted_when_its_worker_is_gone_too(forked, ftrun, tmp_path):
    process = forked(*LONG, "output_dir=dead")
    _wait_for_step(tmp_path / "dead", 3)
    holder = record.Result.load(tmp_path / "dead").holder
    process.kill()
    process.wait()
    assert record.Result.load(tmp_path / "dead").status == "running"  # the worker goes on by itself
    os.kill(holder.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while record.Result.load(tmp_path / "dead").status == "running":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert record.Result.load(tmp_path / "dead").status == "interrupted"


def test_what_is_done_or_not_there_cannot_be_resumed(ftrun):
    ftrun("model=tiny", "train.max_steps=1", "output_dir=done").sees(0)
    assert "completed" in ftrun("resume", "done").sees(2).err
    assert "holds no run" in ftrun("resume", "nowhere").sees(2).err


def test_a_second_ctrl_c_ends_at_once(forked, tmp_path):
    process = forked(*LONG, "train.max_steps=100000", "output_dir=now")
    _wait_for_step(tmp_path / "now", 3)
    os.kill(record.Result.load(tmp_path / "now").holder.pid, signal.SIGSTOP)  # a worker that cannot react
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130, out
    assert record.Result.load(tmp_path / "now").status == "interrupted"


def test_a_worker_that_dies_before_it_begins_is_a_failed_run(start, write, tmp_path):
    write("early/sitecustomize.py", 'import os, sys\nif "ftrun.worker" in sys.orig_argv: os._exit(3)\n')
    process = start("model=tiny", "output_dir=early_death", PYTHONPATH=str(tmp_path / "early"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "exit code 3 and no word" in err
    assert record.Result.load(tmp_path / "early_death").status == "failed"


def test_a_run_that_was_killed_between_its_model_and_its_result_is_resumed(ftrun):
    whole = ftrun(*RUN, "train.save_every=4").sees(0)
    before = weights(whole.folder)
    file = whole.folder / "result.json"
    holder = {"host": socket.gethostname(), "pid": 2**30, "started": 1.0}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "running", "holder": holder}))
    (whole.folder / "model" / "left_over").touch()
    ftrun("resume", whole.folder.name).sees(0)
    assert weights(whole.folder) == before
    assert not (whole.folder / "model" / "left_over").exists()


def test_a_run_that_failed_says_how_far_it_came_and_how_to_go_on(ftrun):
    done = ftrun(*RUN, "optimizer.lr=1e30", "train.log_every=1", "train.save_every=1").sees(1)
    assert done.result.step == max(line["step"] for line in done.metrics) > 0
    assert "grad_norm" in done.result.metrics
    assert f"to go on: ftrun resume {done.folder.name}" in done.err


def test_a_long_folder_for_temporary_files_is_no_obstacle(ftrun, tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    done = ftrun("model=tiny", "debug=smoke", TMPDIR=str(folder)).sees(0)
    assert "step 2/2" in done.out


def test_a_reader_that_is_gone_does_not_end_the_run(forked, tmp_path):
    process = forked("model=tiny", "train.max_steps=30", "train.log_every=1", "output_dir=run")
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert record.Result.load(tmp_path / "run").status == "completed"


def test_of_two_that_resume_at_once_one_is_refused(ftrun, forked):
    whole = ftrun(*RUN, "train.save_every=4").sees(0)
    _make_it_look_killed(whole.folder, 4)
    both = [forked("resume", whole.folder.name) for _ in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    assert sum("is running: process" in error for error in errors) == 1
    steps = [line["step"] for line in comparable(whole.folder) if "loss" in line]
    assert steps == sorted(set(steps))
