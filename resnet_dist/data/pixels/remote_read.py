"""Reading images from an object store: many requests at a time, neighbours in one, and a cache.

The rows of a batch are sorted by their place in the shards and divided among threads. A thread
takes from the cache what is there, and asks for the others: for images that lie close together with
one request.

How many requests are in flight follows from Little's law: to get `rate` images a second, each of
which takes `seconds`, `rate * seconds` of them have to be under way. Both are measured all the
time, and some headroom is added. If training has to wait for images, the rate that it asks for is
higher than the measured one; the headroom lets the number grow with each batch until it is enough.
"""

import concurrent.futures
import math
import threading
import time
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from resnet_dist.config import DataConfig
from resnet_dist.data.pixels.read import (
    Encoded,
    Reader,
    ReadLimits,
    Share,
    broken_image,
    check_length,
    examine,
    read_limits,
)
from resnet_dist.data.sources.index import Index
from resnet_dist.data.stores.cache import ImageCache
from resnet_dist.data.stores.client import PIECE_BYTES, Patience, read_range
from resnet_dist.data.stores.errors import StoreError

MAX_GAP_BYTES = 65_536
"""Images of a shard with at most this many bytes between them are read by one request: to read
these bytes takes less time than another request."""

_LEAST_IN_FLIGHT = 4
_MOST_IN_FLIGHT = 128
_IN_FLIGHT_AT_START = 32
_HEADROOM = 1.5

# The weight of a new measurement in the running average of the time of an image.
_WEIGHT = 1 / 64
# Batches over which the rate is measured.
_RATE_BATCHES = 6


@dataclass(frozen=True)
class ImagePlace:
    """Where the bytes of an image are."""

    row: int
    """row of the index"""
    shard: str
    """address of the shard"""
    offset: int
    """first byte in the shard"""
    length: int
    """number of bytes"""

    @property
    def stop(self) -> int:
        """The byte behind the last one."""
        return self.offset + self.length


@dataclass
class RemoteShare(Share):
    """Rows that one thread reads, with their places in the request."""

    numbers: list[int] = field(default_factory=list)
    """of each row: its position in the request"""


@dataclass(frozen=True)
class _Request:
    """A batch that was asked for."""

    time: float
    """in seconds, of the monotonic clock"""
    num_images: int


