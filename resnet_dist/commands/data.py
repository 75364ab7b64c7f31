"""`resnet-dist data`: the ImageNet archives, small public sets and any folder, made ready to train
on.

Files get their names when they are complete: a command that was killed goes on where it was when it
is run again.
"""

import argparse
import functools
import io
import os
import re
import shutil
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from resnet_dist.console import Progress
from resnet_dist.options import Parser

_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz")
_PLAIN_NAME = re.compile(r"[^./\\\0][^/\\\0]*")  # in no folder, not hidden, not ..
_COMMANDS = {
    "import-imagenet": (
        "the ILSVRC 2012 archives in SRC to OUT/train/<wnid>/ and OUT/val/<wnid>/",
        "src out --shards --resize --quality --shard_mb --workers",
    ),
    "pack": (
        "class folders in SRC/train/ and SRC/val/ to tar shards that webdataset and DALI read too, with an index",
        "src out --resize --quality --shard_mb --workers",
    ),
    "download": (
        "imagenette, cifar10 or flowers102 through torchvision (of Flowers-102, as in papers on transfer, "
        "the train and val splits to train/, the test split to val/)",
        "name out --size",
    ),
    "verify": (
        "decode every image with the training decoder and with Pillow; exit code 1 if one is broken",
        "data_dir --report --write_exclude --exclude_duplicates --tiny --workers",
    ),
    "show": (
        "a picture of what the network sees; takes the options of training, such as --config FILE",
        "--out --images --epochs",
    ),
}
_OPTIONS = {
    "--shards": (False, "write tar shards as pack does, and no class folders"),
    "--resize": (
        0,
        "bring shorter sides above this down to it and save such images anew as JPEG; 0 = none",
    ),
    "--quality": (
        0,
        "JPEG quality of all images that it makes smaller; 0 = 90, of the resized ones alone",
    ),
    "--shard_mb": (256, "MiB of original bytes in a shard"),
    "--workers": (len(os.sched_getaffinity(0)), "threads"),
    "--size": ("full", "of Imagenette: full, 320px or 160px"),
    "--report": ("verify.json", "the report; the same as text goes beside it"),
    "--write_exclude": (
        "",
        "file for the list of broken training images, which data.exclude takes",
    ),
    "--exclude_duplicates": (
        False,
        "list training images that are there twice, or in val/, as well",
    ),
    "--tiny": (32, "shorter side below which an image is tiny"),
    "--out": ("show.png", "the picture"),
    "--images": (8, "of each split"),
    "--epochs": (6, "in which the training images are shown"),
}


SUMMARIES = {name: text for name, (text, _) in _COMMANDS.items()}


def add_data_options(parser: Parser, name: str) -> None:
    """Add the arguments of the sub-command `name`."""
    _, arguments = _COMMANDS[name]
    for argument in arguments.split():
        if not argument.startswith("--"):
            parser.add_option(argument)
            continue
        default, meaning = _OPTIONS[argument]
        if default is False:
            parser.add_option(argument, help=meaning, action="store_true")
        else:
            parser.add_option(argument, help=meaning, type=type(default), default=default)


