"""The value of a length, by hand."""

from __future__ import annotations

import pytest

from ftrun.completions import Completion
from ftrun_plugins.reward.length import Length, Side
from ftrun_plugins.reward.overlong import Overlong


def of_length(*tokens: int) -> list[Completion]:
    return [
        Completion(prompt=[], answer=None, text="", prompt_ids=[1, 2], ids=[0] * count, finished=True)
        for count in tokens
    ]


@pytest.mark.parametrize(
    ("side", "wanted"),
    [
        (Side.both, [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]),
        (Side.longer, [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]),
        (Side.shorter, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_the_wanted_length(side, wanted):
    assert Length(target_tokens=10, side=side).score(of_length(0, 5, 10, 15, 20, 99)) == wanted


def overlong(policy_run, *words: str) -> Overlong:
    run = policy_run("reward=overlong", *words)
    reward = run.cfg.reward["overlong"]
    reward.prepare(run, None)
    return reward


def test_soft_punishment_near_the_limit(policy_run):
    """Equation 13 of the DAPO paper with L_max = 100 and L_cache = 20."""
    reward = overlong(policy_run, "reward.overlong.max_tokens=100", "stage.max_new_tokens=100")
    assert reward.score(of_length(0, 80, 85, 90, 100, 150)) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_the_limit_is_the_stages_own(policy_run):
    assert overlong(policy_run, "stage.max_new_tokens=10", "reward.overlong.buffer=0.5").score(of_length(5, 7, 10)) == [
        0.0, -0.4, -1.0,
    ]  # fmt: skip


def test_a_limit_that_no_reply_comes_near_is_refused(policy_run):
    from ftrun.errors import ConfigError

    with pytest.raises(ConfigError, match=r"cut off at 64 tokens \(stage\.max_new_tokens\), before the value falls"):
        policy_run("reward=overlong", "reward.overlong.max_tokens=1024", "stage.max_new_tokens=64")
