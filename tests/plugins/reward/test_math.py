"""The result of a reply, found and compared by value."""

from __future__ import annotations

import time

import pytest

from ftrun.completions import Completion
from ftrun_plugins.reward.math import Math

RIGHT = [
    # where the result stands
    ("6 times 7 is 42.\n#### 42", "42"),
    ("#### 5\n#### 42", "42"),
    (r"so \boxed{5}, or rather \boxed{6}", "6"),
    (r"\boxed{\frac{\text{1}}{2}}", "0.5"),
    (r"\boxed 7", "7"),
    (r"\fbox{7}", "7"),
    ("The answer is 42 apples. I hope 7 of them are ripe.", "42"),
    ("The answer is 4.0", "4"),
    ("**Answer:** 7", "7"),
    ("The answer is that Sam has 5 coins", "5"),
    ("the answer is 3+4=7", "7"),
    ("The answer is 5 because 2+3 is", "5"),
    (r"The final answer is $\boxed{15}$. I hope it is correct.", "15"),
    ("I think that 3 and 4 make 7", "7"),
    ("1. first\n2. then\nso 9", "9"),
    ("so 3*4 = 12", "12"),
    ("10-3", "3"),
    ("between 3-5", "5"),
    ("<think>1 and 2 are 3</think>15", "15"),
    # numbers
    ("7", 7),
    ("7", 7.0),
    ("It is 1,234.", "1234"),
    ("It is 1234", "1,234"),
    ("#### -1,000.50", "-1000.5"),
    (".5", "0.5"),
    ("1/3", "2/6"),
    ("1/2", "0.5"),
    ("2 1/2 cups", "2.5"),
    ("3e4", "30000"),
    ("-3", "\u22123"),
    ("50%", "0.5"),
    ("50%", "50"),
    ("50 percent", "50%"),
    ("0.5", "50%"),
    # LaTeX
    (r"\boxed{0.5}", r"\frac12"),
    (r"\boxed{\dfrac{3}{4}}", "3/4"),
    (r"$\boxed{2\frac{1}{2}}$", "2.5"),
    (r"\boxed{-\frac{1}{2}}", "-0.5"),
    (r"\boxed{\frac{-1}{2}}", "-0.5"),
    (r"\boxed{1{,}000}", "1000"),
    (r"\boxed{10\,000}", "10000"),
    (r"\boxed{3\times10^{4}}", "30000"),
    (r"The answer is \(15\).", "15"),
    # units
    (r"\boxed{12\text{ cm}^2}", "12"),
    ("12 cm", "12"),
    ("5 km/h", "5"),
    ("-5 degrees", "-5"),
    (r"\boxed{90^\circ}", "90"),
    ("$1,000", "1000"),
    (r"\$5", "5"),
    ("7", "7 letters"),
    # rows
    ("42", "#### 42"),
    ("42", r"Therefore \boxed{42}."),
    ("42", ["41", "42"]),
    # no numbers
    (r"\boxed{x=5}", "5"),
    (r"\boxed{x^2 + 1}", "x^2+1"),
    (r"\boxed{(1, 2)}", "(1,2)"),
    (r"\boxed{(\frac12, 1)}", "(0.5,1)"),
    (r"\boxed{\{1,2\}}", r"\{1, 2\}"),
    (r"\boxed{\sqrt{2}}", r"\sqrt{2}"),
    (r"\boxed{\text{yes}}", "Yes"),
    ("The answer is (B).", "B"),
    ("Paris", "paris"),
    ("12:30", "12:30"),
]

WRONG = [
    ("", "42"),
    ("none", "42"),
    ("#### 43", "42"),
    ("42, no: #### 43", "42"),
    ("142", "42"),
    ("-42", "42"),
    ("4.2", "42"),
    ("4 2", "42"),
    ("12.345", "12"),
    ("1,23", "123"),
    ("0.333", "1/3"),
    ("50%", "0.5%"),
    ("2x", "2"),
    ("2^10", "2"),
    (r"\boxed{2\pi}", "2"),
    (r"the answer is 2\pi", "2"),
    (r"\boxed{(1,2)}", "[1,2]"),
    (r"\boxed{(1,2)}", "(1,3)"),
    (r"\boxed{", "5"),
    ("yes and no", "yes"),
    ("3", ""),
    ("1/0", "1"),
    ("1e999999999", "1"),
    ("<think>42</think>", "42"),
]


def worth(text: str, answer: object, tolerance: float = 0.0) -> float | None:
    reply = Completion(prompt=[], answer=answer, text=text, prompt_ids=[], ids=[], finished=True)
    (value,) = Math(tolerance=tolerance).score([reply])
    return value


@pytest.mark.parametrize(("text", "answer"), RIGHT, ids=repr)
def test_a_right_result(text, answer):
    assert worth(text, answer) == 1.0


@pytest.mark.parametrize(("text", "answer"), WRONG, ids=repr)
def test_a_wrong_result(text, answer):
    assert worth(text, answer) == 0.0


def test_a_row_without_an_answer_is_none():
    assert worth("5", None) is None


def test_the_tolerance_is_an_absolute_difference():
    assert worth("3.14", "3.14159", 0.01) == 1.0
    assert worth("3.14", "3.14159", 0.001) == 0.0
    assert worth("0.1", "0.4", 0.3) == 1.0


@pytest.mark.parametrize(
    "text",
    ["9" * 50_000, "(" * 50_000 + "a", "{" * 50_000, "1," * 50_000, r"\boxed{" * 5_000,
     "#### " + "(a," * 20_000, "a " * 50_000],
    ids=lambda text: text[:8],
)  # fmt: skip
def test_a_long_reply_takes_no_long_time(text):
    began = time.monotonic()
    assert worth(text, "5") == 0.0
    assert worth(text, "(a,b)") == 0.0
    assert time.monotonic() - began < 2
