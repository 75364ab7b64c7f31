"""The list of a data set's images: class names, and for each row a file, or a place in a tar shard,
and a label.

The list is one binary file that every process of a machine maps: opening it costs the same for a
thousand images and for a billion, its pages are shared, and nothing of its size is ever built. Rows
are ordered by class and then by file name, so that row i is the same image in class folders and in
shards packed from them. Who makes the file: scan.py for what it finds, `resnet-dist data pack` for
what it writes.

The file: magic, version, CRC-32 and length of a JSON text; that text, with everything that is
small; then at the next multiple of 64 bytes a record of _COLUMNS for each row (what is known of an
image lies in one page), and one more; then, at the next multiple of 64 bytes, the names behind each
other.
"""

import hashlib
import json
import mmap
import os
import struct
import tempfile
import zlib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

SUFFIXES = (".jpg", ".jpeg", ".png")
"""File names, in any case, that count as images."""
PACK_PLAN = ".pack.json"
"""Name of the file that says what `resnet-dist data pack` is to write, beside the shards."""
SHARD_INDEX = "index.bin"
"""Name of the index file that lies beside the tar shards of a split."""

_PREFIX = struct.Struct("<8sIIQ")
_MAGIC, _VERSION = b"resndist", 3
_COLUMNS = [
    ("starts", "<i8"),
    ("labels", "<i4"),
    ("shard", "<i4"),
    ("offset", "<i8"),
    ("length", "<i8"),
]
_ALIGN = 64
_READ_WHOLE = 2**28  # bytes of an index that is fetched at once


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split. Rows are ordered by class, then by file name; images left out have
    none.
    """

    root: str
    """absolute path of the split's folder"""
    class_names: tuple[str, ...]
    """sorted; the position is the class id"""
    shards: tuple[str, ...]
    """file names of the tar shards in `root`; empty for class folders"""
    stamps: tuple[int, ...]
    """the sizes of the shards or the modification times of the class folders, -1 where one is not
    to be trusted"""
    stored_fingerprint: str
    """of all images of the file"""
    arrays: dict[str, np.ndarray]
    """of the file: labels int32 [n], starts int64 [n + 1] of the names in names uint8, and for
    shards shard int32 [n], offset int64 [n], length int64 [n]; all but the names are columns of one
    array of records"""
    excluded: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 [k]: for each image that is left out, in order, how many rows come before it"""

    def __len__(self) -> int:
        return len(self.arrays["labels"]) - len(self.excluded)

    def fingerprint(self) -> str:
        """A short text that changes with the classes, the file names or their order; not with the
        files' contents, nor between class folders and shards packed from them.
        """
        left_out = self.excluded.astype("<i8").tobytes()
        return (
            _digest(self.stored_fingerprint.encode() + left_out)
            if left_out
            else self.stored_fingerprint
        )

    def intact(self) -> bool:
        """Whether the arrays are those that were written; not looked at in a file that is too large
        to be read.
        """
        size = sum(array.nbytes for array in self.arrays.values())
        return (
            size > _READ_WHOLE
            or _fingerprint(self.class_names, self.arrays) == self.stored_fingerprint
        )

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """The class ids of `rows` (int64 [B]): int64 [B]."""
        return self.arrays["labels"][self._stored(rows)].astype(np.int64)

    def place(self, row: int) -> tuple[str, int, int]:
        """Where the image's bytes are: (absolute path, offset, length); length -1 for a file of its
        own.
        """
        stored = self._stored(row)
        if not self.shards:
            return os.path.join(self.root, self._name(stored)), 0, -1
        shard, offset, length = (
            int(self.arrays[name][stored]) for name in ("shard", "offset", "length")
        )
        return os.path.join(self.root, self.shards[shard]), offset, length

    def name(self, row: int) -> str:
        """`<class>/<file>`, which is unique in the split."""
        return self._name(self._stored(row))

    def path(self, row: int) -> str:
        """The image's absolute path for messages; of one in a shard, `<shard>:<class>/<file>`."""
        file = self.place(row)[0]
        return f"{file}:{self.name(row)}" if self.shards else file

    def find(self, name: str) -> int | None:
        """The place in the arrays of `<class>/<file>`, found by bisection; None when there is no
        such image.
        """
        folder, _, file = name.rpartition("/")
        if folder not in self.class_names:
            return None
        every, wanted = (
            range(len(self.arrays["labels"])),
            (self.class_names.index(folder), os.fsencode(file)),
        )
        stored = bisect_left(every, wanted, key=self._key)
        return stored if stored in every and self._key(stored) == wanted else None

    def _stored(self, rows):
        """The places of `rows` in the arrays: each image that is left out before a row moves it up."""
        return (
            rows + np.searchsorted(self.excluded, rows, side="right")
            if len(self.excluded)
            else rows
        )

    def _key(self, stored: int) -> tuple[int, bytes]:
        """What the rows are ordered by: (class id, file name)."""
        start, stop = self.arrays["starts"][stored : stored + 2]
        return self.arrays["labels"][stored], self.arrays["names"][start:stop].tobytes()

    def _name(self, stored: int) -> str:
        label, file = self._key(stored)
        return f"{self.class_names[label]}/{os.fsdecode(file)}"


