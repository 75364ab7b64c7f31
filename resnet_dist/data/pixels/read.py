"""From a row of the index to checked bytes: threads that read ahead, cheap checks, and the record
of bad files.

A broken image stops a whole batch inside the decoder, often without a name. So every file is looked
at first, for a few microseconds: is it a JPEG or PNG at all, does its header give a size, is its
end there. What passes and still cannot be decoded is found by the decoder's owner (dali.py) and
ends up in the same quarantine.
"""

import base64
import dataclasses
import errno
import functools
import json
import os
import struct
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from resnet_dist.data.sources.index import Index

READ_THREADS = 32
"""Threads that wait for the storage, where it is slow. They hardly cost the processor anything;
with 5 ms a file, 32 read 6,400 files a second.
"""

_OPEN_SHARDS = 256
_WAITS = (0.1, 0.4, 1.6)  # seconds before each further try
_PASSING = {  # what a network file system may be over in a moment
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ECONNRESET,
    errno.ECONNREFUSED,
    errno.EREMOTEIO,
}
_SLOW_SECONDS = 0.5e-3  # a file that takes longer was not in the machine's memory

_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"IEND\xaeB`\x82"  # the last chunk's name and its checksum
_JPEG_END = b"\xff\xd9"
_MOST_PIXELS = (
    178_956_970  # Pillow's limit as well: a size beyond it is damage, and would take gigabytes
)
_LONGEST = 200  # longer over shorter side
_STANDALONE = frozenset([0x01, *range(0xD0, 0xD8)])  # JPEG markers without a length
_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..SOF15 without DHT, JPG, DAC
_SCAN, _END = 0xDA, 0xD9
_BLACK_PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYGAAAAAEAAH2FzhVAAAAAElFTkSuQmCC"
)  # a PNG


