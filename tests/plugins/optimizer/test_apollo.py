"""APOLLO's keys, its preset, and a run that resumes."""

from __future__ import annotations

import pytest

from ftrun import config
from ftrun.conformance import _small_model, _small_run
from ftrun.errors import ConfigError

SMALL = ("model=tiny", "hardware=cpu", "adapter=full")
RUN = (
    *SMALL, "optimizer=apollo", "optimizer.rank=8", "optimizer.update_interval=3", "optimizer.lr=0.01",
    "train.micro_batch_size=2", "train.log_every=1", "train.max_steps=8", "data.rows=16", "train.save_every=4",
    "train.keep_checkpoints=9", "stage.num_samples=0",
)  # fmt: skip


@pytest.mark.parametrize(("words", "key", "fix"), [
    (("optimizer.limiter=0.9",), "optimizer.limiter", "1.01"),
    (("optimizer.scale=0",), "optimizer.scale", "> 0"),
    (("adapter=lora",), "optimizer", "adapter=full"),
])  # fmt: skip
def test_what_cannot_be_is_refused(words, key, fix):
    with pytest.raises(ConfigError) as refused:
        config.compose([*SMALL, "optimizer=apollo", *words])
    (problem,) = refused.value.problems
    assert problem.key == key
    assert fix in problem.fix


def test_the_preset_is_apollo_mini(tmp_path):
    """Rank 1 and one factor a matrix, at AdamW's default rate; the state is two rows for each matrix."""
    run = _small_run(tmp_path, [*SMALL, "optimizer=apollo_mini", "train.micro_batch_size=4"])
    keys = run.cfg.optimizer
    assert (keys.name, keys.rank, keys.scaling, keys.scale, keys.lr) == ("apollo", 1, "tensor", 128.0, 5e-5)
    model = _small_model(run)
    optimizer = keys.build(model, run)
    model(**run.batches(1)[0]).loss.backward()
    optimizer.step()
    projected = [group for group in optimizer.param_groups if group["rule"] == "projected"]
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = {names[id(weight)].split(".")[-2]: weight for group in projected for weight in group["params"]}
    assert set(found) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for weight in found.values():
        state = optimizer.state[weight]
        assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (max(weight.shape), 1)
