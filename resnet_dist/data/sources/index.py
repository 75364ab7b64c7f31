"""The index of a split: its class names and, for each image, where its bytes are and its label.

The index is one binary file that all processes of a machine map into memory. Opening it costs the
same for a thousand images and for a billion, and no process builds anything of its size. Rows are
ordered as in torchvision's ImageFolder: by class, then by folder inside the class, then by file
name. So row i is the same image in class folders and in shards packed from them.

Layout of the file: magic, version, CRC-32 and length of a JSON text; the text, which holds
everything small; at the next multiple of 64 bytes one record of _COLUMNS for each row, and one
more; at the next multiple of 64 bytes the file names, one behind the other. All that is known of an
image lies in one record, so that one access touches one page.

`scan.py` builds the file from what it finds; `resnet-dist data pack` writes it for its shards.
"""

import hashlib
import json
import mmap
import os
import struct
import zlib
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.files import write_file
from resnet_dist.text import printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings, in any case, of the files that count as images: torchvision's IMG_EXTENSIONS."""

PACK_PLAN = ".pack.json"
"""File beside the shards that says what `resnet-dist data pack` is to write."""

SHARD_INDEX = "index.bin"
"""File name of the index that lies beside the tar shards of a split."""

Buffer = bytes | mmap.mmap

_PREFIX = struct.Struct("<8sIIQ")
_MAGIC = b"resndist"
_VERSION = 4
# Version 3 has no checksum of the records. `data pack` wrote it with the original file names, which
# a scan of the shards cannot find again.
_VERSION_WITHOUT_CHECKSUM = 3
_COLUMNS = [
    ("starts", "<i8"),
    ("labels", "<i4"),
    ("shard", "<i4"),
    ("offset", "<i8"),
    ("length", "<i8"),
]
_COLUMNS_OF_FOLDERS = _COLUMNS[:2]
_ALIGN = 64
# Bytes of an index that is read as a whole when it is opened; of a larger one each row is checked
# when it is used.
_READ_WHOLE = 2**28

_SLASH = ord("/")
_DOT = ord(".")


