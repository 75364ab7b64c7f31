"""Resize windows of small images, many at once, by matrix products.

A call of torch's resize costs about 20 us, whatever the size, and what surrounds it as much again.
For small images both are far more than the arithmetic. Here the filters of a group of images are
matrices: one product resizes the rows of all of them, another the columns.

The arithmetic is that of torch's kernel for uint8, so that the result is equal bit for bit. Its
weights are 16-bit integers, w * 2**p, rounded, with the largest p at which the largest weight fits;
rows are resized first, and both passes round half up to uint8. All sums are multiples of 2**-p
below 256, which float32 represents exactly, in any order of summation.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from resnet_dist.data.arrays import FloatArray, IntArray, StringArray
from resnet_dist.data.pixels.decoded_images import CHANNELS, gather_runs

MAX_SIDE = 40
"""Largest side of the squares: beyond it, the products take longer than a call for each image."""

FILTERS = ("bilinear", "bicubic")

_MOST_BITS = 22
_FLOAT_BYTES = 4
_HALF = np.float32(0.5)


@dataclass(frozen=True)
class ResizedWindows:
    """Windows in images of one size, and the squares that they are resized to."""

    windows: IntArray
    """int64 [n, 4]: (y, x, height, width) of each window"""
    filters: IntArray
    """int64 [n]: the filter of each window, a position in `FILTERS`"""
    flips: IntArray
    """int64 [n]: 1 to mirror the square horizontally, otherwise 0"""
    side: int
    """side of the squares"""

    def select(self, group: slice) -> "ResizedWindows":
        """Some of the windows."""
        return ResizedWindows(
            windows=self.windows[group],
            filters=self.filters[group],
            flips=self.flips[group],
            side=self.side,
        )


def fits_products(size: tuple[int, int], side: int) -> bool:
    """Whether `resize_windows` can resize, and is faster than a call for each window.

    Args:
        size: (height, width) of the images.
        side: Side of the squares.
    """
    # Larger images would be reduced, whose weights need more bits.
    return max(size) <= side <= MAX_SIDE


def filter_numbers(interpolations: StringArray) -> IntArray:
    """The position of each filter in `FILTERS`: int64 [n]."""
    is_bicubic = interpolations == "bicubic"
    numbers: IntArray = is_bicubic.astype(np.int64)
    return numbers


def resize_windows(images: torch.Tensor, wanted: ResizedWindows) -> torch.Tensor:
    """Resize a window of each image, and mirror some, as `finish.resize_and_crop` does.

    Args:
        images: uint8 [n, height, width, 3]; `fits_products` must hold.
        wanted: The windows.

    Returns:
        uint8 [n, side, side, 3].
    """
    num_images, height, width, _ = images.shape
    side = wanted.side
    y, x, window_heights, window_widths = wanted.windows.T
    # [n, side, height]
    of_columns = _matrices(
        height,
        starts=y,
        lengths=window_heights,
        wanted=wanted,
    )
    # [n, side, width]
    of_rows = _matrices(
        width,
        starts=x,
        lengths=window_widths,
        wanted=wanted,
        flips=wanted.flips,
    )

    # [n, height, 3, width]: each channel of a row is consecutive.
    planes = images.numpy().transpose(0, 1, 3, 2)
    values = planes.astype(np.float32, order="C")
    rows = values.reshape(num_images, height * CHANNELS, width)
    from_the_right = of_rows.transpose(0, 2, 1)
    resized_rows = np.matmul(rows, from_the_right)
    _round(resized_rows, wanted)

    columns = resized_rows.reshape(num_images, height, CHANNELS * side)
    resized = np.matmul(of_columns, columns)
    _round(resized, wanted)

    pixels = resized.astype(np.uint8)
    squares = pixels.reshape(num_images, side, CHANNELS, side)
    channels_last = squares.transpose(0, 1, 3, 2)
    contiguous = np.ascontiguousarray(channels_last)
    return torch.from_numpy(contiguous)


def _round(values: np.ndarray, wanted: ResizedWindows) -> None:
    """Round half up, in place; the bicubic filter can also leave the range of uint8."""
    values += _HALF
    np.floor(values, out=values)
    if wanted.filters.any():
        np.clip(values, 0, 255, out=values)


def _matrices(
    length: int,
    starts: IntArray,
    lengths: IntArray,
    wanted: ResizedWindows,
    flips: IntArray | None = None,
) -> np.ndarray:
    """The matrices that resize one side of windows.

    Args:
        length: Pixels of that side of the images.
        starts: int64 [n]: the first pixel of each window.
        lengths: int64 [n]: its number of pixels.
        wanted: The filters, and the side of the squares.
        flips: int64 [n]: 1 to mirror the result.

    Returns:
        float32 [n, side, length].
    """
    side = wanted.side
    table = _weight_table(length, side)
    pixels = np.arange(side)
    if flips is not None:
        is_mirrored = flips[:, None] > 0
        backwards = side - 1 - pixels
        pixels = np.where(is_mirrored, backwards, pixels)
    # The rows of the table that belong to a window, and their place in the flattened table.
    table_number = wanted.filters * (length + 1) + lengths
    first_row = table_number * side
    row_numbers = first_row[:, None] + pixels
    row_starts = row_numbers * (3 * length)
    # The weights are in the middle third: this begins so many pixels before it as the image does
    # before the window.
    shifts = length - starts
    positions = row_starts + shifts[:, None]
    first_bytes = _FLOAT_BYTES * positions.ravel()
    num_bytes = _FLOAT_BYTES * length
    runs = gather_runs(table, first_bytes, num_bytes)
    weights = runs.view(np.float32)
    return weights.reshape(-1, side, length)


@functools.lru_cache(maxsize=16)
def _weight_table(length: int, side: int) -> np.ndarray:
    """The weights of all windows of up to `length` pixels, with zeros before and behind them.

    Returns:
        The bytes of float32 [2, length + 1, side, 3 * length], by filter and size of the window.
    """
    shape = (len(FILTERS), length + 1, side, 3 * length)
    table = np.zeros(shape, np.float32)
    for number, name in enumerate(FILTERS):
        for window in range(1, length + 1):
            weights = _rounded_weights(window, side, name)
            stop = length + window
            table[number, window, :, length:stop] = weights
    flat = table.reshape(-1)
    return flat.view(np.uint8)


def _rounded_weights(length: int, side: int, name: str) -> FloatArray:
    """The weights by which torch resizes `length` pixels to `side`, which are not fewer.

    Returns:
        float64 [side, length], whole multiples of a power of 2.
    """
    filter_function, radius = _FUNCTIONS[name]
    scale = length / side
    output_pixels = np.arange(side)[:, None]
    centers = scale * (output_pixels + 0.5)
    pixels = np.arange(length)
    first = np.trunc(centers - radius + 0.5)
    stop = np.trunc(centers + radius + 0.5)
    is_inside = (pixels >= first) & (pixels < stop)
    distances = np.abs(pixels - centers + 0.5)
    values = np.where(is_inside, filter_function(distances), 0)
    sums = values.sum(axis=1, keepdims=True)
    weights = values / sums

    largest = float(weights.max())
    factor = 2 ** _bits_of_weights(largest)
    scaled = weights * factor
    half = np.copysign(0.5, scaled)
    rounded: FloatArray = np.trunc(scaled + half) / factor
    return rounded


def _bits_of_weights(largest: float) -> int:
    """The most bits behind the point with which the largest weight is rounded to below 2**15."""
    bits = 0
    while bits < _MOST_BITS:
        with_one_more = largest * 2 ** (bits + 1)
        rounded = int(with_one_more + 0.5)
        if rounded >= 2**15:
            break
        bits += 1
    return bits


def _bilinear(distances: FloatArray) -> FloatArray:
    """The bilinear filter."""
    values: FloatArray = np.maximum(1 - distances, 0)
    return values


def _bicubic(distances: FloatArray) -> FloatArray:
    """The bicubic filter with a = -0.5 (Keys 1981), as in Pillow."""
    a = -0.5
    x = distances
    # The order of the operations is that of torch.
    below_1 = (a + 2) * x - (a + 3)
    below_1 = below_1 * x * x + 1
    below_2 = a * x - 5 * a
    below_2 = below_2 * x + 8 * a
    below_2 = below_2 * x - 4 * a
    values: FloatArray = np.select([x < 1, x < 2], [below_1, below_2], default=0.0)
    return values


_FUNCTIONS = {"bilinear": (_bilinear, 1.0), "bicubic": (_bicubic, 2.0)}
"""By name: the filter, and the distance from which on it is zero."""
