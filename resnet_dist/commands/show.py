"""`resnet-dist data show`: a picture of what the network sees, made by the loaders that training uses."""

import argparse
import tempfile
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from resnet_dist import run as composition
from resnet_dist.config import Config, DataConfig
from resnet_dist.data.build import build_train_loader, build_val_loader
from resnet_dist.data.types import Batch
from resnet_dist.distributed import Runtime

_LINE, _GAP = 18, 6              # height of a line of text and room between tiles, in pixels


def run(config: Config, args: argparse.Namespace) -> int:
    """Write args.out: in each row a training image in several epochs, then the crops of an evaluation image.

    Mixup and CutMix, which come later, are not in it. Returns the exit code: 2 for what the user did, with a sentence.
    """
    def body(config: Config, runtime: Runtime) -> int:
        if config.data.kind == "synthetic":
            raise ValueError("data.kind is synthetic, which has no images to show: take folder or digits")
        with tempfile.TemporaryDirectory() as scratch:
            common = {"dtype": torch.float32, "output_dir": scratch}
            train = build_train_loader(config.data, runtime, seed=config.seed, global_batch_size=1, grad_accum_steps=1,
                                       augment=replace(config.augment, repeats=1), **common)
            val = build_val_loader(config.data, runtime, **common)
            trained = [[(f"epoch {epoch}", train.look(row, epoch)) for epoch in range(args.epochs)]
                       for row in _spread(train, args.images)]
            evaluated = [[("evaluation", val.look(row))] for row in _spread(val, args.images)]
            rows = [left + right for left, right in zip_longest(trained, evaluated, fillvalue=[])]
            sheet([[tile for title, batch in row for tile in _tiles(title, batch, train.class_names, config.data)]
                   for row in rows]).save(args.out, "PNG")
            train.close()
            val.close()
        print(f"picture: {args.out}")
        return 0
    return composition.main(config, body)


def _spread(loader, count: int) -> np.ndarray:
    """`count` rows of a loader's images, evenly spread: int64 [count, 1]."""
    return np.unique(np.linspace(0, loader.num_samples - 1, count).astype(np.int64))[:, None]


def _tiles(title: str, batch: Batch, class_names: tuple[str, ...], data: DataConfig) -> list[tuple]:
    """(picture, text above, text below) of every view of a batch of one image, with the normalisation undone."""
    label = int(batch.labels[0])
    pixels = [images[0].permute(1, 2, 0).cpu() * torch.tensor(data.std) + torch.tensor(data.mean)
              for images in (batch.images, *batch.other_views)]
    return [(Image.fromarray((255 * one).round().clamp(0, 255).byte().numpy()), f"{title}, {len(one)} px",
             "broken" if label < 0 else class_names[label]) for one in pixels]


def sheet(rows: list[list[tuple[Image.Image, str, str]]]) -> Image.Image:
    """Rows of (picture, text above, text below) as one picture; small ones in whole multiples of their size."""
    largest = max(picture.width for row in rows for picture, _, _ in row)
    factor = -(-128 // largest)
    across, down = factor * largest + _GAP, factor * largest + 2 * _LINE + _GAP
    canvas = Image.new("RGB", (max(map(len, rows)) * across + _GAP, len(rows) * down + _GAP), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for r, row in enumerate(rows):
        for c, (picture, above, below) in enumerate(row):
            x, y, side = _GAP + c * across, _GAP + r * down, factor * picture.width
            canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x, y + _LINE))
            draw.text((x, y), above, "#606060", font)
            draw.text((x, y + _LINE + side), below[:across // 7], "black", font)
    return canvas