@dataclass(frozen=True)
class Origin:
    """What an index was built from."""

    shards: tuple[str, ...] = ()
    """file names of the tar shards in the split's folder; empty for class folders"""
    folders: tuple[str, ...] = ()
    """all folders that were listed, relative to the split's folder; empty for shards"""
    stamps: tuple[tuple[int, ...], ...] = ()
    """for each shard its size, for each folder its times of modification and change in ns; empty
    for one that had changed just before it was listed"""
    remarks: tuple[str, ...] = ()
    """sentences about what was left out and what is unusual"""


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split. Images that are excluded have no row."""

    root: str
    """absolute path of the split's folder"""
    class_names: tuple[str, ...]
    """the position is the class id"""
    origin: Origin
    stored_fingerprint: str
    """of all images of the file, also of the excluded ones"""
    arrays: Mapping[str, np.ndarray]
    """labels int32 [n]; starts int64 [n + 1], where each name begins in names, uint8; for shards
    also shard int32 [n], offset int64 [n], length int64 [n]"""
    excluded: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 [k]: for each excluded image, in order, how many rows come before it"""

    def __len__(self) -> int:
        return len(self.arrays["labels"]) - len(self.excluded)

    @property
    def shards(self) -> tuple[str, ...]:
        """File names of the tar shards in `root`; empty for class folders."""
        return self.origin.shards

    def fingerprint(self) -> str:
        """A short text that changes with the classes, the file names or their order.

        It does not change with the files' contents, nor between class folders and shards that were
        packed from them.
        """
        if len(self.excluded) == 0:
            return self.stored_fingerprint
        positions = self.excluded.astype("<i8").tobytes()
        return _digest(self.stored_fingerprint.encode() + positions)

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """The class ids of `rows` (int64 [B]): int64 [B]. Raises ValueError for a damaged index."""
        stored = self._stored(rows)
        labels: np.ndarray = self.arrays["labels"][stored].astype(np.int64)
        if labels.size:
            self._check_label(labels.min())
            self._check_label(labels.max())
        return labels

    def place(self, row: int) -> tuple[str, int, int]:
        """Where the image's bytes are: (absolute path, offset, length).

        The length is -1 for an image in a file of its own. Raises ValueError for a damaged index.
        """
        stored = self._stored(row)
        if not self.shards:
            return os.path.join(self.root, self._name(stored)), 0, -1
        number: int = self.arrays["shard"].item(stored)
        offset: int = self.arrays["offset"].item(stored)
        length: int = self.arrays["length"].item(stored)
        known_shard = 0 <= number < len(self.shards)
        if not known_shard or offset < 0 or length < 0:
            raise self._damaged("a place in a shard is out of range")
        path = os.path.join(self.root, self.shards[number])
        return path, offset, length

    def name(self, row: int) -> str:
        """`<class>/<file>`, or `<class>/<folder>/<file>`: unique in the split."""
        return self._name(self._stored(row))

    def path(self, row: int) -> str:
        """The image's absolute path for messages; in a shard `<shard>:<class>/<file>`."""
        file = self.place(row)[0]
        if self.shards:
            return f"{file}:{self.name(row)}"
        return file

    def find(self, name: str) -> int | None:
        """The position in the arrays of the image `<class>/<file>`; None if there is none."""
        class_name, _, file = name.partition("/")
        if class_name not in self.class_names:
            return None
        label = self.class_names.index(class_name)
        wanted = (label, *name_order(os.fsencode(file)))
        positions = range(len(self.arrays["labels"]))
        found = bisect_left(positions, wanted, key=self._order)
        if found in positions and self._order(found) == wanted:
            return found
        return None

    def check_contents(self) -> None:
        """Raise ValueError if a row points outside of the split's folder, its shards or classes.

        The arrays of a file above 256 MiB are not read here: each row is checked when it is used.
        """
        _check_plain_names(self.class_names, "class")
        _check_plain_names(self.shards, "shard")
        size = sum(array.nbytes for array in self.arrays.values())
        if size <= _READ_WHOLE:
            self._check_labels()
            self._check_file_names()
            if self.shards:
                self._check_places()

    def _check_labels(self) -> None:
        labels = self.arrays["labels"]
        if len(labels) == 0:
            return
        self._check_label(labels[0])
        self._check_label(labels[-1])
        if np.any(labels[1:] < labels[:-1]):
            raise self._damaged("the rows are not ordered by class")

    def _check_file_names(self) -> None:
        starts = np.ascontiguousarray(self.arrays["starts"])
        names = self.arrays["names"]
        if starts[0] != 0 or starts[-1] != len(names):
            raise self._damaged("the file names have another length")
        if np.any(starts[1:] <= starts[:-1]):
            raise self._damaged("a file name has no length")
        if np.any(names == 0):
            raise self._damaged("a file name holds a null byte")
        begins, ends = _parts_of_names(starts, names)
        lengths = ends - begins
        if np.any(lengths < 1):
            raise self._damaged("a part of a file name is empty")
        first_is_dot = names[begins] == _DOT
        last_is_dot = names[ends - 1] == _DOT
        # These are "." and "..".
        only_dots = first_is_dot & last_is_dot & (lengths <= 2)
        if np.any(only_dots):
            raise self._damaged("a file name leads outside of the folder")

    def _check_places(self) -> None:
        number = self.arrays["shard"]
        offset = self.arrays["offset"]
        length = self.arrays["length"]
        if len(number) == 0:
            return
        if number.min() < 0 or number.max() >= len(self.shards):
            raise self._damaged("a shard's number is out of range")
        if offset.min() < 0 or length.min() < 0:
            raise self._damaged("an image has a negative place")
        stamps = self.origin.stamps
        if len(stamps) != len(self.shards):
            raise self._damaged("the sizes of the shards are missing")
        sizes = np.array(stamps, dtype=np.int64)[:, 0]
        room = sizes[number] - offset
        if np.any(length > room):
            raise self._damaged("an image reaches beyond the end of its shard")

    def _check_label(self, label: int) -> None:
        """Raise ValueError for a number that is no class id."""
        if not 0 <= label < len(self.class_names):
            raise self._damaged("a class id is out of range")

    def _stored(self, rows: Any) -> Any:  # noqa: ANN401 - an integer or an array of them
        """The positions of `rows` in the arrays: each excluded image before a row moves it up."""
        if len(self.excluded) == 0:
            return rows
        return rows + np.searchsorted(self.excluded, rows, side="right")

    def _key(self, stored: int) -> tuple[int, bytes]:
        """(class id, file name without the class) of a position in the arrays."""
        # `item` takes half the time of an index.
        starts = self.arrays["starts"]
        start = starts.item(stored)
        stop = starts.item(stored + 1)
        name = self.arrays["names"][start:stop].tobytes()
        label: int = self.arrays["labels"].item(stored)
        if not 0 <= label < len(self.class_names):
            raise self._damaged("a class id is out of range")
        return label, name

    def _order(self, stored: int) -> tuple[int, str, str]:
        """The key that the rows are ordered by."""
        label, name = self._key(stored)
        return (label, *name_order(name))

    def _name(self, stored: int) -> str:
        label, file = self._key(stored)
        # A name with b"/." may be a hidden file in a sub-folder; most have neither.
        if file.startswith((b"/", b"..")) or b"/." in file:
            parts = file.split(b"/")
            if self.root != "/" and (b".." in parts or b"" in parts):
                raise self._damaged("a file name leads outside of the folder")
        return f"{self.class_names[label]}/{os.fsdecode(file)}"

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"the cached list of the images in {self.root} is damaged: {what}. Start again with "
            f"--data.rescan always, which builds it anew"
        )


