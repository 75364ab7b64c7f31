"""`resnet-dist data import-tiny-imagenet`: Tiny-ImageNet, as it is published, to class folders.

It has 200 classes of ImageNet, with 500 training and 50 validation images of 64 x 64 pixels each:

- `train/<wnid>/images/<name>.JPEG`, and their names in `train/<wnid>/<wnid>_boxes.txt`,
- `val/images/<name>.JPEG`, and their classes in `val/val_annotations.txt`,
- `words.txt`, with the words of all of WordNet's nouns.

The images of `test/` have no labels.
"""

import argparse
import functools
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.commands.class_folders import NewFile, write_class_folders
from resnet_dist.files import write_file
from resnet_dist.models.class_names import WORDS_FILE, format_words
from resnet_dist.text import printable

_ANNOTATIONS = "val/val_annotations.txt"
_WORDS = "words.txt"
_TOP_FOLDER = "tiny-imagenet-200"
# Neither hidden nor `..`.
_NAME = r"[^./][^/]*"
_CLASS = re.compile(f"train/({_NAME})/.*")
_TRAIN_IMAGE = re.compile(f"train/({_NAME})/images/({_NAME}[.]jpe?g)", re.IGNORECASE)
_VAL_IMAGE = re.compile(f"val/images/({_NAME}[.]jpe?g)", re.IGNORECASE)


@dataclass(frozen=True)
class _Source:
    """The files of Tiny-ImageNet, in a folder or in a zip file."""

    place: str
    """the folder or the zip file, for messages"""
    sizes: dict[str, int]
    """the number of bytes of each file, by its path below the top folder"""
    read: Callable[[str], bytes]
    """gives the content of one of these files"""

    def fault(self, problem: str) -> ValueError:
        """The error for a data set that is not complete."""
        return ValueError(f"{printable(self.place)}: {problem}: unpack it again")

    def lines(self, name: str) -> list[str]:
        """The lines of a text file. Raises ValueError if it is not text."""
        content = self.read(name)
        try:
            return content.decode().splitlines()
        except UnicodeDecodeError as problem:
            raise ValueError(
                f"{printable(self.place)}: {name} is not text in UTF-8 ({problem}): get it again"
            ) from problem

    def image(self, wnid: str, path: str) -> NewFile:
        """An image and the name that it gets.

        Args:
            wnid: its class.
            path: its path below the top folder.
        """
        file = os.path.basename(path)
        read = functools.partial(self.read, path)
        num_bytes = self.sizes[path]
        return NewFile(f"{wnid}/{file}", read, num_bytes)


def run(args: argparse.Namespace) -> int:
    """Import the folder or zip file args.src to args.out.

    Args:
        args: the command line.

    Returns:
        0.

    Raises:
        ValueError: if it is not Tiny-ImageNet, or not all of it.
    """
    if os.path.isdir(args.src):
        _import_folder(args.src, args.out)
    else:
        _import_zip(args.src, args.out)
    return 0


def _import_folder(folder: str, out: str) -> None:
    """Import a folder. Raises ValueError if it is not Tiny-ImageNet, or is `out`."""
    root = _find_root(folder)
    if root.resolve() == Path(out).resolve():
        raise ValueError(f"{out} is the folder to read: name another folder to write")
    source = _open_folder(root)
    _import(source, out)


