"""Training and validation batches from image files: the threads between the index and the model.

One background thread per iteration asks the readers for the next files, hands them to DALI
(dali.py), finishes what DALI has decoded (finish.py; on the CPU in a pool of threads) and keeps
batches ready.
"""

import atexit
import contextlib
import functools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from resnet_dist.config import AugmentConfig, DataConfig, DecoderConfig
from resnet_dist.data.arrays import IntArray
from resnet_dist.data.pixels.dali import (
    Augmenter,
    DaliTensors,
    Decoder,
    LoadedJob,
    Portion,
    batch_to_torch,
    split_into_portions,
    windows_to_torch,
)
from resnet_dist.data.pixels.finish import (
    Normalizer,
    disable_openmp_in_thread,
    erase,
    resize_and_crop,
    resize_exact,
    resize_fast,
    to_device,
)
from resnet_dist.data.pixels.quarantine import Quarantine, Wanted, blank, next_good
from resnet_dist.data.pixels.read import Encoded, Reader, Share, read_limits
from resnet_dist.data.sampling import augment as augmentation
from resnet_dist.data.sampling import order
from resnet_dist.data.sampling.crops import Geometry
from resnet_dist.data.sampling.jobs import (
    TrainSampling,
    job_geometry,
    preview_job,
    train_job,
    val_job,
)
from resnet_dist.data.sources.index import Index
from resnet_dist.data.types import IGNORED_LABEL, Batch, Job

# Values that are cropped and normalised together, where an image has fewer. They stay in the cache:
# ten images of 32 pixels, which halves the time of each, or one of 224.
_GROUP_VALUES = 32_768

# Batches whose files are being read while an earlier one is decoded.
_READ_AHEAD = 2

_MAX_PENDING_PIXELS = {"cpu": 2**28, "cuda": 2**30}
"""Decoded pixels of all portions under way, three bytes each. A batch of 1,024 photographs of
ImageNet has 0.2 * 2**30; a single image may have more.
"""


@dataclass(frozen=True)
class LoaderSettings:
    """Where and how a loader works; nothing that changes what it shows."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    """that decode and, on the CPU, that resize"""
    output_dir: str
    """folder of quarantine.jsonl"""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)


@dataclass
class _UnfinishedBatch:
    """The views of the oldest job, filled portion by portion: [n, side, side, 3] each."""

    views: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _ReadyBatch:
    """A batch, and on a GPU the event after which its tensors are complete."""

    batch: Batch
    event: torch.cuda.Event | None = None


def _receive(ready: Generator[_ReadyBatch, None, None]) -> Generator[Batch, None, None]:
    """Hand batches over to the stream of the caller, which waits for them on the GPU alone."""
    with contextlib.closing(ready):
        for item in ready:
            if item.event is not None:
                stream = torch.cuda.current_stream()
                stream.wait_event(item.event)
                for tensor in (item.batch.images, item.batch.labels, *item.batch.other_views):
                    # Its memory is not reused before the caller's stream is done with it.
                    tensor.record_stream(stream)
            yield item.batch


class _BackgroundError:
    """What the background thread of `_run_ahead` raised."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


_END = object()


