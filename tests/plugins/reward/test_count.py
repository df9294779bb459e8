"""Occurrences, counted by hand."""

from __future__ import annotations

import pytest

from ftrun.completions import Completion
from ftrun.errors import RunFailed
from ftrun_plugins.reward.count import Count, Measure


def worth(reply: str, answer: object = None, **keys: object) -> float | None:
    judged = Completion(prompt=[], answer=answer, text=reply, prompt_ids=[], ids=[], finished=True)
    (value,) = Count(**keys).score([judged])  # type: ignore[arg-type]
    return value


def test_the_share_of_the_reply():
    assert worth("eeee") == 1.0
    assert worth("Ee..", text="e") == 0.25
    assert worth("ab ab", text="ab") == 0.8
    assert worth("") == 0.0


def test_the_number_of_times():
    assert worth("banana", text="an", measure=Measure.number) == 2.0
    assert worth("a" * 9, text="a", measure=Measure.number, most=5) == 5.0


@pytest.mark.parametrize(("answer", "wanted"), [("3", 1.0), (2, 0.5), (4, 0.75), (1, 0.0), (0, 0.0), (None, None)])
def test_the_nearness_to_the_answer(answer, wanted):
    assert worth("banana", answer, text="a", measure=Measure.answer) == wanted


def test_an_answer_that_is_no_number_ends_the_run():
    with pytest.raises(RunFailed, match="reward=count compares with the row's answer, and 'three' is no number"):
        worth("banana", "three", text="a", measure=Measure.answer)
