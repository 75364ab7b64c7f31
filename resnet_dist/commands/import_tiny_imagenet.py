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
        try:
            return self.read(name).decode().splitlines()
        except UnicodeDecodeError as problem:
            raise ValueError(
                f"{printable(self.place)}: {name} is not text in UTF-8 ({problem}): get it again"
            ) from problem

    def image(self, wnid: str, path: str) -> NewFile:
        """An image and the name that it gets."""
        file = os.path.basename(path)
        read = functools.partial(self.read, path)
        return NewFile(f"{wnid}/{file}", read, self.sizes[path])


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
        root = _find_root(args.src)
        if root.resolve() == Path(args.out).resolve():
            raise ValueError(f"{args.out} is the folder to read: name another folder to write")
        _import(_open_folder(root), args.out)
        return 0
    try:
        with zipfile.ZipFile(args.src) as archive:
            _import(_open_zip(args.src, archive), args.out)
    except FileNotFoundError as problem:
        raise ValueError(f"{printable(args.src)} does not exist") from problem
    except zipfile.BadZipFile as problem:
        raise ValueError(
            f"{printable(args.src)} is damaged, or no zip file ({problem}): get it again"
        ) from problem
    return 0


def _not_tiny_imagenet(place: str) -> ValueError:
    return ValueError(
        f"{printable(place)} is not Tiny-ImageNet as it is published, since it has no "
        f"{_ANNOTATIONS}: name tiny-imagenet-200.zip, or the folder that it unpacks to"
    )


def _find_root(folder: str) -> Path:
    """The folder that holds train/ and val/: `folder`, or the usual one in it."""
    for root in (Path(folder), Path(folder, _TOP_FOLDER)):
        if (root / _ANNOTATIONS).is_file():
            return root
    raise _not_tiny_imagenet(folder)


def _open_folder(root: Path) -> _Source:
    """List train/ and val/ of a folder."""
    sizes = {}
    words = root / _WORDS
    if words.is_file():
        sizes[_WORDS] = words.stat().st_size
    for split in ("train", "val"):
        for folder, _, names in os.walk(root / split):
            inner = os.path.relpath(folder, root)
            for name in names:
                size = os.path.getsize(os.path.join(folder, name))
                sizes[f"{inner}/{name}"] = size

    def read(name: str) -> bytes:
        return (root / name).read_bytes()

    return _Source(str(root), sizes, read)


def _open_zip(path: str, archive: zipfile.ZipFile) -> _Source:
    """List a zip file, whose top folder may have any name."""
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
    """What the names in a zip file have before train/ and val/; None if it has no annotations."""
    places = []
    for name in names:
        if f"/{name}".endswith(f"/{_ANNOTATIONS}"):
            places.append(name)
    if not places:
        return None
    shortest = min(places, key=len)
    return shortest.removesuffix(_ANNOTATIONS)


def _import(source: _Source, out: str) -> None:
    """Check everything, then write both splits and the words of the classes."""
    train = _find_train(source)
    classes = set()
    for image in train:
        wnid, _, _ = image.name.partition("/")
        classes.add(wnid)
    val = _find_val(source, classes)
    words = _read_words(source, classes)
    write_class_folders(out, "train", train)
    write_class_folders(out, "val", val)
    if words:
        write_file(Path(out, WORDS_FILE), format_words(words))
    else:
        print(f"{printable(source.place)} has no {_WORDS}: the classes keep their WordNet ids")


def _find_train(source: _Source) -> list[NewFile]:
    """The training images. Raises ValueError if some are missing."""
    images = []
    wnids = set()
    with_images = set()
    for path in sorted(source.sizes):
        in_class = _CLASS.fullmatch(path)
        if in_class:
            wnids.add(in_class[1])
        of_class = _TRAIN_IMAGE.fullmatch(path)
        if of_class:
            wnid = of_class[1]
            with_images.add(wnid)
            images.append(source.image(wnid, path))
    if not images:
        raise source.fault("it has no training images in train/<wnid>/images/")
    for wnid in sorted(wnids):
        _check_class(source, wnid, wnid in with_images)
    return images


def _check_class(source: _Source, wnid: str, has_images: bool) -> None:
    """Raise ValueError if a class lacks images; the file of its boxes names all of them."""
    if not has_images:
        raise source.fault(f"the class train/{printable(wnid)} has no images")
    list_of_images = f"train/{wnid}/{wnid}_boxes.txt"
    if list_of_images not in source.sizes:
        return
    for line in source.lines(list_of_images):
        name, _, _ = line.partition("\t")
        path = f"train/{wnid}/images/{name}"
        if path not in source.sizes:
            named_by = printable(list_of_images)
            raise source.fault(f"{printable(path)} is missing, which {named_by} names")


def _find_val(source: _Source, classes: set[str]) -> list[NewFile]:
    """The validation images, with the classes that the annotations give them.

    Raises:
        ValueError: if an image or an annotation is missing, or an annotation is not valid.
    """
    missing = {path for path in source.sizes if _VAL_IMAGE.fullmatch(path)}
    images = []
    for number, line in enumerate(source.lines(_ANNOTATIONS), 1):
        name, _, rest = line.partition("\t")
        wnid, _, _ = rest.partition("\t")
        path = f"val/images/{name}"
        problem = ""
        if wnid not in classes:
            problem = f"{wnid!r} is no class of train/"
        elif path not in missing:
            problem = f"val/images/ has no image {name!r}, or an earlier line names it too"
        if problem:
            raise source.fault(
                f"{_ANNOTATIONS}, line {number}: {printable(problem)}; a line is <image>, <wnid> "
                f"and a box, with tabs between them"
            )
        missing.remove(path)
        images.append(source.image(wnid, path))
    if missing:
        first = printable(min(missing))
        raise source.fault(f"{_ANNOTATIONS} has no line for {first}")
    return images


def _read_words(source: _Source, classes: set[str]) -> dict[str, str]:
    """The words of the classes; empty if there is no file of them."""
    if _WORDS not in source.sizes:
        return {}
    words = {}
    for line in source.lines(_WORDS):
        wnid, _, meaning = line.partition("\t")
        has_words = meaning.strip() != ""
        if wnid in classes and has_words:
            words[wnid] = meaning
    return dict(sorted(words.items()))
