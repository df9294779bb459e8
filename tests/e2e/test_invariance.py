"""How a step's rows are divided changes nothing: batch 8 is 4 x 2, 1 x 8 and two processes with 4 each."""

from __future__ import annotations

import pytest

from ftrun import plugin

TRAINING = [name for name in plugin.names("stage") if "loss" in plugin.get("stage", name).metrics]

# Without dropout and noise; every weight trains, so that every gradient counts.
RUN = ("model=tiny", "adapter=full", "optimizer.lr=1e-3", "data.rows=20", "train.max_steps=3", "train.log_every=1")


def exception(stage: str) -> str:
    """Return why a stage's loss depends on how its rows are divided, if it does."""
    return getattr(plugin.get("stage", stage), "depends_on_batches", "")


def numbers(done) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in done.metrics if "loss" in line]


def words(stage: str, size: int, accumulation: int) -> list[str]:
    batch = [f"train.micro_batch_size={size}", f"train.grad_accumulation={accumulation}"]
    return [f"stage={stage}", *RUN, *batch]


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINING)
def test_a_batch_can_be_divided(ftrun, stage):
    if why := exception(stage):
        pytest.skip(why)
    # The last step of the epoch has four rows left.
    whole = numbers(ftrun(*words(stage, 8, 1)).sees(0))
    assert len(whole) == 3
    for size, accumulation in ((4, 2), (1, 8)):
        divided = numbers(ftrun(*words(stage, size, accumulation)).sees(0))
        for ours, expected in zip(divided, whole, strict=True):
            assert ours == pytest.approx(expected, abs=1e-5, rel=1e-5), (size, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("stage", TRAINING)
def test_processes_can_share_a_batch(ftrun, stage):
    if why := exception(stage):
        pytest.skip(why)
    whole = numbers(ftrun(*words(stage, 8, 1)).sees(0))
    shared = numbers(ftrun(*words(stage, 2, 2), "hardware.num_processes=2").sees(0))
    for ours, expected in zip(shared, whole, strict=True):
        assert ours == pytest.approx(expected, abs=1e-5, rel=1e-5)
