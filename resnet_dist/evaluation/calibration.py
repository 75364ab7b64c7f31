"""Whether the probabilities of a network mean what they say.

References:
    Guo et al., "On calibration of modern neural networks", ICML 2017 (ECE, section 2; temperature,
    section 4.2).
    Nguyen and O'Connor, "Posterior calibration and exploratory analysis for natural language
    processing models", EMNLP 2015 (bins of equal mass).
    Brier, "Verification of forecasts expressed in terms of probability", 1950.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from resnet_dist.data.arrays import BoolArray, FloatArray, IntArray
from resnet_dist.evaluation.per_image import ImageResults, temperature_grid

NUM_BINS = 15
"""Number of bins of the expected calibration error, as in Guo et al. 2017."""


@dataclass(frozen=True)
class Bin:
    """Images of similar confidence."""

    num: int
    """number of images"""
    correct: int
    """number of images whose most probable class is the label"""
    confidence: float
    """mean probability of the most probable class; 0 for an empty bin"""

    @property
    def accuracy(self) -> float:
        """The fraction of correct images; 0 for an empty bin."""
        if not self.num:
            return 0.0
        return self.correct / self.num


@dataclass(frozen=True)
class TemperatureScaling:
    """Logits divided by a temperature: chosen on one half of the images, measured on the other."""

    temperature: float
    """minimizes the loss on the even rows of the index"""
    num: int
    """number of images on which the figures below are measured: the odd rows"""
    loss_before: float
    loss_after: float
    ece_before: float
    ece_after: float
    is_at_the_edge: bool
    """whether the best temperature is the smallest or the largest that was tried"""


@dataclass(frozen=True)
class Calibration:
    """Calibration of a network on a set of images."""

    num: int
    """number of images that could be decoded; the others have no probabilities"""
    loss: float
    """mean negative log-likelihood of the label, in nats"""
    brier: float
    """mean Brier score, from 0 (best) to 2"""
    bins: list[Bin]
    """bins of equal width, from low to high confidence"""
    bins_of_equal_mass: list[Bin]
    """bins with equal numbers of images, from low to high confidence"""
    scaling: TemperatureScaling | None
    """None with fewer than two images"""

    @property
    def ece(self) -> float:
        """The expected calibration error with bins of equal width, from 0 to 1."""
        return expected_calibration_error(self.bins)

    @property
    def ece_equal_mass(self) -> float:
        """The expected calibration error with bins of equal mass, from 0 to 1."""
        return expected_calibration_error(self.bins_of_equal_mass)


def measure_calibration(results: ImageResults) -> Calibration | None:
    """Measure the calibration of the images that could be decoded.

    Args:
        results: The results of all images.

    Returns:
        The figures; None if no image could be decoded.
    """
    readable = results.select(results.is_readable)
    if not len(readable):
        return None
    confidences = readable.confidences
    hits = readable.is_hit
    return Calibration(
        num=len(readable),
        loss=exact_mean(readable.losses),
        brier=exact_mean(readable.brier),
        bins=equal_width_bins(confidences, hits),
        bins_of_equal_mass=equal_mass_bins(confidences, hits),
        scaling=scale_temperature(readable),
    )


def exact_mean(values: FloatArray) -> float:
    """The mean of at least one value, whose sum is rounded once."""
    return math.fsum(values.tolist()) / len(values)


def equal_width_bins(confidences: FloatArray, hits: BoolArray) -> list[Bin]:
    """Divide [0, 1] into 15 intervals of equal width. Each contains its upper bound.

    Args:
        confidences: The probability of the most probable class of each image, [n].
        hits: Whether that class is the label, [n].
    """
    upper_bounds = np.arange(1, NUM_BINS) / NUM_BINS
    number_of_bin = np.searchsorted(upper_bounds, confidences, side="left")
    bins = []
    for number in range(NUM_BINS):
        members = np.flatnonzero(number_of_bin == number)
        bins.append(_bin(confidences, hits, members))
    return bins


def equal_mass_bins(confidences: FloatArray, hits: BoolArray) -> list[Bin]:
    """Divide the images by their confidence into 15 groups whose sizes differ by at most one.

    Images of equal confidence stay in the order of the index. Arguments as `equal_width_bins`.
    """
    order = np.argsort(confidences, kind="stable")
    bins = []
    for members in np.array_split(order, NUM_BINS):
        bins.append(_bin(confidences, hits, members))
    return bins


def _bin(confidences: FloatArray, hits: BoolArray, members: IntArray) -> Bin:
    """The bin of some images."""
    mean = 0.0
    if len(members):
        mean = exact_mean(confidences[members])
    return Bin(
        num=len(members),
        correct=int(hits[members].sum()),
        confidence=mean,
    )


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """The mean distance between accuracy and confidence, weighted by the images of the bins."""
    num = sum(each.num for each in bins)
    if not num:
        return 0.0
    terms = []
    for each in bins:
        gap = abs(each.accuracy - each.confidence)
        terms.append(each.num * gap)
    return math.fsum(terms) / num


def scale_temperature(results: ImageResults) -> TemperatureScaling | None:
    """Find the best temperature on the even rows, and measure it on the odd ones.

    Rows are ordered by class, so that both halves have the same classes.

    Args:
        results: The results of the images that could be decoded.

    Returns:
        The figures; None if one half has no image.
    """
    is_odd = results.rows % 2 == 1
    fitted = results.select(~is_odd)
    measured = results.select(is_odd)
    if not len(fitted) or not len(measured):
        return None
    grid = temperature_grid()
    means = []
    for number in range(len(grid)):
        means.append(exact_mean(fitted.tempered_losses[:, number]))
    best = int(np.argmin(means))
    hits = measured.is_hit
    before = equal_width_bins(measured.confidences, hits)
    after = equal_width_bins(measured.tempered_confidences[:, best], hits)
    return TemperatureScaling(
        temperature=float(grid[best]),
        num=len(measured),
        loss_before=exact_mean(measured.losses),
        loss_after=exact_mean(measured.tempered_losses[:, best]),
        ece_before=expected_calibration_error(before),
        ece_after=expected_calibration_error(after),
        is_at_the_edge=best in (0, len(grid) - 1),
    )
