"""Where images are cropped: random windows and flips in training, central squares in evaluation.

A window is a row (y, x, height, width) in pixels, int64. Training and evaluation have one form of
geometry, so that one decoder serves both: decode a window, resize it, take one or more squares out
of the result, mirror them. Training geometry is a pure function of (seed, epoch, row, image size),
computed for a whole batch at once: a few microseconds per image.
"""

from dataclasses import dataclass

import numpy as np

from resnet_dist.config import DataConfig
from resnet_dist.data.arrays import BoolArray, FloatArray, IntArray
from resnet_dist.rng import uniform

TRIES = 10
"""Tries of torchvision's RandomResizedCrop."""

# An area and a ratio for each try, then the position.
_NUMBERS_PER_SAMPLE = 2 * TRIES + 2

# Progressive sides are multiples of it.
_SIDE_STEP = 32


@dataclass(frozen=True)
class View:
    """How one square is taken out of the decoded window of each image; int64, in pixels."""

    sizes: IntArray
    """[n, 2]: the (height, width) that the window is resized to"""
    offsets: IntArray
    """[n, 2]: the (y, x) in the resized window where the square begins; what lies outside of the
    window is black"""
    side: int
    """side of the square"""


@dataclass(frozen=True)
class Geometry:
    """What is done with each image of a batch, in this order."""

    windows: IntArray
    """int64 [n, 4]: the (y, x, height, width) of the image that is decoded"""
    views: tuple[View, ...]
    """the squares: one in training, one or more in evaluation"""
    flips: IntArray
    """int64 [n]: 1 where the squares are mirrored, else 0"""


def train_side(epoch: int, config: DataConfig) -> int:
    """Side of the training crop in an epoch, in pixels.

    It is `train_crop_size`. With progressive resizing it rises linearly between the two
    `progressive_epochs`, rounded to a multiple of 32 (Leclerc et al. 2023, FFCV).
    """
    start = config.progressive_start_size
    begin, end = config.progressive_epochs
    if not start or epoch >= end:
        return config.train_crop_size
    progress = max(0.0, (epoch - begin) / max(end - begin, 1e-9))
    exact_side = start + (config.train_crop_size - start) * progress
    side = round(exact_side / _SIDE_STEP) * _SIDE_STEP
    return min(config.train_crop_size, max(_SIDE_STEP, side))


def train_geometry(
    seed: int,
    epoch: int | IntArray,
    rows: IntArray,
    heights: IntArray,
    widths: IntArray,
    side: int,
    config: DataConfig,
) -> Geometry:
    """Random crops and flips of the samples `rows`, whose images are `heights` x `widths`.

    Args:
        seed: the seed of the run.
        epoch: one number, or one for each sample where an epoch shows an image several times (see
            rng.py).
        rows: int64 [n].
        heights: int64 [n], in pixels.
        widths: int64 [n], in pixels.
        side: side of the crop, in pixels.
        config: says how images are cropped (`train_crop`).
    """
    if config.train_crop == "random_resized":
        windows = random_windows(
            seed, epoch, rows, heights, widths, config.crop_scale, config.crop_ratio
        )
        view = View(np.full((len(rows), 2), side), np.zeros((len(rows), 2), np.int64), side)
    else:
        windows = whole_windows(heights, widths)
        numbers = uniform(seed, "crop", epoch, rows, 3)
        view = _random_squares(numbers, heights, widths, side, config)
    mirrored = flips(seed, epoch, rows, config.flip_probability).astype(np.int64)
    return Geometry(windows, (view,), mirrored)


def _random_squares(
    numbers: FloatArray, heights: IntArray, widths: IntArray, side: int, config: DataConfig
) -> View:
    """A random square of each resized image, from uniform numbers [n, 3]."""
    low, high = side, side
    if config.train_crop == "scale_jitter":
        low, high = config.scale_jitter
    border = config.pad if config.train_crop == "pad" else 0

    shorter = low + np.floor(numbers[:, 0] * (high - low + 1)).astype(np.int64)
    sizes = resized_sides(heights, widths, shorter)
    num_places = sizes - side + 2 * border + 1
    offsets = np.floor(numbers[:, 1:] * num_places).astype(np.int64) - border
    return View(sizes, offsets, side)


