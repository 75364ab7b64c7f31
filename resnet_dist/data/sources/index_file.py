"""The binary file of an index: writing it, and mapping it into memory.

The file has three parts, each padded with zeros to a multiple of 64 bytes:

1. The header: magic, version, CRC-32 and length of a JSON text, then this text. It holds the class
   names, the origin of the index, its fingerprint, the CRC-32 of the rest of the file, and the
   sizes of the other parts.
2. One record for each row with the columns of `record_type`, and one more record, whose `starts` is
   the end of the last file name. All numbers of an image are in one record, so that reading them
   touches one page of memory.
3. The file names, one after the other.
"""

import json
import mmap
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.data.sources.index import (
    READ_WHOLE,
    Index,
    Origin,
    fingerprint_of,
    name_order,
)
from resnet_dist.files import write_file

Buffer = bytes | mmap.mmap

# Magic, version, CRC-32 of the JSON text, length of the JSON text.
_PREFIX = struct.Struct("<8sIIQ")
_MAGIC = b"resndist"
_VERSION = 4
# Version 3 has no checksum of the records. `data pack` wrote it with the original file names, which
# a scan of the shards cannot recover.
_VERSION_WITHOUT_CHECKSUM = 3

_COLUMNS_OF_FOLDERS = [
    ("starts", "<i8"),
    ("labels", "<i4"),
]
_COLUMNS_OF_SHARDS = [
    *_COLUMNS_OF_FOLDERS,
    ("shard", "<i4"),
    ("offset", "<i8"),
    ("length", "<i8"),
]

# Each part of the file begins at a multiple of this many bytes.
_ALIGN = 64


def write_index(
    path: str,
    class_names: Sequence[str],
    labels: Sequence[int],
    names: Sequence[bytes],
    *,
    shards: Sequence[str],
    places: Sequence[tuple[int, int, int]],
) -> None:
    """Write the index of tar shards, which must be complete and in the folder of the index.

    Args:
        path: the file to write.
        class_names: the names of the classes; the position of a name is the class id.
        labels: class id of each image, in any order of the images.
        names: file name of each image without the class, as os.fsencode returns it.
        shards: file names of the shards.
        places: (number of the shard, offset in bytes, length in bytes) of each image.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if two images of a class have the same name.
    """
    folder = os.path.dirname(path)
    stamps = []
    for shard in shards:
        size = os.path.getsize(os.path.join(folder, shard))
        stamps.append((size,))
    origin = Origin(shards=tuple(shards), stamps=tuple(stamps))

    rows = sort_rows(class_names, labels, names)
    sorted_labels = np.asarray(labels)[rows]
    sorted_names = [names[row] for row in rows]
    sorted_places = np.asarray(places, dtype="<i8")[rows]
    payload = encode_index(class_names, sorted_labels, sorted_names, origin, sorted_places)
    write_file(Path(path), payload)


def sort_rows(
    class_names: Sequence[str],
    labels: Sequence[int],
    names: Sequence[bytes],
) -> list[int]:
    """Sort images as in an index: by class, then by folder, then by file name.

    Args:
        class_names: the names of the classes; the position of a name is the class id.
        labels: class id of each image.
        names: file name of each image without the class, as os.fsencode returns it.

    Returns:
        The numbers of the images, in the order of the index.

    Raises:
        ValueError: if two images of a class have the same name.
    """

    def order(row: int) -> tuple[int, str, str]:
        folder, file = name_order(names[row])
        return labels[row], folder, file

    rows = sorted(range(len(names)), key=order)
    for row, following in pairwise(rows):
        has_same_name = names[row] == names[following]
        if has_same_name and labels[row] == labels[following]:
            class_name = class_names[labels[row]]
            file = os.fsdecode(names[row])
            raise ValueError(
                f"the image {class_name}/{file} is there twice: the images of a class need "
                f"different names; remove or rename one of the two"
            )
    return rows


