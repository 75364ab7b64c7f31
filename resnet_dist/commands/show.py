"""`resnet-dist data show`: a picture of what the network sees, made by the loaders that training
uses.
"""

import argparse
import tempfile
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from resnet_dist.config import Config
from resnet_dist.data.build import build_train_loader, build_val_loader
from resnet_dist.distributed import Runtime
from resnet_dist.process import run_process

_LINE, _GAP = 18, 6  # height of a line of text and room between tiles, in pixels


def run(config: Config, args: argparse.Namespace) -> int:
    """Write args.out: in each row a training image in several epochs, then the crops of an
    evaluation image.

    Mixup and CutMix, which come later, are not in it. Returns the exit code: 2 for what the user
    did, with a sentence.
    """

    def body(config: Config, runtime: Runtime) -> int:
        if config.data.kind == "synthetic":
            raise ValueError(
                "data.kind is synthetic, which has no images to show: take folder or digits"
            )
        with tempfile.TemporaryDirectory() as scratch:
            single = replace(
                config,
                output_dir=scratch,
                augment=replace(config.augment, repeats=1),
                train=replace(
                    config.train, global_batch_size=1, grad_accum_steps=1, precision="fp32"
                ),
            )
            train = build_train_loader(single, runtime)
            val = build_val_loader(single, runtime)
            spread = [
                np.unique(np.linspace(0, loader.num_samples - 1, args.images).astype(np.int64))[
                    :, None
                ]
                for loader in (train, val)
            ]
            trained = [
                [(f"epoch {epoch}", train.show_rows(row, epoch)) for epoch in range(args.epochs)]
                for row in spread[0]
            ]
            evaluated = [[("evaluation", val.show_rows(row))] for row in spread[1]]
            train.close()
            val.close()
        rows = [left + right for left, right in zip_longest(trained, evaluated, fillvalue=[])]
        mean, std = torch.tensor(config.data.mean), torch.tensor(config.data.std)
        names = (*train.class_names, "broken")  # which has a negative label
        sheet(
            [
                [
                    (
                        title,
                        view[0].permute(1, 2, 0).cpu() * std + mean,
                        names[max(-1, int(batch.labels))],
                    )
                    for title, batch in row
                    for view in (batch.images, *batch.other_views)
                ]
                for row in rows
            ]
        ).save(args.out)
        print(f"picture: {args.out}")
        return 0

    return run_process(config, body)


def sheet(rows: list[list[tuple[str, torch.Tensor, str]]]) -> Image.Image:
    """Rows of (text above, [side, side, 3] of 0 to 1, text below) as one picture; small ones are
    shown larger.
    """
    largest = max(len(pixels) for row in rows for _, pixels, _ in row)
    factor = -(-128 // largest)
    across, down = factor * largest + _GAP, factor * largest + 2 * _LINE + _GAP
    canvas = Image.new(
        "RGB", (max(map(len, rows)) * across + _GAP, len(rows) * down + _GAP), "white"
    )
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(12)
    for r, row in enumerate(rows):
        for c, (above, pixels, below) in enumerate(row):
            x, y, side = _GAP + c * across, _GAP + r * down, factor * len(pixels)
            tile = Image.fromarray((255 * pixels).round().clamp(0, 255).byte().numpy())
            canvas.paste(tile.resize((side, side), Image.Resampling.NEAREST), (x, y + _LINE))
            draw.text((x, y), f"{above}, {len(pixels)} px", "#606060", font)
            draw.text((x, y + _LINE + side), below[: across // 7], "black", font)
    return canvas
