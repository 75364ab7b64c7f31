"""Filling the training cache: a split is decoded once at the start and kept for all epochs.

The decoded images are in one file for each machine, in its temporary folder (TMPDIR), and every
rank maps it. The file is deleted as soon as all ranks of the machine have opened it. It is then
gone with the last of them, however they end, so that no run can meet the file of another one.

All ranks of a machine share the work: first the sizes are read, which say where each image lies,
then the images are decoded.
"""

import contextlib
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import numpy as np
import torch

from resnet_dist.config import DataConfig
from resnet_dist.data.arrays import IntArray
from resnet_dist.data.pixels.cached import needs_dali
from resnet_dist.data.pixels.decoded_images import MARGIN, DecodedImages
from resnet_dist.data.pixels.decoding import ImageDecoding, LoaderSettings
from resnet_dist.data.pixels.quarantine import Quarantine
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

_SIZE_BYTES = 8
# Height and width of an image.
_SIZE = np.dtype((np.int32, 2))


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
        return cls(runtime.local_rank, min(runtime.local_world_size, num_training))

    def rows(self, num_rows: int) -> range:
        """The rows that this rank reads and decodes for all of them."""
        start = num_rows * self.number // self.count
        stop = num_rows * (self.number + 1) // self.count
        return range(start, stop)


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
    problem = filling.check_estimate() or filling.open_file()
    try:
        problem = problem or filling.read_sizes()
        problem = problem or filling.decode()
        if problem is None:
            cache = filling.map_file()
            num_bytes = len(cache.pixels)
            seconds = time.perf_counter() - started
            return cache, (
                f"training cache: {len(index)} images, {memory_size(num_bytes)}, decoded in "
                f"{seconds:.0f} s"
            )
    finally:
        filling.close()
    if config.train_cache == "auto":
        return None, f"training cache: off, since {problem}"
    raise ValueError(
        f"data.train_cache is {config.train_cache}, but {problem}. Take --data.train_cache off, or "
        "smaller images (`resnet-dist data pack --resize`)"
    )


