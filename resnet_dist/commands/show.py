"""`resnet-dist data show`: save a picture of the images that the network sees.

The images come from the data loaders of training and evaluation.
"""

import argparse
import tempfile
from dataclasses import replace
from itertools import zip_longest
from typing import NamedTuple

import numpy as np

from resnet_dist.config import Config, DataConfig
from resnet_dist.data.build import build_train_loader, build_val_loader
from resnet_dist.data.pixels.loader import DaliTrainLoader, DaliValLoader
from resnet_dist.data.types import Batch
from resnet_dist.distributed.process import run_process
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.evaluation.pictures import Tile, contact_sheet, to_levels


class _TitledBatch(NamedTuple):
    """A batch of one image, and the title of its tiles."""

    title: str
    batch: Batch


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
        tiles = []
        for row in rows:
            row_tiles = []
            for shown in row:
                row_tiles.extend(_make_tiles(shown, config.data, names))
            tiles.append(row_tiles)
        contact_sheet(tiles).save(args.out)
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
    data: DataConfig,
    names: tuple[str, ...],
) -> list[Tile]:
    """The views of an image as tiles, with the normalisation undone.

    Args:
        shown: A batch of one image.
        data: The mean and standard deviation that the loader has applied.
        names: The class names, and a last name for broken images.
    """
    batch = shown.batch
    # -1 is the last name.
    label = max(-1, int(batch.labels))
    views = [batch.images, *batch.other_views]
    tiles = []
    for view in views:
        pixels = to_levels(view[0], data.mean, data.std)
        tiles.append(Tile(shown.title, pixels, names[label]))
    return tiles
