"""Fira's keys, and a run that resumes."""

from __future__ import annotations

import shutil

import pytest

from ftrun import config
from ftrun.errors import ConfigError
from tests.ended import comparable, cut_off, weights

SMALL = ("model=tiny", "hardware=cpu", "adapter=full", "optimizer=fira")
RUN = (
    *SMALL, "optimizer.rank=8", "optimizer.update_interval=3", "optimizer.lr=0.01", "optimizer.layerwise=true",
    "train.micro_batch_size=2", "train.log_every=1", "train.max_steps=8", "data.rows=16", "train.save_every=4",
    "train.keep_checkpoints=9", "stage.num_samples=0",
)  # fmt: skip


def test_a_run_learns_and_resumes_within_an_interval(ftrun):
    """With updates in the backward pass."""
    whole = ftrun(*RUN).sees(0)
    assert whole.losses[-1] < whole.losses[0] - 0.5
    copy = whole.folder.with_name("from4")
    shutil.copytree(whole.folder, copy)
    cut_off(copy, 4)
    ftrun("resume", copy.name).sees(0)
    assert comparable(copy) == comparable(whole.folder)
    assert weights(copy) == weights(whole.folder)


@pytest.mark.parametrize(("words", "key", "fix"), [
    (("optimizer.projection=full",), "optimizer.projection", "optimizer=galore"),
    (("optimizer.limiter=0.9",), "optimizer.limiter", "1.01"),
    (("adapter=lora",), "optimizer", "adapter=full"),
])  # fmt: skip
def test_what_cannot_be_is_refused(words, key, fix):
    with pytest.raises(ConfigError) as refused:
        config.compose([*SMALL, *words])
    (problem,) = refused.value.problems
    assert problem.key == key
    assert fix in problem.fix