def write_index(
    path: str,
    class_names: Sequence[str],
    labels: Sequence[int],
    names: Sequence[bytes],
    *,
    shards: Sequence[str] = (),
    places: Sequence | None = None,
) -> None:
    """Write the index of tar shards that lie in the folder of `path`, complete; rows may come in
    any order.

    names: file names without the class, as os.fsencode gives them; shards: file names; places:
    (number of the shard, offset, length in bytes) for each row. Written beside and renamed. Raises
    OSError, and ValueError as `encode_index`.
    """
    sizes = [os.path.getsize(os.path.join(os.path.dirname(path), shard)) for shard in shards]
    write_whole(
        path,
        encode_index(class_names, labels, names, shards=shards, places=places, stamps=sizes),
        sync=True,
    )


def encode_index(
    class_names: Sequence[str],
    labels: Sequence[int],
    names: Sequence[bytes],
    *,
    shards: Sequence[str] = (),
    places: Sequence | None = None,
    stamps: Sequence[int] = (),
) -> bytes:
    """The bytes of an index file, for rows in any order; arguments as `write_index`, stamps as in
    `Index`.

    Raises ValueError when two images of a class have one name.
    """
    rows = sorted(range(len(names)), key=lambda row: (labels[row], names[row]))
    for row, after in pairwise(rows):
        if (labels[row], names[row]) == (labels[after], names[after]):
            raise ValueError(
                f"the image {class_names[labels[row]]}/{os.fsdecode(names[row])} is there twice: the "
                f"images of a class need different names; remove or rename one of the two"
            )
    names = [names[row] for row in rows]
    arrays = {
        "labels": np.asarray(labels, dtype="<i4")[rows],
        "starts": np.cumsum([0, *map(len, names)], dtype="<i8"),
        "names": np.frombuffer(b"".join(names), dtype=np.uint8),
    }
    fingerprint = _fingerprint(class_names, arrays)
    if shards:
        table = np.asarray(places, dtype="<i8")[rows]
        arrays.update(shard=table[:, 0], offset=table[:, 1], length=table[:, 2])
    records = np.zeros(len(rows) + 1, record_type(bool(shards)))
    for name in records.dtype.names:
        records[name][: len(arrays[name])] = arrays[name]
    header = encode_header(
        len(rows),
        len(arrays["names"]),
        {
            "classes": list(class_names),
            "shards": list(shards),
            "stamps": list(stamps),
            "fingerprint": fingerprint,
        },
    )
    return header + _padded(records.tobytes()) + _padded(arrays["names"].tobytes())


def record_type(sharded: bool) -> np.dtype:
    """What the file knows of a row: the first two of _COLUMNS of a file, all of an image in a
    shard.
    """
    return np.dtype(_COLUMNS if sharded else _COLUMNS[:2])


def encode_header(rows: int, name_bytes: int, facts: dict) -> bytes:
    """All that comes before the records of `rows` images and their names; `facts` are classes,
    shards and so on.
    """
    text = json.dumps({**facts, "rows": rows, "name_bytes": name_bytes}).encode()
    return _padded(_PREFIX.pack(_MAGIC, _VERSION, zlib.crc32(text), len(text)) + text)