def _run_ahead(
    items: Generator[_ReadyBatch, None, None], depth: int
) -> Generator[_ReadyBatch, None, None]:
    """Yield `items`, computed in a background thread that keeps up to `depth` of them ready.

    What the thread raises is raised here. Closing this generator stops the thread, closes `items`
    and waits for both.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=max(1, depth))
    stopped = threading.Event()
    thread = threading.Thread(
        target=_fill_queue, args=(items, ready, stopped), name="loader", daemon=True
    )
    thread.start()
    try:
        while True:
            item = ready.get()
            if item is _END:
                return
            if isinstance(item, _BackgroundError):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()


def _fill_queue(
    items: Generator[_ReadyBatch, None, None], ready: "queue.Queue[Any]", stopped: threading.Event
) -> None:
    """Put `items` into a queue until they end or `stopped` is set: the work of the thread."""
    disable_openmp_in_thread()
    try:
        for item in items:
            if not _put(ready, item, stopped):
                break
        items.close()
        _put(ready, _END, stopped)
    except BaseException as error:
        _put(ready, _BackgroundError(error), stopped)


def _put(ready: "queue.Queue[Any]", item: object, stopped: threading.Event) -> bool:
    """Put an item into a full queue once there is room; False when nobody wants it any more."""
    while not stopped.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False


def _close_if_alive(reference: "weakref.ref[DaliLoader]") -> None:
    """Close a loader that still exists."""
    loader = reference()
    if loader is not None:
        loader.close()


class DaliLoader:
    """Turns jobs into batches: files -> DALI -> images on the device, in one background thread."""

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        quarantine: Quarantine,
        settings: LoaderSettings,
        *,
        local_batch_size: int,
        views: int = 1,
        slots: int = 0,
    ) -> None:
        """Start the threads and the pipelines.

        Args:
            index: the images of the split.
            config: the data section of the config.
            quarantine: takes the bad files.
            settings: where and how to work.
            local_batch_size: of the largest batch.
            views: number of squares of each image.
            slots: number of augmentation operations on each image.
        """
        self.index = index
        self.config = config
        self.quarantine = quarantine
        self.device = settings.device
        self.dtype = settings.dtype
        self.threads = settings.threads
        self.queue_depth = settings.decoder.queue_depth
        self.num_samples = len(index)
        self.class_names = index.class_names
        self.reader = Reader(index, limits=read_limits(config))
        self.decoder = Decoder(
            local_batch_size=local_batch_size,
            threads=settings.threads,
            device=settings.device,
            views=views,
            slots=slots,
            options=settings.decoder,
        )
        self.augmenter = Augmenter(
            slots=slots, local_batch_size=local_batch_size, threads=settings.threads
        )
        self.normalize = Normalizer(config, settings.dtype, settings.device)
        self.pool = ThreadPoolExecutor(
            settings.threads, "resize", initializer=disable_openmp_in_thread
        )
        self.running: Generator[Batch, None, None] | None = None
        # A process that ends with an error may never call close(). DALI then aborts it at exit,
        # when it takes down pipelines that a thread still uses. This function is registered after
        # DALI's own exit function, so it runs before it.
        self.at_exit = functools.partial(_close_if_alive, weakref.ref(self))
        atexit.register(self.at_exit)

    @property
    def num_bad(self) -> int:
        """Number of broken files that this process has met in this split."""
        return len(self.quarantine.files)

    def close(self) -> None:
        """Stop the threads and free the pipelines."""
        atexit.unregister(self.at_exit)
        self._stop()
        self.reader.close()
        self.pool.shutdown()
        self.decoder.close()
        self.augmenter.close()

    def run(self, jobs: Iterable[Job]) -> Iterator[Batch]:
        """The batches of `jobs`, in order.

        An iteration that is still running is ended, since both would feed the same pipeline.

        Raises:
            ValueError: when more than `data.max_bad_images` training images are broken.
        """
        self._stop()
        self.running = _receive(_run_ahead(self._produce(jobs), self.config.prefetch_batches))
        return self.running

    def load(self, job: Job, requested: list[Share] | None = None) -> LoadedJob:
        """Read the files of a job; `requested` are those that were asked for already.

        Bad images are replaced (training) or blacked out (evaluation).
        """
        if requested is None:
            requested = self.reader.request(job.rows)
        images = [
            self._replace_if_bad(job, place, image)
            for place, image in enumerate(self.reader.collect(requested))
        ]
        return LoadedJob(job, images, self._geometry(job, images))

    def _stop(self) -> None:
        if self.running is not None:
            self.running.close()
            self.running = None

    def _produce(self, jobs: Iterable[Job]) -> Generator[_ReadyBatch, None, None]:
        """The batches of `jobs`; on a GPU they are made on a stream of their own."""
        with contextlib.closing(self._produce_batches(jobs)) as batches:
            if self.device.type != "cuda":
                for batch in batches:
                    yield _ReadyBatch(batch)
                return
            # A new thread starts on device 0.
            torch.cuda.set_device(self.device)
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                for batch in batches:
                    yield _ReadyBatch(batch, stream.record_event())

    def _produce_batches(self, jobs: Iterable[Job]) -> Generator[Batch, None, None]:
        """Each job read, decoded and finished, while the next ones are being read and decoded."""
        unfinished = _UnfinishedBatch()
        reading: deque[tuple[Job, list[Share]]] = deque()
        try:
            for job in jobs:
                reading.append((job, self.reader.request(job.rows)))
                if len(reading) > _READ_AHEAD:
                    yield from self._decode(self.load(*reading.popleft()), unfinished)
            while reading:
                yield from self._decode(self.load(*reading.popleft()), unfinished)
            while self.decoder.pending:
                yield from self._finish_oldest(unfinished)
        finally:
            for _, requested in reading:
                for share in requested:
                    share.cancel()
            self.decoder.drop_pending()

    def _decode(self, loaded: LoadedJob, unfinished: _UnfinishedBatch) -> Iterator[Batch]:
        """Start to decode a job; yields the batch that is complete meanwhile, if there is one."""
        max_pixels = _MAX_PENDING_PIXELS[self.device.type]
        is_whole = self.device.type == "cuda"
        for portion in split_into_portions(loaded, max_pixels // 2, is_whole):
            while (
                self.decoder.pending
                and self.decoder.pending_pixels + portion.num_pixels > max_pixels
            ):
                yield from self._finish_oldest(unfinished)
            self.decoder.submit(portion)
            if len(self.decoder.pending) >= self.queue_depth:
                yield from self._finish_oldest(unfinished)

    def _finish_oldest(self, unfinished: _UnfinishedBatch) -> Iterator[Batch]:
        """Finish the oldest portion; yields its batch when that is complete."""
        portion, decoded = self._collect()
        geometry = portion.loaded.geometry
        if portion.start == 0:
            unfinished.views = [
                torch.empty(
                    (len(geometry.windows), view.side, view.side, 3),
                    dtype=self.dtype,
                    device=self.device,
                )
                for view in geometry.views
            ]
        finish = self._finish_on_gpu if self.device.type == "cuda" else self._finish_on_cpu
        for number, images in enumerate(unfinished.views):
            finish(decoded, portion, number, images[portion.places])
        if portion.is_last:
            yield self._batch(portion.loaded, unfinished.views)

    def _collect(self) -> tuple[Portion, tuple[DaliTensors, ...]]:
        """The oldest portion, decoded.

        Images that the decoder refuses are treated as bad ones, and their portion runs again.
        """
        while True:
            try:
                return self.decoder.collect()
            except RuntimeError as failure:
                if not self._replace_undecodable():
                    raise RuntimeError(
                        "DALI failed, though it decodes every image of the batch alone"
                    ) from failure
                self.decoder.restart()

    def _replace_undecodable(self) -> bool:
        """Treat the images that cannot be decoded as bad, in the oldest portion that has some.

        Returns False when no pending portion has one.
        """
        for portion in self.decoder.pending:
            found = self.decoder.find_undecodable(portion)
            loaded = portion.loaded
            for place in found:
                row = loaded.images[place].row
                broken = Encoded(row, b"", 0, 0, "the decoder refuses it")
                loaded.images[place] = self._replace_if_bad(loaded.job, place, broken)
            if found:
                loaded.geometry = self._geometry(loaded.job, loaded.images)
                return True
        return False

    def _replace_if_bad(self, job: Job, place: int, image: Encoded) -> Encoded:
        """`image`, or what is shown in its place when it is bad.

        In training that is the next good image of the index, in evaluation a black one.
        """
        if image.reason is None:
            return image
        if job.training:
            return next_good(
                self.index,
                image,
                self.quarantine,
                Wanted(int(job.rows[place]), job.epoch, job.step),
                self.reader.limits,
            )
        self.quarantine.add(self.index.path(image.row), image.reason)
        return blank(image)

    def _geometry(self, job: Job, images: list[Encoded]) -> Geometry:
        heights = np.array([image.height for image in images])
        widths = np.array([image.width for image in images])
        return job_geometry(job, heights, widths, self.config)

    def _batch(self, loaded: LoadedJob, views: list[torch.Tensor]) -> Batch:
        """The finished views of a job with their labels; an image that is bad has none."""
        rows = np.array([image.row for image in loaded.images], dtype=np.int64)
        is_bad = np.array([image.reason is not None for image in loaded.images])
        labels = torch.from_numpy(np.where(is_bad, IGNORED_LABEL, self.index.labels_of(rows)))
        if loaded.job.boxes is not None:
            erase(views[0], loaded.job.boxes)
        labels = to_device(labels, self.device)
        first, *others = [images.permute(0, 3, 1, 2) for images in views]
        return Batch(first, labels, rows, tuple(others))

    def _finish_on_cpu(
        self, decoded: tuple[DaliTensors, ...], portion: Portion, number: int, out: torch.Tensor
    ) -> None:
        """Fill `out` [n, side, side, 3] with the view `number` of a portion: its decoded windows,
        resized, cropped, mirrored, augmented and normalised.
        """
        job = portion.loaded.job
        lighting = None if job.lighting is None else job.lighting[portion.places]
        crop = self._crop_function(windows_to_torch(decoded[0]), portion, number)
        side = out.shape[1]
        self.normalize.prepare(side)

        def normalize(pixels: torch.Tensor, group: slice) -> None:
            self.normalize(pixels, out[group], None if lighting is None else lighting[group])

        def crop_and_normalize(group: slice) -> None:
            normalize(crop(group), group)

        group_size = max(1, _GROUP_VALUES // (3 * side**2))
        groups = [
            slice(first, min(first + group_size, len(out)))
            for first in range(0, len(out), group_size)
        ]
        if job.operations is None:
            self._for_each(crop_and_normalize, groups)
            return
        squares = torch.cat(self._for_each(crop, groups))
        augmented = self.augmenter(squares, job.operations.part(portion.places))
        self._for_each(lambda group: normalize(augmented[group], group), groups)

    def _crop_function(
        self, windows: list[torch.Tensor], portion: Portion, number: int
    ) -> Callable[[slice], torch.Tensor]:
        """A function from a group of images of the portion to their squares, uint8 [k, side, side,
        3].
        """
        geometry = portion.loaded.geometry
        view = geometry.views[number]
        sizes = view.sizes[portion.places].tolist()
        offsets = view.offsets[portion.places].tolist()
        flips = geometry.flips[portion.places].tolist()
        resize = resize_fast if portion.loaded.job.training else resize_exact

        def crop(group: slice) -> torch.Tensor:
            squares = [
                resize_and_crop(
                    windows[i], tuple(sizes[i]), offsets[i], flips[i], view.side, resize
                )
                for i in range(group.start, group.stop)
            ]
            return torch.stack(squares) if len(squares) > 1 else squares[0][None]

        return crop

    def _for_each(self, function: Callable[[slice], Any], groups: list[slice]) -> list[Any]:
        """`function` of each group, in the pool.

        With one thread it runs here: this thread would only wait for the other, and pass Python's
        lock to and fro.
        """
        if self.threads == 1:
            return [function(group) for group in groups]
        return list(self.pool.map(function, groups))

    def _finish_on_gpu(
        self, decoded: tuple[DaliTensors, ...], portion: Portion, number: int, out: torch.Tensor
    ) -> None:
        """Like `_finish_on_cpu`, for squares that DALI has cropped and augmented already."""
        job = portion.loaded.job
        lighting = None if job.lighting is None else job.lighting[portion.places]
        pixels = batch_to_torch(decoded[number], self.device)
        self.normalize.prepare(pixels.shape[2])
        self.normalize(pixels, out, lighting)


class DaliTrainLoader(DaliLoader):
    """This rank's share of the training set (see types.TrainLoader).

    A bad image is replaced by the next good one of the index, with the label of that one;
    `Batch.indices` names the image that is shown. Window and flip are those of the sample that was
    asked for, so that the replacement, which has its own turn as well, is shown in two ways.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        layout: order.BatchLayout,
        settings: LoaderSettings,
    ) -> None:
        """Raises ValueError when the data set is smaller than one global batch."""
        self.seed = seed
        self.sampling = TrainSampling(len(index), layout, config, augment)
        self.steps_per_epoch = self.sampling.steps_per_epoch
        quarantine = Quarantine(settings.output_dir, "train", layout.rank, config.max_bad_images)
        super().__init__(
            index,
            config,
            quarantine,
            settings,
            local_batch_size=layout.local_batch_size,
            slots=augmentation.num_slots(augment),
        )
        self.fingerprint = index.fingerprint()

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """The micro-batches of steps [start_step, stop_step) in order, grad_accum_steps of them for
        each step.

        A new call ends the iteration before it.

        Raises:
            ValueError: when more than `data.max_bad_images` files are broken.
        """
        return self.run(self.jobs(start_step, stop_step))

    def jobs(self, start_step: int, stop_step: int) -> Iterator[Job]:
        """What `batches` shows, before any file is read."""
        for step in range(start_step, stop_step):
            for micro_step in range(self.sampling.layout.grad_accum_steps):
                yield train_job(self.seed, step, micro_step, self.sampling)

    def show_rows(self, rows: IntArray, epoch: int = 0) -> Batch:
        """What `epoch` shows of the images `rows`: int64 [n], at most one batch.

        It ends an iteration that is still running.
        """
        return next(self.run([preview_job(self.seed, rows, epoch, self.sampling)]))