def _import_zip(path: str, out: str) -> None:
    """Import a zip file. Raises ValueError if it is not Tiny-ImageNet, or cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            source = _open_zip(path, archive)
            _import(source, out)
    except FileNotFoundError as problem:
        raise ValueError(f"{printable(path)} does not exist") from problem
    except zipfile.BadZipFile as problem:
        raise ValueError(
            f"{printable(path)} is damaged, or no zip file ({problem}): get it again"
        ) from problem


def _not_tiny_imagenet(place: str) -> ValueError:
    """The error for a folder or a zip file that holds something else."""
    return ValueError(
        f"{printable(place)} is not Tiny-ImageNet as it is published, since it has no "
        f"{_ANNOTATIONS}: name tiny-imagenet-200.zip, or the folder that it unpacks to"
    )


def _find_root(folder: str) -> Path:
    """The folder that holds train/ and val/: `folder`, or the usual one in it.

    Raises:
        ValueError: if neither of them does.
    """
    for root in (Path(folder), Path(folder, _TOP_FOLDER)):
        annotations = root / _ANNOTATIONS
        if annotations.is_file():
            return root
    raise _not_tiny_imagenet(folder)


def _open_folder(root: Path) -> _Source:
    """List the words, train/ and val/ of a folder."""
    paths = [root / _WORDS]
    for split in ("train", "val"):
        folder = root / split
        paths.extend(folder.rglob("*"))
    sizes = {}
    for path in paths:
        if path.is_file():
            name = path.relative_to(root).as_posix()
            sizes[name] = path.stat().st_size

    def read(name: str) -> bytes:
        return (root / name).read_bytes()

    return _Source(str(root), sizes, read)


def _open_zip(path: str, archive: zipfile.ZipFile) -> _Source:
    """List a zip file, whose top folder may have any name.

    Raises:
        ValueError: if it has no annotations.
    """
    top = _find_top_folder(archive.namelist())
    if top is None:
        raise _not_tiny_imagenet(path)
    sizes = {}
    for member in archive.infolist():
        is_inside = member.filename.startswith(top)
        if is_inside and not member.is_dir():
            name = member.filename.removeprefix(top)
            sizes[name] = member.file_size

    def read(name: str) -> bytes:
        try:
            return archive.read(f"{top}{name}")
        except (zlib.error, EOFError) as problem:
            raise zipfile.BadZipFile(f"{name}: {problem}") from problem

    return _Source(path, sizes, read)


def _find_top_folder(names: list[str]) -> str | None:
    """What the names in a zip file have before train/ and val/.

    Args:
        names: the names of all files.

    Returns:
        A path that ends with a slash, "" if there is no top folder, or None if the zip file has no
        annotations.
    """
    top_folders = []
    for name in names:
        if not name.endswith(_ANNOTATIONS):
            continue
        top = name.removesuffix(_ANNOTATIONS)
        is_folder = top == "" or top.endswith("/")
        if is_folder:
            top_folders.append(top)
    if not top_folders:
        return None
    return min(top_folders, key=len)


def _import(source: _Source, out: str) -> None:
    """Check everything, then write both splits and the words of the classes."""
    train, classes = _find_train(source)
    val = _find_val(source, classes)
    words = _read_words(source, classes)
    write_class_folders(out, "train", train)
    write_class_folders(out, "val", val)
    if words:
        path = Path(out, WORDS_FILE)
        write_file(path, format_words(words))
    else:
        print(f"{printable(source.place)} has no {_WORDS}: the classes keep their WordNet ids")


def _find_train(source: _Source) -> tuple[list[NewFile], set[str]]:
    """The training images, and the WordNet ids of their classes.

    Raises:
        ValueError: if some are missing.
    """
    images = []
    wnids = set()
    wnids_with_images = set()
    for path in sorted(source.sizes):
        class_match = _CLASS.fullmatch(path)
        if class_match:
            wnids.add(class_match[1])
        image_match = _TRAIN_IMAGE.fullmatch(path)
        if image_match:
            wnid = image_match[1]
            wnids_with_images.add(wnid)
            image = source.image(wnid, path)
            images.append(image)
    if not images:
        raise source.fault("it has no training images in train/<wnid>/images/")
    for wnid in sorted(wnids):
        if wnid not in wnids_with_images:
            raise source.fault(f"the class train/{printable(wnid)} has no images")
        _check_boxes(source, wnid)
    return images, wnids


def _check_boxes(source: _Source, wnid: str) -> None:
    """Check that a class has each image that the file of its boxes names.

    Args:
        source: where its files are.
        wnid: the class.

    Raises:
        ValueError: if an image is missing.
    """
    boxes = f"train/{wnid}/{wnid}_boxes.txt"
    if boxes not in source.sizes:
        return
    for line in source.lines(boxes):
        name, _, _ = line.partition("\t")
        path = f"train/{wnid}/images/{name}"
        if path not in source.sizes:
            raise source.fault(f"{printable(path)} is missing, which {printable(boxes)} names")


def _find_val(source: _Source, classes: set[str]) -> list[NewFile]:
    """The validation images, with the classes that the annotations give them.

    Raises:
        ValueError: if an image or an annotation is missing, or an annotation is not valid.
    """
    without_class = {path for path in source.sizes if _VAL_IMAGE.fullmatch(path)}
    images = []
    lines = source.lines(_ANNOTATIONS)
    for number, line in enumerate(lines, 1):
        name, _, rest = line.partition("\t")
        wnid, _, _ = rest.partition("\t")
        path = f"val/images/{name}"
        problem = ""
        if wnid not in classes:
            problem = f"{wnid!r} is no class of train/"
        elif path not in without_class:
            problem = f"val/images/ has no image {name!r}, or an earlier line names it too"
        if problem:
            place = f"{_ANNOTATIONS}, line {number}"
            form = "a line is <image>, <wnid> and a box, with tabs between them"
            raise source.fault(f"{place}: {printable(problem)}; {form}")
        without_class.remove(path)
        image = source.image(wnid, path)
        images.append(image)
    if without_class:
        first = printable(min(without_class))
        raise source.fault(f"{_ANNOTATIONS} has no line for {first}")
    return images


def _read_words(source: _Source, classes: set[str]) -> dict[str, str]:
    """The words of the classes, by WordNet id; empty if there is no file of them."""
    if _WORDS not in source.sizes:
        return {}
    words = {}
    for line in source.lines(_WORDS):
        wnid, _, meaning = line.partition("\t")
        has_words = meaning.strip() != ""
        if wnid in classes and has_words:
            words[wnid] = meaning
    sorted_by_wnid = sorted(words.items())
    return dict(sorted_by_wnid)
