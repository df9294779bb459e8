"""The order of rows from several sources, against orders written out by hand, and against its own restarts."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from ftrun.data import Mix, MixUntil, mix

FIRST, LAST = MixUntil.first, MixUntil.last


def order(lengths, weights=None, how=Mix.interleave, until=FIRST, seed=0):
    return list(mix.order(lengths, weights or [1.0] * len(lengths), how, until, seed))


def drawn(lengths, weights, how, until, seed):
    """What streaming yields: from iterators of which nobody knows how long they are."""
    openers = [lambda length=length: iter(range(length)) for length in lengths]
    return list(mix.draw(openers, mix.Drawer(weights, how, seed), until))


def test_concatenated_whole_sources_follow_one_another():
    assert order([2, 0, 3], how=Mix.concatenate) == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]
    assert order([2, 1], [2.0, 1.0], Mix.concatenate) == [(0, 0), (0, 1), (0, 0), (0, 1), (1, 0)]


def test_a_fraction_is_a_seeded_choice_in_order():
    rows = [row for _, row in order([100], [1.3], Mix.concatenate, seed=3)]
    assert rows[:100] == list(range(100))
    assert len(rows) == 130
    assert rows[100:] == sorted(set(rows[100:]))
    assert rows == [row for _, row in order([100], [1.3], Mix.concatenate, seed=3)]
    assert rows != [row for _, row in order([100], [1.3], Mix.concatenate, seed=4)]


def test_whole_passes_are_ranges():
    assert mix.passes(5, 2.0, 0) == [range(5), range(5)]
    assert mix.passes(5, 1, 0) == [range(5)]
    assert mix.passes(5, 0.01, 0) == []


def test_interleaved_until_a_used_up_source_has_its_turn():
    assert order([2, 4]) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert order([4, 2]) == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    assert order([0, 2]) == []


def test_interleaved_until_the_last_source_is_used_up():
    rows = order([1, 3], until=LAST)
    assert rows == [(0, 0), (1, 0), (0, 0), (1, 1), (0, 0), (1, 2), (0, 0)]
    assert order([0, 2], until=LAST) == [(1, 0), (1, 1)]
    assert order([0, 0], until=LAST) == []


def test_weighted_draws_follow_the_weights():
    counts = Counter(source for source, _ in order([40_000] * 3, [1.0, 2.0, 5.0], Mix.weighted, seed=7))
    total = sum(counts.values())
    assert counts[2] == 40_000
    assert counts[0] / total == pytest.approx(1 / 8, abs=0.005)
    assert counts[1] / total == pytest.approx(2 / 8, abs=0.005)
    first, other = (order([100, 100], [1.0, 1.0], Mix.weighted, seed=seed) for seed in (1, 2))
    assert first != other


def test_weighted_until_last_sees_every_row():
    rows = order([3, 50], [0.9, 0.1], Mix.weighted, LAST, seed=1)
    assert {row for source, row in rows if source == 1} == set(range(50))
    for source, length in ((0, 3), (1, 50)):
        seen = [row for number, row in rows if number == source]
        assert seen == [count % length for count in range(len(seen))]


@pytest.mark.parametrize("how", [Mix.interleave, Mix.weighted])
@pytest.mark.parametrize("until", [FIRST, LAST])
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_streaming_has_the_same_order(how, until, seed):
    lengths, weights = [5, 11, 2], [1.0, 3.0, 0.5]
    assert drawn(lengths, weights, how, until, seed) == order(lengths, weights, how, until, seed)


@pytest.mark.parametrize("how", [Mix.interleave, Mix.weighted])
def test_a_drawer_goes_on_from_its_count(how):
    drawer = mix.Drawer([1.0, 2.0, 3.0], how, seed=5)
    whole = [drawer.next() for _ in range(100)]
    again = mix.Drawer([1.0, 2.0, 3.0], how, seed=5, count=37)
    assert [again.next() for _ in range(63)] == whole[37:]
    assert again.count == drawer.count == 100


def test_an_order_is_made_as_it_is_asked_for():
    assert list(islice(mix.order([10**12], [1.0], Mix.concatenate, FIRST, 0), 3)) == [(0, 0), (0, 1), (0, 2)]
    assert len(list(islice(mix.order([10**12] * 2, [1.0, 1.0], Mix.weighted, LAST, 0), 1000))) == 1000
