"""Pictures of what the network sees: images without their normalization, and contact sheets."""

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

Levels = np.ndarray[Any, np.dtype[np.uint8]]
"""An RGB image, uint8 [H, W, 3]."""

# All lengths are in pixels.
_LINE_HEIGHT = 18
_GAP = 6
_MIN_TILE_SIDE = 128
_FONT_SIZE = 12
_LETTER_WIDTH = 7


class Tile(NamedTuple):
    """One image of the picture, and its captions."""

    above: str
    """text above the image"""
    pixels: Levels
    """a square image"""
    below: str
    """text below the image"""


def to_levels(
    image: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
) -> Levels:
    """Undo the normalization of an image.

    Args:
        image: [3, H, W], normalized, on any device.
        mean: The mean of each channel, for pixel values in [0, 1].
        std: The standard deviation of each channel.
    """
    channels_last = image.permute(1, 2, 0).float().cpu()
    pixels = channels_last * torch.tensor(std) + torch.tensor(mean)
    levels = (255 * pixels).round().clamp(0, 255).byte()
    array: Levels = levels.numpy()
    return array


def to_png(picture: Image.Image) -> bytes:
    """The content of a PNG file with a picture."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def contact_sheet(rows: list[list[Tile]]) -> Image.Image:
    """Arrange rows of tiles in one picture.

    If images are small, all are enlarged by the same whole factor.

    Args:
        rows: The tiles of each row. Rows may differ in length.

    Returns:
        The picture, in RGB.
    """
    largest_side = 0
    num_columns = 0
    for row in rows:
        num_columns = max(num_columns, len(row))
        for tile in row:
            largest_side = max(largest_side, len(tile.pixels))
    factor = math.ceil(_MIN_TILE_SIDE / largest_side)
    side = factor * largest_side
    tile_width = side + _GAP
    tile_height = side + 2 * _LINE_HEIGHT + _GAP
    num_letters = tile_width // _LETTER_WIDTH

    width = num_columns * tile_width + _GAP
    height = len(rows) * tile_height + _GAP
    canvas = Image.new("RGB", (width, height), "white")
    for row_number, row in enumerate(rows):
        y = _GAP + row_number * tile_height
        for column_number, tile in enumerate(row):
            x = _GAP + column_number * tile_width
            _draw_tile(canvas, tile, (x, y), factor, num_letters)
    return canvas


def _draw_tile(
    canvas: Image.Image,
    tile: Tile,
    position: tuple[int, int],
    factor: int,
    num_letters: int,
) -> None:
    """Draw a tile and its captions.

    Args:
        canvas: The picture.
        tile: The tile.
        position: (x, y) of its upper left corner.
        factor: How many pixels of the picture show one pixel of the image, in each direction.
        num_letters: Number of letters of the lower caption that fit.
    """
    x, y = position
    original_side = len(tile.pixels)
    side = factor * original_side
    image = Image.fromarray(tile.pixels)
    enlarged = image.resize((side, side), Image.Resampling.NEAREST)
    image_y = y + _LINE_HEIGHT
    canvas.paste(enlarged, (x, image_y))

    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_FONT_SIZE)
    title = f"{tile.above}, {original_side} px"
    draw.text((x, y), title, "#606060", font)
    draw.text(
        (x, image_y + side),
        tile.below[:num_letters],
        "black",
        font,
    )
