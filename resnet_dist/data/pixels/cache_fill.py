"""Filling the training cache: a split is decoded once at the start and kept for all epochs.

The decoded images are in one file for each machine, in its temporary folder (TMPDIR), and every
rank maps it. The file is deleted as soon as all ranks of the machine have opened it. It is then
gone with the last of them, however they end, so that no run can meet the file of another one.

All ranks of a machine share the work: first the sizes are read, which say where each image lies,
then the images are decoded.
"""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np
import torch

from resnet_dist.config import DataConfig
from resnet_dist.data.arrays import IntArray
from resnet_dist.data.pixels.cache_file import CacheFile
from resnet_dist.data.pixels.cached import needs_dali
from resnet_dist.data.pixels.decoded_images import CHANNELS, DecodedImages
from resnet_dist.data.pixels.decoding import DecodedPortion, ImageDecoding, LoaderSettings
from resnet_dist.data.pixels.quarantine import Quarantine
from resnet_dist.data.pixels.read import Reader
from resnet_dist.data.pixels.remote_read import build_reader
from resnet_dist.data.sampling.jobs import val_job
from resnet_dist.data.sources.index import Index
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.resources.host_memory import free_host_memory
from resnet_dist.text import memory_size

_SHARE_OF_HOST = 0.5
_SHARE_OF_GPU = 0.25
"""Part of the free memory that the cache may take. The network has a GPU's memory still to come."""

_SAMPLE = 256
"""Images whose sizes say beforehand whether a split may fit."""

_BATCH = 64
"""Images that are read or decoded together."""

_SECONDS_BETWEEN_REPORTS = 1.0
"""How often the ranks tell each other that they still work."""


class _CacheError(Exception):
    """Why there can be no cache, as a part of a sentence."""


@dataclass(frozen=True)
class Machine:
    """The ranks of one machine that share a cache."""

    number: int
    """of this rank among them"""
    count: int

    @classmethod
    def of(cls, runtime: Runtime) -> "Machine":
        """The ranks beside this one; a launcher may have started spare processes behind them."""
        first_rank = runtime.rank - runtime.local_rank
        num_training = runtime.world_size - first_rank
        count = min(runtime.local_world_size, num_training)
        return cls(runtime.local_rank, count)

    @property
    def is_first(self) -> bool:
        """Whether this rank does what one rank of the machine has to do."""
        return self.number == 0

    def rows(self, num_rows: int) -> IntArray:
        """The rows that this rank reads and decodes for all of them, int64."""
        start = num_rows * self.number // self.count
        stop = num_rows * (self.number + 1) // self.count
        return np.arange(start, stop, dtype=np.int64)


def fill_cache(
    index: Index, config: DataConfig, settings: LoaderSettings, runtime: Runtime
) -> tuple[DecodedImages | None, str]:
    """Decode a split into memory, as `data.train_cache` asks. Call it on every rank.

    Args:
        index: The images of the split.
        config: The data section.
        settings: Of the loader.
        runtime: This rank.

    Returns:
        The decoded images, or None where `auto` finds no room; and a sentence about them.

    Raises:
        ValueError: on every rank, if the split does not fit and `train_cache` is not "auto".
    """
    started = time.perf_counter()
    filling = _Filling(index, config, settings, runtime)
    try:
        filling.check_estimate()
        filling.open_file()
        filling.read_sizes()
        filling.decode()
        cache = filling.file.map()
    except _CacheError as problem:
        if config.train_cache == "auto":
            return None, f"training cache: off, since {problem}"
        raise ValueError(
            f"data.train_cache is {config.train_cache}, but {problem}. Take --data.train_cache "
            f"off, or smaller images (`resnet-dist data pack --resize`)"
        ) from None
    finally:
        filling.close()
    num_images = len(index)
    size = memory_size(len(cache.pixels))
    seconds = time.perf_counter() - started
    return cache, f"training cache: {num_images} images, {size}, decoded in {seconds:.0f} s"


def estimate_cache_bytes(index: Index, config: DataConfig) -> int:
    """Estimate how many bytes the decoded images of a split take, from the sizes of a few."""
    num_images = len(index)
    spread = np.linspace(0, num_images - 1, _SAMPLE)
    rows = np.unique(spread.astype(np.int64))
    reader = build_reader(index, config)
    try:
        sizes = _read_sizes(reader, rows)
    finally:
        reader.close()
    num_pixels = sizes.astype(np.int64).prod(axis=1)
    return int(CHANNELS * num_pixels.mean() * num_images)


def cache_budget() -> int:
    """Number of bytes of this machine's memory that the training cache may take."""
    return int(_SHARE_OF_HOST * free_host_memory())


