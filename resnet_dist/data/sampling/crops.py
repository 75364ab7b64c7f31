"""Where an image is cut: random windows and flips in training, central squares in evaluation.

All windows are int64 rows (y, x, height, width) in pixels. All kinds of geometry have one form, so
that one decoder does them all: decode a window, resize it, take a square out of the result (or
several, each of its own resizing), mirror it. Training geometry is a pure function of (seed, epoch,
row, image size) and is computed for a whole batch at once: a few microseconds per image.
"""

from dataclasses import dataclass

import numpy as np

from resnet_dist.config import DataConfig
from resnet_dist.rng import uniform

TRIES = 10
_PER_SAMPLE = 2 * TRIES + 2  # an area and a ratio for each try, then the position
_SIDE_STEP = 32  # progressive sides are multiples of it


@dataclass(frozen=True)
class View:
    """How one square is taken out of the decoded window of each image of a batch; int64, in pixels."""

    sizes: np.ndarray
    """[n, 2]: the (height, width) that the window is resized to"""
    offsets: np.ndarray
    """[n, 2]: the (y, x) in the resized window where the square begins; what lies outside of it is
    black"""
    side: int
    """of the square"""


@dataclass(frozen=True)
class Geometry:
    """What is done with each image of a batch, in this order."""

    windows: np.ndarray
    """int64 [n, 4]: the (y, x, height, width) of the image that is decoded"""
    views: tuple[View, ...]
    """the squares: one in training, one or more in evaluation"""
    flips: np.ndarray
    """int64 [n]: 1 where the squares are mirrored, else 0"""


def train_side(epoch: int, config: DataConfig) -> int:
    """Side of the training crop in an epoch: `train_crop_size`, or what progressive resizing gives,
    in pixels.

    Between the two `progressive_epochs` it rises linearly, rounded to a multiple of 32 (Leclerc et
    al. 2023, FFCV).
    """
    start, (begin, end) = config.progressive_start_size, config.progressive_epochs
    if not start or epoch >= end:
        return config.train_crop_size
    progress = max(0.0, (epoch - begin) / max(end - begin, 1e-9))
    side = round((start + (config.train_crop_size - start) * progress) / _SIDE_STEP) * _SIDE_STEP
    return min(config.train_crop_size, max(_SIDE_STEP, side))


def train_geometry(
    seed: int,
    epoch: int | np.ndarray,
    rows: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    side: int,
    config: DataConfig,
) -> Geometry:
    """Random crops of `side` pixels (`config.train_crop`) and flips of the samples `rows`: images
    `heights` x `widths`.

    `epoch` is one number, or one for each sample (rng.draw).
    """
    if config.train_crop == "random_resized":
        windows = random_windows(
            seed, epoch, rows, heights, widths, config.crop_scale, config.crop_ratio
        )
        sizes, offsets = np.full((len(rows), 2), side), np.zeros((len(rows), 2), np.int64)
    else:
        windows, numbers = whole_windows(heights, widths), uniform(seed, "crop", epoch, rows, 3)
        low, high = config.scale_jitter if config.train_crop == "scale_jitter" else (side, side)
        sizes = resized_sides(
            heights, widths, low + np.floor(numbers[:, 0] * (high - low + 1)).astype(np.int64)
        )
        border = config.pad if config.train_crop == "pad" else 0
        room = sizes - side + 2 * border + 1  # places for the square along each side
        offsets = np.floor(numbers[:, 1:] * room).astype(np.int64) - border
    mirrored = flips(seed, epoch, rows, config.flip_probability).astype(np.int64)
    return Geometry(windows, (View(sizes, offsets, side),), mirrored)