class Gate:
    """Lets at most `limit` threads in at a time. The limit may change."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.inside = 0
        self.most = 0
        """largest number that was inside so far"""
        self.changed = threading.Condition()

    def __enter__(self) -> None:
        with self.changed:
            while self.inside >= self.limit:
                self.changed.wait()
            self.inside += 1
            self.most = max(self.most, self.inside)

    def __exit__(self, *error: object) -> None:
        with self.changed:
            self.inside -= 1
            self.changed.notify()

    def set_limit(self, limit: int) -> None:
        """Change the limit; threads that are inside stay."""
        with self.changed:
            self.limit = limit
            self.changed.notify_all()


def requests_in_flight(images_per_second: float, seconds_per_image: float) -> int:
    """How many requests have to be under way at the same time, by Little's law, with headroom.

    Args:
        images_per_second: what is asked for.
        seconds_per_image: from the request to the last byte.
    """
    under_way = images_per_second * seconds_per_image
    needed = math.ceil(_HEADROOM * under_way)
    at_least = max(_LEAST_IN_FLIGHT, needed)
    return min(_MOST_IN_FLIGHT, at_least)


def coalesce(places: list[ImagePlace]) -> list[list[ImagePlace]]:
    """Group images that one request can read.

    Args:
        places: sorted by shard and offset. The same image may be there several times.

    Returns:
        The groups, in the same order. A group of several images has at most `PIECE_BYTES` bytes.
    """
    groups: list[list[ImagePlace]] = []
    stop = 0
    for place in places:
        if groups and _fits(groups[-1], stop, place):
            groups[-1].append(place)
            stop = max(stop, place.stop)
        else:
            groups.append([place])
            stop = place.stop
    return groups


def _fits(group: list[ImagePlace], stop: int, place: ImagePlace) -> bool:
    """Whether the request for a group can read one more image.

    Args:
        group: the images so far.
        stop: where the group ends in the shard.
        place: the next image.
    """
    first = group[0]
    if place.shard != first.shard:
        return False
    gap = place.offset - stop
    size = max(stop, place.stop) - first.offset
    return gap <= MAX_GAP_BYTES and size <= PIECE_BYTES


class RemoteReader(Reader):
    """Like `Reader`, for shards in an object store.

    An image that is damaged is broken like any other. A store that cannot be read is an error of
    the run, since no neighbour could take the place of an image: `collect` raises it.
    """

    def __init__(self, index: Index, limits: ReadLimits, cache: ImageCache | None = None) -> None:
        super().__init__(index, threads=_MOST_IN_FLIGHT, limits=limits)
        self.cache = cache
        self.gate = Gate(_IN_FLIGHT_AT_START)
        self.stopped = threading.Event()
        self.failure: BaseException | None = None
        self.patience = Patience(limits.timeout_s, self.stopped)
        self.latest: deque[_Request] = deque(maxlen=_RATE_BATCHES)

    def request(self, rows: np.ndarray) -> list[Share]:
        """Begin to read `rows`; `collect` has the result."""
        num_rows = len(rows)
        self._adapt(num_rows)
        places = [self._place(row) for row in rows.tolist()]

        def by_place(number: int) -> tuple[str, int]:
            place = places[number]
            return place.shard, place.offset

        numbers_in_order = sorted(range(num_rows), key=by_place)
        order = np.array(numbers_in_order, np.int64)
        # Neighbours stay in one share, so that one request can read them.
        num_shares = min(self.gate.limit, num_rows)
        num_shares = max(1, num_shares)
        shares: list[Share] = []
        for part in np.array_split(order, num_shares):
            numbers = part.tolist()
            rows_of_share = rows[part].tolist()
            share = RemoteShare(rows_of_share, numbers=numbers)
            share.future = self.pool.submit(self._load_all, share)
            shares.append(share)
        return shares

    def collect(self, requested: list[Share]) -> list[Encoded]:
        """The images of a request, in its order; waits for them.

        Raises:
            StoreError: the store cannot be read.
        """
        by_number: dict[int, Encoded] = {}
        for share in requested:
            assert isinstance(share, RemoteShare)
            images = self._wait(share)
            by_number.update(zip(share.numbers, images, strict=True))
        return [by_number[number] for number in range(len(by_number))]

    def close(self) -> None:
        """End the threads; what was requested and has not begun is dropped."""
        self.stopped.set()
        super().close()
        if self.cache is not None and not self.stuck:
            self.cache.close()

    def _place(self, row: int) -> ImagePlace:
        """Where the image of a row is."""
        shard, offset, length = self.index.place(row)
        return ImagePlace(row, shard, offset, length)

    def _adapt(self, num_images: int) -> None:
        """Set the number of requests in flight, before `num_images` images are requested."""
        now = time.monotonic()
        is_measured = len(self.latest) > 1 and self.seconds_per_file > 0
        if is_measured:
            images = sum(request.num_images for request in self.latest)
            oldest = self.latest[0]
            seconds = now - oldest.time
            images_per_second = images / seconds
            limit = requests_in_flight(images_per_second, self.seconds_per_file)
            self.gate.set_limit(limit)
        self.latest.append(_Request(now, num_images))

    def _wait(self, share: Share) -> list[Encoded]:
        """The images of a share.

        Raises:
            StoreError: the store cannot be read.
        """
        assert share.future is not None
        # Each request ends by itself; this is for a client that hangs all the same.
        seconds = 2 * self.limits.timeout_s + 60
        waited = concurrent.futures.wait([share.future], timeout=seconds)
        if self.failure is not None:
            # Of all threads, the one that failed first.
            raise self.failure
        if not waited.done:
            self.stuck = True
            raise StoreError(
                f"{self.index.root} cannot be read: no image has come for {seconds:g} s"
            )
        share.future.result()
        return share.loaded

    def _load_all(self, share: Share) -> None:
        """Read and check the rows of a share: the work of one thread.

        An error ends the other threads too, since none of their images will be used.
        """
        if self.stopped.is_set():
            return
        try:
            self._load_rows(share)
        except BaseException as error:
            if self.failure is None:
                self.failure = error
            self.stopped.set()
            raise

    def _load_rows(self, share: Share) -> None:
        """Read and check the rows of a share, from the cache or with coalesced requests."""
        known: dict[int, bytes] = {}
        missing = []
        for row in share.rows:
            place = self._place(row)
            data = self._cached(place)
            if data is None:
                missing.append(place)
            else:
                known[row] = data
        for group in coalesce(missing):
            if self.stopped.is_set():
                return
            known.update(self._fetch(group))
        share.loaded = [self._examine(row, known) for row in share.rows]

    def _cached(self, place: ImagePlace) -> bytes | None:
        """The bytes of an image from the cache; None if they are not there."""
        if self.cache is None:
            return None
        started = time.perf_counter()
        position = self.index.position(place.row)
        data = self.cache.get(position, place.length)
        if data is not None:
            seconds = time.perf_counter() - started
            self._measure(seconds)
        return data

    def _fetch(self, group: list[ImagePlace]) -> dict[int, bytes]:
        """Read images with one request, and keep them in the cache.

        Returns:
            The bytes by row. Images that are too large are left out.
        """
        group = [place for place in group if place.length <= self.limits.max_file_bytes]
        if not group:
            return {}
        first = group[0]
        stop = max(place.stop for place in group)
        pin = self.index.pins[first.shard]
        with self.gate:
            started = time.perf_counter()
            length = stop - first.offset
            data = read_range(first.shard, first.offset, length, pin, self.patience)
            seconds = time.perf_counter() - started
        seconds_per_image = seconds / len(group)
        images = {}
        for place in group:
            begin = place.offset - first.offset
            end = begin + place.length
            images[place.row] = data[begin:end]
            self._measure(seconds_per_image)
        self._keep(images)
        return images

    def _keep(self, images: dict[int, bytes]) -> None:
        """Put images, by row, into the cache."""
        if self.cache is None:
            return
        for row, data in images.items():
            position = self.index.position(row)
            self.cache.put(position, data)

    def _examine(self, row: int, known: dict[int, bytes]) -> Encoded:
        """Check the bytes of an image; one that was not read is too large."""
        if row in known:
            return examine(row, known[row], self.limits)
        place = self._place(row)
        try:
            check_length(place.length, self.limits)
        except OSError as error:
            return broken_image(row, f"cannot be read: {error}")
        raise AssertionError

    def _measure(self, seconds: float) -> None:
        """Add the time of an image to the running average."""
        if self.seconds_per_file == 0:
            self.seconds_per_file = seconds
        change = seconds - self.seconds_per_file
        self.seconds_per_file += _WEIGHT * change


def build_reader(index: Index, config: DataConfig) -> Reader:
    """The reader of an index: of files, or of shards in an object store.

    Raises:
        ValueError: the cache cannot be used.
    """
    limits = read_limits(config)
    if not index.origin.pins:
        return Reader(index, limits=limits)
    cache = None
    if config.cache_dir:
        try:
            cache = ImageCache(config.cache_dir, index, int(config.cache_gb * 1e9))
        except OSError as error:
            raise ValueError(
                f"data.cache_dir {config.cache_dir!r} cannot be used ({error.strerror}): name a "
                f"folder on a local disk that can be written to"
            ) from None
    return RemoteReader(index, limits, cache)