def _read_sizes(reader: Reader, rows: IntArray) -> np.ndarray:
    """The sizes of images: int32 [n, 2], zeros for broken ones."""
    requested = reader.request(rows)
    sizes = []
    for image in reader.collect(requested):
        sizes.append((image.height, image.width))
    return np.array(sizes, np.int32)


class _Filling:
    """The steps of `fill_cache`. If one fails on some rank, it raises `_CacheError` on all."""

    def __init__(
        self, index: Index, config: DataConfig, settings: LoaderSettings, runtime: Runtime
    ) -> None:
        self.index = index
        self.config = config
        self.runtime = runtime
        self.machine = Machine.of(runtime)
        self.settings = replace(settings, device=torch.device("cpu"))
        self.budget = cache_budget()
        self.file = CacheFile(len(index))
        self.stopped = threading.Event()

    def close(self) -> None:
        """Stop the work and let the file go; what is mapped stays."""
        self.stopped.set()
        self.file.close()

    def check_estimate(self) -> None:
        """Judge by the sizes of a few images, since reading all of a large split takes hours."""
        self._together(self._check_sample)

    def open_file(self) -> None:
        """Create the file, open it on every rank of the machine, and delete its name."""
        name = self.runtime.on_main(_temporary_name)
        path = os.path.join(tempfile.gettempdir(), name)

        def create() -> None:
            if self.machine.is_first:
                self._open(path, is_new=True)

        def open_created() -> None:
            if not self.machine.is_first:
                self._open(path, is_new=False)

        try:
            self._together(create)
            # The file is there on all machines.
            self._together(open_created)
        finally:
            if self.machine.is_first:
                with contextlib.suppress(OSError):
                    os.unlink(path)

    def read_sizes(self) -> None:
        """Read the size of every image, and reserve the disk space of all of them."""
        self._together(self._write_own_sizes)
        self._together(self._lay_out)

    def decode(self) -> None:
        """Decode every image into the file."""
        self._together(self._decode_own)

    def _together(self, work: Callable[[], None]) -> None:
        """Do some work on every rank, however long it takes.

        It runs in a thread, and every second the ranks tell each other who continues: no collective
        waits for the slowest rank until it times out.

        Raises:
            _CacheError: on every rank, if the work has failed on one.
        """
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                self._wait_for_all(future)
            finally:
                self.stopped.set()
        self.stopped.clear()
        problem = _problem_of(future)
        num_failed = self.runtime.sum_integer(int(problem is not None))
        if problem is not None:
            raise _CacheError(problem)
        if num_failed > 0:
            raise _CacheError(f"{num_failed} other ranks have no room for it (see their messages)")

    def _wait_for_all(self, future: "Future[None]") -> None:
        """Wait until the work of every rank has ended."""
        num_working = 1
        while num_working > 0:
            not_done = wait([future], timeout=_SECONDS_BETWEEN_REPORTS).not_done
            num_working = self.runtime.sum_integer(len(not_done))

    def _check_sample(self) -> None:
        """Estimate the size of the cache from a few images."""
        if self.machine.is_first:
            num_bytes = estimate_cache_bytes(self.index, self.config)
            self._check_budget(num_bytes)

    def _check_budget(self, num_bytes: int) -> None:
        """Raise `_CacheError` if the decoded images do not fit."""
        if num_bytes <= self.budget:
            return
        size = memory_size(num_bytes)
        budget = memory_size(self.budget)
        raise _CacheError(
            f"the decoded images take about {size}, more than {_SHARE_OF_HOST:.0%} of the free "
            f"memory of this machine or control group ({budget})"
        )

    def _open(self, path: str, *, is_new: bool) -> None:
        try:
            self.file.open(path, is_new=is_new)
        except OSError as error:
            raise _CacheError(
                f"{path} cannot be opened: {error.strerror}. TMPDIR names its folder"
            ) from None

    def _write_own_sizes(self) -> None:
        """Write this rank's share of the sizes to the file."""
        rows = self.machine.rows(len(self.index))
        num_written = 0
        for sizes in self._sizes_of(rows):
            self.file.write_sizes(rows[num_written], sizes)
            num_written += len(sizes)

    def _sizes_of(self, rows: IntArray) -> Iterator[np.ndarray]:
        """The sizes of images, in batches: int32 [n, 2], zeros for broken ones."""
        reader = build_reader(self.index, self.config)
        try:
            for batch in self._batches(rows):
                yield _read_sizes(reader, batch)
        finally:
            reader.close()

    def _batches(self, rows: IntArray) -> Iterator[IntArray]:
        """The rows in batches, until the work is stopped."""
        for start in range(0, len(rows), _BATCH):
            if self.stopped.is_set():
                return
            yield rows[start : start + _BATCH]

    def _lay_out(self) -> None:
        """Find the place of each image, and take the disk space before the work begins."""
        self.file.lay_out()
        if not self.machine.is_first:
            return
        self._check_budget(self.file.image_bytes)
        try:
            self.file.reserve()
        except OSError as error:
            size = memory_size(self.file.num_bytes)
            raise _CacheError(
                f"{tempfile.gettempdir()} has no room for {size} ({error.strerror}). TMPDIR may "
                f"name another folder"
            ) from None

    def _decode_own(self) -> None:
        """Write this rank's share of the pixels to the file, and mark what cannot be decoded."""
        quarantine = _NoQuarantine(self.settings.output_dir, "train", self.runtime.rank, None)
        decoding = ImageDecoding(
            self.index, self.config, quarantine, self.settings, local_batch_size=_BATCH
        )
        rows = self.machine.rows(len(self.index))
        # Evaluation keeps the order of the images, and does not crop them.
        jobs = map(val_job, self._batches(rows))
        try:
            with contextlib.closing(decoding.decode(jobs)) as portions:
                for decoded in portions:
                    self._write_images(decoded)
        finally:
            decoding.close()

    def _write_images(self, decoded: DecodedPortion) -> None:
        """Write the images of a portion; one that cannot be used gets the size 0."""
        portion = decoded.portion
        images = portion.loaded.images[portion.places]
        for image, pixels in zip(images, decoded.windows, strict=True):
            size = list(pixels.shape[:2])
            expected_size = self.file.sizes[image.row].tolist()
            is_good = image.reason is None
            if is_good and size == expected_size:
                self.file.write_image(image.row, pixels)
            else:
                self.file.mark_as_bad(image.row)


