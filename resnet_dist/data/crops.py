"""Where an image is cut: random windows and flips in training, the central crop in evaluation.

All windows are int64 rows (y, x, height, width) in pixels. Both kinds of geometry have one form, so that one decoder
does both: decode a window, resize it, take a square out of the result, mirror it. Training geometry is a pure function
of (seed, epoch, row, image size) and is computed for a whole batch at once: a few microseconds per image.
"""

from dataclasses import dataclass

import numpy as np

from resnet_dist.rng import uniform

TRIES = 10
_PER_SAMPLE = 2 * TRIES + 2                                     # an area and a ratio for each try, then the position


@dataclass(frozen=True)
class Geometry:
    """What is done with each image of a batch, in this order; all int64, in pixels."""

    windows: np.ndarray
    """[n, 4]: the (y, x, height, width) of the image that is decoded"""
    sizes: np.ndarray
    """[n, 2]: the (height, width) that the window is resized to"""
    offsets: np.ndarray
    """[n, 2]: the (y, x) in the resized window where the square begins; negative means black padding"""
    flips: np.ndarray
    """[n]: 1 where the square is mirrored, else 0"""


def train_geometry(
    seed: int, epoch: int, rows: np.ndarray, heights: np.ndarray, widths: np.ndarray, *,
    crop_size: int, scale: tuple[float, float], ratio: tuple[float, float], flip_probability: float,
) -> Geometry:
    """Random resized crops and flips for the samples `rows`, whose images are `heights` x `widths`."""
    windows = random_windows(seed, epoch, rows, heights, widths, scale, ratio)
    mirrored = flips(seed, epoch, rows, flip_probability).astype(np.int64)
    return Geometry(windows, np.full((len(windows), 2), crop_size), np.zeros((len(windows), 2), np.int64), mirrored)


def val_geometry(heights: np.ndarray, widths: np.ndarray, *, resize_size: int, crop_size: int) -> Geometry:
    """The whole image, its shorter side resized to `resize_size`, and the central square of `crop_size`."""
    windows = np.array([(0, 0, height, width) for height, width in zip(heights, widths, strict=True)], np.int64)
    sizes = np.array([resized_sides(int(h), int(w), resize_size) for _, _, h, w in windows], np.int64)
    offsets = np.array([[center_offset(int(side), crop_size) for side in pair] for pair in sizes], np.int64)
    return Geometry(windows, sizes, offsets, np.zeros(len(windows), np.int64))


def random_windows(
    seed: int, epoch: int, rows: np.ndarray, heights: np.ndarray, widths: np.ndarray,
    scale: tuple[float, float], ratio: tuple[float, float],
) -> np.ndarray:
    """Random resized crops (Szegedy et al. 2014, section 6) for the samples `rows` of images `heights` x `widths`.

    Returns int64 [n, 4]. A row of it depends on nothing but the seed, the epoch, that sample and its image's size.
    """
    return windows_from_uniforms(uniform(seed, "crop", epoch, rows, _PER_SAMPLE), heights, widths, scale, ratio)


def windows_from_uniforms(
    numbers: np.ndarray, heights: np.ndarray, widths: np.ndarray,
    scale: tuple[float, float], ratio: tuple[float, float],
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


def _clamped_sides(
    heights: np.ndarray, widths: np.ndarray, ratio: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the largest window inside each image whose width over height lies in `ratio`.

    At least one pixel, where torchvision's rounding could give none (a strip of one pixel, ratios far from 1).
    """
    actual = widths / heights
    tall = np.where(actual < ratio[0], np.rint(widths / ratio[0]), heights)
    wide = np.where(actual > ratio[1], np.rint(heights * ratio[1]), widths)
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

    Rounded half to even as in torchvision's `center_crop`. Negative where the side is shorter than the crop: there
    torchvision pads with black, the odd pixel after the image, and so do we.
    """
    return round((side - crop) / 2) if side >= crop else -((crop - side) // 2)