def encode_index(
    class_names: Sequence[str],
    labels: np.ndarray,
    names: Sequence[bytes],
    origin: Origin,
    places: np.ndarray | None = None,
) -> bytes:
    """The contents of an index file.

    Args:
        class_names: the names of the classes; the position of a name is the class id.
        labels: class ids [n], in the order of `sort_rows`.
        names: n file names without the class, in the same order.
        origin: what the index was built from.
        places: int64 [n, 3], (number of the shard, offset, length) of each image; None for class
            folders.
    """
    lengths = np.fromiter(map(len, names), dtype="<i8", count=len(names))
    starts = np.concatenate([[0], np.cumsum(lengths)])
    name_bytes = b"".join(names)
    arrays = {
        "labels": np.asarray(labels, dtype="<i4"),
        "starts": starts.astype("<i8"),
        "names": np.frombuffer(name_bytes, dtype=np.uint8),
    }
    fingerprint = fingerprint_of(class_names, arrays)
    if places is not None:
        arrays["shard"] = places[:, 0]
        arrays["offset"] = places[:, 1]
        arrays["length"] = places[:, 2]

    kind = record_type(sharded=bool(origin.shards))
    records = np.zeros(len(names) + 1, kind)
    for column in kind.names or ():
        values = arrays[column]
        records[column][: len(values)] = values
    body = _padded(records.tobytes()) + _padded(name_bytes)

    facts = {
        "classes": list(class_names),
        **asdict(origin),
        "fingerprint": fingerprint,
        "checksum": zlib.crc32(body),
    }
    header = encode_header(len(names), len(name_bytes), facts)
    return header + body


def record_type(sharded: bool) -> np.dtype[Any]:
    """The NumPy type of a record: two columns for class folders, five for shards."""
    if sharded:
        return np.dtype(_COLUMNS_OF_SHARDS)
    return np.dtype(_COLUMNS_OF_FOLDERS)


def encode_header(rows: int, name_bytes: int, facts: Mapping[str, Any]) -> bytes:
    """The header of an index file, with its padding.

    Args:
        rows: number of images.
        name_bytes: number of bytes of all file names.
        facts: further entries of the JSON text.
    """
    complete = {**facts, "rows": rows, "name_bytes": name_bytes}
    text = json.dumps(complete).encode()
    checksum = zlib.crc32(text)
    prefix = _PREFIX.pack(_MAGIC, _VERSION, checksum, len(text))
    return _padded(prefix + text)


def open_index(path: str, root: str) -> Index:
    """Map an index file into memory.

    Only the header is checked.

    Args:
        path: the index file.
        root: the folder of the split.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the header or the size of the file is wrong.
    """
    mapped = _map_file(path)
    if len(mapped) < READ_WHOLE:
        mapped.madvise(mmap.MADV_WILLNEED)
    else:
        # If the file is larger than the memory, reading ahead around each row would waste memory.
        mapped.madvise(mmap.MADV_RANDOM)
    return read_index(mapped, root)


def open_checked(path: str, root: str) -> Index:
    """Map an index file into memory, and check its contents too: the checksum and all rows.

    The rows of a file above `READ_WHOLE` bytes are checked when they are used.

    Args:
        path: the index file.
        root: the folder of the split.

    Raises:
        OSError: if the file cannot be opened.
        ValueError: if the header, the size, the checksum or a row is wrong.
    """
    mapped = _map_file(path)
    index = open_index(path, root)
    if len(mapped) <= READ_WHOLE and not _has_right_checksum(mapped, index):
        raise ValueError(f"the index {path} is damaged: its checksum is wrong")
    index.check_contents()
    return index


def read_checked(buffer: Buffer, root: str) -> Index:
    """The index over the contents of its file, which are checked as by `open_checked`.

    Args:
        buffer: the contents of the file.
        root: the folder of the split, or its address.

    Raises:
        ValueError: if the header, the size, the checksum or a row is wrong.
    """
    index = read_index(buffer, root)
    if not _has_right_checksum(buffer, index):
        raise ValueError("the index is damaged: its checksum is wrong")
    index.check_contents()
    return index