class DaliValLoader(DaliLoader):
    """This rank's share of the validation set (see types.ValLoader).

    On the CPU its pixels are those of torchvision's Resize and CenterCrop on PIL images, bit for
    bit. A bad image is not replaced: it is black, has the label IGNORED_LABEL, and counts as a
    miss.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        settings: LoaderSettings,
    ) -> None:
        num_scales = len(config.val_scales) or 1
        num_crops = 5 if config.val_crops == "ten" else 1
        super().__init__(
            index,
            config,
            Quarantine(settings.output_dir, "val", rank, None),
            settings,
            local_batch_size=min(config.val_batch_size, len(index)),
            views=num_scales * num_crops,
        )
        self.mirrored = config.val_flip or config.val_crops == "ten"
        self.share = order.val_batches(len(index), config.val_batch_size, rank, world_size)
        self.rounds = len(self.share)

    def __iter__(self) -> Iterator[Batch | None]:
        """`rounds` items; None where this rank has no batch left while other ranks have one."""
        shares = [rows for rows in self.share if rows is not None]
        yield from self.run(val_job(np.array(rows, dtype=np.int64)) for rows in shares)
        # Only the last round can be without a batch.
        for _ in range(self.rounds - len(shares)):
            yield None

    def show_rows(self, rows: IntArray) -> Batch:
        """Evaluation's view of the images `rows`: int64 [n], at most one batch.

        It ends an iteration that is still running.
        """
        return next(self.run([val_job(rows)]))
