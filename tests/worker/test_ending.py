"""What a run leaves: which metrics are drawn together."""

from __future__ import annotations

from ftrun.worker.ending import _panels


def test_a_metric_is_drawn_with_its_evaluations_and_with_that_of_the_other_reply():
    lines = [
        {
            "step": 1,
            "epoch": 0.1,
            "time": 1.0,
            "loss": 2.0,
            "rewards_chosen": 0.1,
            "rewards_rejected": 0.2,
            "tokens": 9,
        },
        {
            "step": 1,
            "epoch": 0.1,
            "time": 1.0,
            "eval_loss": 3.0,
            "eval_math_loss": 4.0,
            "eval_math_rewards_chosen": 0.3,
        },
        {"step": 2, "epoch": 0.2, "time": 2.0, "loss": 1.0, "rewards_margins": 0.5},
    ]
    assert _panels(lines, ["math"]) == {
        "loss": {"loss": [(1, 2.0), (2, 1.0)], "eval_loss": [(1, 3.0)], "eval_math_loss": [(1, 4.0)]},
        "rewards": {
            "rewards_chosen": [(1, 0.1)],
            "rewards_rejected": [(1, 0.2)],
            "eval_math_rewards_chosen": [(1, 0.3)],
        },
        "rewards_margins": {"rewards_margins": [(2, 0.5)]},
    }
