"""`resnet-dist data download`: public data sets that torchvision downloads, to class folders."""

import argparse
import functools
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from resnet_dist.files import write_file_unsynced
from resnet_dist.logs.console import Progress

if TYPE_CHECKING:
    import numpy as np


class NewFile(NamedTuple):
    """A file that is to be written."""

    name: str
    """`<class>/<file>`"""
    read: Callable[[], bytes]
    """gives the content"""


class Request(NamedTuple):
    """What to download."""

    cache: str
    """folder for what torchvision downloads"""
    split: str
    """train or val"""
    size: str
    """of Imagenette"""


def run(args: argparse.Namespace) -> int:
    """Download a data set to args.out. Raises ConnectionError if it cannot be downloaded."""
    sets = {"imagenette": _imagenette, "cifar10": _cifar10, "flowers102": _flowers102}
    if args.name not in sets:
        raise ValueError(f"{args.name!r} is no data set: choose one of {', '.join(sets)}")
    cache = os.path.join(args.out, ".download")
    if os.path.exists(os.path.join(args.out, "train")) and not os.path.exists(cache):
        raise ValueError(f"{args.out} has a train/ already: remove it, or name another folder")
    try:
        for split in ("train", "val"):
            files = list(sets[args.name](Request(cache, split, args.size)))
            _write_all(args.out, split, files)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"{args.name} cannot be downloaded: {error}; run this again, with a network"
        ) from error
    shutil.rmtree(cache)
    return 0


def _write_all(out: str, split: str, files: list[NewFile]) -> None:
    """Write each file that is not there to out/split/."""
    with Progress(len(files), f"write {split}") as bar:
        for name, read in files:
            path = Path(out, split, name)
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file_unsynced(path, read())
            bar.update()
    print(f"{split}: {len(files)} images in {os.path.join(out, split)}")


def _imagenette(request: Request) -> Iterator[NewFile]:
    from torchvision import datasets

    cache = Path(request.cache)
    if request.split == "train":
        # torchvision takes a folder that was not finished for a complete one.
        for unfinished in cache.glob("imagenette2*/"):
            shutil.rmtree(unfinished, ignore_errors=True)
    datasets.Imagenette(request.cache, request.split, size=request.size, download=True)
    for path in sorted(cache.glob(f"imagenette2*/{request.split}/*/*.JPEG")):
        yield NewFile(f"{path.parent.name}/{path.name}", path.read_bytes)


def _cifar10(request: Request) -> Iterator[NewFile]:
    from torchvision import datasets

    part = datasets.CIFAR10(request.cache, train=request.split == "train", download=True)
    for number, (pixels, label) in enumerate(zip(part.data, part.targets, strict=True)):
        name = f"{part.classes[label]}/{number:05d}.png"
        yield NewFile(name, functools.partial(_encode_png, pixels))


def _encode_png(pixels: "np.ndarray") -> bytes:
    """The file of an image, uint8 [h, w, 3]."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _flowers102(request: Request) -> Iterator[NewFile]:
    from torchvision import datasets

    official_splits = ("train", "val") if request.split == "train" else ("test",)
    for official in official_splits:
        part = datasets.Flowers102(request.cache, official, download=True)
        for path, label in zip(part._image_files, part._labels, strict=True):
            # The number before the name makes the folders sort as the labels.
            words = re.sub("[^a-z]+", "_", part.classes[label])
            name = f"{label + 1:03d}_{words}/{os.path.basename(path)}"
            yield NewFile(name, Path(path).read_bytes)
