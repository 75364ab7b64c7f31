"""Where images are cropped: random windows and flips in training, central squares in evaluation.

A window is (y, x, height, width) in pixels, int64. Training and evaluation describe their geometry
in the same form, so that one decoder serves both: it decodes a window, resizes it, cuts one or more
squares out of the result and mirrors them. The training geometry is a pure function of (seed,
epoch, row, image size). It is computed for a whole batch at once, which takes a few microseconds
per image.
"""

from dataclasses import dataclass

import numpy as np

from resnet_dist.config import DataConfig
from resnet_dist.data.arrays import BoolArray, FloatArray, IntArray, StringArray
from resnet_dist.rng import integers_below, uniform

TRIES = 10
"""Number of windows that torchvision's RandomResizedCrop tries before it takes the central one."""

# Two numbers for each try (area and ratio), then two for the position.
_NUMBERS_PER_SAMPLE = 2 * TRIES + 2

# With progressive resizing, all crop sides are multiples of this many pixels. Networks for images
# of at most 32 pixels reduce them by a factor of 4 or 8.
_SIDE_STEP = 32
_SIDE_STEP_OF_SMALL_IMAGES = 8


@dataclass(frozen=True)
class View:
    """How one square is cut out of the decoded window of each image, in pixels."""

    sizes: IntArray
    """int64 [n, 2]: the (height, width) that the window is resized to"""
    offsets: IntArray
    """int64 [n, 2]: the (y, x) of the square's top left corner in the resized window; parts of the
    square outside of the window are black"""
    side: int
    """side of the square"""


@dataclass(frozen=True)
class Geometry:
    """How each image of a batch is cropped, resized and mirrored. The fields are in this order."""

    windows: IntArray
    """int64 [n, 4]: the window (y, x, height, width) of each image that is decoded"""
    views: tuple[View, ...]
    """the squares that are cut out: one in training, one or more in evaluation"""
    flips: IntArray
    """int64 [n]: 1 if the squares of an image are mirrored horizontally, otherwise 0"""
    interpolations: StringArray
    """[n]: the filter, bilinear or bicubic, that resizes the window of each image"""


def train_side(epoch: int, config: DataConfig) -> int:
    """Side of the training crop in an epoch.

    Without progressive resizing this is `train_crop_size`. With it, the side grows linearly from
    `progressive_start_size` to `train_crop_size` between the two `progressive_epochs`, rounded to a
    multiple of 32 (Leclerc et al. 2023, FFCV). If `train_crop_size` is at most 32, it is rounded to
    a multiple of 8.

    Args:
        epoch: the epoch, counted from 0.
        config: the section `data`.

    Returns:
        The side in pixels.
    """
    start = config.progressive_start_size
    begin, end = config.progressive_epochs
    if not start or epoch >= end:
        return config.train_crop_size
    # `end` may equal `begin`.
    num_epochs = max(end - begin, 1e-9)
    progress = max(0.0, (epoch - begin) / num_epochs)
    exact_side = start + (config.train_crop_size - start) * progress

    step = _SIDE_STEP
    if config.train_crop_size <= _SIDE_STEP:
        step = _SIDE_STEP_OF_SMALL_IMAGES
    side = round(exact_side / step) * step
    side = max(side, step)
    return min(side, config.train_crop_size)


def train_geometry(
    seed: int,
    epoch: int | IntArray,
    rows: IntArray,
    heights: IntArray,
    widths: IntArray,
    side: int,
    config: DataConfig,
) -> Geometry:
    """Draw crops and flips of a training batch.

    Args:
        seed: the seed of the run.
        epoch: one number, or one for each sample if an epoch shows an image several times (see
            rng.py).
        rows: int64 [n], the samples.
        heights: int64 [n], heights of their images, in pixels.
        widths: int64 [n], widths of their images, in pixels.
        side: side of the crop, in pixels.
        config: the section `data`; `train_crop` is the kind of crop.
    """
    if config.train_crop == "random_resized":
        windows = random_windows(
            seed, epoch, rows, heights, widths, config.crop_scale, config.crop_ratio
        )
        # The whole window is resized to the square.
        sizes = np.full((len(rows), 2), side)
        offsets = np.zeros((len(rows), 2), np.int64)
        view = View(sizes, offsets, side)
    else:
        windows = whole_windows(heights, widths)
        numbers = uniform(seed, "crop", epoch, rows, 3)
        view = _random_squares(numbers, heights, widths, side, config)
    mirrored = flips(seed, epoch, rows, config.flip_probability).astype(np.int64)
    filters = interpolations(seed, epoch, rows, config.train_interpolation)
    return Geometry(windows, (view,), mirrored, filters)