def write_index(
    path: str,
    class_names: Sequence[str],
    labels: Sequence[int],
    names: Sequence[bytes],
    *,
    shards: Sequence[str],
    places: Sequence[tuple[int, int, int]],
) -> None:
    """Write the index of tar shards that are complete and lie in the folder of `path`.

    Args:
        path: the file to write.
        class_names: the position is the class id.
        labels: class id of each image; rows may come in any order.
        names: file name of each image without the class, as os.fsencode gives it.
        shards: file names.
        places: (number of the shard, offset, length in bytes) of each image.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if two images of a class have the same name.
    """
    folder = os.path.dirname(path)
    sizes = []
    for shard in shards:
        size = os.path.getsize(os.path.join(folder, shard))
        sizes.append((size,))
    rows = sort_rows(class_names, labels, names)
    payload = encode_index(
        class_names,
        np.asarray(labels)[rows],
        [names[row] for row in rows],
        Origin(shards=tuple(shards), stamps=tuple(sizes)),
        np.asarray(places, dtype="<i8")[rows],
    )
    write_file(Path(path), payload)


def name_order(name: bytes) -> tuple[str, str]:
    """(folder, file) of a name inside a class: what ImageFolder orders the files of a class by."""
    folder, _, file = os.fsdecode(name).rpartition("/")
    return folder, file


def sort_rows(
    class_names: Sequence[str], labels: Sequence[int], names: Sequence[bytes]
) -> list[int]:
    """The order that the rows have in an index: by class, folder and file name.

    Raises ValueError if two images of a class have the same name.
    """

    def order(row: int) -> tuple[int, str, str]:
        folder, file = name_order(names[row])
        return labels[row], folder, file

    rows = sorted(range(len(names)), key=order)
    for row, following in pairwise(rows):
        if names[row] == names[following] and labels[row] == labels[following]:
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
    """The bytes of an index file.

    Args:
        class_names: the position is the class id.
        labels: [n], in the order of `sort_rows`.
        names: n file names without the class, in the same order.
        origin: what the index was built from.
        places: [n, 3]: number of the shard, offset, length; None for class folders.
    """
    lengths = np.fromiter(map(len, names), dtype="<i8", count=len(names))
    arrays = {
        "labels": np.asarray(labels, dtype="<i4"),
        "starts": np.concatenate([[0], np.cumsum(lengths)]).astype("<i8"),
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
    }
    fingerprint = _fingerprint(class_names, arrays)
    if places is not None:
        arrays["shard"] = places[:, 0]
        arrays["offset"] = places[:, 1]
        arrays["length"] = places[:, 2]
    kind = record_type(bool(origin.shards))
    records = np.zeros(len(names) + 1, kind)
    for column in kind.names or ():
        values = arrays[column]
        records[column][: len(values)] = values
    body = _padded(records.tobytes()) + _padded(arrays["names"].tobytes())
    facts = {
        "classes": list(class_names),
        **asdict(origin),
        "fingerprint": fingerprint,
        "checksum": zlib.crc32(body),
    }
    return encode_header(len(names), len(arrays["names"]), facts) + body


