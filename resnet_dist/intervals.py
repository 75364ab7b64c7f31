"""How sure an accuracy is: intervals for proportions, from the counts alone.

Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927; Newcombe,
"Interval estimation for the difference between independent proportions", Statistics in Medicine
1998 (method 10).
"""

import math
from dataclasses import dataclass

# Two-sided 95 % of the normal distribution.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """A proportion, or a difference of two, in percent, with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def contains(self, value: float) -> bool:
        """Whether `value` lies inside the bounds."""
        return self.low <= value <= self.high


def wilson_interval(correct: int, num: int) -> Interval:
    """The interval of `correct` out of `num` (at least 1), by Wilson's score method."""
    share = correct / num
    square = _Z * _Z
    scale = 1 + square / num
    center = (share + square / (2 * num)) / scale
    spread = math.sqrt(share * (1 - share) / num + square / (4 * num * num))
    half = _Z * spread / scale
    # Rounding must not push the bounds beyond the proportion itself, 0 or 1.
    low = max(0.0, min(share, center - half))
    high = min(1.0, max(share, center + half))
    return Interval(100 * share, 100 * low, 100 * high)


def difference_interval(first: Interval, second: Interval) -> Interval:
    """The interval of `second` - `first`, two accuracies measured independently of each other.

    For two networks on the same images it is on the safe side: a paired test would be sharper.
    """
    difference = second.value - first.value
    down = math.hypot(second.value - second.low, first.high - first.value)
    up = math.hypot(second.high - second.value, first.value - first.low)
    return Interval(difference, difference - down, difference + up)
