"""Tar shards: the images that their headers list.

A shard is a plain tar file with members `<class>/<file>` (or `<class>/<folder>/<file>`), or with
webdataset's `<key>.jpg` and `<key>.cls`, where the latter holds the class id in ASCII digits.
Leading folders that all members share, such as `imagenet/train/`, are no part of the class.
"""

import io
import os
import posixpath
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from stat import S_ISREG
from typing import cast

import numpy as np

from resnet_dist.data.sources.folders import (
    LeftOut,
    ScanPart,
    formats_remark,
    is_image_name,
    kind_of_name,
)
from resnet_dist.data.sources.index import SUFFIXES, Origin, first_names
from resnet_dist.data.sources.index_file import encode_index, sort_rows

MAX_CLASS_ID = 1_000_000
"""Largest class id in a .cls member; a larger one is damage, and would fill the memory with class
names. The largest public sets have some 20,000 classes."""

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".rar", ".7z")
"""Endings of archives that people take for shards, and that cannot be read by position."""

_MAX_CLS_BYTES = 32


@dataclass
class Shard(ScanPart):
    """The images of one shard."""

    folders: list[str] = field(default_factory=list)
    """of each image; the first part is its class; empty if a .cls member has it"""
    files: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    class_ids: dict[str, int] = field(default_factory=dict)
    """from the .cls members: by the stem of the image's name"""
    stamp: list[int] = field(default_factory=list)
    """of the file, from before it was read"""

    def is_current(self, path: str) -> bool:
        """Whether the file is as it was when it was read. Raises OSError."""
        return self.stamp == _shard_stamp(os.stat(path))


def _shard_stamp(stat: os.stat_result) -> list[int]:
    """[size in bytes, time of modification in ns]."""
    return [stat.st_size, stat.st_mtime_ns]


def read_headers(path: str) -> Shard:
    """List the images of one shard, from its headers.

    Args:
        path: the tar file.

    Raises:
        ValueError: if it is no complete and uncompressed tar file.
    """
    stat = os.stat(path)
    if not S_ISREG(stat.st_mode):
        raise ValueError(f"the shard {path} is no regular file: replace it by a tar file")
    shard = Shard()
    shard.stamp = _shard_stamp(stat)
    try:
        with tarfile.open(path, "r:") as tar:
            member = tar.next()
            while member is not None:
                # tarfile keeps a kilobyte for each member otherwise.
                tar.__dict__["members"].clear()
                _add_member(shard, tar, member)
                member = tar.next()
            _check_end(tar)
    except (tarfile.TarError, ValueError, MemoryError, OverflowError) as error:
        reason = str(error) or "a member claims more bytes than there are"
        raise ValueError(
            f"the shard {path} is no complete, uncompressed tar file: {reason}. Copy it again, or "
            f"pack it again with `resnet-dist data pack`"
        ) from None
    return shard


def _check_end(tar: tarfile.TarFile) -> None:
    """Check that the end marker follows. tarfile takes damage for the end.

    Raises:
        ValueError: if it does not.
    """
    file = cast("io.BufferedReader", tar.fileobj)
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    end_marker = bytes(tarfile.BLOCKSIZE)
    if block != end_marker:
        raise ValueError(f"it ends or is damaged at byte {tar.offset}, before its end marker")


def _add_member(
    shard: Shard,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
) -> None:
    """Add a member of a tar file to the images of a shard, or to what is left out.

    Args:
        shard: the images so far.
        tar: the tar file.
        member: the header of the member.

    Raises:
        ValueError: if it is a .cls member without a class id.
    """
    if member.isdir():
        return
    path = _inside(member.name)
    folder, file = posixpath.split(path)
    stem, suffix = posixpath.splitext(file)
    if not member.isreg() or member.issparse():
        shard.left_out.add("links, devices or sparse files", member.name)
    elif is_image_name(file):
        shard.folders.append(folder)
        shard.files.append(file)
        shard.offsets.append(member.offset_data)
        shard.lengths.append(member.size)
    elif suffix == ".cls":
        # Beside class folders it repeats what the folder says.
        if not folder:
            shard.class_ids[stem] = _read_class_id(tar, member)
    else:
        shard.left_out.add(kind_of_name(file), member.name)


def _inside(name: str) -> str:
    """A member's name as a path without leading `/`, `./` and `../`."""
    normal = posixpath.normpath(name)
    parts = normal.split("/")
    while parts and parts[0] in ("", ".", ".."):
        parts = parts[1:]
    return "/".join(parts)


def _read_class_id(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
) -> int:
    """Read the class id in a .cls member.

    Args:
        tar: the tar file.
        member: the header of the member.

    Returns:
        The class id; -1 for a negative one, which means none.

    Raises:
        ValueError: if there is no class id.
    """
    if member.size > _MAX_CLS_BYTES:
        raise ValueError(f"{member.name} has {member.size} bytes, but a class id is a short number")
    file = cast("io.BufferedReader", tar.extractfile(member))
    content = file.read()
    try:
        number = int(content)
    except ValueError:
        raise ValueError(f"{member.name} holds {content!r}, which is no class id") from None
    if number > MAX_CLASS_ID:
        raise ValueError(
            f"{member.name} holds the class id {number}, which is above the limit of {MAX_CLASS_ID}"
        )
    return max(-1, number)