def write_whole(path: str, payload: bytes, sync: bool = False) -> None:
    """Write a file in one move: it is there completely or not at all; `sync`: after a power cut
    too. Raises OSError.
    """
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{os.path.basename(path)}.", dir=os.path.dirname(path) or "."
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(payload)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock out other users of the data
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def open_index(path: str, root: str) -> Index:
    """The index in the file `path`, mapped, of the split in the folder `root`. Raises OSError or as
    `read_index`.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    # Reading around each row that is touched would be for nothing in a list that is larger than the
    # memory.
    mapped.madvise(mmap.MADV_WILLNEED if len(mapped) < _READ_WHOLE else mmap.MADV_RANDOM)
    return read_index(mapped, root)


def read_index(buffer: bytes | mmap.mmap, root: str) -> Index:
    """The index over the bytes of its file. Only the header is looked at; ValueError when that or
    the size is wrong.
    """
    magic, version, checksum, length = _PREFIX.unpack(buffer[: _PREFIX.size].ljust(_PREFIX.size))
    text = (
        buffer[_PREFIX.size : _PREFIX.size + length]
        if (magic, version) == (_MAGIC, _VERSION)
        else b""
    )
    if not text or zlib.crc32(text) != checksum:
        raise ValueError("this is no index of this version, or it is damaged")
    facts, start = json.loads(text), _aligned(_PREFIX.size + length)
    kind, count = record_type(bool(facts["shards"])), facts["rows"]
    names_start = _aligned(start + (count + 1) * kind.itemsize)
    if (stop := _aligned(names_start + facts["name_bytes"])) != len(buffer):
        raise ValueError(f"the index has {len(buffer)} bytes, not the {stop} that its header tells")
    records = np.frombuffer(buffer, kind, count + 1, start)
    arrays = {
        name: records[name] if name == "starts" else records[name][:count] for name in kind.names
    }
    arrays["names"] = np.frombuffer(buffer, np.uint8, facts["name_bytes"], names_start)
    return Index(
        root,
        *(tuple(facts[name]) for name in ("classes", "shards", "stamps")),
        facts["fingerprint"],
        arrays,
    )


def list_files(paths: Sequence[str]) -> Index:
    """An index of single files, in the given order, that are of one class without a name."""
    names = [os.fsencode(os.path.join(os.getcwd(), path))[1:] for path in paths]
    return Index(
        "/",
        ("",),
        (),
        (),
        "",
        {
            "labels": np.zeros(len(names), "<i4"),
            "starts": np.cumsum([0, *map(len, names)]),
            "names": np.frombuffer(b"".join(names), np.uint8),
        },
    )


def check_same_classes(train_names: tuple[str, ...], val_names: tuple[str, ...]) -> None:
    """Raise ValueError when the two splits have different classes: class ids of one would be
    shifted in the other.
    """
    if train_names == val_names:
        return
    parts = [
        f"{len(names)} only in {split}/ ({some(sorted(names))})"
        for split, names in (
            ("train", set(train_names) - set(val_names)),
            ("val", set(val_names) - set(train_names)),
        )
        if names
    ]
    raise ValueError(
        f"data.data_dir: the classes of train/ and val/ differ: {', '.join(parts)}. A class id is the "
        f"folder's place in the sorted list: add or remove folders until they agree"
    )


def check_num_classes(num_classes: int | None, found: int) -> int:
    """The number of classes: that of the data. Raises ValueError when `num_classes` is a number
    that disagrees.
    """
    if num_classes is not None and num_classes != found:
        raise ValueError(
            f"model.num_classes is {num_classes}, but the data has {found} classes: set it to null"
        )
    return found


def some(names: Sequence[str], count: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _aligned(size: int) -> int:
    return size + -size % _ALIGN


def _padded(blob: bytes) -> bytes:
    return blob.ljust(_aligned(len(blob)), b"\0")


def _fingerprint(class_names: Sequence[str], arrays: dict[str, np.ndarray]) -> str:
    """Of what the images are called and belong to, in their order."""
    names = "\0".join(class_names).encode(errors="surrogateescape")
    return _digest(
        b"".join([names, *(arrays[name].tobytes() for name in ("labels", "starts", "names"))])
    )


def _digest(blob: bytes) -> str:
    return hashlib.blake2b(blob, digest_size=8).hexdigest()
