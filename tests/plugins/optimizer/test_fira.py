"""Fira's keys, and a run that resumes."""

from __future__ import annotations

import pytest

from ftrun import config
from ftrun.errors import ConfigError

SMALL = ("model=tiny", "hardware=cpu", "adapter=full", "optimizer=fira")
RUN = (
    *SMALL, "optimizer.rank=8", "optimizer.update_interval=3", "optimizer.lr=0.01", "optimizer.layerwise=true",
    "train.micro_batch_size=2", "train.log_every=1", "train.max_steps=8", "data.rows=16", "train.save_every=4",
    "train.keep_checkpoints=9", "stage.num_samples=0",
)  # fmt: skip


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
