"""The result of an evaluation for each image, in the order of the index.

Every figure about an evaluation, apart from the counts of `metrics.py`, is computed from these rows
on the main process. The rows are the same on any number of ranks, and so are the figures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from resnet_dist.data.arrays import BoolArray, FloatArray, IntArray

MOST_TOP_CLASSES = 5
"""How many of the most probable classes are kept for each image."""

SMALLEST_TEMPERATURE = 0.2
LARGEST_TEMPERATURE = 5.0
NUM_TEMPERATURES = 129


def temperature_grid() -> FloatArray:
    """The temperatures that are tried, float64 [129], in equal ratios of 2.5 %.

    The middle one is 1, which changes nothing.
    """
    low = np.log(SMALLEST_TEMPERATURE)
    high = np.log(LARGEST_TEMPERATURE)
    grid: FloatArray = np.exp(np.linspace(low, high, NUM_TEMPERATURES))
    grid[NUM_TEMPERATURES // 2] = 1.0
    return grid


@dataclass(frozen=True, eq=False)
class ImageResults:
    """What a network says about each of n images.

    Equal logits rank by class id, as in `metrics.Counts`.
    """

    rows: IntArray
    """int64 [n], ascending: the rows of the data set's index"""
    labels: IntArray
    """int64 [n]: class ids"""
    is_readable: BoolArray
    """[n]: whether the image could be decoded; if not, it counts as a miss"""
    is_finite: BoolArray
    """[n]: whether all logits are finite"""
    top_classes: IntArray
    """int64 [n, k]: the most probable classes, the best first; k is 5 or the number of classes"""
    top_probabilities: FloatArray
    """float32 [n, k]"""
    losses: FloatArray
    """float32 [n]: the cross-entropy in nats, which is minus the log-probability of the label"""
    brier: FloatArray
    """float32 [n]: the sum over the classes of the squared difference between the probability and
    the target, which is 1 for the label and 0 for the others"""
    tempered_losses: FloatArray
    """float32 [n, T]: the loss at each temperature of `temperature_grid`"""
    tempered_confidences: FloatArray
    """float32 [n, T]: the largest probability at each temperature"""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def is_hit(self) -> BoolArray:
        """[n]: whether the most probable class is the label."""
        first = self.top_classes[:, 0]
        hit: BoolArray = (first == self.labels) & self._may_be_correct
        return hit

    @property
    def is_top5_hit(self) -> BoolArray:
        """[n]: whether the label is among the five most probable classes."""
        among = (self.top_classes == self.labels[:, None]).any(axis=1)
        hit: BoolArray = among & self._may_be_correct
        return hit

    @property
    def confidences(self) -> FloatArray:
        """[n]: the probability of the most probable class."""
        first: FloatArray = self.top_probabilities[:, 0]
        return first

    @property
    def _may_be_correct(self) -> BoolArray:
        may_be: BoolArray = self.is_readable & self.is_finite
        return may_be

    def select(self, chosen: BoolArray) -> "ImageResults":
        """The results of some images.

        Args:
            chosen: Whether each image is kept, [n].
        """
        columns = [getattr(self, field.name)[chosen] for field in fields(self)]
        return ImageResults(*columns)


def join_results(parts: Sequence[ImageResults]) -> ImageResults:
    """Put the results of several batches or ranks together, in the order of the index.

    Args:
        parts: At least one; no image is in two of them.
    """
    rows = np.concatenate([part.rows for part in parts])
    order = np.argsort(rows, kind="stable")
    assert len(np.unique(rows)) == len(rows), "an image was evaluated twice"
    columns = []
    for field in fields(ImageResults):
        column = np.concatenate([getattr(part, field.name) for part in parts])
        columns.append(column[order])
    return ImageResults(*columns)
