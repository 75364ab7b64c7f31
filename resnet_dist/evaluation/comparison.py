"""Whether two networks differ by more than chance.

References:
    McNemar, "Note on the sampling error of the difference between correlated proportions or
    percentages", Psychometrika 1947. The exact form is the sign test on the discordant images.
    Student, "The probable error of a mean", Biometrika 1908.
    Abramowitz and Stegun, "Handbook of mathematical functions", 26.7.3 and 26.7.4 (the distribution
    of Student's t for integer degrees of freedom).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from resnet_dist.data.arrays import BoolArray
from resnet_dist.evaluation.intervals import Interval

SIGNIFICANCE = 0.05
"""A difference is called one if chance alone gives it with less than this probability."""


@dataclass(frozen=True)
class PairedTest:
    """Two networks on the same images."""

    num: int
    """number of images"""
    only_first: int
    """images that only the first network classifies correctly"""
    only_second: int
    """images that only the second network classifies correctly"""
    p_value: float
    """probability of a difference at least as large if the networks are equally good"""

    @property
    def is_different(self) -> bool:
        """Whether the difference is larger than chance explains."""
        return self.p_value < SIGNIFICANCE

    @property
    def points(self) -> float:
        """The accuracy of the second network minus that of the first, in percentage points."""
        return 100 * (self.only_second - self.only_first) / self.num


def paired_test(first: BoolArray, second: BoolArray) -> PairedTest:
    """McNemar's exact test, two-sided.

    Args:
        first: Whether the first network is correct, for each of n images.
        second: The same for the second network.
    """
    assert len(first) == len(second) > 0, "both networks need the same images"
    only_first = int(np.sum(first & ~second))
    only_second = int(np.sum(second & ~first))
    return PairedTest(
        num=len(first),
        only_first=only_first,
        only_second=only_second,
        p_value=sign_test(only_first, only_second),
    )


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of the exact sign test.

    Args:
        wins: Number of images on which one network is better.
        losses: Number of images on which it is worse.

    Returns:
        Twice the probability of at most min(wins, losses) heads in wins + losses tosses of a fair
        coin, at most 1. The sum is exact; it is rounded once.
    """
    num_tosses = wins + losses
    combinations = 1
    total = 1
    for heads in range(1, min(wins, losses) + 1):
        combinations = combinations * (num_tosses - heads + 1) // heads
        total += combinations
    p_value = (2 * total) / (1 << num_tosses)
    return min(1.0, p_value)


@dataclass(frozen=True)
class SeedSummary:
    """The results of runs that differ in their seed alone."""

    num: int
    """number of runs, at least 2"""
    mean: float
    deviation: float
    """standard deviation of one run, with num - 1 in the denominator"""
    interval: Interval
    """the mean with its 95 % confidence interval, by Student's t"""


def summarize_seeds(values: Sequence[float]) -> SeedSummary:
    """Mean, deviation and interval of the results of at least two runs.

    The interval says how well the mean over all seeds is known. It takes the results as normally
    distributed.
    """
    num = len(values)
    assert num >= 2, "one run has no deviation"
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values)
    half_width = student_quantile(num - 1) * deviation / math.sqrt(num)
    interval = Interval(mean, mean - half_width, mean + half_width)
    return SeedSummary(num, mean, deviation, interval)


def summarize_accuracies(values: Sequence[float]) -> SeedSummary:
    """As `summarize_seeds`, for percentages: the interval is cut to what is possible, 0 to 100."""
    summary = summarize_seeds(values)
    interval = summary.interval
    low = max(0.0, interval.low)
    high = min(100.0, interval.high)
    return replace(summary, interval=Interval(interval.value, low, high))


def student_quantile(freedom: int) -> float:
    """The 97.5th percentile of Student's t distribution.

    Args:
        freedom: Degrees of freedom, at least 1.
    """
    low = 0.0
    # With one degree of freedom it is 12.7, and less with more.
    high = 13.0
    for _ in range(60):
        middle = (low + high) / 2
        if _two_sided_probability(middle, freedom) < 1 - SIGNIFICANCE:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _two_sided_probability(t: float, freedom: int) -> float:
    """The probability that a variable of Student's t distribution lies in [-t, t]."""
    angle = math.atan(t / math.sqrt(freedom))
    cos_squared = math.cos(angle) ** 2
    is_odd = freedom % 2 == 1
    # The series has a term for every second degree of freedom.
    term = math.cos(angle) if is_odd else 1.0
    first = 3 if is_odd else 2
    series = 0.0
    for number in range(first, freedom + 1, 2):
        series += term
        term *= cos_squared * (number - 1) / number
    series *= math.sin(angle)
    if is_odd:
        return 2 / math.pi * (angle + series)
    return series


def difference_of_means(first: Sequence[float], second: Sequence[float]) -> Interval:
    """The mean of `second` minus that of `first`, with its 95 % interval by Welch's t test.

    The degrees of freedom are rounded down, which makes the interval wider.

    Args:
        first: At least two results.
        second: At least two results.
    """
    value = statistics.fmean(second) - statistics.fmean(first)
    variance_of_first = statistics.variance(first) / len(first)
    variance_of_second = statistics.variance(second) / len(second)
    total = variance_of_first + variance_of_second
    if total == 0:
        return Interval(value, value, value)
    parts = variance_of_first**2 / (len(first) - 1) + variance_of_second**2 / (len(second) - 1)
    freedom = max(1, math.floor(total**2 / parts))
    half_width = student_quantile(freedom) * math.sqrt(total)
    return Interval(value, value - half_width, value + half_width)
