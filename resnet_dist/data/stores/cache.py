"""A cache on a local disk for images from an object store, shared by the processes of a machine.

Each split of a data set has a folder of its own in the folder of the cache:

- `data`: the bytes of images, one after the other, in the order in which they came,
- `table`: one record for each row of the index: where its bytes begin in `data`, how many there
  are, and the CRC-32 of the row's number and the bytes.

A record is written after the bytes. Whatever a kill or a crash leaves, a record whose checksum does
not fit its bytes counts as absent. So nothing has to be repaired.

Room is given under a lock on the folder of the cache: `data` is extended first, and only if the
sizes of all files stay below the limit. An epoch shows each image once, so that no image of the
data set in use deserves its place more than another: when the cache is full, further images are not
kept. Folders that no process uses are removed for new ones, the least recently used first.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import struct
import time
import warnings
import zlib
from collections.abc import Iterator

from resnet_dist.data.sources.index import Index
from resnet_dist.files import write_at
from resnet_dist.text import printable

# Offset in `data`, length, and CRC-32.
_RECORD = struct.Struct("<qII")
_LOCK = "lock"
_TABLE = "table"
_DATA = "data"
# The end of the name of a folder while it is being removed.
_REMOVED = ".removed"
_NAME = re.compile(r"images_[0-9a-f]{24}(\.removed)?")
# Seconds after which a full cache is asked again whether there is room.
_ASK_AGAIN_S = 60.0


class ImageCache:
    """The images of one split that are on the local disk. Threads may share it."""

    def __init__(self, folder: str, index: Index, limit_bytes: int) -> None:
        """Open the folder of the split in the cache, and make it if there is none.

        Args:
            folder: of the cache (data.cache_dir).
            index: the images.
            limit_bytes: the size of all files in the folder of the cache never exceeds it.

        Raises:
            OSError: the folder cannot be made or locked.
            ValueError: the limit has no room for the table of this split.
        """
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.index = index
        self.full_until = 0.0
        self.broken = False
        self.path = os.path.join(folder, _key(index))
        os.makedirs(folder, exist_ok=True)
        with self._locked():
            self._open_files()

    def get(self, row: int, length: int) -> bytes | None:
        """The bytes of an image.

        Args:
            row: position of the image in the index file.
            length: number of bytes.

        Returns:
            None if they are not in the cache, or damaged.
        """
        try:
            record = os.pread(self.table, _RECORD.size, row * _RECORD.size)
            if len(record) < _RECORD.size:
                return None
            offset, kept_length, checksum = _RECORD.unpack(record)
            is_kept = kept_length == length and length > 0 and offset >= 0
            if not is_kept:
                return None
            data = os.pread(self.data, length, offset)
        except OSError:
            return None
        if len(data) != length:
            return None
        if _checksum(row, data) != checksum:
            return None
        return data

    def put(self, row: int, data: bytes) -> None:
        """Keep the bytes of an image, if there is room. It never raises an error.

        Args:
            row: position of the image in the index file.
            data: the bytes.
        """
        if self.broken or not data or time.monotonic() < self.full_until:
            return
        try:
            offset = self._reserve(len(data))
            if offset is None:
                self.full_until = time.monotonic() + _ASK_AGAIN_S
                return
            write_at(self.data, data, offset)
            record = _RECORD.pack(offset, len(data), _checksum(row, data))
            write_at(self.table, record, row * _RECORD.size)
        except OSError as error:
            self.broken = True
            reason = os.strerror(error.errno or errno.EIO)
            message = f"data.cache_dir {self.folder}: {reason}; this run keeps no more images in it"
            warnings.warn(printable(message), stacklevel=2)

    def close(self) -> None:
        """Close the files; other processes may then remove the folder."""
        for descriptor in (self.data, self.table, self.used):
            os.close(descriptor)

    def _open_files(self) -> None:
        """Open the files of the split and mark it as used. The cache is locked."""
        self._remove_leftovers()
        records = len(self.index.arrays["labels"]) * _RECORD.size
        table_path = os.path.join(self.path, _TABLE)
        missing = records
        with contextlib.suppress(OSError):
            missing -= os.path.getsize(table_path)
        os.makedirs(self.path, exist_ok=True)
        self.used = _open_file(os.path.join(self.path, _LOCK))
        fcntl.flock(self.used, fcntl.LOCK_SH)
        os.utime(self.path)
        has_room = self._make_room(max(0, missing))
        if not has_room:
            # The limit may be smaller than what is here from earlier runs.
            self._empty()
            has_room = self._make_room(records)
        if not has_room:
            os.close(self.used)
            limit_gb = self.limit_bytes / 1e9
            table_gb = records / 1e9
            raise ValueError(
                f"data.cache_gb is {limit_gb:g}, and data.cache_dir {self.folder!r} has no room "
                f"for the table of {self.index.root} ({table_gb:.3g} GB) beside what other runs "
                f"keep there: raise it, or name another folder"
            )
        self.table = _open_file(table_path)
        self.data = _open_file(os.path.join(self.path, _DATA))
        if os.fstat(self.table).st_size != records:
            os.ftruncate(self.table, records)

    def _reserve(self, length: int) -> int | None:
        """Extend `data` by `length` bytes; returns where they begin, or None without room."""
        with self._locked():
            if not self._make_room(length):
                return None
            offset = os.fstat(self.data).st_size
            os.ftruncate(self.data, offset + length)
        return offset

    def _make_room(self, length: int) -> bool:
        """Remove folders that nobody uses until `length` more bytes fit. The cache is locked.

        Returns:
            Whether they fit.
        """
        excess = _size_of_cache(self.folder) + length - self.limit_bytes
        if excess <= 0:
            return True
        for path in self._others():
            size = _size_of(path)
            if _remove_unless_used(path):
                excess -= size
            if excess <= 0:
                return True
        return False

    def _others(self) -> list[str]:
        """The folders of other splits, the least recently used first."""
        paths = _folders(self.folder)
        # The folder of this split may not be there yet.
        others = [path for path in paths if path != self.path]
        return sorted(others, key=os.path.getmtime)

    def _empty(self) -> None:
        """Remove the images of this split, unless another process uses them."""
        try:
            fcntl.flock(self.used, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return
        for name in (_TABLE, _DATA):
            with contextlib.suppress(FileNotFoundError):
                os.truncate(os.path.join(self.path, name), 0)
        fcntl.flock(self.used, fcntl.LOCK_SH)

    def _remove_leftovers(self) -> None:
        """Remove what a process has left that was killed while it removed a folder."""
        for path in _folders(self.folder):
            if path.endswith(_REMOVED):
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock of the cache. The kernel frees the lock of a process that is killed."""
        # Locks belong to an open file, so threads need a descriptor each.
        descriptor = _open_file(os.path.join(self.folder, _LOCK))
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _open_file(path: str) -> int:
    """A descriptor of a file for reading and writing, which is made if there is none."""
    flags = os.O_RDWR | os.O_CREAT
    return os.open(path, flags, 0o666)


