"""Intervals of proportions against published values."""

import pytest

from resnet_dist.evaluation.intervals import difference_interval, wilson_interval

# Published values have four digits.
TOLERANCE = 6e-5


def bounds(interval):
    return (interval.low / 100, interval.high / 100)


def test_wilson_against_published_values():
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I."""
    for correct, num, expected in (
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ):
        interval = wilson_interval(correct, num)
        assert bounds(interval) == pytest.approx(expected, abs=TOLERANCE)


def test_difference_against_published_values():
    """Newcombe 1998, "Interval estimation for the difference", table II, method 10."""
    for first, second, expected in (
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ):
        of_first = wilson_interval(*first)
        of_second = wilson_interval(*second)
        interval = difference_interval(of_second, of_first)
        assert bounds(interval) == pytest.approx(expected, abs=TOLERANCE)


def test_all_and_none_stay_in_range():
    for num in (1, 3, 10**7):
        none = wilson_interval(0, num)
        every = wilson_interval(num, num)
        assert none.low == 0
        assert 0 < none.high < 100
        assert every.high == 100
