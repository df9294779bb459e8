"""The learning rate that a step is taken with, against the formula of each schedule."""

from __future__ import annotations

import math

import pytest

PEAK, STEPS, WARM = 1e-3, 12, 3

# The rate of the n-th step, counted from 0, as transformers and its documentation define it.
FORMULAS = {
    "linear": lambda n: (STEPS - n) / (STEPS - WARM),
    "cosine": lambda n: 0.5 * (1 + math.cos(math.pi * (n - WARM) / (STEPS - WARM))),
    "constant": lambda _: 1.0,
    "inverse_sqrt": lambda n: 1 / math.sqrt(n / WARM),
    "polynomial": lambda n: (1e-7 + (PEAK - 1e-7) * (1 - (n - WARM) / (STEPS - WARM))) / PEAK,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_rate_of_every_step(ftrun, name):
    done = ftrun(
        "model=tiny", "data.rows=24", f"train.max_steps={STEPS}", "train.log_every=1", f"optimizer.lr={PEAK}",
        f"train.scheduler={name}", f"train.warmup={WARM}", "stage.num_samples=0",
    ).sees(0)  # fmt: skip
    rates = [line["lr"] for line in done.metrics if "lr" in line]
    expected = [PEAK * n / WARM for n in range(WARM)] + [PEAK * FORMULAS[name](n) for n in range(WARM, STEPS)]
    assert rates == pytest.approx(expected, rel=1e-6)
