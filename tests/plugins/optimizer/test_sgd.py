"""optimizer=sgd: what is refused, and that it trains."""

from __future__ import annotations

import pytest

from ftrun.config import compose
from ftrun.errors import ConfigError


def test_looking_ahead_needs_a_momentum():
    words = ["model=tiny", "optimizer=sgd", "optimizer.nesterov=true"]
    with pytest.raises(ConfigError, match=r"it looks ahead along the momentum, and there is none"):
        compose(words)
    assert compose([*words, "optimizer.momentum=0.9"]).optimizer.nesterov


def test_its_own_rate_trains(ftrun):
    words = ("model=tiny", "hardware=cpu", "adapter=full", "optimizer=sgd", "train.max_steps=40", "train.log_every=1")
    done = ftrun(*words, "optimizer.momentum=0.9").sees(0)
    assert done.losses[-1] < 0.8 * done.losses[0]