def _problem_of(future: "Future[None]") -> str | None:
    """Why the work of this rank has failed, as a part of a sentence; None if it has not."""
    error = future.exception()
    if error is None:
        return None
    if isinstance(error, _CacheError):
        return str(error)
    return f"it could not be filled: {type(error).__name__}: {error}"


class _NoQuarantine(Quarantine):
    """Bad images are recorded when training meets them, as without the cache."""

    def add(
        self, file: str, reason: str, *, epoch: int | None = None, step: int | None = None
    ) -> None:
        """Record nothing."""


def _temporary_name() -> str:
    """A random file name that no other run uses."""
    return f"resnet_dist_cache_{os.urandom(8).hex()}"


def build_train_cache(
    index: Index, config: DataConfig, settings: LoaderSettings, runtime: Runtime, slots: int
) -> tuple[DecodedImages | None, str]:
    """Fill the training cache, and move it to the GPU where that is asked for or pays.

    Args:
        index: The images of the training set.
        config: The data section.
        settings: Of the loader.
        runtime: This rank.
        slots: Number of augmentation operations on each image.

    Returns:
        The decoded images, or None where `auto` finds no room; and a sentence about them.

    Raises:
        ValueError: on every rank, if there is no room and `train_cache` is not "auto".
    """
    cache, remark = fill_cache(index, config, settings, runtime)
    if cache is None or settings.device.type == "cpu":
        return cache, remark
    if config.train_cache == "host":
        return cache, f"{remark}, in host memory"
    problem = _no_device_cache(cache, config, settings.device, slots)
    num_failed = runtime.sum_integer(int(problem is not None))
    if num_failed == 0:
        on_device = _move_to_device(cache, settings.device)
        return on_device, f"{remark}, on the GPU"
    if config.train_cache == "auto":
        return cache, f"{remark}, in host memory"
    reason = problem or "it does not fit on another GPU"
    raise ValueError(f"data.train_cache is device, but {reason}. Take --data.train_cache host")


def _no_device_cache(
    cache: DecodedImages, config: DataConfig, device: torch.device, slots: int
) -> str | None:
    """What stands against a cache on the GPU; None for nothing."""
    if needs_dali(cache, config, slots):
        return "the images differ in size, or they are resized or augmented after the crop"
    free, _ = torch.cuda.mem_get_info(device)
    num_bytes = len(cache.pixels)
    if num_bytes <= _SHARE_OF_GPU * free:
        return None
    return f"{memory_size(num_bytes)} are more than {_SHARE_OF_GPU:.0%} of the GPU's free memory"


def _move_to_device(cache: DecodedImages, device: torch.device) -> DecodedImages:
    """Copy images of one size to a GPU."""
    size = cache.common_size
    assert size is not None, "the images differ in size"
    rows = np.arange(len(cache.heights))
    images = cache.equal_images(rows, size)
    return replace(cache, on_device=images.to(device))
