"""Corrupted images: ImageNet-C and CIFAR-10-C (Hendrycks and Dietterich 2019).

"Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019. Both
have 15 corruptions with five severities each. Four more ("extra") corruptions, which serve to
choose settings, are not part of the result.
"""

import os
from collections.abc import Iterable, Mapping

ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""The error of AlexNet on each corruption of ImageNet-C, the average over the five severities, as
its authors publish it (github.com/hendrycks/robustness; rounded in table 1 of the paper)."""

SEVERITIES = (1, 2, 3, 4, 5)

# The folders of the archives of ImageNet-C, which some keep.
_GROUPS = ("", "noise", "blur", "weather", "digital")


def part_name(corruption: str, severity: int) -> str:
    """The name of one of the 75 parts: "fog/3"."""
    return f"{corruption}/{severity}"


def find_corruption(folder: str, corruption: str) -> str:
    """The folder of a corruption of ImageNet-C.

    Args:
        folder: The folder of ImageNet-C. The corruptions lie in it or in the folders noise, blur,
            weather and digital.
        corruption: One of `ALEXNET_ERRORS`.

    Raises:
        ValueError: There is no such folder.
    """
    for group in _GROUPS:
        path = os.path.join(folder, group, corruption)
        if os.path.isdir(path):
            return path
    raise ValueError(f"{folder} has no folder {corruption}/ with the severities 1 to 5")


def average_errors(errors: Mapping[str, float]) -> dict[str, float]:
    """The error of each corruption that has all five severities.

    Args:
        errors: The error of each part, in [0, 1], by `part_name`.

    Returns:
        The average over the severities, in [0, 1], by corruption.
    """
    averages = {}
    for corruption in ALEXNET_ERRORS:
        parts = [part_name(corruption, severity) for severity in SEVERITIES]
        if all(part in errors for part in parts):
            averages[corruption] = sum(errors[part] for part in parts) / len(parts)
    return averages


def mean_corruption_error(averages: Mapping[str, float]) -> float:
    """The mean corruption error (mCE) on ImageNet-C, in percent; AlexNet has 100.

    The error of each corruption is divided by that of AlexNet; the mCE is the mean of the 15
    quotients (section 4.3 of the paper).

    Args:
        averages: What `average_errors` returned, with all corruptions.
    """
    ratios = [averages[name] / error for name, error in ALEXNET_ERRORS.items()]
    return 100 * sum(ratios) / len(ratios)


def mean_error(averages: Mapping[str, float]) -> float:
    """The mean error over the 15 corruptions in percent, as it is reported for CIFAR-10-C."""
    return 100 * sum(averages.values()) / len(averages)


def missing_corruptions(averages: Iterable[str]) -> list[str]:
    """The corruptions that are not among those of `average_errors`."""
    present = set(averages)
    return [name for name in ALEXNET_ERRORS if name not in present]
