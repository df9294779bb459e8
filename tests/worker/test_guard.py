"""Which steps are refused, and when: without a GPU, by standing in for the copy that runs behind."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ftrun import config
from ftrun.errors import RunFailed
from ftrun.worker import guard
from ftrun.worker.guard import Guard


@pytest.fixture
def made(monkeypatch):
    monkeypatch.setattr(guard, "places", lambda _, step, batches: [f"{step}:{batch}" for batch in batches])

    def make(*words: str, scaler: Any = None) -> Guard:
        run = SimpleNamespace(cfg=config.compose(["model=tiny", *words]), world_size=1, rank=0, is_main=True)
        device, state = torch.device("cpu"), SimpleNamespace(global_step=0)
        accelerator = SimpleNamespace(scaler=scaler)
        return Guard(
            SimpleNamespace(run=run, args=SimpleNamespace(device=device), state=state, accelerator=accelerator)
        )

    return make


def step(one: Guard, loss: float | list[float], norm: float = 1.0) -> bool:
    one.begin()
    for each in loss if isinstance(loss, list) else [loss]:
        one.see(torch.tensor(each))
    one.see_norm(torch.tensor(norm))
    refused = one.refuses()
    one.trainer.state.global_step += 1
    return refused


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf)])
def test_what_is_not_finite_is_bad(made, loss, norm):
    one = made()
    assert not step(one, 1.0)
    with pytest.raises(RunFailed, match="at step 2 the loss is"):
        step(one, loss, norm)


def test_the_batches_that_are_at_fault_are_named_or_all_of_them(made):
    with pytest.raises(RunFailed, match="on the rows 0:1, 0:2;"):
        step(made(), [1.0, math.nan, math.inf])
    with pytest.raises(RunFailed, match="on the rows 0:0, 0:1;"):
        step(made(), [1.0, 1.0], math.nan)


def test_no_more_than_some_rows_are_named(made):
    with pytest.raises(RunFailed, match="0:14, 0:15 and 4 more;"):
        step(made(), [math.nan] * 20)


def test_where_a_gpu_is_not_waited_for_a_step_is_judged_in_the_next(made, monkeypatch):
    monkeypatch.setattr(guard._Seen, "set_off", lambda _: None)
    one = made()
    one.waits = True
    assert not step(one, 1.0)
    assert not step(one, math.nan)
    with pytest.raises(RunFailed, match="at step 2"):
        step(one, 1.0)


def test_or_before_anything_is_written_down(made, monkeypatch):
    monkeypatch.setattr(guard._Seen, "set_off", lambda _: None)
    one = made()
    one.waits = True
    assert not step(one, math.nan)
    with pytest.raises(RunFailed, match="at step 1"):
        one.settle()
    one.settle()


def test_an_overflow_is_left_to_the_loss_scaling_but_not_a_loss(made):
    one = made("train.on_bad_loss=skip", scaler=object())
    assert not step(one, 1.0, math.inf)
    assert one.skipped == 0
    assert step(one, math.nan, math.nan)
    assert one.skipped == 1


def test_a_leap_is_measured_by_the_median_of_the_steps_that_were_taken(made):
    one = made("train.on_bad_loss=skip", "train.max_loss_spike=2")
    assert [step(one, 1.0) for _ in range(10)] == [False] * 10
    assert step(one, 2.1)
    assert step(one, 1.0, 2.1)
    assert not step(one, 1.9, 1.9)
    assert one.skipped == 2
    # A loss that may be below zero has no scale; its gradient has.
    other = made("train.on_bad_loss=skip", "train.max_loss_spike=2")
    assert [step(other, -1.0) for _ in range(10)] == [False] * 10
    assert not step(other, 100.0)
    assert step(other, 0.0, 3.0)


def test_what_a_checkpoint_holds_is_taken_up(made):
    words = ("train.on_bad_loss=skip", "train.max_loss_spike=2")
    one, other = made(*words), made(*words)
    for number in range(15):
        step(one, 1.0 + number / 100)
    step(one, 5.0)
    other.restore(json.loads(json.dumps(one.state())))
    assert other.state() == one.state()
    assert step(other, 2.2) == step(one, 2.2) is True
