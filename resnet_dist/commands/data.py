"""`resnet-dist data`: get a data set ready: import, pack, download, verify, show.

Files get their names when they are complete, so a command that was killed goes on where it was when
it is run again.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from resnet_dist.addresses import is_url
from resnet_dist.settings.options import Parser
from resnet_dist.text import printable

if TYPE_CHECKING:
    from resnet_dist.data.sources.index import Index
    from resnet_dist.data.sources.pack import ImageSource, PackOptions


class _Argument(NamedTuple):
    """One option, or for the default None one positional argument."""

    default: Any
    meaning: str


_PACKING = ("--resize", "--quality", "--shard_mb", "--workers")
_PARQUET = ("--class_names", "--image_column", "--label_column", "--val_split")
_COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "import-imagenet": (
        "the ILSVRC 2012 archives in SRC to OUT/train/<wnid>/ and OUT/val/<wnid>/",
        ("src", "out", "--shards", "--skip_checksums", *_PACKING),
    ),
    "import-tiny-imagenet": (
        "Tiny-ImageNet, a folder or zip file SRC, to OUT/train/<wnid>/ and OUT/val/<wnid>/",
        ("src", "out"),
    ),
    "import-cifar10": (
        "the official archive of CIFAR-10, python or binary, packed or not, to PNG files in "
        "OUT/train/<class>/ and OUT/val/<class>/",
        ("src", "out", "--skip_checksums"),
    ),
    "import-parquet": (
        "parquet files as Hugging Face has them, in SRC or SRC/data/, to tar shards in OUT/train/ "
        "and OUT/val/",
        ("src", "out", *_PARQUET, *_PACKING),
    ),
    "import-hf": (
        "download the parquet files of the data set NAME from the Hugging Face hub and import them",
        ("name", "out", "--config", *_PARQUET, *_PACKING),
    ),
    "pack": (
        "class folders in SRC/train/ and SRC/val/ to tar shards with an index, which webdataset "
        "and DALI read too",
        ("src", "out", *_PACKING),
    ),
    "index-shards": (
        "write the index file of each tar shard and shards.json, which an object store needs "
        "beside the shards (pack writes them by itself)",
        ("data_dir",),
    ),
    "download": (
        "imagenette, cifar10 or flowers102 through torchvision (of Flowers-102, as in papers on "
        "transfer, the train and val splits to train/, the test split to val/)",
        ("name", "out", "--size"),
    ),
    "verify": (
        "decode every image with the training decoder and with Pillow; exit code 1 if one is "
        "broken",
        (
            "data_dir",
            "--report",
            "--write_exclude",
            "--exclude_duplicates",
            "--tiny",
            "--workers",
        ),
    ),
    "show": (
        "a picture of what the network sees; takes the options of training, such as --config FILE",
        ("--out", "--images", "--epochs"),
    ),
}
_ARGUMENTS = {
    "src": _Argument(None, "folder or archive to read"),
    "out": _Argument(None, "folder to write"),
    "name": _Argument(
        None,
        "download: imagenette, cifar10 or flowers102; import-hf: a data set of the hub, such as "
        "ILSVRC/imagenet-1k",
    ),
    "data_dir": _Argument(None, "folder that holds train/ and val/"),
    "--shards": _Argument(False, "write tar shards as pack does, and no class folders"),
    "--skip_checksums": _Argument(
        False, "do not compare the MD5 sums of the files with the published ones"
    ),
    "--class_names": _Argument(
        "", "text file with one class name a line, by label; empty: as the files say"
    ),
    "--image_column": _Argument("", "column of the images; empty: as the files say"),
    "--label_column": _Argument("", "column of the labels; empty: as the files say"),
    "--val_split": _Argument(
        "", "split to import as the validation set, such as test; empty: validation, valid or val"
    ),
    "--config": _Argument("", "configuration of a data set of the hub that has several"),
    "--resize": _Argument(
        0,
        "resize images whose shorter side is above this to it, and save them as JPEG; 0 = none",
    ),
    "--quality": _Argument(
        0,
        "JPEG quality for all images that it makes smaller; 0 = only resized images are encoded "
        "again, with 90",
    ),
    "--shard_mb": _Argument(256, "MiB of original bytes in a shard"),
    "--workers": _Argument(len(os.sched_getaffinity(0)), "number of threads"),
    "--size": _Argument("full", "size of Imagenette: full, 320px or 160px"),
    "--report": _Argument(
        "verify.json", "file for the report; a .txt with the same lies beside it"
    ),
    "--write_exclude": _Argument(
        "", "file for the list of broken training images, which data.exclude takes"
    ),
    "--exclude_duplicates": _Argument(
        False, "also list training images that are there twice, or in val/"
    ),
    "--tiny": _Argument(32, "shorter side in pixels below which an image is tiny"),
    "--out": _Argument("show.png", "file for the picture"),
    "--images": _Argument(8, "number of images of each split"),
    "--epochs": _Argument(6, "number of epochs that the training images are shown in"),
}
_PATHS = ("src", "out", "data_dir", "report", "write_exclude", "class_names")


SUMMARIES = {name: text for name, (text, _) in _COMMANDS.items()}


def add_data_options(parser: Parser, name: str) -> None:
    """Add the arguments of the sub-command `name`."""
    _, arguments = _COMMANDS[name]
    for argument in arguments:
        _add_argument(parser, argument)


def _add_argument(parser: Parser, name: str) -> None:
    default, meaning = _ARGUMENTS[name]
    if default is None:
        parser.add_option(name, help=meaning)
    elif default is False:
        parser.add_option(name, help=meaning, action="store_true")
    else:
        parser.add_option(name, help=meaning, type=type(default), default=default)


def run(args: argparse.Namespace) -> int:
    """Do one subcommand; not show, which joins the other ranks (show.py).

    Returns:
        0; 1 if the machine or the network fails, or an image is broken; 2 for what the user did.
    """
    try:
        _check(args)
        return _functions()[args.command](args)
    except (ValueError, OSError) as problem:
        print(f"error: {printable(problem)}", file=sys.stderr)
        return 2 if isinstance(problem, ValueError) else 1


def _check(args: argparse.Namespace) -> None:
    """Expand `~` and variables in paths. Raises ValueError for a negative number."""
    for key, value in vars(args).items():
        if isinstance(value, int) and value < 0:
            raise ValueError(f"--{key} is {value}: it must not be negative")
        if key in ("src", "out") and is_url(str(value)):
            raise ValueError(
                f"{value} is an address, and this command works on folders of a disk: copy the "
                f"data with the tools of the store"
            )
        if key in _PATHS and value:
            setattr(args, key, os.path.expanduser(os.path.expandvars(value)))


def _functions() -> dict[str, Callable[[argparse.Namespace], int]]:
    """What does each subcommand. Imported here, so that the help needs none of it."""
    from resnet_dist.commands import (
        download,
        import_cifar10,
        import_hf,
        import_imagenet,
        import_parquet,
        import_tiny_imagenet,
        verify,
    )

    return {
        "import-imagenet": import_imagenet.run,
        "import-tiny-imagenet": import_tiny_imagenet.run,
        "import-cifar10": import_cifar10.run,
        "import-parquet": import_parquet.run,
        "import-hf": import_hf.run,
        "pack": pack_folder,
        "index-shards": index_folder_of_shards,
        "download": download.run,
        "verify": verify.run,
    }


def pack_options(args: argparse.Namespace) -> "PackOptions":
    """The options of packing, from the command line."""
    from resnet_dist.data.sources.pack import PackOptions

    return PackOptions(args.out, args.shard_mb, args.workers, args.resize, args.quality)


def pack_folder(args: argparse.Namespace) -> int:
    """Pack every split of a folder to shards."""
    from resnet_dist.data.sources.pack import open_splits, pack
    from resnet_dist.models.class_names import copy_words

    for split, index in open_splits(args.src).items():
        print(pack(_sources(index), split, pack_options(args)))
    copy_words(Path(args.src), Path(args.out))
    return 0


def index_folder_of_shards(args: argparse.Namespace) -> int:
    """Write the index file of each shard of a folder, for object stores."""
    from resnet_dist.data.sources.pack import open_splits
    from resnet_dist.data.stores.shard_index import write_shard_indexes

    if is_url(args.data_dir):
        raise ValueError(
            f"{args.data_dir} is an address: run this command where the shards are on a disk, and "
            f"upload what it writes"
        )
    for split, index in open_splits(args.data_dir).items():
        if not index.shards:
            raise ValueError(
                f"{index.root} holds class folders: `resnet-dist data pack` makes shards of them"
            )
        number = write_shard_indexes(index)
        print(f"{split}: {number} index files and shards.json in {index.root}")
    return 0


def _sources(index: "Index") -> "Iterator[ImageSource]":
    """The images of an index, with their sizes."""
    from resnet_dist.data.sources.pack import ImageSource

    for row in range(len(index)):
        path, offset, length = index.place(row)
        if length < 0:
            length = os.path.getsize(path)
        yield ImageSource(index.name(row), path, offset, length)
