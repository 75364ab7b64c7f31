"""`resnet-dist data show`: a picture of what the network sees, made by the loaders of training."""

import argparse
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

# Height of a line of text, room between tiles and smallest side of a tile, in pixels.
_LINE = 18
_GAP = 6
_SMALLEST_TILE = 128
_FONT_SIZE = 12
_PIXELS_A_LETTER = 7


class Tile(NamedTuple):
    """One image of the picture."""

    above: str
    """text above it"""
    pixels: torch.Tensor
    """[side, side, 3], 0 to 1"""
    below: str
    """text below it"""


class _Shown(NamedTuple):
    """A batch of one image, and what it shows."""

    title: str
    batch: Batch


def run(config: Config, args: argparse.Namespace) -> int:
    """Write args.out.

    Each row has a training image as several epochs show it, then the crops of an evaluation image.
    Mixup and CutMix, which come later, are not in it. Returns the exit code.
    """

    def body(config: Config, runtime: Runtime) -> int:
        if config.data.kind == "synthetic":
            raise ValueError(
                "data.kind is synthetic, which has no images to show: take folder or digits"
            )
        rows, class_names = _load(config, runtime, args)
        # A broken image has a negative label.
        names = (*class_names, "broken")
        mean = torch.tensor(config.data.mean)
        std = torch.tensor(config.data.std)
        tiles = []
        for row in rows:
            tiles.append([tile for shown in row for tile in _tiles(shown, mean, std, names)])
        sheet(tiles).save(args.out)
        print(f"picture: {args.out}")
        return 0

    return run_process(config, body)


def _load(
    config: Config, runtime: Runtime, args: argparse.Namespace
) -> tuple[list[list[_Shown]], tuple[str, ...]]:
    """(the rows of the picture, class names), through the loaders of training."""
    augment = replace(config.augment, repeats=1)
    with tempfile.TemporaryDirectory() as scratch:
        single = replace(
            config,
            output_dir=scratch,
            augment=augment,
            train=replace(config.train, global_batch_size=1, grad_accum_steps=1, precision="fp32"),
        )
        train = build_train_loader(single, runtime)
        val = build_val_loader(single, runtime)
        assert isinstance(train, DaliTrainLoader)
        assert isinstance(val, DaliValLoader)
        trained = []
        for row in _spread(train.num_samples, args.images):
            shown = []
            for epoch in range(args.epochs):
                batch = train.show_rows(row, epoch)
                shown.append(_Shown(f"epoch {epoch}", batch))
            trained.append(shown)
        evaluated = []
        for row in _spread(val.num_samples, args.images):
            batch = val.show_rows(row)
            evaluated.append([_Shown("evaluation", batch)])
        train.close()
        val.close()
    rows = []
    for left, right in zip_longest(trained, evaluated):
        rows.append([*(left or []), *(right or [])])
    return rows, train.class_names


def _spread(num_samples: int, count: int) -> list[np.ndarray]:
    """Rows that are spread evenly over a split, each as int64 [1]."""
    spread = np.linspace(0, num_samples - 1, count)
    rows = np.unique(spread.astype(np.int64))
    return [np.array([row]) for row in rows]


def _tiles(
    shown: _Shown, mean: torch.Tensor, std: torch.Tensor, names: tuple[str, ...]
) -> list[Tile]:
    """The views of an image with the normalisation undone."""
    name = names[max(-1, int(shown.batch.labels))]
    tiles = []
    for view in (shown.batch.images, *shown.batch.other_views):
        pixels = view[0].permute(1, 2, 0).cpu() * std + mean
        tiles.append(Tile(shown.title, pixels, name))
    return tiles


def sheet(rows: list[list[Tile]]) -> Image.Image:
    """Rows of tiles as one picture; small ones are enlarged by a whole factor."""
    largest = max(len(tile.pixels) for row in rows for tile in row)
    factor = -(-_SMALLEST_TILE // largest)
    across = factor * largest + _GAP
    down = factor * largest + 2 * _LINE + _GAP
    columns = max(map(len, rows))
    size = (columns * across + _GAP, len(rows) * down + _GAP)
    canvas = Image.new("RGB", size, "white")
    for row_number, row in enumerate(rows):
        y = _GAP + row_number * down
        for column_number, tile in enumerate(row):
            x = _GAP + column_number * across
            position = (x, y)
            _draw_tile(canvas, tile, position, factor, letters=across // _PIXELS_A_LETTER)
    return canvas


def _draw_tile(
    canvas: Image.Image, tile: Tile, position: tuple[int, int], factor: int, letters: int
) -> None:
    """Draw a tile with its texts, its upper left corner at `position`."""
    x, y = position
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(_FONT_SIZE)
    side = factor * len(tile.pixels)
    levels = (255 * tile.pixels).round().clamp(0, 255).byte().numpy()
    image = Image.fromarray(levels).resize((side, side), Image.Resampling.NEAREST)
    canvas.paste(image, (x, y + _LINE))
    draw.text((x, y), f"{tile.above}, {len(tile.pixels)} px", "#606060", font)
    draw.text((x, y + _LINE + side), tile.below[:letters], "black", font)