def _key(index: Index) -> str:
    """The name of the folder of a split: another one if a shard or the list of images differs."""
    origin = index.origin
    facts = (index.root, index.stored_fingerprint, origin.shards, origin.pins)
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=12)
    return f"images_{digest.hexdigest()}"


def _checksum(row: int, data: bytes) -> int:
    """The CRC-32 of an image, which differs for the same bytes in another row."""
    return zlib.crc32(data, row & 0xFFFFFFFF)


def _folders(folder: str) -> list[str]:
    """The folders of splits in the folder of the cache. Everything else there is the user's."""
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if _NAME.fullmatch(entry.name)]


def _size_of_cache(folder: str) -> int:
    """The size of all files in the cache, in bytes."""
    return sum(map(_size_of, _folders(folder)))


def _size_of(path: str) -> int:
    """The size of the files in one folder of the cache."""
    size = 0
    for name in (_TABLE, _DATA):
        with contextlib.suppress(OSError):
            size += os.path.getsize(os.path.join(path, name))
    return size


def _remove_unless_used(path: str) -> bool:
    """Remove a folder of the cache, unless a process uses it. Returns whether it is removed."""
    try:
        descriptor = _open_file(os.path.join(path, _LOCK))
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        removed = f"{path}{_REMOVED}"
        os.rename(path, removed)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    shutil.rmtree(removed, ignore_errors=True)
    return True