def _random_squares(
    numbers: FloatArray, heights: IntArray, widths: IntArray, side: int, config: DataConfig
) -> View:
    """Draw a square out of each whole image, after its shorter side was resized.

    With `train_crop` "scale_jitter" the shorter side is resized to a random length in
    `scale_jitter`, otherwise to `side`. With "pad" the image is padded on all sides before.

    Args:
        numbers: uniform [n, 3]: a number for the length of the shorter side, then two for the
            position of the square.
        heights: int64 [n], in pixels.
        widths: int64 [n], in pixels.
        side: side of the square, in pixels.
        config: the section `data`.
    """
    low = side
    high = side
    if config.train_crop == "scale_jitter":
        low, high = config.scale_jitter
    border = 0
    if config.train_crop == "pad":
        border = config.pad

    num_lengths = high - low + 1
    shorter = low + integers_below(numbers[:, 0], num_lengths)
    sizes = resized_sides(heights, widths, shorter)

    padded_sizes = sizes + 2 * border
    num_places = padded_sizes - side + 1
    offsets = integers_below(numbers[:, 1:], num_places) - border
    return View(sizes, offsets, side)


def val_geometry(heights: IntArray, widths: IntArray, config: DataConfig) -> Geometry:
    """The squares that evaluation cuts out of whole images, after resizing their shorter side.

    There are three cases:

    - By default, one central square of `val_crop_size`.
    - With `val_crops` "ten", the central square and the four corners. The loader does not mirror
      them: their mirror images are computed on the device.
    - With `val_scales`, for each of these sides the central square of the image whose shorter side
      is resized to it.

    An image that is smaller than the square is padded with black. If the padding is odd, the
    additional pixel is at the bottom or right, as in torchvision.

    Args:
        heights: int64 [n], in pixels.
        widths: int64 [n], in pixels.
        config: the section `data`.
    """
    scales = [(side, side) for side in config.val_scales]
    if not scales:
        scales = [(config.val_resize_size, config.val_crop_size)]
    views = []
    for resize_size, side in scales:
        sizes = resized_sides(heights, widths, resize_size)
        # The largest offset. It is negative if the image is padded, which never happens with
        # corners.
        last = sizes - side
        middle = last / 2
        rounded = np.rint(middle)
        truncated = np.trunc(middle)
        center = np.where(last >= 0, rounded, truncated)
        views.append(View(sizes, center.astype(np.int64), side))
        if config.val_crops == "ten":
            for corner in ((0, 0), (0, 1), (1, 0), (1, 1)):
                offsets = last * np.array(corner)
                views.append(View(sizes, offsets, side))

    windows = whole_windows(heights, widths)
    no_flips = np.zeros(len(heights), np.int64)
    filters = np.full(len(heights), config.val_interpolation)
    return Geometry(windows, tuple(views), no_flips, filters)


