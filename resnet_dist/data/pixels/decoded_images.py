"""Decoded images in memory, and how squares are cut out of them.

The images of a split lie one behind the other in one array: uint8, height * width * 3 values each.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from resnet_dist.data.arrays import BoolArray, ByteArray, IntArray

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
        good = np.flatnonzero(~self.is_bad)
        if not len(good):
            return None
        height = int(self.heights[good[0]])
        width = int(self.widths[good[0]])
        is_same = (self.heights[good] == height) & (self.widths[good] == width)
        if not is_same.all():
            return None
        return height, width

    def image(self, row: int) -> torch.Tensor:
        """The pixels of an image, uint8 [height, width, 3], without a copy."""
        height = int(self.heights[row])
        width = int(self.widths[row])
        start = int(self.starts[row])
        pixels = self.pixels[start : start + 3 * height * width]
        return torch.from_numpy(pixels.reshape(height, width, 3))

    def equal_images(self, rows: IntArray, size: tuple[int, int]) -> torch.Tensor:
        """Copy images of one size: uint8 [n, height, width, 3].

        Args:
            rows: int64 [n].
            size: (height, width) of each of them.
        """
        height, width = size
        copied = _gather_runs(self.pixels, self.starts[rows], 3 * height * width)
        return torch.from_numpy(copied.reshape(-1, height, width, 3))


@dataclass(frozen=True)
class SquarePlaces:
    """Where squares lie in images of one size."""

    offsets: IntArray
    """int64 [n, 2]: (y, x) of the top left corner; what is outside of the image is black"""
    flips: IntArray
    """int64 [n]: 1 to mirror the square horizontally, otherwise 0"""
    side: int

    def part(self, group: slice) -> "SquarePlaces":
        """The places of some of the squares."""
        return SquarePlaces(self.offsets[group], self.flips[group], self.side)


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
    height, width = size
    side = places.side
    y = places.offsets[:, :1] + np.arange(side)
    x = places.offsets[:, 1:] + np.arange(side)
    row_starts = np.clip(y, 0, height - 1) * (3 * width)
    first_values = starts + 3 * places.offsets[:, 1]
    runs = _gather_runs(pixels, (first_values[:, None] + row_starts).ravel(), 3 * side)
    squares = runs.reshape(-1, side, 3 * side)

    is_row_inside = (y >= 0) & (y < height)
    is_column_inside = (x >= 0) & (x < width)
    if not is_row_inside.all():
        squares *= is_row_inside.view(np.uint8)[:, :, None]
    if not is_column_inside.all():
        is_value_inside = np.repeat(is_column_inside.view(np.uint8), 3, axis=1)
        squares *= is_value_inside[:, None, :]

    found = torch.from_numpy(squares).view(-1, side, side, 3)
    mirrored = torch.from_numpy(np.flatnonzero(places.flips))
    if len(mirrored):
        # torch.flip is fast on the memory format channels_last, [n, 3, side, side].
        originals = found[mirrored].permute(0, 3, 1, 2)
        found[mirrored] = originals.flip(3).permute(0, 2, 3, 1)
    return found


def _gather_runs(pixels: ByteArray, starts: IntArray, length: int) -> ByteArray:
    """Copy runs of bytes: uint8 [n, length].

    Args:
        pixels: uint8, one-dimensional and contiguous.
        starts: int64 [n], the first position of each run.
        length: Bytes of a run.
    """
    # One item at each position, and each overlaps the next ones.
    run = np.dtype((np.void, length))
    every_run = np.ndarray((len(pixels) - length + 1,), run, pixels, strides=(1,))
    copied: ByteArray = every_run[starts].view(np.uint8).reshape(-1, length)
    return copied


def resize_equal(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize images of one size, as `finish.resize_fast` does each of them.

    Args:
        images: uint8 [n, h, w, 3].
        size: (height, width) of the result.

    Returns:
        uint8 [n, height, width, 3].
    """
    if size == tuple(images.shape[1:3]):
        return images
    resized = functional.interpolate(
        images.permute(0, 3, 1, 2),
        size=size,
        mode="bilinear",
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
    num_images = len(images)
    flat = images.reshape(num_images, -1).numpy()
    num_values = flat.shape[1]
    pixels = np.empty(2 * margin + flat.size, np.uint8)
    pixels[margin : margin + flat.size] = flat.ravel()
    starts = margin + num_values * np.arange(num_images)
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
    is_mirrored = flips[:, None] > 0
    y = offsets[:, :1] + steps
    x = offsets[:, 1:] + torch.where(is_mirrored, side - 1 - steps, steps)
    inside_y = y.clamp(0, height - 1)
    inside_x = x.clamp(0, width - 1)
    squares = images[rows[:, None, None], inside_y[:, :, None], inside_x[:, None, :]]
    is_inside = (y == inside_y)[:, :, None] & (x == inside_x)[:, None, :]
    return squares.masked_fill_(~is_inside[..., None], 0)
