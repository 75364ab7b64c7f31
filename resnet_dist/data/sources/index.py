"""The index of a split: its class names, and for each image its label and where its bytes are.

All processes of a machine map the same index file into memory. Opening it takes the same time for a
thousand images and for a billion, and no process builds an object of its size. Rows are ordered as
in torchvision's ImageFolder: by class, then by folder inside of the class, then by file name. Row i
is therefore the same image in class folders and in tar shards that were packed from them.

`index_file.py` describes the file. `scan.py` builds the index from the files that it finds, and
`resnet-dist data pack` writes it for its shards.
"""

import functools
import hashlib
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from resnet_dist.text import printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Suffixes of image files, as in torchvision's IMG_EXTENSIONS. Upper case counts too."""

PACK_PLAN = ".pack.json"
"""Name of the file beside the shards with the settings and images of `resnet-dist data pack`."""

SHARD_INDEX = "index.bin"
"""Name of the index file beside the tar shards of a split."""

READ_WHOLE = 2**28
"""Largest size in bytes of an index whose contents are checked when it is opened. The rows of a
larger index are checked when they are used.
"""

_SLASH = ord("/")
_DOT = ord(".")


@dataclass(frozen=True)
class Origin:
    """What an index was built from."""

    shards: tuple[str, ...] = ()
    """file names of the tar shards in the folder of the split; empty for class folders"""
    folders: tuple[str, ...] = ()
    """all folders that were listed, relative to the folder of the split; empty for shards"""
    stamps: tuple[tuple[int, ...], ...] = ()
    """for each shard (its size in bytes,); for each folder its times (mtime, ctime) in ns, or ()
    if it had changed so shortly before it was listed that its times are not reliable"""
    remarks: tuple[str, ...] = ()
    """sentences about files that were left out, and about anything unusual"""
    pins: tuple[str, ...] = ()
    """for each shard in an object store, text that changes when the shard does; else empty"""