def val_geometry(heights: IntArray, widths: IntArray, config: DataConfig) -> Geometry:
    """The squares of evaluation, taken out of the whole image, whose shorter side is resized.

    There is one central square; or the four corners and the centre (`val_crops: ten`, whose mirror
    images are taken on the device); or, for each of `val_scales`, the central square of the image
    resized to that shorter side. A side that is shorter than the square is padded with black, with
    the odd pixel after the image, as in torchvision.
    """
    scales = [(side, side) for side in config.val_scales]
    if not scales:
        scales = [(config.val_resize_size, config.val_crop_size)]
    views = []
    for resize_size, side in scales:
        sizes = resized_sides(heights, widths, resize_size)
        # Negative where the image is padded, which never happens with corners.
        last = sizes - side
        center = np.where(last >= 0, np.rint(last / 2), np.trunc(last / 2)).astype(np.int64)
        views.append(View(sizes, center, side))
        if config.val_crops == "ten":
            for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
                views.append(View(sizes, last * np.array(corner), side))
    no_flips = np.zeros(len(heights), np.int64)
    return Geometry(whole_windows(heights, widths), tuple(views), no_flips)


def whole_windows(heights: IntArray, widths: IntArray) -> IntArray:
    """The windows that are the whole images: int64 [n, 4]."""
    zeros = np.zeros(len(heights), np.int64)
    return np.stack([zeros, zeros, heights, widths], axis=1).astype(np.int64)


def random_windows(
    seed: int,
    epoch: int | IntArray,
    rows: IntArray,
    heights: IntArray,
    widths: IntArray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> IntArray:
    """Random resized crops (Szegedy et al. 2014, section 6) of the samples `rows`.

    Returns:
        int64 [n, 4]. A window depends only on the seed, the epoch, its sample and the size of its
        image.
    """
    numbers = uniform(seed, "crop", epoch, rows, _NUMBERS_PER_SAMPLE)
    return windows_from_uniforms(numbers, heights, widths, scale, ratio)


def windows_from_uniforms(
    numbers: FloatArray,
    heights: IntArray,
    widths: IntArray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> IntArray:
    """The law of torchvision's `RandomResizedCrop.get_params` on uniform numbers.

    A try has an area, uniform in `scale` times the image's, and width over height, log-uniform in
    `ratio`. The first of ten tries that fits into the image is placed uniformly. If none fits, the
    window is the largest central one whose ratio is in `ratio`, of at least one pixel (torchvision
    may give none there). Sides are rounded half to even, as in torchvision.

    Args:
        numbers: float64 [n, 22] in [0, 1).
        heights: int64 [n], in pixels.
        widths: int64 [n], in pixels.
        scale: range of the area, as a fraction of the image's.
        ratio: range of width over height.

    Returns:
        int64 [n, 4].
    """
    images = np.stack([heights, widths], axis=1).astype(np.int64)
    area_numbers = numbers[:, 0 : 2 * TRIES : 2]
    areas = images.prod(axis=1, keepdims=True) * (scale[0] + (scale[1] - scale[0]) * area_numbers)
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * numbers[:, 1 : 2 * TRIES : 2])
    tries = np.rint(np.sqrt(np.stack([areas / ratios, areas * ratios], axis=2)))

    fits = ((tries > 0) & (tries <= images[:, None])).all(axis=2)
    any_fits = fits.any(axis=1, keepdims=True)
    first_fit = tries[np.arange(len(tries)), fits.argmax(axis=1)]
    sides = np.where(any_fits, first_fit, _largest_central(images, ratio))
    room = images - sides
    corners = np.where(any_fits, np.floor(numbers[:, -2:] * (room + 1)), room // 2)
    return np.hstack([corners, sides]).astype(np.int64)


def _largest_central(images: IntArray, ratio: tuple[float, float]) -> FloatArray:
    """Sides of the largest window of each image with width over height in `ratio`: [n, 2]."""
    limits = np.stack([images[:, 1] / ratio[0], images[:, 0] * ratio[1]], axis=1)
    return np.maximum(np.rint(np.minimum(images, limits)), 1)


def flips(seed: int, epoch: int | IntArray, rows: IntArray, probability: float) -> BoolArray:
    """Whether each of the samples `rows` is mirrored: bool [n]."""
    return uniform(seed, "flip", epoch, rows, 1)[:, 0] < probability


def resized_sides(heights: IntArray, widths: IntArray, shorter: int | IntArray) -> IntArray:
    """(height, width) after the shorter side is resized to `shorter` (one number, or [n]).

    The longer side is truncated, as in torchvision's `Resize(shorter)`. Returns int64 [n, 2].
    """
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    resized: IntArray = np.reshape(shorter, (-1, 1)) * sides // sides.min(axis=1, keepdims=True)
    return resized
