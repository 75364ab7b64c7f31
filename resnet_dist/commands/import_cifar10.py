"""`resnet-dist data import-cifar10`: the official files of CIFAR-10 to class folders of PNG files.

The names and pixels are those of `resnet-dist data download cifar10`, which needs a network.
"""

import argparse
import functools
import hashlib
import os
import tarfile
import zlib
from pathlib import Path

from resnet_dist.commands.class_folders import NewFile, files_of_tar, write_class_folders
from resnet_dist.commands.download import encode_png
from resnet_dist.evaluation.sets.arrays import CIFAR10_CLASSES, ImageArrays, parse_cifar10
from resnet_dist.text import printable

_PLACES = (
    "cifar-10-python.tar.gz",
    "cifar-10-binary.tar.gz",
    "cifar-10-batches-py",
    "cifar-10-batches-bin",
)


def run(args: argparse.Namespace) -> int:
    """Import the archive or folder args.src to args.out.

    Args:
        args: the command line.

    Returns:
        0.

    Raises:
        ValueError: if a file is missing, damaged or another than the published one.
    """
    files = _read_files(args.src)
    # All files are checked before the first one is written.
    images = {
        "train": _read_split(files, _published_sums("train"), args),
        "val": _read_split(files, _published_sums("val"), args),
    }
    for split, arrays in images.items():
        write_class_folders(args.out, split, _png_files(arrays))
    return 0


def _published_sums(split: str) -> dict[str, str]:
    """The names of the files of the python version, with their MD5 sums."""
    from torchvision.datasets import CIFAR10

    published = CIFAR10.train_list if split == "train" else CIFAR10.test_list
    return dict(published)


def _read_files(src: str) -> dict[str, bytes]:
    """Read an archive, an unpacked one, or what lies under its usual name in a folder.

    Returns:
        The contents of all files by their names.
    """
    if os.path.isfile(src):
        return _read_archive(src)
    for name in _PLACES:
        place = os.path.join(src, name)
        if os.path.isfile(place):
            return _read_archive(place)
        if os.path.isdir(place):
            return _read_folder(place)
    if not os.path.isdir(src):
        raise ValueError(f"{printable(src)} does not exist")
    return _read_folder(src)


def _read_archive(path: str) -> dict[str, bytes]:
    try:
        return files_of_tar(path)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as problem:
        raise ValueError(
            f"{printable(path)} is damaged, or no tar file ({problem}): get it again"
        ) from problem


def _read_folder(folder: str) -> dict[str, bytes]:
    """The files of both versions that lie in a folder."""
    files = {}
    for split in ("train", "val"):
        for name in _published_sums(split):
            for path in (Path(folder, name), Path(folder, f"{name}.bin")):
                if path.is_file():
                    files[path.name] = path.read_bytes()
    return files


def _read_split(
    files: dict[str, bytes], published: dict[str, str], args: argparse.Namespace
) -> list[ImageArrays]:
    """Check and parse the files of a split.

    Args:
        files: the contents of all files.
        published: the names of the files of the python version, with their MD5 sums.
        args: the command line.

    Raises:
        ValueError: if a file is missing, damaged or another than the published one.
    """
    arrays = []
    for name, md5 in published.items():
        binary_name = f"{name}.bin"
        if name in files:
            content = files[name]
            found = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if found != md5 and not args.skip_checksums:
                raise ValueError(
                    f"{printable(args.src)}: {name} is not the published file: its MD5 sum is not "
                    f"{md5}. Get it again, or import it as it is with --skip_checksums"
                )
            arrays.append(parse_cifar10(Path(name), content))
        elif binary_name in files:
            arrays.append(parse_cifar10(Path(binary_name), files[binary_name]))
        else:
            raise ValueError(
                f"{printable(args.src)} has neither {name} nor {binary_name}: name "
                f"{_PLACES[0]} or {_PLACES[1]}, or the folder that it unpacks to"
            )
    return arrays


def _png_files(arrays: list[ImageArrays]) -> list[NewFile]:
    """The files of the images, numbered through in the official order."""
    files: list[NewFile] = []
    for images in arrays:
        for pixels, label in zip(images.pixels, images.labels.tolist(), strict=True):
            name = f"{CIFAR10_CLASSES[label]}/{len(files):05d}.png"
            files.append(NewFile(name, functools.partial(encode_png, pixels)))
    return files