class _Filling:
    """The steps of `fill_cache`. Each returns what stands against the cache, on every rank."""

    def __init__(
        self, index: Index, config: DataConfig, settings: LoaderSettings, runtime: Runtime
    ) -> None:
        self.index = index
        self.config = config
        self.runtime = runtime
        self.machine = Machine.of(runtime)
        self.settings = replace(settings, device=torch.device("cpu"))
        self.budget = int(_SHARE_OF_HOST * free_host_memory())
        self.descriptor: int | None = None
        self.starts = np.zeros(0, np.int64)
        self.sizes = np.zeros((0, 2), np.int32)
        self.stopped = threading.Event()

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for its machine."""
        return self.machine.number == 0

    def close(self) -> None:
        """Let the file go; what is mapped stays."""
        self.stopped.set()
        if self.descriptor is not None:
            os.close(self.descriptor)

    def check_estimate(self) -> str | None:
        """Judge by the sizes of a few images, since reading all of a large split takes hours."""
        problem = None
        if self.is_first:
            num_images = len(self.index)
            sample = np.unique(np.linspace(0, num_images - 1, _SAMPLE).astype(np.int64))
            sizes = np.concatenate(list(self._sizes_of(sample)))
            num_bytes = int(3 * sizes.astype(np.int64).prod(axis=1).mean() * num_images)
            problem = self._too_large(num_bytes)
        return self._agree(problem)

    def open_file(self) -> str | None:
        """Create the file, open it on every rank of the machine, and delete its name."""
        name = self.runtime.on_main(_temporary_name)
        path = os.path.join(tempfile.gettempdir(), name)
        problem = None
        if self.is_first:
            problem = self._open(path, os.O_CREAT | os.O_EXCL)
        # Wait until the file is there on all machines.
        created = self._agree(problem)
        if created is None and not self.is_first:
            problem = self._open(path, 0)
        # Wait until every rank has opened it.
        opened = self._agree(problem)
        if self.is_first:
            with contextlib.suppress(OSError):
                os.unlink(path)
        return opened

    def read_sizes(self) -> str | None:
        """Read the size of every image, and reserve the disk space of all of them."""
        problem = self._together(self._read_own_sizes)
        if problem:
            return problem
        num_images = len(self.index)
        head = os.pread(self._file(), num_images * _SIZE_BYTES, 0)
        self.sizes = np.frombuffer(head, _SIZE).copy()
        values = 3 * self.sizes.astype(np.int64).prod(axis=1)
        ends = np.cumsum(values)
        self.starts = self._pixels_start + MARGIN + ends - values
        if self.is_first:
            problem = self._too_large(int(ends[-1])) or self._reserve()
        return self._agree(problem)

    def decode(self) -> str | None:
        """Decode every image into the file."""
        return self._together(self._decode_own)

    def map_file(self) -> DecodedImages:
        """The finished cache."""
        num_images = len(self.index)
        mapped = mmap.mmap(self._file(), self._file_bytes)
        content = np.frombuffer(mapped, np.uint8)
        sizes = content[: num_images * _SIZE_BYTES].view(np.int32).reshape(-1, 2)
        return DecodedImages(
            heights=sizes[:, 0].astype(np.int64),
            widths=sizes[:, 1].astype(np.int64),
            starts=self.starts - self._pixels_start,
            pixels=content[self._pixels_start :],
        )

    @property
    def _pixels_start(self) -> int:
        """The position of the first margin, behind the sizes."""
        return len(self.index) * _SIZE_BYTES

    @property
    def _file_bytes(self) -> int:
        num_values = 3 * self.sizes[-1].astype(np.int64).prod()
        return int(self.starts[-1] + num_values + MARGIN)

    def _file(self) -> int:
        assert self.descriptor is not None, "the file is not open"
        return self.descriptor

    def _open(self, path: str, flags: int) -> str | None:
        try:
            self.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        except OSError as error:
            return f"{path} cannot be opened: {error.strerror}. TMPDIR names its folder"
        return None

    def _reserve(self) -> str | None:
        """Take the disk space now: a full disk is noticed before the work."""
        try:
            os.posix_fallocate(self._file(), 0, self._file_bytes)
        except OSError as error:
            return (
                f"{tempfile.gettempdir()} has no room for {memory_size(self._file_bytes)} "
                f"({error.strerror}). TMPDIR may name another folder"
            )
        return None

    def _too_large(self, num_bytes: int) -> str | None:
        """A sentence if the decoded images do not fit."""
        if num_bytes <= self.budget:
            return None
        return (
            f"the decoded images take about {memory_size(num_bytes)}, more than "
            f"{_SHARE_OF_HOST:.0%} of the free memory of this machine or control group "
            f"({memory_size(self.budget)})"
        )

    def _agree(self, problem: str | None) -> str | None:
        """None if no rank has a problem; the one of this rank, or a word about the others."""
        num_failed = self.runtime.sum_integer(int(problem is not None))
        if num_failed == 0:
            return None
        return problem or f"{num_failed} other ranks have no room for it (see their messages)"

    def _together(self, work: Callable[[], str | None]) -> str | None:
        """Do some work on every rank, however long it takes; returns what `_agree` returns.

        It runs in a thread, and every second the ranks tell each other who continues: no collective
        waits for the slowest rank until it times out.
        """
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work)
            try:
                num_working = 1
                while num_working:
                    not_done = wait([future], timeout=1).not_done
                    num_working = self.runtime.sum_integer(len(not_done))
            finally:
                self.stopped.set()
            self.stopped.clear()
            problem = None
            try:
                problem = future.result()
            except Exception as error:
                problem = f"it could not be filled: {type(error).__name__}: {error}"
        return self._agree(problem)

    def _batches(self, rows: range) -> Iterator[IntArray]:
        """The rows in batches, until the work is stopped."""
        for start in range(rows.start, rows.stop, _BATCH):
            if self.stopped.is_set():
                return
            yield np.arange(start, min(start + _BATCH, rows.stop), dtype=np.int64)

    def _sizes_of(self, rows: IntArray) -> Iterator[np.ndarray]:
        """The sizes of images, in batches: int32 [n, 2], zeros for broken ones."""
        reader = build_reader(self.index, self.config)
        try:
            for start in range(0, len(rows), _BATCH):
                if self.stopped.is_set():
                    return
                images = reader.collect(reader.request(rows[start : start + _BATCH]))
                sizes = [(image.height, image.width) for image in images]
                yield np.array(sizes, np.int32)
        finally:
            reader.close()

    def _read_own_sizes(self) -> str | None:
        """Write this rank's share of the sizes to the file."""
        rows = self.machine.rows(len(self.index))
        position = rows.start * _SIZE_BYTES
        for sizes in self._sizes_of(np.array(rows, np.int64)):
            _write(self._file(), sizes.tobytes(), position)
            position += sizes.nbytes
        return None

    def _decode_own(self) -> str | None:
        """Write this rank's share of the pixels to the file, and mark what cannot be decoded."""
        quarantine = _NoQuarantine(self.settings.output_dir, "train", self.runtime.rank, None)
        decoding = ImageDecoding(
            self.index, self.config, quarantine, self.settings, local_batch_size=_BATCH
        )
        rows = self.machine.rows(len(self.index))
        jobs = (val_job(batch) for batch in self._batches(rows))
        try:
            with contextlib.closing(decoding.decode(jobs)) as portions:
                for decoded in portions:
                    images = decoded.portion.loaded.images[decoded.portion.places]
                    for image, pixels in zip(images, decoded.windows, strict=True):
                        is_bad = image.reason is not None
                        self._keep(image.row, pixels, is_bad)
        finally:
            decoding.close()
        return None

    def _keep(self, row: int, pixels: torch.Tensor, is_bad: bool) -> None:
        """Write the pixels of one image; one that cannot be used gets the size 0."""
        is_expected = tuple(pixels.shape[:2]) == tuple(self.sizes[row].tolist())
        if is_bad or not is_expected:
            _write(self._file(), bytes(_SIZE_BYTES), row * _SIZE_BYTES)
            return
        _write(self._file(), pixels.numpy().data.cast("B"), int(self.starts[row]))


class _NoQuarantine(Quarantine):
    """Bad images are recorded when training meets them, as without the cache."""

    def add(
        self, file: str, reason: str, *, epoch: int | None = None, step: int | None = None
    ) -> None:
        """Record nothing."""


def _write(descriptor: int, data: bytes | memoryview, position: int) -> None:
    """Write all of `data` at a position of a file. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view = view[written:]
        position += written


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
        return _move_to_device(cache, settings.device), f"{remark}, on the GPU"
    if config.train_cache == "auto":
        return cache, f"{remark}, in host memory"
    raise ValueError(
        f"data.train_cache is device, but {problem or 'it does not fit on another GPU'}. Take "
        "--data.train_cache host"
    )


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
