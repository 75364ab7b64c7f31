"""`resnet-dist data download`: public data sets that torchvision downloads, to class folders."""

import argparse
import functools
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.commands.class_folders import NewFile, write_class_folders

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Request:
    """What to download."""

    cache: str
    """folder for what torchvision downloads"""
    split: str
    """train or val"""
    size: str
    """of Imagenette"""

    @property
    def is_train(self) -> bool:
        """Whether this is the training set."""
        return self.split == "train"


def run(args: argparse.Namespace) -> int:
    """Download a data set.

    Args:
        args: The options of the command: `name`, `out` and `size`.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: The name is unknown, or the folder is used already.
        ConnectionError: The data set cannot be downloaded.
    """
    find_files = _choose_data_set(args.name)
    cache = os.path.join(args.out, ".download")
    _check_folder(args.out, cache)
    try:
        for split in ("train", "val"):
            request = Request(cache, split, args.size)
            files = find_files(request)
            write_class_folders(args.out, split, files)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"{args.name} cannot be downloaded: {error}; run this again, with a network"
        ) from error
    shutil.rmtree(cache)
    return 0


def _choose_data_set(name: str) -> Callable[[Request], Iterator[NewFile]]:
    """The function that downloads a data set. Raises ValueError for an unknown name."""
    known = {
        "imagenette": _imagenette,
        "cifar10": _cifar10,
        "flowers102": _flowers102,
    }
    if name not in known:
        names = ", ".join(known)
        raise ValueError(f"{name!r} is no data set: choose one of {names}")
    return known[name]


def _check_folder(out: str, cache: str) -> None:
    """Raise ValueError if the folder has a training set that is not of an unfinished download."""
    train_folder = os.path.join(out, "train")
    is_used = os.path.exists(train_folder)
    is_unfinished = os.path.exists(cache)
    if is_used and not is_unfinished:
        raise ValueError(f"{out} has a train/ already: remove it, or name another folder")


def _imagenette(request: Request) -> Iterator[NewFile]:
    """The files of Imagenette, whose splits have the names that ours have."""
    from torchvision import datasets

    cache = Path(request.cache)
    if request.is_train:
        # torchvision takes a folder that was not finished for a complete one.
        for unfinished in cache.glob("imagenette2*/"):
            shutil.rmtree(unfinished, ignore_errors=True)
    datasets.Imagenette(
        cache,
        request.split,
        size=request.size,
        download=True,
    )
    paths = cache.glob(f"imagenette2*/{request.split}/*/*.JPEG")
    for path in sorted(paths):
        class_name = path.parent.name
        yield NewFile(f"{class_name}/{path.name}", path.read_bytes)


def _cifar10(request: Request) -> Iterator[NewFile]:
    """The files of CIFAR-10, whose test set becomes the validation set."""
    from torchvision import datasets

    part = datasets.CIFAR10(
        request.cache,
        train=request.is_train,
        download=True,
    )
    images = zip(part.data, part.targets, strict=True)
    for number, (pixels, label) in enumerate(images):
        class_name = part.classes[label]
        encode = functools.partial(encode_png, pixels)
        yield NewFile(f"{class_name}/{number:05d}.png", encode)


def encode_png(pixels: "np.ndarray") -> bytes:
    """The file of an image, uint8 [h, w, 3]."""
    from PIL import Image

    buffer = io.BytesIO()
    image = Image.fromarray(pixels)
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _flowers102(request: Request) -> Iterator[NewFile]:
    """The files of Flowers-102: train and val together for training, test for validation."""
    from torchvision import datasets

    official_splits = ["test"]
    if request.is_train:
        official_splits = ["train", "val"]
    for official in official_splits:
        part = datasets.Flowers102(request.cache, official, download=True)
        # torchvision has no public names for these two.
        images = zip(part._image_files, part._labels, strict=True)
        for path, label in images:
            # The number before the name makes the folders sort as the labels.
            number = label + 1
            words = re.sub("[^a-z]+", "_", part.classes[label])
            folder = f"{number:03d}_{words}"
            file = os.path.basename(path)
            yield NewFile(f"{folder}/{file}", Path(path).read_bytes)