@dataclass(frozen=True)
class Encoded:
    """One image file as it was read."""

    row: int
    """row of the index that the bytes are from"""
    data: bytes
    height: int
    width: int
    reason: str | None = None
    """why the image cannot be used; None for one that looks good"""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of a JPEG or PNG from its header alone; an EXIF orientation is ignored, as in
    decoding.

    Raises ValueError with the reason when there is no such header.
    """
    return _header(data)[:2]


def check(data: bytes) -> str | None:
    """What is plainly wrong with an image file, or None.

    The bytes of the picture are not looked at: damage inside them is for the decoder to find.
    """
    return _inspect(data)[2]


def _inspect(data: bytes) -> tuple[int, int, str | None]:
    """(height, width, reason): the size, or zeros and what is wrong."""
    try:
        height, width, picture, end = _header(data)
        if not 0 < height * width <= _MOST_PIXELS:
            raise ValueError(f"the header gives a size of {width} x {height}")
        if max(height, width) > _LONGEST * min(height, width):
            raise ValueError(
                f"it is {width} x {height}: resized by its shorter side it would take gigabytes"
            )
        # Entropy-coded data cannot contain JPEG's end marker, so one after the first scan's start
        # is the real one, whatever cameras and editors append to the file.
        if data.rfind(end, picture) < 0:
            raise ValueError("the file is cut off: its end marker is missing")
    except ValueError as error:
        return 0, 0, str(error)
    return height, width, None


def _header(data: bytes) -> tuple[int, int, int, bytes]:
    """(height, width, where the header ends, the end marker); raises ValueError when it cannot be
    followed to there.
    """
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(_PNG_START):
        if len(data) < 33 or data[12:16] != b"IHDR":
            raise ValueError("the PNG header is damaged")
        width, height = struct.unpack_from(">II", data, 16)
        return height, width, 33, _PNG_END
    if not data.startswith(b"\xff\xd8"):
        raise ValueError(f"neither JPEG nor PNG: the file starts with {data[:8]!r}")
    position, size = 2, None
    while True:
        while (
            data[position : position + 2] == b"\xff\xff"
        ):  # fill bytes are allowed before a marker
            position += 1
        head = data[position : position + 9]
        if len(head) < 4 or head[0] != 0xFF or (head[1] in _FRAME and len(head) < 9):
            raise ValueError("the JPEG header is damaged or cut off")
        marker = head[1]
        if marker in (_SCAN, _END):
            if size is None or marker == _END:
                raise ValueError("the JPEG header gives no size")
            return *size, position, _JPEG_END
        if marker in _FRAME and size is None:
            size = struct.unpack_from(">HH", head, 5)
        position += 2 if marker in _STANDALONE else 2 + struct.unpack_from(">H", head, 2)[0]


class _Shard:
    """An open file for os.pread, which needs no position and so no lock; closed when nobody uses it
    any more.
    """

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open_shard = functools.lru_cache(maxsize=_OPEN_SHARDS)(_Shard)


def _read(path: str, offset: int, length: int) -> bytes:
    """The bytes of a file (`length` -1), or of a place in a shard; tries again where the reason may
    pass.
    """
    for wait in (*_WAITS, None):
        try:
            if length < 0:
                with open(path, "rb", buffering=0) as file:
                    return file.read()
            shard = _open_shard(path)  # held, so that it stays open when the cache drops it
            data = os.pread(shard.descriptor, length, offset)
            if len(data) < length:
                raise OSError(f"the shard ends after {len(data)} of its {length} bytes")
            return data
        except OSError as error:
            if wait is None or error.errno not in _PASSING:
                raise
        _open_shard.cache_clear()  # a descriptor can be stale itself
        time.sleep(wait)


def load(index: Index, row: int) -> Encoded:
    """Read and check the image of one row. One that cannot be read is a bad image like any other."""
    try:
        data = _read(*index.place(row))
    except OSError as error:
        return Encoded(row, b"", 0, 0, f"cannot be read: {error.strerror or error}")
    return Encoded(row, data, *_inspect(data))


class Reader:
    """Threads that read and check files of one index."""

    def __init__(self, index: Index, threads: int = READ_THREADS) -> None:
        self.index = index
        self.threads = threads
        self.seconds_per_file = 0.0
        self.load = load  # the benchmark takes a slower one
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="read")

    def request(self, rows: np.ndarray) -> list[Future]:
        """Start to read `rows`; `collect` has the result.

        In shares for all threads where the storage is slow. Where it is fast one thread has the
        least work: several only pass Python's lock to and fro (15 us of processor time a file
        instead of 60).
        """
        shares = self.threads if self.seconds_per_file > _SLOW_SECONDS else 1
        share = -(-len(rows) // shares)
        return [
            self.pool.submit(self._load_all, rows[start : start + share].tolist())
            for start in range(0, len(rows), share)
        ]

    def collect(self, requested: list[Future]) -> list[Encoded]:
        """The files of a request, in its order; waits for them."""
        return [encoded for future in requested for encoded in future.result()]

    def _load_all(self, rows: list[int]) -> list[Encoded]:
        loaded, clock = [], [time.perf_counter()]
        for row in rows:
            loaded.append(self.load(self.index, row))
            clock.append(time.perf_counter())
        # The median: a busy machine, too, makes a few files late, and more threads would only make
        # it busier.
        self.seconds_per_file = float(np.median(np.diff(clock)))
        return loaded

    def close(self) -> None:
        """End the threads; what was requested and not begun is dropped."""
        self.pool.shutdown(wait=True, cancel_futures=True)


class Quarantine:
    """The bad files that this process has met, each recorded once, and the limit that stops the
    run.
    """

    def __init__(self, output_dir: str, split: str, rank: int, limit: int | None) -> None:
        """`limit`: how many are tolerated (data.max_bad_images); None for any number."""
        self.path = os.path.join(output_dir, "quarantine.jsonl")
        self.split = split
        self.rank = rank
        self.limit = limit
        self.files: dict[str, str] = {}  # path: reason

    def add(
        self, file: str, reason: str, *, epoch: int | None = None, step: int | None = None
    ) -> None:
        """Record a bad file, unless it is known. Raises ValueError when it is one too many."""
        if file in self.files:
            return
        self.files[file] = reason
        line = {
            "path": file,
            "reason": reason,
            "split": self.split,
            "rank": self.rank,
            "epoch": epoch,
            "step": step,
        }
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as record:
                record.write(
                    json.dumps(line) + "\n"
                )  # one write of one line: ranks do not mix theirs
        except OSError as error:
            warnings.warn(
                f"{file} is bad ({reason}); {self.path} could not be written: {error}", stacklevel=2
            )
        if self.limit is not None and len(self.files) > self.limit:
            raise ValueError(
                f"{len(self.files)} broken {self.split} images on rank {self.rank}, more than "
                f"data.max_bad_images = {self.limit}. The last one is {file}: {reason}. All are listed in "
                f"{self.path}: repair or remove them, or raise data.max_bad_images"
            )


def next_good(
    index: Index, encoded: Encoded, quarantine: Quarantine, *, wanted: int, epoch: int, step: int
) -> Encoded:
    """`encoded`, or if it is bad the first good image after it in the index (which wraps around),
    each one recorded.

    The choice depends on the files alone, so every layout of ranks makes the same. Raises
    ValueError when there is no good image at all or the quarantine is full. `wanted` is the row
    that was asked for in the beginning.
    """
    while encoded.reason is not None:
        quarantine.add(index.path(encoded.row), encoded.reason, epoch=epoch, step=step)
        row = (encoded.row + 1) % len(index)
        if row == wanted:
            raise ValueError(
                f"none of the {len(index)} images in {index.root} can be decoded; see {quarantine.path}"
            )
        encoded = load(index, row)
    return encoded


def blank(encoded: Encoded) -> Encoded:
    """A black image in place of a bad one, with the row and the reason kept."""
    return dataclasses.replace(encoded, data=_BLACK_PIXEL, height=1, width=1)
