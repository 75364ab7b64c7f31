"""Confidence intervals for accuracies, computed from the counts alone.

References:
    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    Newcombe, "Interval estimation for the difference between independent proportions: comparison
    of eleven methods", Statistics in Medicine 1998 (method 10).
"""

import math
from dataclasses import dataclass

# The 97.5th percentile of the normal distribution, for two-sided intervals of 95 %.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A proportion, or a difference of two proportions, with its 95 % confidence interval.

    All values are in percent.
    """

    value: float
    """the measured proportion or difference"""
    low: float
    """lower bound"""
    high: float
    """upper bound"""

    def contains(self, value: float) -> bool:
        """Whether `value` lies within the bounds."""
        return self.low <= value <= self.high


def wilson_interval(correct: int, num: int) -> Interval:
    """The confidence interval of a proportion by Wilson's score method.

    Args:
        correct: Number of correct samples.
        num: Number of samples, at least 1.

    Returns:
        The proportion and its bounds, in percent.
    """
    share = correct / num
    z_squared = _Z * _Z
    scale = 1 + z_squared / num
    center = (share + z_squared / (2 * num)) / scale
    variance = share * (1 - share) / num
    correction = z_squared / (4 * num * num)
    half_width = _Z * math.sqrt(variance + correction) / scale
    low = center - half_width
    high = center + half_width
    # Rounding must not put a share of 0 or 1 outside of its own interval.
    low = max(0.0, min(share, low))
    high = min(1.0, max(share, high))
    return Interval(100 * share, 100 * low, 100 * high)


def difference_interval(first: Interval, second: Interval) -> Interval:
    """The confidence interval of `second` - `first`, by Newcombe's method 10.

    The two accuracies must be measured independently. For two networks on the same images the
    interval is wider than necessary; a paired test would be more precise.

    Args:
        first: The interval of the accuracy that is subtracted.
        second: The interval of the other accuracy.

    Returns:
        The difference and its bounds, in percent.
    """
    difference = second.value - first.value
    below_second = second.value - second.low
    above_second = second.high - second.value
    below_first = first.value - first.low
    above_first = first.high - first.value
    down = math.hypot(below_second, above_first)
    up = math.hypot(above_second, below_first)
    return Interval(
        value=difference,
        low=difference - down,
        high=difference + up,
    )