def index_shards(root: str, names: Sequence[str], shards: Sequence[Shard]) -> bytes:
    """The contents of the index of a split's shards.

    Args:
        root: the folder of the split.
        names: the file names of the shards.
        shards: the images of each shard.

    Raises:
        ValueError: if they hold no image, or nothing tells the class of one.
    """
    rule = f"data.data_dir: the {len(shards)} tar files in {root}"
    left_out = LeftOut()
    files: list[str] = []
    for shard in shards:
        left_out.add_all(shard.left_out)
        files += shard.files
    if not files:
        found = left_out.remark() or "they are empty"
        raise ValueError(
            f"{rule} ({first_names(names)}) hold no image ({', '.join(SUFFIXES)}); {found}"
        )
    folders = _without_common(shards)
    num_with_class = sum(1 for folder in folders if folder)
    if 0 < num_with_class < len(folders):
        raise ValueError(
            f"{rule} hold some images in class folders and some without: pack them in one way"
        )
    if num_with_class > 0:
        classes, labels, rows = _by_folder(folders, files)
    else:
        classes, labels = _by_class_id(root, names, shards)
        rows = [os.fsencode(file) for file in files]
    order = sort_rows(classes, labels, rows)
    stamps = []
    for shard in shards:
        size = shard.stamp[0]
        stamps.append((size,))
    remarks = []
    for remark in (left_out.remark(), formats_remark(files)):
        if remark:
            remarks.append(remark)
    origin = Origin(
        shards=tuple(names),
        stamps=tuple(stamps),
        remarks=tuple(remarks),
    )
    places = _places(shards)
    ordered_labels = np.asarray(labels)[order]
    ordered_rows = [rows[row] for row in order]
    return encode_index(
        classes,
        ordered_labels,
        ordered_rows,
        origin,
        places[order],
    )


def _places(shards: Sequence[Shard]) -> np.ndarray:
    """Where the images of all shards are.

    Args:
        shards: the images of each shard.

    Returns:
        int64 [n, 3]: number of the shard, offset and length of each image.
    """
    parts = []
    for number, shard in enumerate(shards):
        part = np.empty((len(shard.files), 3), dtype="<i8")
        part[:, 0] = number
        part[:, 1] = shard.offsets
        part[:, 2] = shard.lengths
        parts.append(part)
    return np.concatenate(parts)


def _without_common(shards: Sequence[Shard]) -> list[list[str]]:
    """The parts of each image's folder, without the leading ones that all images share.

    At least one part remains of each, the class.

    Args:
        shards: the images of each shard.
    """
    folders = []
    for shard in shards:
        for folder in shard.folders:
            parts = folder.split("/") if folder else []
            folders.append(parts)
    shortest = min(map(len, folders))
    if shortest == 0:
        return folders
    # The last part of the shortest one has to remain.
    heads = [folder[: shortest - 1] for folder in folders]
    extremes = [min(heads), max(heads)]
    common = len(os.path.commonprefix(extremes))
    return [folder[common:] for folder in folders]


def _by_folder(
    folders: list[list[str]],
    files: list[str],
) -> tuple[list[str], list[int], list[bytes]]:
    """The classes of images in class folders.

    Args:
        folders: the parts of each image's folder; the first one is the class.
        files: the file names.

    Returns:
        (class names, labels, names inside of the class).
    """
    class_of_rows = [folder[0] for folder in folders]
    classes = sorted(set(class_of_rows))
    ids = {}
    for label, name in enumerate(classes):
        ids[name] = label
    labels = []
    rows = []
    for folder, file in zip(folders, files, strict=True):
        labels.append(ids[folder[0]])
        inner_name = "/".join([*folder[1:], file])
        rows.append(os.fsencode(inner_name))
    return classes, labels, rows


def _by_class_id(
    root: str,
    names: Sequence[str],
    shards: Sequence[Shard],
) -> tuple[list[str], list[int]]:
    """The classes of images with .cls members.

    Classes have numbers for names, so that ids stay what they are where a class has no image.

    Args:
        root: the folder of the split.
        names: the file names of the shards.
        shards: the images of each shard.

    Returns:
        (class names, labels).

    Raises:
        ValueError: if an image has no class id.
    """
    labels = []
    for name, shard in zip(names, shards, strict=True):
        for file in shard.files:
            stem, _ = posixpath.splitext(file)
            label = shard.class_ids.get(stem, -1)
            if label == -1:
                path = os.path.join(root, name)
                raise ValueError(
                    f"the shard {path} holds {file} with neither a class folder nor a .cls file of "
                    f"that name with a class id, so nothing tells its class"
                )
            labels.append(label)
    num_classes = max(labels) + 1
    classes = [str(number) for number in range(num_classes)]
    return classes, labels