def whole_windows(heights: IntArray, widths: IntArray) -> IntArray:
    """Windows that cover the whole images.

    Args:
        heights: int64 [n], in pixels.
        widths: int64 [n], in pixels.

    Returns:
        int64 [n, 4].
    """
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
    """Draw random resized crops (Szegedy et al. 2014, section 6).

    Args:
        seed: the seed of the run.
        epoch: one number, or one for each sample (see rng.py).
        rows: int64 [n], the samples.
        heights: int64 [n], in pixels.
        widths: int64 [n], in pixels.
        scale: range of the area, as a fraction of the image's area.
        ratio: range of width over height.

    Returns:
        int64 [n, 4]. Each window depends only on the seed, the epoch, its sample and the size of
        its image.
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
    """The algorithm of torchvision's `RandomResizedCrop.get_params`, on given uniform numbers.

    Each try draws an area, uniform in `scale` times the area of the image, and a ratio of width
    over height, log-uniform in `ratio`. The first of ten tries that fits into the image is placed
    uniformly. If none fits, the window is the largest central one whose ratio is in `ratio`, of at
    least one pixel (torchvision may return an empty one). Sides are rounded half to even, as in
    torchvision.

    Args:
        numbers: float64 [n, 22] in [0, 1): for each try a number for the area and one for the
            ratio, then two for the position.
        heights: int64 [n], in pixels.
        widths: int64 [n], in pixels.
        scale: range of the area, as a fraction of the image's area.
        ratio: range of width over height.

    Returns:
        int64 [n, 4].
    """
    area_numbers = numbers[:, 0 : 2 * TRIES : 2]
    ratio_numbers = numbers[:, 1 : 2 * TRIES : 2]
    position_numbers = numbers[:, -2:]

    images = np.stack([heights, widths], axis=1).astype(np.int64)
    image_areas = images.prod(axis=1, keepdims=True)
    smallest, largest = scale
    fractions = smallest + (largest - smallest) * area_numbers
    areas = image_areas * fractions
    low, high = np.log(ratio)
    ratios = np.exp(low + (high - low) * ratio_numbers)
    heights_of_tries = np.sqrt(areas / ratios)
    widths_of_tries = np.sqrt(areas * ratios)
    # [n, TRIES, 2]
    tries = np.rint(np.stack([heights_of_tries, widths_of_tries], axis=2))

    side_fits = (tries > 0) & (tries <= images[:, None])
    fits = side_fits.all(axis=2)
    any_fits = fits.any(axis=1, keepdims=True)
    number_of_first = fits.argmax(axis=1)
    first_fit = tries[np.arange(len(tries)), number_of_first]
    sides = np.where(any_fits, first_fit, _largest_central(images, ratio))

    room = images - sides
    random_corners = integers_below(position_numbers, room + 1)
    central_corners = room // 2
    corners = np.where(any_fits, random_corners, central_corners)
    return np.hstack([corners, sides]).astype(np.int64)


def _largest_central(images: IntArray, ratio: tuple[float, float]) -> FloatArray:
    """The largest sides inside of each image with width over height in `ratio`.

    Args:
        images: int64 [n, 2], (height, width) of the images.
        ratio: range of width over height.

    Returns:
        float64 [n, 2], (height, width), whole numbers of at least 1.
    """
    largest_heights = images[:, 1] / ratio[0]
    largest_widths = images[:, 0] * ratio[1]
    limits = np.stack([largest_heights, largest_widths], axis=1)
    sides = np.rint(np.minimum(images, limits))
    return np.maximum(sides, 1)


def flips(seed: int, epoch: int | IntArray, rows: IntArray, probability: float) -> BoolArray:
    """Draw which samples are mirrored horizontally.

    Args:
        seed: the seed of the run.
        epoch: one number, or one for each sample (see rng.py).
        rows: int64 [n], the samples.
        probability: probability of mirroring.

    Returns:
        bool [n].
    """
    numbers = uniform(seed, "flip", epoch, rows, 1)
    return numbers[:, 0] < probability


def interpolations(
    seed: int, epoch: int | IntArray, rows: IntArray, interpolation: str
) -> StringArray:
    """Draw the filters that resize the windows of a training batch.

    Args:
        seed: the seed of the run.
        epoch: one number, or one for each sample (see rng.py).
        rows: int64 [n], the samples.
        interpolation: "bilinear" or "bicubic" for all samples, or "random": one of these two, with
            equal probability.

    Returns:
        [n], "bilinear" or "bicubic".
    """
    if interpolation != "random":
        return np.full(len(rows), interpolation)
    numbers = uniform(seed, "interpolation", epoch, rows, 1)
    return np.where(numbers[:, 0] < 0.5, "bilinear", "bicubic")


def resized_sides(heights: IntArray, widths: IntArray, shorter: int | IntArray) -> IntArray:
    """The sizes of images after their shorter side was resized.

    The longer side is truncated to whole pixels, as in torchvision's `Resize(shorter)`.

    Args:
        heights: int64 [n], in pixels.
        widths: int64 [n], in pixels.
        shorter: the new length of the shorter side in pixels: one number, or int64 [n].

    Returns:
        int64 [n, 2], (height, width).
    """
    sides = np.stack([heights, widths], axis=1).astype(np.int64)
    old_shorter = sides.min(axis=1, keepdims=True)
    new_shorter = np.reshape(shorter, (-1, 1))
    resized: IntArray = new_shorter * sides // old_shorter
    return resized