def val_geometry(heights: np.ndarray, widths: np.ndarray, config: DataConfig) -> Geometry:
    """The squares of evaluation, taken out of the whole image, whose shorter side is resized.

    One central square; or its four corners and the centre (`val_crops` ten, whose mirror images are
    taken on the device); or, for each of `val_scales`, the central square of the image resized to
    that shorter side. Where a side is shorter than the square, it is padded with black, the odd
    pixel after the image (torchvision).
    """
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)] if config.val_crops == "ten" else []
    scales, views = (
        [(side, side) for side in config.val_scales]
        or [(config.val_resize_size, config.val_crop_size)],
        [],
    )
    for resize_size, side in scales:
        sizes = resized_sides(heights, widths, resize_size)
        last = sizes - side  # negative where it is padded, never with corners
        center = np.where(last >= 0, np.rint(last / 2), np.trunc(last / 2)).astype(np.int64)
        views += [
            View(sizes, offsets, side)
            for offsets in (center, *(last * np.array(corner) for corner in corners))
        ]
    return Geometry(whole_windows(heights, widths), tuple(views), np.zeros(len(heights), np.int64))


def whole_windows(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """The windows that are the images themselves: int64 [n, 4]."""
    zeros = np.zeros(len(heights), np.int64)
    return np.stack([zeros, zeros, heights, widths], axis=1).astype(np.int64)


def random_windows(
    seed: int,
    epoch: int | np.ndarray,
    rows: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Random resized crops (Szegedy et al. 2014, section 6) for the samples `rows` of images
    `heights` x `widths`.

    Returns int64 [n, 4]. A row of it depends on nothing but the seed, the epoch, that sample and
    its image's size.
    """
    return windows_from_uniforms(
        uniform(seed, "crop", epoch, rows, _PER_SAMPLE), heights, widths, scale, ratio
    )


def windows_from_uniforms(
    numbers: np.ndarray,
    heights: np.ndarray,
    widths: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """The law of torchvision's `RandomResizedCrop.get_params` on uniform `numbers` [n, 22] in [0,
    1); int64 [n, 4].

    Ten tries of (area uniform in `scale` times the image's, width over height log-uniform in
    `ratio`); the first window that fits is placed uniformly. Where none fits: the largest central
    window with its ratio clamped into `ratio`, of at least one pixel, where torchvision's could
    have none. Sides are rounded half to even, as torchvision's are.
    """
    images = np.stack([heights, widths], axis=1).astype(np.int64)
    areas = images.prod(axis=1, keepdims=True) * (
        scale[0] + (scale[1] - scale[0]) * numbers[:, 0 : 2 * TRIES : 2]
    )
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * numbers[:, 1 : 2 * TRIES : 2])
    tries = np.rint(np.sqrt(np.stack([areas / ratios, areas * ratios], axis=2)))
    fits = ((tries > 0) & (tries <= images[:, None])).all(axis=2)
    found = fits.any(axis=1, keepdims=True)
    clamped = np.minimum(
        images, np.stack([images[:, 1] / ratio[0], images[:, 0] * ratio[1]], axis=1)
    )
    sides = np.where(
        found, tries[np.arange(len(tries)), fits.argmax(axis=1)], np.maximum(np.rint(clamped), 1)
    )
    room = images - sides
    return np.hstack(
        [np.where(found, np.floor(numbers[:, -2:] * (room + 1)), room // 2), sides]
    ).astype(np.int64)


def flips(seed: int, epoch: int | np.ndarray, rows: np.ndarray, probability: float) -> np.ndarray:
    """Whether each of the samples `rows` is mirrored: bool [n]."""
    return uniform(seed, "flip", epoch, rows, 1)[:, 0] < probability


def resized_sides(heights: np.ndarray, widths: np.ndarray, shorter: int | np.ndarray) -> np.ndarray:
    """(height, width) after the shorter side is brought to `shorter` (one, or [n]): int64 [n, 2].

    The other one is truncated, as by torchvision's `Resize(shorter)`.
    """
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    return np.reshape(shorter, (-1, 1)) * sides // sides.min(axis=1, keepdims=True)
