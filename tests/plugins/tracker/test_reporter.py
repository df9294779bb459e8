"""A tracker that fails stops a run before it trains, and leaves one that is under way alone."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback

from ftrun.errors import ConfigError
from ftrun.record import Status
from ftrun.worker import stop
from ftrun_plugins.tracker import _reporter as telling
from ftrun_plugins.tracker.tensorboard import TensorBoard

DONE = SimpleNamespace(global_step=5, max_steps=5)
STOPPED = SimpleNamespace(global_step=3, max_steps=5)


class Broken(TrainerCallback):
    def __init__(self, error: Exception) -> None:
        self.error = error
        self.told: list[str] = []

    def on_train_begin(self, *args, **kwargs):
        self.told.append("begin")

    def on_log(self, *args, **kwargs):
        self.told.append("log")
        raise self.error

    def on_train_end(self, *args, **kwargs):
        self.told.append("end")
        raise self.error


def reporter(callback, end=lambda _: None):
    return telling.reporter(TensorBoard(), callback, end)


def test_a_tracker_that_fails_is_told_on_and_its_failure_said_once(capsys):
    broken = Broken(OSError("disk\nfull"))
    told = reporter(broken)
    told.on_train_begin(None, DONE, None)
    told.on_log(None, DONE, None, logs={})
    told.on_log(None, DONE, None, logs={})
    told.on_train_end(None, DONE, None)
    assert broken.told == ["begin", "log", "log", "end"]
    assert capsys.readouterr().out == "tracker=tensorboard is not told everything: disk full\n"


def test_what_the_user_can_mend_is_an_error():
    with pytest.raises(ConfigError):
        reporter(Broken(ConfigError([]))).on_log(None, DONE, None)


@pytest.mark.parametrize(
    ("state", "requested", "status"),
    [
        (DONE, None, Status.completed),
        (DONE, Status.interrupted, Status.completed),
        (STOPPED, Status.interrupted, Status.interrupted),
        (STOPPED, Status.preempted, Status.preempted),
    ],
)
def test_a_tracker_learns_how_the_run_ended(monkeypatch, state, requested, status):
    monkeypatch.setattr(stop, "_requested", requested)
    ends: list[Status] = []
    told = reporter(Broken(ValueError()), ends.append)
    told.on_train_begin(None, state, None)
    told.on_train_end(None, state, None)
    assert ends == [status]


def test_what_hangs_is_left_behind():
    begun, release = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 seconds"):
        telling.within(0.1, release.wait)
    assert time.monotonic() - begun < 5
    release.set()


def test_what_does_not_hang_answers_or_raises():
    assert telling.within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        telling.within(5, lambda: {}[1])


def test_a_start_that_fails_names_the_tracker_and_the_way_out():
    with pytest.raises(ConfigError) as caught, telling.starting(TensorBoard(), "another"):
        raise RuntimeError
    (problem,) = caught.value.problems
    assert (problem.key, problem.message, problem.fix) == (
        "tracker.tensorboard",
        "cannot start: RuntimeError",
        "another",
    )
