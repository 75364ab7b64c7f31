"""`resnet-dist data import-imagenet`: the three ILSVRC 2012 archives to class folders or shards."""

import argparse
import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from resnet_dist.commands.class_folders import NewFile, files_of_tar, write_class_folders
from resnet_dist.data.sources.pack import ImageSource, PackOptions, pack
from resnet_dist.files import write_file
from resnet_dist.logs.console import Progress
from resnet_dist.models.class_names import WORDS_FILE, format_words

# A file name in no folder that is neither hidden nor `..`.
_PLAIN_NAME = re.compile(r"[^./\\\0][^/\\\0]*")
_HASH_PIECE_BYTES = 2**24
_CHECKED = ".archives.json"


def run(args: argparse.Namespace) -> int:
    """Import the archives in args.src.

    Args:
        args: the command line.

    Returns:
        0.

    Raises:
        ValueError: if an archive is missing, damaged or another than the published one.
    """
    paths, sums = _find_archives(args.src)
    # The headers come first: they find most damage in seconds, the checksums in minutes.
    wnids, truth, words = _read_devkit(paths["devkit"])
    found = {
        "train": _find_train(paths["train"], wnids),
        "val": _find_val(paths["val"], wnids, truth),
    }
    if not args.skip_checksums:
        record = Path(args.out, _CHECKED)
        _check_sums(sums, record)
    for split, sources in found.items():
        if args.shards:
            options = PackOptions(
                args.out,
                args.shard_mb,
                args.workers,
                args.resize,
                args.quality,
            )
            print(pack(sources, split, options))
        else:
            files = [NewFile(source.name, source.read, source.length) for source in sources]
            write_class_folders(args.out, split, files)
    write_file(Path(args.out, WORDS_FILE), format_words(words))
    return 0


def _find_archives(folder: str) -> tuple[dict[str, str], dict[str, str]]:
    """Find the three archives.

    Args:
        folder: the folder that holds them.

    Returns:
        Their paths by torchvision's keys ("train", "val", "devkit"), and the published MD5 sum of
        each path.

    Raises:
        ValueError: if one of them is missing.
    """
    from torchvision.datasets.imagenet import ARCHIVE_META

    paths: dict[str, str] = {}
    sums: dict[str, str] = {}
    for key, (name, md5) in ARCHIVE_META.items():
        path = os.path.join(folder, name)
        paths[key] = path
        sums[path] = md5
    missing = [path for path in paths.values() if not os.path.isfile(path)]
    if missing:
        listed = ", ".join(missing)
        raise ValueError(
            f"no {listed}: get them from image-net.org (ILSVRC 2012), with these names"
        )
    return paths, sums


def _check_sums(sums: dict[str, str], record: Path) -> None:
    """Compare the archives' MD5 sums with the published ones, once for each file.

    Args:
        sums: the published MD5 sum of each path.
        record: file of the archives that have passed, by size and time of modification.

    Raises:
        ValueError: if a sum differs.
    """
    passed = []
    if record.exists():
        passed = json.loads(record.read_text())
    for path, published in sums.items():
        stat = os.stat(path)
        mark = [
            os.path.basename(path),
            published,
            stat.st_size,
            stat.st_mtime_ns,
        ]
        if mark in passed:
            continue
        if _md5(path, stat.st_size) != published:
            raise ValueError(
                f"{path} is not the published file: its MD5 sum is not {published}. Get it again, "
                f"or import it as it is with --skip_checksums"
            )
        passed.append(mark)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_file(record, json.dumps(passed))


def _md5(path: str, size: int) -> str:
    """The MD5 sum of a file.

    Args:
        path: the file.
        size: its number of bytes, for the progress bar.
    """
    digest = hashlib.md5(usedforsecurity=False)
    title = f"check {os.path.basename(path)}"
    with Progress(size, title, "B") as bar, open(path, "rb") as file:
        piece = file.read(_HASH_PIECE_BYTES)
        while piece:
            digest.update(piece)
            bar.update(len(piece))
            piece = file.read(_HASH_PIECE_BYTES)
    return digest.hexdigest()


