"""Replies of the wanted form."""

from __future__ import annotations

import time

import pytest

from ftrun.completions import Completion
from ftrun_plugins.reward.format import Format


def worth(text: str, **keys: str) -> float:
    reply = Completion(prompt=[], answer=None, text=text, prompt_ids=[], ids=[], finished=True)
    (value,) = Format(**keys).score([reply])
    return value


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>2 and 2\nmake 4</think>\n4", 1.0),
        ("\n<think></think>It is 4.\nReally.", 1.0),
        ("<think>2 and 2</think>", 0.0),
        ("<think>2 and 2</think> \n", 0.0),
        ("4", 0.0),
        ("I think: <think>2</think>4", 0.0),
        ("<think>2 and 2 make 4", 0.0),
        ("<think>a<think>b</think>4", 0.0),
        ("<think>a</think>4<think>b</think>5", 0.0),
        ("</think>4", 0.0),
        ("", 0.0),
    ],
)
def test_thinking_and_an_answer(text, wanted):
    assert worth(text) == wanted


def test_a_pattern_of_ones_own_matches_the_whole_reply():
    assert worth("so:\nanswer: 42", pattern=r".*answer: \d+") == 1.0
    assert worth("answer: 42 or so", pattern=r".*answer: \d+") == 0.0


def test_a_long_reply_takes_no_long_time():
    began = time.monotonic()
    for text in ("<think>" + "a " * 20_000, "<think>a</think>" + " " * 20_000, "<think>" * 5_000, " " * 20_000):
        assert worth(text) == 0.0
    assert time.monotonic() - began < 2
