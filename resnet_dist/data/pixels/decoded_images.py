"""Decoded images in memory, and how squares are cut out of them.

The images of a split lie one behind the other in one array: uint8, height * width * 3 values each.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from resnet_dist.data.arrays import BoolArray, ByteArray, IntArray

CHANNELS = 3
"""Values of a pixel: R, G and B, a byte each."""

MARGIN = 2**16
"""Unused bytes before the first image and behind the last one, so that a row of a square may reach
out of its image."""


@dataclass(frozen=True)
class DecodedImages:
    """The decoded images of a split, by row of its index."""

    heights: IntArray
    """int64 [N]; 0 for an image that cannot be used"""
    widths: IntArray
    """int64 [N]"""
    starts: IntArray
    """int64 [N]: the position of each image in `pixels`"""
    pixels: ByteArray
    """uint8: the images, between two margins"""
    on_device: torch.Tensor | None = None
    """uint8 [N, height, width, 3]: the same on a GPU, if all images have one size"""

    @functools.cached_property
    def is_bad(self) -> BoolArray:
        """Whether each image cannot be used: bool [N]."""
        bad: BoolArray = self.heights == 0
        return bad

    @functools.cached_property
    def common_size(self) -> tuple[int, int] | None:
        """(height, width) of all images that can be used; None if they differ."""
        is_good = ~self.is_bad
        height = _common_value(self.heights[is_good])
        width = _common_value(self.widths[is_good])
        if height is None or width is None:
            return None
        return height, width

    def image(self, row: int) -> torch.Tensor:
        """The pixels of an image, without a copy.

        Args:
            row: The row of the image.

        Returns:
            uint8 [height, width, 3].
        """
        height = int(self.heights[row])
        width = int(self.widths[row])
        start = int(self.starts[row])
        num_values = CHANNELS * height * width
        stop = start + num_values
        pixels = self.pixels[start:stop]
        image = pixels.reshape(height, width, CHANNELS)
        return torch.from_numpy(image)

    def equal_images(self, rows: IntArray, size: tuple[int, int]) -> torch.Tensor:
        """Copy images of one size: uint8 [n, height, width, 3].

        Args:
            rows: int64 [n], the images.
            size: (height, width) of each of them.
        """
        height, width = size
        starts = self.starts[rows]
        values_per_image = CHANNELS * height * width
        copied = gather_runs(self.pixels, starts, values_per_image)
        images = copied.reshape(-1, height, width, CHANNELS)
        return torch.from_numpy(images)


def _common_value(values: IntArray) -> int | None:
    """The value that all elements have; None if they differ or there are none."""
    if len(values) == 0:
        return None
    first = values[0]
    is_other = values != first
    if is_other.any():
        return None
    return int(first)


@dataclass(frozen=True)
class SquarePlaces:
    """Where squares lie in images of one size."""

    offsets: IntArray
    """int64 [n, 2]: (y, x) of the top left corner; what is outside of the image is black"""
    flips: IntArray
    """int64 [n]: 1 to mirror the square horizontally, otherwise 0"""
    side: int

    @functools.cached_property
    def margin(self) -> int:
        """Most bytes that a row of a square reaches out of its image."""
        distances = np.abs(self.offsets)
        most_pixels = self.side + int(distances.max())
        return CHANNELS * most_pixels

    def select(self, group: slice) -> "SquarePlaces":
        """The places of some of the squares."""
        offsets = self.offsets[group]
        flips = self.flips[group]
        return SquarePlaces(offsets, flips, self.side)


def cut_squares(
    pixels: ByteArray, starts: IntArray, size: tuple[int, int], places: SquarePlaces
) -> torch.Tensor:
    """Cut squares out of images of one size, which are not resized.

    The result is that of `finish.resize_and_crop` for each image. A row of a square is one run of
    bytes, so that a batch is a single indexing operation: 7 us for an image of 32 pixels.

    Args:
        pixels: uint8; at least three times the width of the part that is outside of the image lies
            before the first image and behind the last one.
        starts: int64 [n], the position in `pixels` of each image.
        size: (height, width) of each image.
        places: Where to cut.

    Returns:
        uint8 [n, side, side, 3].
    """
    side = places.side
    steps = np.arange(side)
    first_rows = places.offsets[:, :1]
    first_columns = places.offsets[:, 1:]
    # [n, side]: where the rows and the columns of the squares lie in the images.
    y = first_rows + steps
    x = first_columns + steps

    height, width = size
    # A row outside of the image is copied from inside, and made black below.
    inside_y = np.clip(y, 0, height - 1)
    first_pixels = inside_y * width + first_columns
    run_starts = starts[:, None] + CHANNELS * first_pixels
    run_length = CHANNELS * side
    runs = gather_runs(pixels, run_starts.ravel(), run_length)
    squares = runs.reshape(-1, side, run_length)
    _blacken_outside(squares, y, x, size)

    found = torch.from_numpy(squares).view(-1, side, side, CHANNELS)
    _mirror(found, places.flips)
    return found


def _blacken_outside(squares: ByteArray, y: IntArray, x: IntArray, size: tuple[int, int]) -> None:
    """Make the parts of squares black that are outside of their images, in place.

    Args:
        squares: uint8 [n, side, 3 * side].
        y: int64 [n, side], the rows of the squares in the images.
        x: int64 [n, side], their columns.
        size: (height, width) of each image.
    """
    height, width = size
    is_row_inside = (y >= 0) & (y < height)
    is_column_inside = (x >= 0) & (x < width)
    if not is_row_inside.all():
        row_factors = is_row_inside.view(np.uint8)
        squares *= row_factors[:, :, None]
    if not is_column_inside.all():
        column_factors = is_column_inside.view(np.uint8)
        value_factors = np.repeat(column_factors, CHANNELS, axis=1)
        squares *= value_factors[:, None, :]


def _mirror(squares: torch.Tensor, flips: IntArray) -> None:
    """Mirror some squares horizontally, in place.

    Args:
        squares: uint8 [n, side, side, 3].
        flips: int64 [n], 1 to mirror a square.
    """
    mirrored = torch.from_numpy(np.flatnonzero(flips))
    if len(mirrored) == 0:
        return
    # torch.flip is fast on the memory format channels_last, [n, 3, side, side].
    originals = squares[mirrored].permute(0, 3, 1, 2)
    flipped = originals.flip(3)
    squares[mirrored] = flipped.permute(0, 2, 3, 1)


def gather_runs(pixels: ByteArray, starts: IntArray, length: int) -> ByteArray:
    """Copy runs of bytes: uint8 [n, length].

    Args:
        pixels: uint8, one-dimensional and contiguous.
        starts: int64 [n], the first position of each run.
        length: Bytes of a run.
    """
    # One item at each position, and each overlaps the next ones.
    num_positions = len(pixels) - length + 1
    run_type = np.dtype((np.void, length))
    every_run = np.ndarray((num_positions,), run_type, pixels, strides=(1,))
    copied = every_run[starts]
    values: ByteArray = copied.view(np.uint8)
    return values.reshape(-1, length)


def resize_equal(images: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Resize images of one size, as `finish.resize_fast` does each of them.

    Args:
        images: uint8 [n, h, w, 3].
        size: (height, width) of the result.
        mode: The filter, "bilinear" or "bicubic".

    Returns:
        uint8 [n, height, width, 3].
    """
    if size == tuple(images.shape[1:3]):
        return images
    # The fast kernel needs the memory format channels_last, [n, 3, h, w].
    channels_last = images.permute(0, 3, 1, 2)
    resized = functional.interpolate(
        channels_last,
        size=size,
        mode=mode,
        antialias=True,
    )
    return resized.permute(0, 2, 3, 1)