def run(args: argparse.Namespace) -> int:
    """Do a subcommand but show. Returns 1 where the machine fails or an image is broken, 2 for what
    the user did.
    """
    try:
        if negative := [
            key for key, value in vars(args).items() if isinstance(value, int) and value < 0
        ]:
            raise ValueError(f"--{negative[0]} must not be negative")
        if args.command == "verify":
            from resnet_dist.commands import verify

            return verify.run(args)
        {"import-imagenet": import_imagenet, "pack": pack_folder, "download": download}[
            args.command
        ](args)
        return 0
    except (ValueError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2 if isinstance(problem, ValueError) else 1


def pack_folder(args: argparse.Namespace) -> None:
    """Every split of a folder to shards."""
    from resnet_dist.data.sources.pack import Source, open_splits, pack

    for split, index in open_splits(args.src).items():
        places = ((index.name(row), *index.place(row)) for row in range(len(index)))
        print(
            pack(
                (
                    Source(name, path, offset, os.path.getsize(path) if length < 0 else length)
                    for name, path, offset, length in places
                ),
                split,
                args,
            )
        )


def import_imagenet(args: argparse.Namespace) -> None:
    """The three archives to class folders or to shards. Raises ValueError when one is missing,
    damaged or another.
    """
    from resnet_dist.data.sources.pack import Source, pack

    train, val, devkit = paths = [os.path.join(args.src, name) for name in _ARCHIVES]
    if missing := [path for path in paths if not os.path.isfile(path)]:
        raise ValueError(
            f"no {', '.join(missing)}: get them from image-net.org (ILSVRC 2012), with these names"
        )
    wnids, truth = _read_devkit(devkit)
    with Progress(len(wnids), "find train", "class") as bar:
        sources = {"train": [], "val": []}
        for tar, outer in _members(train, {f"{wnid}.tar" for wnid in wnids.values()}):
            for _, inner in _members(f"{train}: {outer.name}", None, tar.extractfile(outer)):
                sources["train"].append(
                    Source(
                        f"{outer.name.removesuffix('.tar')}/{inner.name}",
                        train,
                        outer.offset_data + inner.offset_data,
                        inner.size,
                    )
                )
            bar.update()
    folders = {
        f"ILSVRC2012_val_{number:08d}.JPEG": wnids[key] for number, key in enumerate(truth, 1)
    }
    for _, member in _members(val, set(folders)):
        sources["val"].append(
            Source(f"{folders[member.name]}/{member.name}", val, member.offset_data, member.size)
        )
    for split, found in sources.items():
        if args.shards:
            print(pack(found, split, args))
        else:
            _write_all(args.out, split, [(one.name, one.length, one.read) for one in found])


def _read_devkit(path: str) -> tuple[dict[int, str], list[int]]:
    """(wnid of each ILSVRC2012_ID that is a class and no group of classes, the ID of each
    validation image).
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(
            "the devkit's meta.mat cannot be read without scipy: pip install scipy"
        ) from None
    try:
        with tarfile.open(path, "r:*") as tar:
            files = {
                os.path.basename(member.name): tar.extractfile(member).read()
                for member in tar
                if member.isreg()
            }
        synsets = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)["synsets"]
        wnids = {
            int(one["ILSVRC2012_ID"]): str(one["WNID"])
            for one in synsets
            if one["num_children"] == 0
        }
        truth = [int(line) for line in files["ILSVRC2012_validation_ground_truth.txt"].split()]
        if set(truth) <= set(wnids) and all(map(_PLAIN_NAME.fullmatch, wnids.values())):
            return wnids, truth
        raise ValueError("its classes and the validation images' do not agree")
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or not the devkit of ILSVRC 2012 ({error}): get it again"
        ) from error


def _members(
    path: str, wanted: set[str] | None, file=None
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of a tar, only headers of which are read: plain files, all those `wanted` and
    once (None: any).

    Raises ValueError for another one, before it is looked at, and for a tar that is not complete.
    """
    left = set(wanted or ())
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            for member in tar:
                plain = member.type in (
                    tarfile.REGTYPE,
                    tarfile.AREGTYPE,
                ) and _PLAIN_NAME.fullmatch(member.name)
                if not plain or (wanted is not None and member.name not in left):
                    raise ValueError(
                        f"{path}: the member {member.name!r} is refused: here belong the files "
                        "of ImageNet, once and in no folder, and no paths, links or devices"
                    )
                left.discard(member.name)
                yield tar, member
            tar.fileobj.seek(tar.offset)  # tarfile takes damage for the end
            if left or tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it lacks {min(left, default='its end marker')}")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}): get it again") from error


def _write_all(out: str, split: str, images: list[tuple]) -> None:
    """Write each (`<class>/<file>`, size or None, function that gives the bytes) that is not there
    to out/split/.
    """
    from resnet_dist.data.sources.index import write_whole

    with Progress(len(images), f"write {split}") as bar:
        for name, size, read in images:
            path = os.path.join(out, split, name)
            if not os.path.exists(path) or size not in (None, os.path.getsize(path)):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                write_whole(path, read())
            bar.update()
    print(f"{split}: {len(images)} images in {os.path.join(out, split)}")


def download(args: argparse.Namespace) -> None:
    """A set that torchvision downloads, to class folders. Raises ConnectionError when it cannot."""
    from torchvision import datasets

    sets = {"imagenette": _imagenette, "cifar10": _cifar10, "flowers102": _flowers102}
    if args.name not in sets:
        raise ValueError(f"{args.name!r} is none of {', '.join(sets)}")
    cache = os.path.join(args.out, ".download")
    if os.path.exists(os.path.join(args.out, "train")) and not os.path.exists(cache):
        raise ValueError(f"{args.out} has a train/ already: remove it, or name another folder")
    try:
        for split in ("train", "val"):
            _write_all(args.out, split, list(sets[args.name](datasets, cache, split, args.size)))
    except (OSError, RuntimeError) as error:
        raise ConnectionError(
            f"{args.name} cannot be downloaded: {error}; run this again, with a network"
        ) from error
    shutil.rmtree(cache)


def _imagenette(datasets, cache: str, split: str, size: str) -> Iterator[tuple]:
    for half in Path(cache).glob("imagenette2*/") if split == "train" else ():
        shutil.rmtree(half, ignore_errors=True)  # torchvision takes an unfinished one for complete
    datasets.Imagenette(cache, split, size=size, download=True)
    for path in sorted(Path(cache).glob(f"imagenette2*/{split}/*/*.JPEG")):
        yield f"{path.parent.name}/{path.name}", None, path.read_bytes


def _cifar10(datasets, cache: str, split: str, size: str) -> Iterator[tuple]:
    from PIL import Image

    def png(pixels) -> bytes:
        Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
        return buffer.getvalue()

    part = datasets.CIFAR10(cache, train=split == "train", download=True)
    for number, (pixels, label) in enumerate(zip(part.data, part.targets, strict=True)):
        yield f"{part.classes[label]}/{number:05d}.png", None, functools.partial(png, pixels)


def _flowers102(datasets, cache: str, split: str, size: str) -> Iterator[tuple]:
    for official in ("train", "val") if split == "train" else ("test",):
        part = datasets.Flowers102(cache, official, download=True)
        for path, label in zip(part._image_files, part._labels, strict=True):
            # sorted as the labels
            folder = f"{label + 1:03d}_{re.sub('[^a-z]+', '_', part.classes[label])}"
            yield f"{folder}/{os.path.basename(path)}", None, Path(path).read_bytes
