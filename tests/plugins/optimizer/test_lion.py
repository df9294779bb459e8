"""optimizer=lion: its rate, and that it trains."""

from __future__ import annotations

import pytest

from ftrun.config import compose


def test_its_rate_is_a_fifth_of_the_usual_one():
    usual = compose(["model=tiny", "adapter=full", "optimizer=adamw"]).optimizer.lr
    for name in ("lion", "lion_8bit"):
        assert compose(["model=tiny", "adapter=full", f"optimizer={name}"]).optimizer.lr == pytest.approx(usual / 5)


def test_it_trains_and_updates_in_the_backward_pass_are_the_same(ftrun):
    words = ("model=tiny", "hardware=cpu", "adapter=full", "optimizer=lion", "optimizer.lr=1e-3", "train.max_steps=12")
    losses = [
        ftrun(*words, "train.max_grad_norm=0", "train.log_every=1", f"optimizer.layerwise={layerwise}").sees(0).losses
        for layerwise in ("false", "true")
    ]
    assert losses[0] == losses[1]
    assert losses[0][-1] < 0.95 * losses[0][0]
