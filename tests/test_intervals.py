"""Intervals of proportions against published values."""

import pytest

from resnet_dist.evaluation.intervals import difference_interval, wilson_interval


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
        assert bounds(wilson_interval(correct, num)) == pytest.approx(expected, abs=6e-5)


def test_difference_against_published_values():
    """Newcombe 1998, "Interval estimation for the difference", table II, method 10."""
    for (first, n1), (second, n2), expected in (
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 10), (0.6075, 1.0)),
    ):
        interval = difference_interval(wilson_interval(second, n2), wilson_interval(first, n1))
        assert bounds(interval) == pytest.approx(expected, abs=6e-5)


def test_all_and_none_stay_in_range():
    for num in (1, 3, 10**7):
        assert wilson_interval(0, num).low == 0
        assert wilson_interval(num, num).high == 100
        assert 0 < wilson_interval(0, num).high < 100
