"""Which evaluation is the best, and which metric says so."""

from __future__ import annotations

import math

import pytest

from ftrun import config
from ftrun.worker.best import Best, objective_of


def waited(values: list[float], *words: str) -> tuple[list[int], Best]:
    cfg, best = config.compose(["model=tiny", *words]), Best()
    found = []
    for step, value in enumerate(values, 1):
        best.note(step, value, cfg)
        found.append(best.waited)
    return found, best


def test_evaluations_that_are_no_better_are_counted():
    found, best = waited([3.0, 2.0, 2.0, math.nan, 2.5, 1.0])
    assert found == [0, 0, 1, 2, 3, 0]
    assert (best.step, best.value) == (6, 1.0)


def test_high_may_be_good():
    found, best = waited([0.1, 0.3, 0.2], "objective_mode=max")
    assert found == [0, 0, 1]
    assert (best.step, best.value) == (2, 0.3)


def test_a_gain_below_the_threshold_is_the_best_all_the_same():
    words = ("train.early_stopping_threshold=0.5", "train.early_stopping_patience=2")
    found, best = waited([3.0, 2.75, 2.5, 1.5], *words, "data.eval_size=2", "train.eval_every=1")
    assert found == [0, 1, 2, 0]
    assert best.step == 4


def test_nothing_but_nan_has_no_best():
    found, best = waited([math.nan, math.nan])
    assert found == [1, 2]
    assert best == Best(waited=2)


@pytest.mark.parametrize(
    ("words", "metrics", "expected"),
    [
        ((), {"loss": 1.0, "eval_loss": 2.0}, "eval_loss"),
        ((), {"loss": 1.0}, "loss"),
        (("data.eval_sets={a: demo:identity, b: demo:identity}",), {"loss": 1.0, "eval_b_loss": 2.0}, "eval_b_loss"),
        (("objective=eval_perplexity",), {"eval_loss": 1.0, "eval_perplexity": 2.0}, "eval_perplexity"),
        (("objective=eval_perplexity",), {"eval_loss": 1.0}, None),
    ],
)
def test_the_objective_is_the_one_that_was_named_or_the_first_of_the_stage(words, metrics, expected):
    assert objective_of(config.compose(["model=tiny", *words]), metrics) == expected
