"""Training and validation batches from image files: the threads between the index and the model.

One background thread per iteration (ahead.py) asks the readers for the next files, hands them to
DALI (dali.py), finishes what DALI has decoded (finish.py; on the CPU in a pool of threads) and
keeps batches ready.
"""

import atexit
import contextlib
import functools
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from resnet_dist.config import AugmentConfig, DataConfig, DecoderConfig
from resnet_dist.data.arrays import FloatArray, IntArray
from resnet_dist.data.pixels.ahead import ReadyBatch, receive, run_ahead
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
    EXACT_RESIZES,
    Normalizer,
    disable_openmp_in_thread,
    erase,
    resize_and_crop,
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


def _close_if_alive(reference: "weakref.ref[DaliLoader]") -> None:
    """Close a loader that still exists."""
    loader = reference()
    if loader is not None:
        loader.close()


def _split_into_groups(num_images: int, side: int) -> list[slice]:
    """Divide the images of a portion into groups of at most `_GROUP_VALUES` values each."""
    values_per_image = 3 * side**2
    group_size = max(1, _GROUP_VALUES // values_per_image)
    groups = []
    for first in range(0, num_images, group_size):
        end = min(first + group_size, num_images)
        groups.append(slice(first, end))
    return groups


def _lighting_of(portion: Portion) -> FloatArray | None:
    """The colour shifts of the images of a portion; None without that augmentation."""
    lighting = portion.loaded.job.lighting
    if lighting is None:
        return None
    return lighting[portion.places]


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
        made = run_ahead(self._produce(jobs), self.config.prefetch_batches)
        self.running = receive(made)
        return self.running

    def load(self, job: Job, requested: list[Share] | None = None) -> LoadedJob:
        """Read the files of a job.

        Bad images are replaced (training) or blacked out (evaluation).

        Args:
            job: The images to read.
            requested: What `reader.request` returned for the job, if it was called already.
        """
        if requested is None:
            requested = self.reader.request(job.rows)
        images = []
        for place, image in enumerate(self.reader.collect(requested)):
            images.append(self._replace_if_bad(job, place, image))
        geometry = self._geometry(job, images)
        return LoadedJob(job, images, geometry)

    def _stop(self) -> None:
        if self.running is not None:
            self.running.close()
            self.running = None

    def _produce(self, jobs: Iterable[Job]) -> Generator[ReadyBatch, None, None]:
        """The batches of `jobs`; on a GPU they are made on a stream of their own."""
        with contextlib.closing(self._produce_batches(jobs)) as batches:
            if self.device.type != "cuda":
                for batch in batches:
                    yield ReadyBatch(batch)
                return
            # A new thread starts on device 0.
            torch.cuda.set_device(self.device)
            stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                for batch in batches:
                    yield ReadyBatch(batch, stream.record_event())

    def _produce_batches(self, jobs: Iterable[Job]) -> Generator[Batch, None, None]:
        """Each job read, decoded and finished, while the next ones are being read and decoded."""
        unfinished = _UnfinishedBatch()
        reading: deque[tuple[Job, list[Share]]] = deque()
        try:
            for job in jobs:
                reading.append((job, self.reader.request(job.rows)))
                if len(reading) > _READ_AHEAD:
                    oldest, requested = reading.popleft()
                    loaded = self.load(oldest, requested)
                    yield from self._decode(loaded, unfinished)
            while reading:
                oldest, requested = reading.popleft()
                loaded = self.load(oldest, requested)
                yield from self._decode(loaded, unfinished)
            while self.decoder.pending:
                yield from self._finish_oldest(unfinished)
        finally:
            for _, requested in reading:
                for share in requested:
                    share.cancel()
            self.decoder.drop_pending()

    def _decode(self, loaded: LoadedJob, unfinished: _UnfinishedBatch) -> Iterator[Batch]:
        """Start to decode a job; yields the batch that is complete meanwhile, if there is one."""
        decoder = self.decoder
        max_pixels = _MAX_PENDING_PIXELS[self.device.type]
        is_whole = self.device.type == "cuda"
        for portion in split_into_portions(loaded, max_pixels // 2, is_whole):
            max_others = max_pixels - portion.num_pixels
            while decoder.pending and decoder.pending_pixels > max_others:
                yield from self._finish_oldest(unfinished)
            decoder.submit(portion)
            if len(decoder.pending) >= self.queue_depth:
                yield from self._finish_oldest(unfinished)

    def _finish_oldest(self, unfinished: _UnfinishedBatch) -> Iterator[Batch]:
        """Finish the oldest portion; yields its batch when that is complete."""
        portion, decoded = self._collect()
        geometry = portion.loaded.geometry
        if portion.start == 0:
            num_images = len(geometry.windows)
            unfinished.views = []
            for view in geometry.views:
                shape = (num_images, view.side, view.side, 3)
                images = torch.empty(shape, dtype=self.dtype, device=self.device)
                unfinished.views.append(images)

        finish = self._finish_on_cpu
        if self.device.type == "cuda":
            finish = self._finish_on_gpu
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

        Returns:
            False if no pending portion has one.
        """
        for portion in self.decoder.pending:
            loaded = portion.loaded
            found = self.decoder.find_undecodable(portion)
            if not found:
                continue
            for place in found:
                row = loaded.images[place].row
                broken = Encoded(
                    row=row,
                    data=b"",
                    height=0,
                    width=0,
                    reason="the decoder refuses it",
                )
                loaded.images[place] = self._replace_if_bad(loaded.job, place, broken)
            loaded.geometry = self._geometry(loaded.job, loaded.images)
            return True
        return False

    def _replace_if_bad(self, job: Job, place: int, image: Encoded) -> Encoded:
        """`image` itself, or its replacement if it is bad.

        In training that is the next good image of the index, in evaluation a black one.

        Args:
            job: The job of the image.
            place: Position of the image in the job.
            image: What was read.
        """
        if image.reason is None:
            return image
        if job.training:
            wanted = Wanted(int(job.rows[place]), job.epoch, job.step)
            return next_good(
                self.index,
                image,
                self.quarantine,
                wanted,
                self.reader.limits,
            )
        path = self.index.path(image.row)
        self.quarantine.add(path, image.reason)
        return blank(image)

    def _geometry(self, job: Job, images: list[Encoded]) -> Geometry:
        """The windows and views of a job, which depend on the sizes of its images."""
        heights = [image.height for image in images]
        widths = [image.width for image in images]
        return job_geometry(job, np.array(heights), np.array(widths), self.config)

    def _batch(self, loaded: LoadedJob, views: list[torch.Tensor]) -> Batch:
        """The finished views of a job with their labels; a bad image has IGNORED_LABEL.

        Args:
            loaded: The job and its images.
            views: One tensor [B, side, side, 3] for each view.
        """
        rows_of_images = [image.row for image in loaded.images]
        rows = np.array(rows_of_images, dtype=np.int64)
        is_bad = np.array([image.reason is not None for image in loaded.images])
        known_labels = self.index.labels_of(rows)
        labels = torch.from_numpy(np.where(is_bad, IGNORED_LABEL, known_labels))
        labels = to_device(labels, self.device)
        if loaded.job.boxes is not None:
            erase(views[0], loaded.job.boxes)

        channels_first = []
        for images in views:
            channels_first.append(images.permute(0, 3, 1, 2))
        first, *others = channels_first
        return Batch(first, labels, rows, tuple(others))

    def _finish_on_cpu(
        self, decoded: tuple[DaliTensors, ...], portion: Portion, number: int, out: torch.Tensor
    ) -> None:
        """Resize, crop, mirror, augment and normalise the decoded windows of a portion.

        Args:
            decoded: What DALI has decoded.
            portion: The portion.
            number: Which of the views to make.
            out: The view, [n, side, side, 3]; it is filled.
        """
        job = portion.loaded.job
        lighting = _lighting_of(portion)
        windows = windows_to_torch(decoded[0])
        crop = self._crop_function(windows, portion, number)
        num_images, side = out.shape[:2]
        self.normalize.prepare(side)

        def normalize(pixels: torch.Tensor, group: slice) -> None:
            lighting_of_group = None
            if lighting is not None:
                lighting_of_group = lighting[group]
            self.normalize(pixels, out[group], lighting_of_group)

        def crop_and_normalize(group: slice) -> None:
            squares = crop(group)
            normalize(squares, group)

        groups = _split_into_groups(num_images, side)
        if job.operations is None:
            self._for_each(crop_and_normalize, groups)
            return

        squares = torch.cat(self._for_each(crop, groups))
        operations = job.operations.part(portion.places)
        augmented = self.augmenter(squares, operations)

        def normalize_augmented(group: slice) -> None:
            normalize(augmented[group], group)

        self._for_each(normalize_augmented, groups)

    def _crop_function(
        self, windows: list[torch.Tensor], portion: Portion, number: int
    ) -> Callable[[slice], torch.Tensor]:
        """Build the function that resizes, crops and mirrors a group of images.

        Args:
            windows: The decoded windows of the portion, uint8 [height, width, 3] each.
            portion: The portion.
            number: Which of the views to make.

        Returns:
            A function from a group of k images of the portion to uint8 [k, side, side, 3].
        """
        geometry = portion.loaded.geometry
        view = geometry.views[number]
        sizes = view.sizes[portion.places].tolist()
        offsets = view.offsets[portion.places].tolist()
        flips = geometry.flips[portion.places].tolist()
        resize = EXACT_RESIZES[self.config.val_interpolation]
        if portion.loaded.job.training:
            resize = resize_fast

        def crop(group: slice) -> torch.Tensor:
            squares = []
            for i in range(group.start, group.stop):
                size = tuple(sizes[i])
                square = resize_and_crop(windows[i], size, offsets[i], flips[i], view.side, resize)
                squares.append(square)
            if len(squares) == 1:
                # Without the copy that torch.stack would make.
                return squares[0][None]
            return torch.stack(squares)

        return crop

    def _for_each(self, function: Callable[[slice], Any], groups: list[slice]) -> list[Any]:
        """Call a function with each group, in the pool; returns the results in order.

        With one thread it runs in the calling thread: a second thread would only be waited for,
        and the two would pass Python's lock to and fro.
        """
        if self.threads == 1:
            return [function(group) for group in groups]
        return list(self.pool.map(function, groups))

    def _finish_on_gpu(
        self, decoded: tuple[DaliTensors, ...], portion: Portion, number: int, out: torch.Tensor
    ) -> None:
        """Like `_finish_on_cpu`, for squares that DALI has cropped and augmented already."""
        pixels = batch_to_torch(decoded[number], self.device)
        side = pixels.shape[2]
        self.normalize.prepare(side)
        self.normalize(pixels, out, _lighting_of(portion))


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
        grad_accum_steps = self.sampling.layout.grad_accum_steps
        for step in range(start_step, stop_step):
            for micro_step in range(grad_accum_steps):
                yield train_job(self.seed, step, micro_step, self.sampling)

    def show_rows(self, rows: IntArray, epoch: int = 0) -> Batch:
        """What `epoch` shows of the images `rows`: int64 [n], at most one batch.

        It ends an iteration that is still running.
        """
        job = preview_job(self.seed, rows, epoch, self.sampling)
        batches = self.run([job])
        return next(batches)


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
        has_ten_crops = config.val_crops == "ten"
        num_crops = 5 if has_ten_crops else 1
        quarantine = Quarantine(settings.output_dir, "val", rank, None)
        super().__init__(
            index,
            config,
            quarantine,
            settings,
            local_batch_size=min(config.val_batch_size, len(index)),
            views=num_scales * num_crops,
        )
        self.mirrored = config.val_flip or has_ten_crops
        self.share = order.val_batches(len(index), config.val_batch_size, rank, world_size)
        self.rounds = len(self.share)

    def __iter__(self) -> Iterator[Batch | None]:
        """`rounds` items; None where this rank has no batch left while other ranks have one."""
        jobs = []
        for rows in self.share:
            if rows is not None:
                jobs.append(val_job(np.array(rows, dtype=np.int64)))
        yield from self.run(jobs)
        # Only the last round can be without a batch.
        for _ in range(self.rounds - len(jobs)):
            yield None

    def show_rows(self, rows: IntArray) -> Batch:
        """Evaluation's view of the images `rows`: int64 [n], at most one batch.

        It ends an iteration that is still running.
        """
        job = val_job(rows)
        batches = self.run([job])
        return next(batches)