def _find_train(path: str, wnids: dict[int, str]) -> list[ImageSource]:
    """The training images, in one tar per class inside the archive.

    Args:
        path: the archive.
        wnids: the classes by their ILSVRC2012_ID.
    """
    wanted = {f"{wnid}.tar" for wnid in wnids.values()}
    sources = []
    with Progress(len(wnids), "find train", "class") as bar:
        for tar, outer in _members(path, wanted):
            wnid = outer.name.removesuffix(".tar")
            inner_path = f"{path}: {outer.name}"
            inner_file = tar.extractfile(outer)
            for _, inner in _members(inner_path, None, inner_file):
                name = f"{wnid}/{inner.name}"
                offset = outer.offset_data + inner.offset_data
                source = ImageSource(name, path, offset, inner.size)
                sources.append(source)
            bar.update()
    return sources


def _find_val(path: str, wnids: dict[int, str], truth: list[int]) -> list[ImageSource]:
    """The validation images.

    Args:
        path: the archive.
        wnids: the classes by their ILSVRC2012_ID.
        truth: the ILSVRC2012_ID of each image.
    """
    folders = {}
    for number, key in enumerate(truth, 1):
        folders[f"ILSVRC2012_val_{number:08d}.JPEG"] = wnids[key]
    sources = []
    for _, member in _members(path, set(folders)):
        folder = folders[member.name]
        name = f"{folder}/{member.name}"
        source = ImageSource(name, path, member.offset_data, member.size)
        sources.append(source)
    return sources


def _read_devkit(path: str) -> tuple[dict[int, str], list[int], dict[str, str]]:
    """Read the classes and the labels of the validation images.

    Args:
        path: the archive of the devkit.

    Returns:
        The wnid of each ILSVRC2012_ID that is a class and not a group of classes, the ID of each
        validation image, and the words of each wnid.

    Raises:
        ValueError: if the archive is damaged, or scipy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(
            "the devkit's meta.mat cannot be read without scipy: pip install scipy"
        ) from None
    try:
        files = files_of_tar(path)
        meta = loadmat(io.BytesIO(files["meta.mat"]), squeeze_me=True)
        wnids = {}
        words = {}
        for synset in meta["synsets"]:
            if synset["num_children"] == 0:
                number = int(synset["ILSVRC2012_ID"])
                wnid = str(synset["WNID"])
                wnids[number] = wnid
                words[wnid] = str(synset["words"])
        lines = files["ILSVRC2012_validation_ground_truth.txt"].split()
        truth = [int(line) for line in lines]
        are_known = set(truth) <= set(wnids)
        are_plain = all(map(_PLAIN_NAME.fullmatch, wnids.values()))
        if are_known and are_plain:
            return wnids, truth, words
        raise ValueError("its classes do not agree with those of the validation images")
    except (tarfile.TarError, EOFError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or not the devkit of ILSVRC 2012 ({error}): get it again"
        ) from error


def _members(
    path: str,
    wanted: set[str] | None,
    file: IO[bytes] | None = None,
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The members of a tar file, of which only the headers are read.

    Args:
        path: the tar file; with `file`, its name in messages.
        wanted: the names that it must hold, each once; None for any names.
        file: the open tar file, if it lies inside of another one.

    Yields:
        The tar file and the header of each member.

    Raises:
        ValueError: for a member that is no plain file or not wanted, before it is looked at; for
            one that is there twice or missing; and for a tar file that is not complete.
    """
    missing = set()
    if wanted is not None:
        missing = set(wanted)
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            for member in tar:
                is_plain_file = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE)
                has_plain_name = _PLAIN_NAME.fullmatch(member.name)
                is_wanted = wanted is None or member.name in missing
                if not is_plain_file or not has_plain_name or not is_wanted:
                    raise ValueError(
                        f"{path}: the member {member.name!r} is refused: the archive holds the "
                        f"files of ImageNet, each once and in no folder, and no links or devices"
                    )
                missing.discard(member.name)
                yield tar, member
            # tarfile takes damage for the end.
            source = cast("IO[bytes]", tar.fileobj)
            source.seek(tar.offset)
            block = source.read(tarfile.BLOCKSIZE)
            end_marker = bytes(tarfile.BLOCKSIZE)
            if missing or block != end_marker:
                lacks = min(missing, default="its end marker")
                raise tarfile.ReadError(f"it lacks {lacks}")
    except tarfile.TarError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}): get it again") from error
