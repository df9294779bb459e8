"""What can be said from a few numbers: mean, spread, an interval around a difference, what a value depends on."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist, fmean, stdev
from typing import TypeVar

_Group = TypeVar("_Group", bound=Hashable)

FEWEST_PAIRS = 3
"""With fewer shared seeds nothing is said of a difference."""

_QUANTILES = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
"""The 97.5 % quantiles of Student's t with 1 to 30 degrees of freedom."""


def t_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t: half the width of a 95 % interval, in standard errors."""
    if degrees <= len(_QUANTILES):
        return _QUANTILES[degrees - 1]
    # The expansion around the normal quantile in powers of 1/degrees (Abramowitz and Stegun, 26.7.5).
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN if one is, or if there are none."""
    return fmean(values) if values else math.nan


def spread(values: Sequence[float]) -> float | None:
    """Return the sample standard deviation, which one value does not have."""
    return stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None


class Verdict(StrEnum):
    """What a difference from the best is called."""

    best = "best"
    better = "better"
    worse = "worse"
    noise = "inside the noise"
    unknown = "unknown"


@dataclass(frozen=True)
class Difference:
    """A value minus another, seed by seed."""

    mean: float
    low: float | None
    """Lower end of the 95 % interval, where there is one."""

    high: float | None
    pairs: int
    """How many seeds both have."""

    @property
    def is_known(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def verdict(self, *, low_is_good: bool) -> Verdict:
        """Say what the difference means for the first of the two."""
        if self.low is None:
            return Verdict.unknown
        if not self.is_known:
            return Verdict.noise
        return Verdict.better if (self.mean < 0) == low_is_good else Verdict.worse


def paired(first: Mapping[_Group, float], second: Mapping[_Group, float]) -> Difference:
    """Compare two by the seeds that both have, with a 95 % interval of Student's t."""
    both = [first[seed] - second[seed] for seed in first if seed in second]
    if not both or not all(map(math.isfinite, both)):  # one seed that came to nothing says something of all
        return Difference(math.nan, None, None, len(both))
    differences = both
    middle = mean(differences)
    if len(differences) < FEWEST_PAIRS:
        return Difference(middle, None, None, len(differences))
    half = t_quantile(len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return Difference(middle, middle - half, middle + half, len(differences))


def share_between(groups: Sequence[Sequence[float]]) -> float:
    """Return which share of the variance of all values lies between the groups' means (one-way ANOVA's eta squared)."""
    values = [value for group in groups for value in group]
    middle = mean(values)
    total = sum((value - middle) ** 2 for value in values)
    between = sum(len(group) * (mean(group) - middle) ** 2 for group in groups)
    return between / total if total > 0 else 0.0


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation; 0 where one of the two does not vary."""
    x, y = _ranks(first), _ranks(second)
    middle_x, middle_y = mean(x), mean(y)
    over_x = sum((value - middle_x) ** 2 for value in x)
    over_y = sum((value - middle_y) ** 2 for value in y)
    both = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return both / math.sqrt(over_x * over_y) if over_x and over_y else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """Return each value's place, equal ones sharing the mean of theirs."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for index in order[start:end]:
            ranks[index] = (start + end - 1) / 2
        start = end
    return ranks
