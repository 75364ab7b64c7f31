"""From a row of the index to the checked bytes of its image, by threads that read ahead.

Whatever is wrong with a file makes a broken image and never ends the run here: it cannot be read,
is no regular file, is too large, gives no answer within a time, or is no image. The reason goes to
the quarantine (quarantine.py), and so does that of an image which passes and which the decoder
refuses.
"""

import concurrent.futures
import errno
import functools
import os
import stat
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from resnet_dist.addresses import is_url
from resnet_dist.config import DataConfig
from resnet_dist.data.pixels.image_header import decode_with_pillow, inspect
from resnet_dist.data.sources.index import Index
from resnet_dist.data.stores.client import Patience, read_range

READ_THREADS = 32
"""Threads that wait for the storage, where it is slow. They take little time of the processor; with
5 ms a file, 32 threads read 6,400 files a second."""

_OPEN_SHARDS = 256
_PIECE_BYTES = 2**23
# Seconds before each further attempt.
_WAITS = (0.1, 0.4, 1.6)
# Errors of a network file system that may be over in a moment.
_TRANSIENT = {
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
# A file that takes longer was not in the machine's memory.
_SLOW_SECONDS = 0.5e-3

STANDARD_INPUT = "/dev/stdin"
"""The one path that need not be a regular file: an image that is piped to `resnet-dist predict`."""

_KINDS = (
    (stat.S_ISFIFO, "a fifo"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a folder"),
)


@dataclass(frozen=True)
class ReadLimits:
    """What a file may cost."""

    max_file_bytes: int
    max_pixels: int
    timeout_s: float
    """seconds without an answer of the storage"""


def read_limits(config: DataConfig) -> ReadLimits:
    """The limits that the config sets."""
    return ReadLimits(
        max_file_bytes=config.max_file_mb << 20,
        max_pixels=config.max_pixels,
        timeout_s=config.read_timeout_s,
    )


DEFAULT_LIMITS = read_limits(DataConfig())


@dataclass(frozen=True)
class Encoded:
    """One image file in memory."""

    row: int
    """row of the index that the bytes are from"""
    data: bytes | memoryview
    """JPEG or PNG; of an image that Pillow has decoded, an uncompressed PNG; from the training
    cache, uint8 [height, width, 3]"""
    height: int
    width: int
    reason: str | None = None
    """why the image cannot be used; None for one that looks good"""


class _Shard:
    """An open file for os.pread, which needs no position and so no lock.

    It is closed when nobody uses it any more.
    """

    def __init__(self, path: str) -> None:
        self.descriptor = _open_regular(path)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


_open_shard = functools.lru_cache(maxsize=_OPEN_SHARDS)(_Shard)


def _open_regular(path: str) -> int:
    """A descriptor of a regular file; OSError for anything else.

    Without O_NONBLOCK, opening a fifo waits for a writer, which may never come.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    for is_kind, name in _KINDS:
        if is_kind(mode):
            raise OSError(f"it is {name}, not a regular file")
    raise OSError("it is not a regular file")


def broken_image(row: int, reason: str, data: bytes = b"") -> Encoded:
    """An image that cannot be used, of row `row` of the index."""
    return Encoded(
        row=row,
        data=data,
        height=0,
        width=0,
        reason=reason,
    )


def _read(path: str, offset: int, length: int, limits: ReadLimits) -> bytes:
    """Read a file, or a part of a shard. Errors that may pass are tried again.

    Args:
        path: The file, or the shard.
        offset: First byte of the part.
        length: Bytes of the part; -1 for a whole file.
        limits: What the file may cost.

    Raises:
        OSError: If it cannot be read.
    """
    for wait in (*_WAITS, None):
        try:
            if length < 0:
                return _read_file(path, limits)
            # Held in a variable, so that it stays open when the cache drops it.
            shard = _open_shard(path)
            check_length(length, limits)
            return _read_pieces(shard.descriptor, offset, length, limits)
        except OSError as error:
            if wait is None or error.errno not in _TRANSIENT:
                raise
        # The descriptor itself can be stale.
        _open_shard.cache_clear()
        time.sleep(wait)
    raise AssertionError


def _read_file(path: str, limits: ReadLimits) -> bytes:
    if path == STANDARD_INPUT:
        return _read_standard_input(limits)
    descriptor = _open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        check_length(size, limits)
        return _read_pieces(descriptor, 0, size, limits)
    finally:
        os.close(descriptor)


def _read_standard_input(limits: ReadLimits) -> bytes:
    """Read the image that `resnet-dist predict /dev/stdin` gets, usually from a pipe."""
    with open(0, "rb", closefd=False) as stream:
        data = stream.read(limits.max_file_bytes + 1)
    check_length(len(data), limits)
    return data


def check_length(length: int, limits: ReadLimits) -> None:
    """Raise OSError for a file of more than `limits.max_file_bytes`."""
    if length <= limits.max_file_bytes:
        return
    max_file_mb = limits.max_file_bytes >> 20
    raise OSError(f"it has {length} bytes, more than data.max_file_mb = {max_file_mb}")


def _read_pieces(descriptor: int, offset: int, length: int, limits: ReadLimits) -> bytes:
    """Read `length` bytes from `offset` on, in pieces of at most `_PIECE_BYTES`.

    Raises:
        OSError: If the file ends before, or the storage takes longer than `limits.timeout_s`.
    """
    data = os.pread(descriptor, min(length, _PIECE_BYTES), offset)
    if len(data) == length:
        return data
    deadline = time.monotonic() + limits.timeout_s
    pieces = [data]
    position = len(data)
    while position < length and pieces[-1]:
        if time.monotonic() > deadline:
            raise OSError(
                f"{position} of its {length} bytes came within data.read_timeout_s = "
                f"{limits.timeout_s:g}"
            )
        piece_length = min(length - position, _PIECE_BYTES)
        piece = os.pread(descriptor, piece_length, offset + position)
        pieces.append(piece)
        position += len(piece)
    if position < length:
        raise OSError(f"the file ends after {position} of its {length} bytes")
    return b"".join(pieces)


def read_image_bytes(index: Index, row: int, limits: ReadLimits = DEFAULT_LIMITS) -> bytes:
    """The bytes of an image's file as they are.

    Raises:
        OSError: If it cannot be read.
        StoreError: If an object store cannot be read.
    """
    path, offset, length = index.place(row)
    if is_url(path):
        check_length(length, limits)
        return read_range(path, offset, length, index.pins[path], Patience(limits.timeout_s))
    return _read(path, offset, length, limits)


def examine(row: int, data: bytes, limits: ReadLimits = DEFAULT_LIMITS) -> Encoded:
    """Check the bytes of a file; a suspicious image is decoded with Pillow at once.

    Args:
        row: Row of the index.
        data: The bytes of the file.
        limits: What the image may cost.
    """
    try:
        height, width, suspicion = inspect(data, limits.max_pixels)
        if suspicion:
            data, height, width = decode_with_pillow(data, suspicion, limits.max_pixels)
    except ValueError as error:
        return broken_image(row, str(error), data)
    return Encoded(row, data, height, width)


def load(index: Index, row: int, limits: ReadLimits = DEFAULT_LIMITS) -> Encoded:
    """Read and check the image of one row. One that cannot be read is broken like any other."""
    try:
        data = read_image_bytes(index, row, limits)
    except OSError as error:
        return broken_image(row, f"cannot be read: {error.strerror or error}")
    except MemoryError:
        return broken_image(row, "cannot be read: there is not enough memory")
    return examine(row, data, limits)


@dataclass
class Share:
    """Rows that one thread reads."""

    rows: list[int]
    loaded: list[Encoded] = field(default_factory=list)
    abandoned: bool = False
    future: "Future[None] | None" = None

    def cancel(self) -> None:
        """Do not begin, if no thread has begun."""
        if self.future is not None:
            self.future.cancel()


class Reader:
    """Threads that read and check files of one index."""

    def __init__(
        self, index: Index, threads: int = READ_THREADS, limits: ReadLimits = DEFAULT_LIMITS
    ) -> None:
        self.index = index
        self.threads = threads
        self.limits = limits
        self.seconds_per_file = 0.0
        self.load: Callable[[Index, int, ReadLimits], Encoded] = load
        """the benchmark puts a slower one here"""
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self.stuck = False

    def request(self, rows: np.ndarray) -> list[Share]:
        """Begin to read `rows`; `collect` has the result.

        Where the storage is slow, the rows are divided among all threads. Where it is fast, one
        thread has the least work: several of them only pass Python's lock to and fro (15 us of
        processor time a file instead of 60).
        """
        num_shares = 1
        if self.seconds_per_file > _SLOW_SECONDS:
            num_shares = self.threads
        # Rounded up.
        size = -(-len(rows) // num_shares)
        shares = []
        for start in range(0, len(rows), size):
            rows_of_share = rows[start : start + size].tolist()
            shares.append(self._submit(rows_of_share))
        return shares

    def collect(self, requested: list[Share]) -> list[Encoded]:
        """The images of a request, in its order; waits for them."""
        images = []
        for share in requested:
            images += self._wait(share)
        return images

    def close(self) -> None:
        """End the threads; what was requested and has not begun is dropped."""
        self.pool.shutdown(wait=not self.stuck, cancel_futures=True)

    def _submit(self, rows: list[int]) -> Share:
        """Let one thread read `rows`."""
        share = Share(rows)
        share.future = self.pool.submit(self._load_all, share)
        return share

    def _wait(self, share: Share) -> list[Encoded]:
        """The images of a share; one that the storage does not deliver in time is broken."""
        assert share.future is not None
        while True:
            before = len(share.loaded)
            try:
                share.future.result(timeout=self.limits.timeout_s)
                return share.loaded
            except concurrent.futures.TimeoutError:
                if len(share.loaded) == before:
                    return self._give_up(share, before)

    def _give_up(self, share: Share, number: int) -> list[Encoded]:
        """Leave the thread with its file, the share's `number`-th, and read the others anew."""
        share.abandoned = True
        self.stuck = True
        broken = broken_image(
            share.rows[number],
            "cannot be read: the storage has not answered within data.read_timeout_s = "
            f"{self.limits.timeout_s:g} s",
        )
        before = share.loaded[:number]
        rest = self._submit(share.rows[number + 1 :])
        return [*before, broken, *self._wait(rest)]

    def _load_all(self, share: Share) -> None:
        """Read and check the rows of a share: the work of one thread."""
        times = [time.perf_counter()]
        for row in share.rows:
            encoded = self.load(self.index, row, self.limits)
            if share.abandoned:
                return
            share.loaded.append(encoded)
            times.append(time.perf_counter())
        # The median: a busy machine delays a few files as well, and more threads would only make
        # it busier.
        if len(times) > 1:
            seconds = [later - earlier for earlier, later in pairwise(times)]
            # Not NumPy's: it imports numpy.ma on first use, which ends in a RecursionError when two
            # threads do so at once.
            self.seconds_per_file = statistics.median(seconds)