def _map_file(path: str) -> mmap.mmap:
    """Map a file into memory, for reading."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _has_right_checksum(mapped: Buffer, index: Index) -> bool:
    """Compare the checksum in the header of a file with its contents."""
    facts, start, version = _read_header(mapped)
    if version == _VERSION_WITHOUT_CHECKSUM:
        fingerprint = fingerprint_of(index.class_names, index.arrays)
        return fingerprint == index.stored_fingerprint
    with memoryview(mapped) as view:
        checksum = zlib.crc32(view[start:])
    return bool(checksum == facts["checksum"])


def read_index(buffer: Buffer, root: str) -> Index:
    """The index over the contents of its file, without copying them.

    Only the header is checked.

    Args:
        buffer: the contents of the file.
        root: the folder of the split.

    Raises:
        ValueError: if the header or the size of the file is wrong.
    """
    facts, start, _ = _read_header(buffer)
    try:
        kind = record_type(sharded=bool(facts["shards"]))
        count = int(facts["rows"])
        name_bytes = int(facts["name_bytes"])
        # One record more than rows.
        records_stop = start + (count + 1) * kind.itemsize
        names_start = _aligned(records_stop)
        stop = _aligned(names_start + name_bytes)
        if count < 0 or name_bytes < 0 or stop != len(buffer):
            raise ValueError(
                f"the index has {len(buffer)} bytes, not the {stop} that its header says"
            )
        records = np.frombuffer(buffer, kind, count + 1, start)
        arrays = {}
        for column in kind.names or ():
            arrays[column] = records[column][:count]
        arrays["starts"] = records["starts"]
        arrays["names"] = np.frombuffer(buffer, np.uint8, name_bytes, names_start)
        return Index(
            root=root,
            class_names=tuple(map(str, facts["classes"])),
            origin=_read_origin(facts),
            stored_fingerprint=str(facts["fingerprint"]),
            arrays=arrays,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the index is damaged: its header has no valid {error}") from None


def _read_header(buffer: Buffer) -> tuple[dict[str, Any], int, int]:
    """Read and check the header of an index file.

    Returns:
        (contents of the JSON text, first byte of the records, version of the file).

    Raises:
        ValueError: if the file is no index, has another version, or its header is damaged.
    """
    prefix = buffer[: _PREFIX.size].ljust(_PREFIX.size)
    magic, version, checksum, length = _PREFIX.unpack(prefix)
    is_known_version = version in (_VERSION, _VERSION_WITHOUT_CHECKSUM)
    if magic != _MAGIC or not is_known_version:
        raise ValueError("this is no index of this version, or it is damaged")

    text_stop = _PREFIX.size + length
    text = buffer[_PREFIX.size : text_stop]
    if not text or zlib.crc32(text) != checksum:
        raise ValueError("the index is damaged: the checksum of its header is wrong")
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError("the index is damaged: its header is no table")
    return facts, _aligned(text_stop), version


def _read_origin(facts: Mapping[str, Any]) -> Origin:
    """What an index was built from, out of the JSON text of its header."""
    stamps = []
    for stamp in facts["stamps"]:
        # In version 3 a stamp is one number instead of a list.
        numbers = stamp if isinstance(stamp, list) else [stamp]
        stamps.append(tuple(map(int, numbers)))
    folders = facts.get("folders", ())
    remarks = facts.get("remarks", ())
    return Origin(
        shards=tuple(map(str, facts["shards"])),
        folders=tuple(map(str, folders)),
        stamps=tuple(stamps),
        remarks=tuple(map(str, remarks)),
        pins=tuple(map(str, facts.get("pins", ()))),
    )


def _aligned(size: int) -> int:
    """Round up to a multiple of `_ALIGN`."""
    padding = -size % _ALIGN
    return size + padding


def _padded(content: bytes) -> bytes:
    """Append zeros up to a multiple of `_ALIGN` bytes."""
    return content.ljust(_aligned(len(content)), b"\0")
