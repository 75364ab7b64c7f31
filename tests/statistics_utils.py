"""Statistical tests of whether random numbers have the distribution that they should have."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np


def same_distribution(first: np.ndarray, second: np.ndarray, p_value: float = 0.001) -> bool:
    """Two-sample Kolmogorov-Smirnov test. With samples of the same distribution it fails with
    probability `p_value`.
    """
    n = len(first)
    m = len(second)
    grid = np.concatenate([first, second])
    first_below = np.searchsorted(np.sort(first), grid, "right") / n
    second_below = np.searchsorted(np.sort(second), grid, "right") / m
    distance = np.abs(first_below - second_below).max()

    limit = math.sqrt(-math.log(p_value / 2) / 2)
    return distance < limit * math.sqrt((n + m) / (n * m))


def deviation_from_uniform(counts: np.ndarray) -> float:
    """How far chi-square is from its mean for equally likely cells, in standard deviations."""
    expected = counts.sum() / counts.size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = counts.size - 1
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def same_frequencies(first: Iterable[Hashable], second: Iterable[Hashable]) -> bool:
    """Two-sample chi-square test over categories; the limit is four standard deviations."""
    first_counts = Counter(first)
    second_counts = Counter(second)
    categories = list(first_counts | second_counts)
    counts = np.array([[found[c] for c in categories] for found in (first_counts, second_counts)])
    in_category = counts.sum(axis=0)
    in_sample = counts.sum(axis=1, keepdims=True)
    expected = in_sample * in_category / counts.sum()
    chi_square = ((counts - expected) ** 2 / expected).sum()
    freedom = max(len(categories) - 1, 1)
    return chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4