def with_margins(images: torch.Tensor, margin: int) -> tuple[ByteArray, IntArray]:
    """Put images of one size into an array as `cut_squares` wants it.

    Args:
        images: uint8 [n, h, w, 3].
        margin: Bytes before the first image and behind the last one.

    Returns:
        The array, and the position of each image in it: int64 [n].
    """
    values = images.reshape(-1).numpy()
    # The last image ends here.
    stop = margin + len(values)
    pixels = np.empty(stop + margin, np.uint8)
    pixels[margin:stop] = values

    num_images = len(images)
    values_per_image = len(values) // num_images
    starts = margin + values_per_image * np.arange(num_images)
    return pixels, starts


def cut_squares_on_device(
    images: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor, side: int
) -> torch.Tensor:
    """Like `cut_squares`, with a few kernels for the whole batch on the device of the images.

    Args:
        images: uint8 [N, height, width, 3].
        rows: int64 [n], which images to take.
        offsets: int64 [n, 2], (y, x) of the squares.
        flips: int64 [n], 1 to mirror a square.
        side: Side of the squares.

    Returns:
        uint8 [n, side, side, 3].
    """
    height, width = images.shape[1:3]
    steps = torch.arange(side, device=images.device)
    backwards = side - 1 - steps
    is_mirrored = flips[:, None] > 0
    # [n, side]: where the rows and the columns of the squares lie in the images.
    y = offsets[:, :1] + steps
    x = offsets[:, 1:] + torch.where(is_mirrored, backwards, steps)

    inside_y = y.clamp(0, height - 1)
    inside_x = x.clamp(0, width - 1)
    # These have the shape of the squares, [n, side, side], or are broadcast to it.
    image_of_pixel = rows[:, None, None]
    row_of_pixel = inside_y[:, :, None]
    column_of_pixel = inside_x[:, None, :]
    squares = images[image_of_pixel, row_of_pixel, column_of_pixel]

    is_row_outside = y != inside_y
    is_column_outside = x != inside_x
    is_outside = is_row_outside[:, :, None] | is_column_outside[:, None, :]
    return squares.masked_fill_(is_outside[..., None], 0)
