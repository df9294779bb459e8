"""What is said from a few numbers, against a second computation and numbers worked out by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from ftrun.board import statistics
from ftrun.board.statistics import Verdict


def share_below(quantile: float, degrees: int) -> float:
    """Student's distribution function, by integrating the density."""
    scale = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
    x = np.linspace(0, quantile, 20_001)
    return 0.5 + float(np.trapezoid(scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2), x))


@pytest.mark.parametrize("degrees", [*range(1, 33), 40, 60, 120, 200])
def test_the_quantiles_of_students_t(degrees):
    assert share_below(statistics.t_quantile(degrees), degrees) == pytest.approx(0.975, abs=3e-6)


def test_the_quantile_goes_to_that_of_the_normal():
    assert statistics.t_quantile(120) == pytest.approx(1.9799, abs=5e-5)
    assert statistics.t_quantile(10**7) == pytest.approx(1.959964, abs=1e-6)


def test_a_paired_interval_worked_out_by_hand():
    """Differences 1, 2, 3, 4, 5: mean 3, standard deviation 1.5811, of the mean 0.7071; t is 2.7764."""
    first = {seed: 10.0 + seed for seed in range(1, 6)}
    found = statistics.paired(first, dict.fromkeys(range(1, 6), 10.0))
    assert (found.mean, found.pairs) == (3.0, 5)
    assert (found.low, found.high) == (pytest.approx(3 - 1.96323, abs=1e-4), pytest.approx(3 + 1.96323, abs=1e-4))
    assert found.verdict(low_is_good=True) is Verdict.worse
    assert found.verdict(low_is_good=False) is Verdict.better


def test_pairing_sees_what_the_spread_over_seeds_hides():
    seeds = {seed: 100.0 * seed for seed in range(4)}
    found = statistics.paired({seed: value + 0.1 + seed / 100 for seed, value in seeds.items()}, seeds)
    assert found.is_known


def test_under_three_shared_seeds_nothing_is_known():
    found = statistics.paired({1: 5.0, 2: 5.0, 3: 5.0}, {2: 1.0, 3: 1.0, 4: 1.0})
    assert (found.mean, found.pairs, found.low) == (4.0, 2, None)
    assert found.verdict(low_is_good=True) is Verdict.unknown
    assert math.isnan(statistics.paired({1: 1.0}, {2: 1.0}).mean)
    one_is_nan = statistics.paired({1: math.nan, 2: 1.0, 3: 1.0, 4: 1.0}, dict.fromkeys(range(1, 5), 2.0))
    assert one_is_nan.verdict(low_is_good=True) is Verdict.unknown  # and not better, without the seed that failed


def test_equal_numbers_differ_by_nothing_but_noise():
    same = {1: 2.0, 2: 2.0, 3: 2.0}
    assert statistics.paired(same, same).verdict(low_is_good=True) is Verdict.noise
    assert statistics.paired({1: 3.0, 2: 3.0, 3: 3.0}, same).verdict(low_is_good=True) is Verdict.worse


def test_one_in_twenty_intervals_misses():
    draw = random.Random(1)
    missed = 0
    for _ in range(2000):
        pairs = {seed: draw.gauss(0, 1) for seed in range(4)}
        missed += statistics.paired(pairs, dict.fromkeys(range(4), 0.0)).is_known
    assert 0.04 < missed / 2000 < 0.06


def test_spread_is_that_of_a_sample():
    assert statistics.spread([1.0, 2.0, 3.0, 4.0]) == pytest.approx(1.2909944)
    assert statistics.spread([1.0]) is None
    assert statistics.spread([1.0, math.nan]) is None


def test_the_share_of_variance_between_groups():
    """Groups 1, 3 and 5, 7: 16 of 20 lies between the means 2 and 6."""
    assert statistics.share_between([[1.0, 3.0], [5.0, 7.0]]) == pytest.approx(0.8)
    assert statistics.share_between([[1.0, 2.0], [1.0, 2.0]]) == 0.0
    assert statistics.share_between([[1.0], [1.0]]) == 0.0


def test_rank_correlation():
    assert statistics.rank_correlation([1, 2, 3, 4], [1.0, 10.0, 100.0, 1000.0]) == pytest.approx(1.0)
    assert statistics.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert statistics.rank_correlation([1, 1, 2], [1, 1, 2]) == pytest.approx(1.0)
    assert statistics.rank_correlation([1, 1, 1], [1, 2, 3]) == 0.0
