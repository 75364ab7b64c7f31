"""Where an image is cut: random windows and flips in training, the central crop in evaluation.

All windows are int64 rows (y, x, height, width) in pixels. Training geometry is a pure function of (seed, epoch, row,
image size) and is computed for a whole batch at once: a few microseconds per image.
"""

import numpy as np

from resnet_dist.rng import uniform

TRIES = 10
_PER_SAMPLE = 2 * TRIES + 2                                     # an area and a ratio for each try, then the position


def random_windows(
    seed: int, epoch: int, rows: np.ndarray, heights: np.ndarray, widths: np.ndarray,
    scale: tuple[float, float], ratio: tuple[float, float],
) -> np.ndarray:
    """Random resized crops (Szegedy et al. 2014, section 6) for the samples `rows` of images `heights` x `widths`.

    Returns int64 [n, 4]. A row of it depends on nothing but the seed, the epoch, that sample and its image's size.
    """
    return windows_from_uniforms(uniform(seed, "crop", epoch, rows, _PER_SAMPLE), heights, widths, scale, ratio)


def windows_from_uniforms(
    numbers: np.ndarray, heights: np.ndarray, widths: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float],
) -> np.ndarray:
    """The law of torchvision's `RandomResizedCrop.get_params` on uniform `numbers` [n, 22] in [0, 1); int64 [n, 4].

    Ten tries of (area uniform in `scale` times the image's, width over height log-uniform in `ratio`); the first window
    that fits is placed uniformly. Where none fits: the largest central window with its ratio clamped into `ratio`.
    Sides are rounded half to even, as torchvision's are.
    """
    heights, widths = np.asarray(heights, dtype=np.int64)[:, None], np.asarray(widths, dtype=np.int64)[:, None]
    areas = heights * widths * (scale[0] + (scale[1] - scale[0]) * numbers[:, 0:2 * TRIES:2])
    low, high = np.log(ratio[0]), np.log(ratio[1])
    ratios = np.exp(low + (high - low) * numbers[:, 1:2 * TRIES:2])
    wide, tall = np.rint(np.sqrt(areas * ratios)), np.rint(np.sqrt(areas / ratios))
    fits = (wide > 0) & (wide <= widths) & (tall > 0) & (tall <= heights)
    first = fits.argmax(axis=1)[:, None]
    found = fits.any(axis=1)

    heights, widths = heights[:, 0], widths[:, 0]
    fallback_height, fallback_width = _clamped_sides(heights, widths, ratio)
    h = np.where(found, np.take_along_axis(tall, first, 1)[:, 0], fallback_height).astype(np.int64)
    w = np.where(found, np.take_along_axis(wide, first, 1)[:, 0], fallback_width).astype(np.int64)
    y = np.where(found, np.floor(numbers[:, -2] * (heights - h + 1)), (heights - h) // 2)
    x = np.where(found, np.floor(numbers[:, -1] * (widths - w + 1)), (widths - w) // 2)
    return np.stack([y.astype(np.int64), x.astype(np.int64), h, w], axis=1)


def _clamped_sides(heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the largest window inside each image whose width over height lies in `ratio`.

    torchvision does not look at the result again: a strip of one pixel gives a side of at least one here, where
    torchvision's rounding could give none.
    """
    actual = widths / heights
    tall = np.where(actual < ratio[0], np.minimum(np.rint(widths / ratio[0]), heights), heights)
    wide = np.where(actual > ratio[1], np.minimum(np.rint(heights * ratio[1]), widths), widths)
    return np.maximum(tall, 1), np.maximum(wide, 1)


def flips(seed: int, epoch: int, rows: np.ndarray, probability: float) -> np.ndarray:
    """Whether each of the samples `rows` is mirrored: bool [n]."""
    return uniform(seed, "flip", epoch, rows, 1)[:, 0] < probability


def resized_sides(height: int, width: int, shorter_side: int) -> tuple[int, int]:
    """(height, width) after the shorter side is brought to `shorter_side`; the other one is truncated.

    These are the sides of torchvision's `Resize(shorter_side)`.
    """
    short = min(height, width)
    return shorter_side * height // short, shorter_side * width // short


def center_offset(side: int, crop: int) -> int:
    """Where a central crop of `crop` pixels begins on a side of `side` pixels.

    Rounded half to even as in torchvision's `center_crop`. Negative where the side is shorter than the crop: torchvision
    then pads with black, the odd pixel after the image, and so do we.
    """
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)
