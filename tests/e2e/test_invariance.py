"""How a step's rows are divided among processes changes nothing."""

from __future__ import annotations

import pytest

# Without dropout and noise; every weight trains, so that every gradient counts.
RUN = ("model=tiny", "adapter=full", "optimizer.lr=1e-3", "data.rows=20", "train.max_steps=3", "train.log_every=1")


def numbers(done) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in done.metrics if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("words", ["dpo stage.loss=aot", "kto"])
def test_processes_can_share_a_batch(ftrun, words):
    first, *more = words.split()
    stage = [f"stage={first}", *more, *RUN]
    whole = numbers(ftrun(*stage, "train.micro_batch_size=8").sees(0))
    shared = numbers(
        ftrun(*stage, "train.micro_batch_size=2", "train.grad_accumulation=2", "hardware.num_processes=2").sees(0)
    )
    for ours, expected in zip(shared, whole, strict=True):
        assert ours == pytest.approx(expected, abs=1e-5, rel=1e-5)