@dataclass(frozen=True, eq=False)
class Index:
    """The images of one split.

    A row is the number of an image among those that are used. A position is the number of an image
    among all images of the index file. Both are the same if no images are excluded.
    """

    root: str
    """absolute path of the folder of the split, or its address in an object store"""
    class_names: tuple[str, ...]
    """the names of the classes; the position of a name is the class id"""
    origin: Origin
    """what the index was built from"""
    stored_fingerprint: str
    """hash of all images of the file, including the excluded ones"""
    arrays: Mapping[str, np.ndarray]
    """The columns of the file, by name:

    - labels: int32 [n], class ids,
    - names: uint8, the file names without the class, one after the other,
    - starts: int64 [n + 1], where each file name begins in `names`,
    - for shards only: shard, int32 [n], the number of the shard,
    - for shards only: offset, int64 [n], and length, int64 [n], of the image in bytes.
    """
    excluded: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 [k], sorted: for each excluded image, the number of rows before it"""

    def __len__(self) -> int:
        return len(self.arrays["labels"]) - len(self.excluded)

    @property
    def shards(self) -> tuple[str, ...]:
        """File names of the tar shards in `root`; empty for class folders."""
        return self.origin.shards

    def fingerprint(self) -> str:
        """A short hash of the class names and of the file names in their order.

        It does not depend on the contents of the files. It is the same for class folders and for
        shards that were packed from them.
        """
        if len(self.excluded) == 0:
            return self.stored_fingerprint
        positions = self.excluded.astype("<i8").tobytes()
        return _digest(self.stored_fingerprint.encode() + positions)

    def labels_of(self, rows: np.ndarray) -> np.ndarray:
        """The class ids of some rows.

        Args:
            rows: int64 [B].

        Returns:
            int64 [B].

        Raises:
            ValueError: if the index is damaged.
        """
        stored = self._stored(rows)
        narrow = self.arrays["labels"][stored]
        labels: np.ndarray = narrow.astype(np.int64)
        if labels.size > 0:
            self._check_label(labels.min())
            self._check_label(labels.max())
        return labels

    def place(self, row: int) -> tuple[str, int, int]:
        """Where the bytes of an image are.

        Returns:
            (absolute path of the file, offset in bytes, length in bytes). The length is -1 if the
            file contains only this image.

        Raises:
            ValueError: if the index is damaged.
        """
        stored = self._stored(row)
        if not self.shards:
            name = self._name(stored)
            return os.path.join(self.root, name), 0, -1
        number: int = self.arrays["shard"].item(stored)
        offset: int = self.arrays["offset"].item(stored)
        length: int = self.arrays["length"].item(stored)
        is_known_shard = 0 <= number < len(self.shards)
        is_place = offset >= 0 and length >= 0
        if not is_known_shard or not is_place:
            raise self._damaged("a place in a shard is out of range")
        path = os.path.join(self.root, self.shards[number])
        return path, offset, length

    @functools.cached_property
    def pins(self) -> dict[str, str]:
        """By the address of each shard in an object store, text that changes when the shard does.

        It is empty for files on a disk.
        """
        pins = {}
        # There are no pins for files on a disk.
        for shard, pin in zip(self.shards, self.origin.pins, strict=False):
            address = os.path.join(self.root, shard)
            pins[address] = pin
        return pins

    def name(self, row: int) -> str:
        """The name of an image, which is unique in the split.

        It is `<class>/<file>`, or `<class>/<folder>/<file>` if the class folder has sub-folders.
        """
        return self._name(self._stored(row))

    def path(self, row: int) -> str:
        """The absolute path of an image for messages.

        For an image in a shard it is `<path of the shard>:<class>/<file>`.
        """
        file = self.place(row)[0]
        if self.shards:
            return f"{file}:{self.name(row)}"
        return file

    def find(self, name: str) -> int | None:
        """Find an image by its name, by a binary search.

        Args:
            name: `<class>/<file>`, as `name` returns it.

        Returns:
            The position of the image in the arrays, or None if there is no such image.
        """
        class_name, _, file = name.partition("/")
        if class_name not in self.class_names:
            return None
        label = self.class_names.index(class_name)
        folder, file_name = name_order(os.fsencode(file))
        wanted = (label, folder, file_name)
        positions = range(len(self.arrays["labels"]))
        found = bisect_left(positions, wanted, key=self._order)
        if found in positions and self._order(found) == wanted:
            return found
        return None

    def check_contents(self) -> None:
        """Check that all rows refer to classes, shards and files in the folder of the split.

        If the arrays are larger than `READ_WHOLE`, this method checks only the names of classes and
        shards. Each row is then checked when it is used.

        Raises:
            ValueError: if a row does not.
        """
        _check_plain_names(self.class_names, "class")
        _check_plain_names(self.shards, "shard")
        size = sum(array.nbytes for array in self.arrays.values())
        if size <= READ_WHOLE:
            self._check_labels()
            self._check_file_names()
            if self.shards:
                self._check_places()

    def _check_labels(self) -> None:
        """Check the class id and the order of all rows."""
        labels = self.arrays["labels"]
        if len(labels) == 0:
            return
        self._check_label(labels[0])
        self._check_label(labels[-1])
        is_before_its_predecessor = labels[1:] < labels[:-1]
        if np.any(is_before_its_predecessor):
            raise self._damaged("the rows are not ordered by class")

    def _check_file_names(self) -> None:
        """Check that no file name is empty or leads outside of the folder of the split."""
        starts = np.ascontiguousarray(self.arrays["starts"])
        names = self.arrays["names"]
        first = starts[0]
        last = starts[-1]
        if first != 0 or last != len(names):
            raise self._damaged("the file names have another length")
        lengths_of_names = np.diff(starts)
        if np.any(lengths_of_names <= 0):
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
        """Check that all images lie inside of their shards."""
        number = self.arrays["shard"]
        offset = self.arrays["offset"]
        length = self.arrays["length"]
        if len(number) == 0:
            return
        num_shards = len(self.shards)
        if number.min() < 0 or number.max() >= num_shards:
            raise self._damaged("a shard's number is out of range")
        if offset.min() < 0 or length.min() < 0:
            raise self._damaged("an image has a negative place")
        stamps = self.origin.stamps
        if len(stamps) != num_shards:
            raise self._damaged("the sizes of the shards are missing")
        sizes = np.array([stamp[0] for stamp in stamps], dtype=np.int64)
        room = sizes[number] - offset
        if np.any(length > room):
            raise self._damaged("an image reaches beyond the end of its shard")

    def _check_label(self, label: int) -> None:
        """Raise ValueError for a number that is no class id."""
        if not 0 <= label < len(self.class_names):
            raise self._damaged("a class id is out of range")

    def position(self, row: int) -> int:
        """The position of a row in the index file, which excluded images do not change."""
        return int(self._stored(row))

    def _stored(self, rows: Any) -> Any:  # noqa: ANN401 - an integer or an array of them
        """The positions of rows in the arrays.

        The position of a row is the row plus the number of excluded images before it.
        """
        if len(self.excluded) == 0:
            return rows
        num_excluded_before = np.searchsorted(self.excluded, rows, side="right")
        return rows + num_excluded_before

    def _key(self, stored: int) -> tuple[int, bytes]:
        """(class id, file name without the class) of a position in the arrays."""
        # array.item(i) takes half the time of array[i].
        starts = self.arrays["starts"]
        start = starts.item(stored)
        stop = starts.item(stored + 1)
        name = self.arrays["names"][start:stop].tobytes()
        label: int = self.arrays["labels"].item(stored)
        self._check_label(label)
        return label, name

    def _order(self, stored: int) -> tuple[int, str, str]:
        """The sort key of a position: (class id, folder, file name)."""
        label, name = self._key(stored)
        folder, file = name_order(name)
        return label, folder, file

    def _name(self, stored: int) -> str:
        """`<class>/<file>` of a position in the arrays."""
        label, file = self._key(stored)
        # This quick test finds all names that may lead outside, and few others, such as hidden
        # files in sub-folders.
        if file.startswith((b"/", b"..")) or b"/." in file:
            parts = file.split(b"/")
            if self.root != "/" and (b".." in parts or b"" in parts):
                raise self._damaged("a file name leads outside of the folder")
        return f"{self.class_names[label]}/{os.fsdecode(file)}"

    def _damaged(self, what: str) -> ValueError:
        """The error for an index with invalid contents."""
        return ValueError(
            f"the cached list of the images in {self.root} is damaged: {what}. Start again with "
            f"--data.rescan always, which builds it anew"
        )


def name_order(name: bytes) -> tuple[str, str]:
    """The key by which ImageFolder sorts the files of a class.

    Args:
        name: the file name without the class, as os.fsencode returns it.

    Returns:
        (folder, file name).
    """
    folder, _, file = os.fsdecode(name).rpartition("/")
    return folder, file


def list_files(paths: Sequence[str]) -> Index:
    """An index of image files that are not in class folders.

    Args:
        paths: absolute paths, or paths relative to the current folder.

    Returns:
        An index with the files in the given order, and with one class that has no name.
    """
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
    """Check that both splits have the same classes.

    Otherwise a class id would stand for one class in train/ and for another class in val/.

    Args:
        train_names: class names of the training set.
        val_names: class names of the validation set.

    Raises:
        ValueError: if they differ.
    """
    if train_names == val_names:
        return
    differences = [
        *_only_in("train", train_names, val_names),
        *_only_in("val", val_names, train_names),
    ]
    listed = ", ".join(differences)
    raise ValueError(
        f"data.data_dir: the classes of train/ and val/ differ: {listed}. A class id is the "
        f"position of the class folder in the sorted list: add or remove folders until both splits "
        f"have the same ones"
    )


def _only_in(split: str, names: Sequence[str], others: Sequence[str]) -> list[str]:
    """Name the classes that only one split has; an empty list if there are none.

    Args:
        split: the split.
        names: its classes.
        others: the classes of the other split.
    """
    only = sorted(set(names) - set(others))
    if not only:
        return []
    return [f"{len(only)} only in {split}/ ({first_names(only)})"]


def check_num_classes(num_classes: int | None, found: int) -> int:
    """Check the configured number of classes against the data.

    Args:
        num_classes: `model.num_classes`; None takes the number of the data.
        found: number of classes in the data.

    Returns:
        The number of classes.

    Raises:
        ValueError: if both numbers differ.
    """
    if num_classes is not None and num_classes != found:
        raise ValueError(
            f"model.num_classes is {num_classes}, but the data has {found} classes: set it to null"
        )
    return found


def first_names(names: Sequence[str], count: int = 5) -> str:
    """List names in a message: the first `count`, and the number of others."""
    listed = ", ".join(map(printable, names[:count]))
    others = len(names) - count
    if others > 0:
        return f"{listed} and {others} more"
    return listed


def _parts_of_names(starts: np.ndarray, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the parts of all names, which are separated by slashes, begin and end.

    Args:
        starts: int64 [n + 1], where the names begin.
        names: uint8, the bytes of all names.

    Returns:
        First and last (exclusive) byte of each part in `names`, both int64 [number of parts].
    """
    slashes = np.flatnonzero(names == _SLASH)
    begins = starts[:-1]
    ends = starts[1:]
    if len(slashes) == 0:
        return begins, ends
    begins = np.concatenate([begins, slashes + 1])
    ends = np.concatenate([ends, slashes])
    return np.sort(begins), np.sort(ends)


def _check_plain_names(names: Sequence[str], what: str) -> None:
    """Check names of entries of a folder.

    Raises:
        ValueError: if a name is a path or not allowed in a folder, or occurs twice.
    """
    for name in names:
        is_path = name in ("", ".", "..") or "/" in name
        if is_path or "\0" in name:
            raise ValueError(f"the index is damaged: {name!r} is no name of a {what}")
    if len(set(names)) != len(names):
        raise ValueError(f"the index is damaged: the name of a {what} is there twice")


def fingerprint_of(class_names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> str:
    """A hash of the class names, and of the labels and file names of all rows.

    Args:
        class_names: the names of the classes.
        arrays: "labels", "starts" and "names", as in `Index.arrays`.
    """
    parts = ["\0".join(class_names).encode(errors="surrogateescape")]
    for column in ("labels", "starts", "names"):
        parts.append(arrays[column].tobytes())
    return _digest(b"".join(parts))


def _digest(blob: bytes) -> str:
    """A hash as 16 hexadecimal digits."""
    return hashlib.blake2b(blob, digest_size=8).hexdigest()
