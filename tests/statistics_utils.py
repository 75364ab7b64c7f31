"""Statistical tests of whether random numbers have the distribution that they should have."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable

import numpy as np
from scipy import stats


def same_distribution(first: np.ndarray, second: np.ndarray, p_value: float = 0.001) -> bool:
    """Two-sample Kolmogorov-Smirnov test. With samples of the same distribution it fails with
    probability `p_value`.
    """
    test = stats.ks_2samp(first, second, method="asymp")
    return bool(test.pvalue > p_value)


def deviation_from_uniform(counts: np.ndarray) -> float:
    """How far chi-square is from its mean for equally likely cells, in standard deviations."""
    chi_square = stats.chisquare(counts, axis=None).statistic
    freedom = counts.size - 1
    std = math.sqrt(2 * freedom)
    deviation = float(chi_square - freedom) / std
    return deviation


def same_frequencies(first: Iterable[Hashable], second: Iterable[Hashable]) -> bool:
    """Two-sample chi-square test over categories; the limit is four standard deviations."""
    first_counts = Counter(first)
    second_counts = Counter(second)
    categories = list(first_counts | second_counts)
    table = [
        [first_counts[category] for category in categories],
        [second_counts[category] for category in categories],
    ]
    test = stats.chi2_contingency(table, correction=False)
    freedom = max(test.dof, 1)
    std = math.sqrt(2 * freedom)
    limit = freedom + 4 * std + 4
    return bool(test.statistic < limit)