def record_type(sharded: bool) -> np.dtype[Any]:
    """What the file holds for a row: two columns for a file, five for an image in a shard."""
    return np.dtype(_COLUMNS if sharded else _COLUMNS_OF_FOLDERS)


def encode_header(rows: int, name_bytes: int, facts: Mapping[str, Any]) -> bytes:
    """Everything before the records: of `rows` images, with `name_bytes` bytes of file names."""
    complete = {**facts, "rows": rows, "name_bytes": name_bytes}
    text = json.dumps(complete).encode()
    checksum = zlib.crc32(text)
    prefix = _PREFIX.pack(_MAGIC, _VERSION, checksum, len(text))
    return _padded(prefix + text)


def open_index(path: str, root: str) -> Index:
    """The index in the file `path`, mapped, of the split in the folder `root`.

    Raises OSError if there is no such file, and ValueError as `read_index`.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Reading ahead around each row would waste memory where the file is larger than the memory.
    advice = mmap.MADV_WILLNEED if len(mapped) < _READ_WHOLE else mmap.MADV_RANDOM
    mapped.madvise(advice)
    return read_index(mapped, root)


def open_checked(path: str, root: str) -> Index:
    """As `open_index`, and with the contents of the file checked: its checksum and every row.

    Raises ValueError as well if something is wrong with them.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    facts, start, version = _read_header(mapped)
    index = open_index(path, root)
    if len(mapped) <= _READ_WHOLE:
        if version == _VERSION_WITHOUT_CHECKSUM:
            same = _fingerprint(index.class_names, index.arrays) == index.stored_fingerprint
        else:
            with memoryview(mapped) as view:
                same = zlib.crc32(view[start:]) == facts["checksum"]
        if not same:
            raise ValueError(f"the index {path} is damaged: its checksum is wrong")
    index.check_contents()
    return index


def read_index(buffer: Buffer, root: str) -> Index:
    """The index over the bytes of its file.

    Only the header is checked. Raises ValueError if it is wrong, or the size of the file.
    """
    facts, start, _ = _read_header(buffer)
    try:
        kind = record_type(bool(facts["shards"]))
        count = int(facts["rows"])
        name_bytes = int(facts["name_bytes"])
        names_start = _aligned(start + (count + 1) * kind.itemsize)
        stop = _aligned(names_start + name_bytes)
        if count < 0 or name_bytes < 0 or stop != len(buffer):
            raise ValueError(
                f"the index has {len(buffer)} bytes, not the {stop} that its header says"
            )
        records = np.frombuffer(buffer, kind, count + 1, start)
        arrays = {column: records[column][:count] for column in kind.names or ()}
        arrays["starts"] = records["starts"]
        arrays["names"] = np.frombuffer(buffer, np.uint8, name_bytes, names_start)
        classes = tuple(map(str, facts["classes"]))
        return Index(root, classes, _read_origin(facts), str(facts["fingerprint"]), arrays)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the index is damaged: its header has no valid {error}") from None


def _read_header(buffer: Buffer) -> tuple[dict[str, Any], int, int]:
    """(the JSON text, where the records begin, version) of an index file."""
    prefix = buffer[: _PREFIX.size].ljust(_PREFIX.size)
    magic, version, checksum, length = _PREFIX.unpack(prefix)
    if magic != _MAGIC or version not in (_VERSION, _VERSION_WITHOUT_CHECKSUM):
        raise ValueError("this is no index of this version, or it is damaged")
    text = buffer[_PREFIX.size : _PREFIX.size + length]
    if not text or zlib.crc32(text) != checksum:
        raise ValueError("the index is damaged: the checksum of its header is wrong")
    facts = json.loads(text)
    if not isinstance(facts, dict):
        raise ValueError("the index is damaged: its header is no table")
    return facts, _aligned(_PREFIX.size + length), version


