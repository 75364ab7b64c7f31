"""Which classes a network confuses: accuracy per class, and a sparse confusion matrix."""

from dataclasses import dataclass

import numpy as np

from resnet_dist.evaluation.calibration import exact_mean
from resnet_dist.evaluation.per_image import ImageResults


@dataclass(frozen=True)
class ClassResult:
    """The images of one class."""

    label: int
    """class id"""
    num: int
    """number of images of the class"""
    correct1: int
    correct5: int
    confidence: float
    """mean probability of the most probable class, whichever it is"""
    num_predicted: int
    """number of images of any class for which the network predicts this class"""


@dataclass(frozen=True)
class Confusion:
    """One cell of the confusion matrix that is not on its diagonal."""

    label: int
    """class id of the images"""
    predicted: int
    """class id that the network predicts"""
    num: int
    """number of images"""


def results_per_class(results: ImageResults, num_classes: int) -> list[ClassResult]:
    """Count the images of each class.

    Args:
        results: The results of all images.
        num_classes: Number of classes of the network.

    Returns:
        The classes that have images, the lowest top-1 accuracy first. Classes of equal accuracy are
        in the order of their ids.
    """
    predicted = np.bincount(results.top_classes[:, 0], minlength=num_classes)
    hits = results.is_hit
    top5_hits = results.is_top5_hit
    confidences = results.confidences
    classes = []
    for label in np.unique(results.labels).tolist():
        members = np.flatnonzero(results.labels == label)
        classes.append(
            ClassResult(
                label=label,
                num=len(members),
                correct1=int(hits[members].sum()),
                correct5=int(top5_hits[members].sum()),
                confidence=exact_mean(confidences[members]),
                num_predicted=int(predicted[label]),
            )
        )
    classes.sort(key=_accuracy)
    return classes


def _accuracy(result: ClassResult) -> float:
    """The sort key of classes."""
    return result.correct1 / result.num


def find_confusions(results: ImageResults, num_classes: int) -> list[Confusion]:
    """The cells of the confusion matrix that are neither zero nor on the diagonal.

    Images that could not be decoded are left out: the network has not seen them.

    Args:
        results: The results of all images.
        num_classes: Number of classes of the network.

    Returns:
        The cells with most images first; equal ones in the order of their class ids.
    """
    seen = results.select(results.is_readable)
    predicted = seen.top_classes[:, 0]
    is_wrong = predicted != seen.labels
    cells = seen.labels[is_wrong] * num_classes + predicted[is_wrong]
    unique, counts = np.unique(cells, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    confusions = []
    for place in order.tolist():
        label, wrong_class = divmod(int(unique[place]), num_classes)
        confusions.append(Confusion(label, wrong_class, int(counts[place])))
    return confusions
