"""Replies that are the answer, and those that are not."""

from __future__ import annotations

import pytest

from ftrun.completions import Completion
from ftrun_plugins.reward.exact import Exact


def worth(text: str, answer: object, **keys: bool) -> float | None:
    reply = Completion(prompt=[], answer=answer, text=text, prompt_ids=[], ids=[], finished=True)
    (value,) = Exact(**keys).score([reply])
    return value


@pytest.mark.parametrize(
    ("text", "answer", "wanted"),
    [
        ("Paris", "Paris", 1.0),
        (" paris.\n", "Paris", 1.0),
        ("It is Paris", "Paris", 0.0),
        ("<think>Rome?</think> Paris!", "Paris", 1.0),
        ("well-known  fact", "Well known fact", 1.0),
        ("3.5", "3.5", 1.0),
        ("35", "3.5", 0.0),
        ("-5", "5", 0.0),
        ("1,000", "1000", 0.0),
        ("\ufb01ne", "fine", 1.0),
        ("7", 7, 1.0),
        ("", "Paris", 0.0),
        ("Paris", None, None),
    ],
)
def test_what_counts_as_the_same(text, answer, wanted):
    assert worth(text, answer) == wanted


def test_keys_make_it_stricter():
    assert worth("paris", "Paris", ignore_case=False) == 0.0
    assert worth("Paris.", "Paris", ignore_punctuation=False) == 0.0
    assert worth("paris ", "Paris", ignore_punctuation=False) == 1.0