def _read_origin(facts: Mapping[str, Any]) -> Origin:
    stamps = []
    for stamp in facts["stamps"]:
        numbers = stamp if isinstance(stamp, list) else [stamp]
        stamps.append(tuple(map(int, numbers)))
    return Origin(
        shards=tuple(map(str, facts["shards"])),
        folders=tuple(map(str, facts.get("folders", ()))),
        stamps=tuple(stamps),
        remarks=tuple(map(str, facts.get("remarks", ()))),
    )


def list_files(paths: Sequence[str]) -> Index:
    """An index of single files, in the given order, all of one class without a name."""
    folder = os.getcwd()
    names = []
    for path in paths:
        absolute = os.path.join(folder, path)
        # The root of the index is "/".
        names.append(os.fsencode(absolute)[1:])
    lengths = list(map(len, names))
    arrays = {
        "labels": np.zeros(len(names), "<i4"),
        "starts": np.cumsum([0, *lengths]),
        "names": np.frombuffer(b"".join(names), np.uint8),
    }
    return Index("/", ("",), Origin(), "", arrays)


def check_same_classes(train_names: tuple[str, ...], val_names: tuple[str, ...]) -> None:
    """Raise ValueError if the two splits have different classes.

    A class id would then mean one class in train/ and another one in val/.
    """
    if train_names == val_names:
        return
    parts = []
    for split, names, others in (
        ("train", train_names, val_names),
        ("val", val_names, train_names),
    ):
        only = sorted(set(names) - set(others))
        if only:
            parts.append(f"{len(only)} only in {split}/ ({some(only)})")
    raise ValueError(
        f"data.data_dir: the classes of train/ and val/ differ: {', '.join(parts)}. A class id is "
        f"the position of the class folder in the sorted list: add or remove folders until both "
        f"splits have the same ones"
    )


def check_num_classes(num_classes: int | None, found: int) -> int:
    """The number of classes, which is that of the data.

    Raises ValueError if `num_classes` is a number that disagrees.
    """
    if num_classes is not None and num_classes != found:
        raise ValueError(
            f"model.num_classes is {num_classes}, but the data has {found} classes: set it to null"
        )
    return found


def some(names: Sequence[str], count: int = 5) -> str:
    """The first few names, and how many more there are."""
    listed = ", ".join(map(printable, names[:count]))
    others = len(names) - count
    if others > 0:
        return f"{listed} and {others} more"
    return listed


def _parts_of_names(starts: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the folders and files of all names begin and end in the array of names."""
    slashes = np.flatnonzero(names == _SLASH)
    begins = starts[:-1]
    ends = starts[1:]
    if len(slashes) == 0:
        return begins, ends
    begins = np.concatenate([begins, slashes + 1])
    ends = np.concatenate([ends, slashes])
    return np.sort(begins), np.sort(ends)


def _check_plain_names(names: Sequence[str], what: str) -> None:
    """Raise ValueError unless all are different names of entries of a folder."""
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise ValueError(f"the index is damaged: {name!r} is no name of a {what}")
    if len(set(names)) != len(names):
        raise ValueError(f"the index is damaged: the name of a {what} is there twice")


def _aligned(size: int) -> int:
    return size + -size % _ALIGN


def _padded(blob: bytes) -> bytes:
    return blob.ljust(_aligned(len(blob)), b"\0")


def _fingerprint(class_names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> str:
    """Of the names of the images, their classes and their order."""
    parts = ["\0".join(class_names).encode(errors="surrogateescape")]
    for column in ("labels", "starts", "names"):
        parts.append(arrays[column].tobytes())
    return _digest(b"".join(parts))


def _digest(blob: bytes) -> str:
    return hashlib.blake2b(blob, digest_size=8).hexdigest()
