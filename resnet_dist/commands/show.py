"""`resnet-dist data show`: save a picture of the images that the network sees.

The images come from the data loaders of training and evaluation.
"""

import argparse
import math
import tempfile
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from resnet_dist.config import Config
from resnet_dist.data.build import build_train_loader, build_val_loader
from resnet_dist.data.pixels.loader import DaliTrainLoader, DaliValLoader
from resnet_dist.data.types import Batch
from resnet_dist.distributed import Runtime
from resnet_dist.process import run_process

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
    pixels: torch.Tensor
    """[side, side, 3], from 0 to 1"""
    below: str
    """text below the image"""


class _TitledBatch(NamedTuple):
    """A batch of one image, and the title of its tiles."""

    title: str
    batch: Batch


class _Normalization(NamedTuple):
    """The statistics that the loaders normalise images with, each [3]."""

    mean: torch.Tensor
    std: torch.Tensor


def run(config: Config, args: argparse.Namespace) -> int:
    """Save the picture to `args.out`.

    Each row shows a training image as several epochs see it, and then the crops of an evaluation
    image. Mixup and CutMix come later in training and are not shown.

    Args:
        config: The settings of training.
        args: The options `out`, `images` (rows of each split) and `epochs`.

    Returns:
        The exit code.
    """

    def body(config: Config, runtime: Runtime) -> int:
        if config.data.kind == "synthetic":
            raise ValueError(
                "data.kind is synthetic, which has no images to show: take folder or digits"
            )
        rows, class_names = _load(config, runtime, args)
        # Broken images have a negative label, which takes the last name.
        names = (*class_names, "broken")
        normalization = _Normalization(
            mean=torch.tensor(config.data.mean),
            std=torch.tensor(config.data.std),
        )
        tiles = []
        for row in rows:
            row_tiles = []
            for shown in row:
                row_tiles.extend(_make_tiles(shown, normalization, names))
            tiles.append(row_tiles)
        sheet(tiles).save(args.out)
        print(f"picture: {args.out}")
        return 0

    return run_process(config, body)


def _load(
    config: Config,
    runtime: Runtime,
    args: argparse.Namespace,
) -> tuple[list[list[_TitledBatch]], tuple[str, ...]]:
    """Load the images of all rows through the loaders of training and evaluation.

    Args:
        config: The settings of training.
        runtime: The process group.
        args: The options `images` (rows of each split) and `epochs`.

    Returns:
        The batches of each row, and the class names.
    """
    with tempfile.TemporaryDirectory() as scratch:
        single = _with_single_images(config, scratch)
        train = build_train_loader(single, runtime)
        val = build_val_loader(single, runtime)
        assert isinstance(train, DaliTrainLoader)
        assert isinstance(val, DaliValLoader)
        train_rows = []
        for indices in _spread(train.num_samples, args.images):
            batches = []
            for epoch in range(args.epochs):
                batch = train.show_rows(indices, epoch)
                batches.append(_TitledBatch(f"epoch {epoch}", batch))
            train_rows.append(batches)
        val_rows = []
        for indices in _spread(val.num_samples, args.images):
            batch = val.show_rows(indices)
            val_rows.append([_TitledBatch("evaluation", batch)])
        train.close()
        val.close()
    rows = []
    for train_row, val_row in zip_longest(train_rows, val_rows):
        # One split may have fewer images than the other.
        row = [*(train_row or []), *(val_row or [])]
        rows.append(row)
    return rows, train.class_names


def _with_single_images(config: Config, scratch: str) -> Config:
    """Change the settings to batches of one image.

    Args:
        config: The settings of training.
        scratch: The new output_dir, so that nothing is written to that of the run.
    """
    augment = replace(config.augment, repeats=1)
    train = replace(
        config.train,
        global_batch_size=1,
        grad_accum_steps=1,
        precision="fp32",
    )
    return replace(
        config,
        output_dir=scratch,
        augment=augment,
        train=train,
    )


def _spread(num_samples: int, count: int) -> list[np.ndarray]:
    """Choose samples that are evenly spread over a split.

    Args:
        num_samples: Number of samples in the split.
        count: Largest number of samples to choose.

    Returns:
        The index of each chosen sample, as int64 [1].
    """
    last = num_samples - 1
    positions = np.linspace(0, last, count).astype(np.int64)
    # In a small split, several positions may be equal.
    indices = np.unique(positions)
    return [np.array([index]) for index in indices]


def _make_tiles(
    shown: _TitledBatch,
    normalization: _Normalization,
    names: tuple[str, ...],
) -> list[Tile]:
    """The views of an image as tiles, with the normalisation undone.

    Args:
        shown: A batch of one image.
        normalization: The mean and standard deviation that the loader has applied.
        names: The class names, and a last name for broken images.
    """
    batch = shown.batch
    # -1 is the last name.
    label = max(-1, int(batch.labels))
    views = [batch.images, *batch.other_views]
    tiles = []
    for view in views:
        channels_last = view[0].permute(1, 2, 0).cpu()
        pixels = channels_last * normalization.std + normalization.mean
        tiles.append(Tile(shown.title, pixels, names[label]))
    return tiles


def sheet(rows: list[list[Tile]]) -> Image.Image:
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
    levels = (255 * tile.pixels).round().clamp(0, 255).byte()
    image = Image.fromarray(levels.numpy())
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
