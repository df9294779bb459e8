"""The share of repeated tokens, against a count by brute force."""

from __future__ import annotations

import random

from ftrun.completions import Completion
from ftrun_plugins.reward.repetition import Repetition


def worth(ids: list[int], ngram: int) -> float:
    reply = Completion(prompt=[], answer=None, text="", prompt_ids=[], ids=ids, finished=True)
    (value,) = Repetition(ngram=ngram).score([reply])
    return value


def by_brute_force(ids: list[int], size: int) -> float:
    repeated = set()
    for start in range(len(ids) - size + 1):
        if any(ids[earlier : earlier + size] == ids[start : start + size] for earlier in range(start)):
            repeated |= set(range(start, start + size))
    return -len(repeated) / max(len(ids), 1)


def test_by_hand():
    assert worth([1, 2, 3, 4], 2) == 0.0
    assert worth([1, 2, 1, 2], 2) == -0.5
    assert worth([7] * 10, 1) == -0.9
    assert worth([7] * 10, 3) == -0.9
    assert worth([1, 2], 3) == 0.0
    assert worth([], 3) == 0.0


def test_against_brute_force():
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(3) for _ in range(draw.randrange(30))]
        size = draw.randrange(1, 5)
        assert worth(ids, size) == by_brute_force(ids, size)
