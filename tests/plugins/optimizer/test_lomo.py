"""LOMO in a run: what is refused where gradients are used up in the backward pass, and a run that resumes."""

from __future__ import annotations

import pytest

from ftrun import config
from ftrun.errors import ConfigError

RUN = (
    "model=tiny", "adapter=full", "train.micro_batch_size=2", "train.log_every=1", "train.max_steps=8", "data.rows=16",
    "train.save_every=4", "train.keep_checkpoints=9", "stage.num_samples=0",
)  # fmt: skip


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
@pytest.mark.parametrize(
    "word", ["train.grad_accumulation=2", "train.precision=fp16", "train.on_bad_loss=skip", "train.max_loss_spike=2"]
)
def test_what_needs_whole_gradients_is_refused(name, word):
    (problem,) = config.examine([*RUN, f"optimizer={name}", word])[1]
    assert problem.key == "optimizer"
    assert "another optimizer" in (problem.fix or "")


def test_several_processes_are_refused():
    cfg = config.compose([*RUN, "optimizer=lomo", "hardware=cpu"])
    cfg.hardware.num_processes = 2
    with pytest.raises(ConfigError, match="several processes"):
        cfg.optimizer.settle(cfg)


def test_a_run_learns_and_tells_the_norm_of_gradients_that_are_gone(ftrun):
    whole = ftrun(*RUN, "optimizer=lomo").sees(0)
    assert whole.losses[-1] < whole.losses[0] - 0.05
    assert all(line["grad_norm"] > 0 for line in whole.metrics if "grad_norm" in line)
