"""Training and validation batches: from decoded pixels to the input of the model.

One background thread per iteration (ahead.py) asks for decoded pixels (decoding.py, or cached.py
where they are in memory), has the CPU make squares of them (squares.py; on a GPU that is done
already), normalises them and keeps batches ready.
"""

import atexit
import contextlib
import functools
import weakref
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from resnet_dist.config import AugmentConfig, DataConfig
from resnet_dist.data.arrays import FloatArray, IntArray
from resnet_dist.data.pixels.ahead import ReadyBatch, receive, run_ahead
from resnet_dist.data.pixels.cached import CachedRows, cached_source
from resnet_dist.data.pixels.dali import LoadedJob, Portion
from resnet_dist.data.pixels.decoded_images import DecodedImages
from resnet_dist.data.pixels.decoding import (
    DecodedPortion,
    ImageDecoding,
    LoaderSettings,
    PixelSource,
)
from resnet_dist.data.pixels.finish import Normalizer, erase, to_device
from resnet_dist.data.pixels.kept_batches import KeptBatch, KeptBatches
from resnet_dist.data.pixels.quarantine import Quarantine
from resnet_dist.data.pixels.squares import SquareMaker
from resnet_dist.data.sampling import augment as augmentation
from resnet_dist.data.sampling import order
from resnet_dist.data.sampling.jobs import TrainSampling, preview_job, train_job, val_job
from resnet_dist.data.sources.index import Index
from resnet_dist.data.types import IGNORED_LABEL, Batch, Job


@dataclass
class _UnfinishedBatch:
    """The views of the oldest job, filled portion by portion: [n, side, side, 3] each."""

    views: list[torch.Tensor] = field(default_factory=list)
    """normalised, on the device"""
    squares: list[torch.Tensor] = field(default_factory=list)
    """uint8, on the CPU; empty if they are not kept"""


@dataclass(frozen=True)
class MadeBatch:
    """A batch, and its uint8 squares on the CPU if the loader keeps them."""

    batch: Batch
    labels: torch.Tensor
    """int64 [n] on the CPU"""
    squares: list[torch.Tensor]
    """uint8 [n, side, side, 3] for each view"""


def _close_if_alive(reference: "weakref.ref[DaliLoader]") -> None:
    """Close a loader that still exists."""
    loader = reference()
    if loader is not None:
        loader.close()


def _lighting_of(portion: Portion) -> FloatArray | None:
    """The colour shifts of the images of a portion; None without that augmentation."""
    lighting = portion.loaded.job.lighting
    if lighting is None:
        return None
    return lighting[portion.places]


class DaliLoader:
    """Turns jobs into batches on the device, in one background thread."""

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        source: PixelSource,
        quarantine: Quarantine,
        settings: LoaderSettings,
        *,
        local_batch_size: int,
        slots: int = 0,
    ) -> None:
        """Start the threads.

        Args:
            index: the images of the split.
            config: the data section of the config.
            source: makes pixels of jobs; it is closed with the loader.
            quarantine: has the bad files.
            settings: where and how to work.
            local_batch_size: of the largest batch.
            slots: number of augmentation operations on each image.
        """
        self.index = index
        self.config = config
        self.source = source
        self.quarantine = quarantine
        self.device = settings.device
        self.dtype = settings.dtype
        self.threads = settings.threads
        self.num_samples = len(index)
        self.class_names = index.class_names
        self.normalize = Normalizer(config, settings.dtype, settings.device)
        self.maker = SquareMaker(
            threads=settings.threads, slots=slots, local_batch_size=local_batch_size
        )
        self.keeps_squares = False
        """whether `MadeBatch.squares` is filled"""
        self.new_remarks: list[str] = []
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

    def remarks(self) -> list[str]:
        """Sentences for the log, each once."""
        remarks = self.new_remarks
        self.new_remarks = []
        return remarks

    def close(self) -> None:
        """Stop the threads and free the pipelines."""
        atexit.unregister(self.at_exit)
        self._stop()
        self.source.close()
        self.maker.close()

    def load(self, job: Job) -> LoadedJob:
        """Read the files of a job."""
        return self.source.load(job)

    def run(self, jobs: Iterable[Job]) -> Iterator[Batch]:
        """The batches of `jobs`, in order.

        An iteration that is still running is ended, since both would feed the same pipeline.

        Raises:
            ValueError: when more than `data.max_bad_images` training images are broken.
        """
        return self.run_batches(made.batch for made in self.make(jobs))

    def run_batches(self, batches: Generator[Batch, None, None]) -> Iterator[Batch]:
        """The batches of a generator, which runs ahead in a thread; it ends the iteration before.

        On a GPU the batches are made on a stream of their own.
        """
        self._stop()
        made = run_ahead(self._ready(batches), self.config.prefetch_batches)
        self.running = receive(made)
        return self.running

    def _stop(self) -> None:
        if self.running is not None:
            self.running.close()
            self.running = None

    def _ready(self, batches: Generator[Batch, None, None]) -> Generator[ReadyBatch, None, None]:
        """The batches, on a GPU with the event after which they are complete."""
        with contextlib.closing(batches):
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

    def make(self, jobs: Iterable[Job]) -> Generator[MadeBatch, None, None]:
        """The batches of `jobs`, made by the calling thread."""
        unfinished = _UnfinishedBatch()
        with contextlib.closing(self.source.decode(jobs)) as portions:
            for decoded in portions:
                portion = decoded.portion
                if portion.start == 0:
                    self._begin(unfinished, portion.loaded)
                for number in range(len(unfinished.views)):
                    self._finish(decoded, number, unfinished)
                # Before the next portion is decoded.
                del decoded
                if portion.is_last:
                    yield self._made(portion.loaded, unfinished)

    def _begin(self, unfinished: _UnfinishedBatch, loaded: LoadedJob) -> None:
        """Allocate the views of a job."""
        num_images = len(loaded.geometry.windows)
        unfinished.views = []
        unfinished.squares = []
        for view in loaded.geometry.views:
            shape = (num_images, view.side, view.side, 3)
            images = torch.empty(shape, dtype=self.dtype, device=self.device)
            unfinished.views.append(images)
            if self.keeps_squares:
                squares = torch.empty(shape, dtype=torch.uint8)
                unfinished.squares.append(squares)

    def _finish(self, decoded: DecodedPortion, number: int, unfinished: _UnfinishedBatch) -> None:
        """Make one view of a portion.

        Args:
            decoded: The portion.
            number: Which of the views to make.
            unfinished: Its view is filled.
        """
        portion = decoded.portion
        out = unfinished.views[number][portion.places]
        side = out.shape[1]
        self.normalize.prepare(side)
        if decoded.squares is not None:
            self.normalize(decoded.squares(number), out, _lighting_of(portion))
            return
        squares = None
        if self.keeps_squares:
            squares = unfinished.squares[number][portion.places]
        if self.device.type == "cpu":
            self._finish_on_cpu(decoded, number, out, squares)
            return
        if squares is None:
            squares = torch.empty(out.shape, dtype=torch.uint8)
        self._make_squares(decoded, number, squares)
        self.normalize(to_device(squares, self.device), out, _lighting_of(portion))

    def _make_squares(self, decoded: DecodedPortion, number: int, out: torch.Tensor) -> None:
        """Fill uint8 [n, side, side, 3] with the squares of a view."""
        assert decoded.crop is not None

        def take(pixels: torch.Tensor, group: slice) -> None:
            out[group] = pixels

        side = out.shape[1]
        crop = decoded.crop(number)
        self.maker.make(crop, take, decoded.portion, side, decoded.group_values)

    def _finish_on_cpu(
        self, decoded: DecodedPortion, number: int, out: torch.Tensor, kept: torch.Tensor | None
    ) -> None:
        """Make the squares of a view and normalise them, while they are in the cache.

        Args:
            decoded: The portion.
            number: Which of the views to make.
            out: The view, [n, side, side, 3]; it is filled.
            kept: uint8 of the same shape, which gets the squares as well; None to drop them.
        """
        assert decoded.crop is not None
        lighting = _lighting_of(decoded.portion)

        def take(pixels: torch.Tensor, group: slice) -> None:
            if kept is not None:
                kept[group] = pixels
            lighting_of_group = None
            if lighting is not None:
                lighting_of_group = lighting[group]
            self.normalize(pixels, out[group], lighting_of_group)

        side = out.shape[1]
        crop = decoded.crop(number)
        self.maker.make(crop, take, decoded.portion, side, decoded.group_values)

    def _made(self, loaded: LoadedJob, unfinished: _UnfinishedBatch) -> MadeBatch:
        """The finished views of a job with their labels; a bad image has IGNORED_LABEL."""
        rows = loaded.shown_rows()
        known_labels = self.index.labels_of(rows)
        labels = torch.from_numpy(np.where(loaded.shown_as_bad(), IGNORED_LABEL, known_labels))
        if loaded.job.boxes is not None:
            erase(unfinished.views[0], loaded.job.boxes)
        batch = batch_of(unfinished.views, to_device(labels, self.device), rows)
        return MadeBatch(batch, labels, unfinished.squares)


def batch_of(views: list[torch.Tensor], labels: torch.Tensor, rows: IntArray) -> Batch:
    """Put a batch together.

    Args:
        views: One tensor [B, side, side, 3] for each view.
        labels: int64 [B].
        rows: int64 [B].
    """
    channels_first = []
    for images in views:
        channels_first.append(images.permute(0, 3, 1, 2))
    first, *others = channels_first
    return Batch(first, labels, rows, tuple(others))


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
        cache: DecodedImages | None = None,
    ) -> None:
        """Start the threads.

        Args:
            index: the images of the training set.
            config: the data section of the config.
            augment: its section on augmentation.
            seed: the seed of the run.
            layout: how a global batch is divided.
            settings: where and how to work.
            cache: the decoded images; None to decode them when they are shown.

        Raises:
            ValueError: when the data set is smaller than one global batch.
        """
        self.seed = seed
        self.sampling = TrainSampling(len(index), layout, config, augment)
        self.steps_per_epoch = self.sampling.steps_per_epoch
        quarantine = Quarantine(settings.output_dir, "train", layout.rank, config.max_bad_images)
        slots = augmentation.num_slots(augment)
        local_batch_size = layout.local_batch_size
        source: PixelSource
        if cache is None:
            source = ImageDecoding(
                index, config, quarantine, settings, local_batch_size=local_batch_size, slots=slots
            )
        else:
            rows = CachedRows(cache, index, config, quarantine)
            source = cached_source(rows, settings, local_batch_size=local_batch_size, slots=slots)
        super().__init__(
            index,
            config,
            source,
            quarantine,
            settings,
            local_batch_size=local_batch_size,
            slots=slots,
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

    Its pixels are those of torchvision's Resize and CenterCrop on PIL images, bit for bit: on every
    device the CPU decodes and resizes. A bad image is not replaced: it is black, has the label
    IGNORED_LABEL, and counts as a miss.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        settings: LoaderSettings,
        kept: KeptBatches | None = None,
    ) -> None:
        """Start the threads.

        Args:
            index: the images of the validation set.
            config: the data section of the config.
            rank: this rank.
            world_size: number of ranks.
            settings: where and how to work.
            kept: takes the squares of the first whole evaluation; None to decode in each one.
        """
        has_ten_crops = config.val_crops == "ten"
        quarantine = Quarantine(settings.output_dir, "val", rank, None)
        local_batch_size = min(config.val_batch_size, len(index))
        source = ImageDecoding(
            index,
            config,
            quarantine,
            replace(settings, device=torch.device("cpu")),
            local_batch_size=local_batch_size,
        )
        super().__init__(
            index, config, source, quarantine, settings, local_batch_size=local_batch_size
        )
        self.mirrored = config.val_flip or has_ten_crops
        self.share = order.val_batches(len(index), config.val_batch_size, rank, world_size)
        self.rounds = len(self.share)
        self.kept = kept
        self.keeps_squares = kept is not None

    def __iter__(self) -> Iterator[Batch | None]:
        """`rounds` items; None where this rank has no batch left while other ranks have one."""
        jobs = []
        for rows in self.share:
            if rows is not None:
                jobs.append(val_job(np.array(rows, dtype=np.int64)))
        if self.kept is None:
            yield from self.run(jobs)
        elif self.kept.is_complete:
            yield from self.run_batches(self._kept_batches(self.kept))
        else:
            yield from self.run_batches(self._keep(jobs, self.kept))
            self.kept.complete()
            self.new_remarks.append(self.kept.describe())
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

    def _keep(self, jobs: list[Job], kept: KeptBatches) -> Generator[Batch, None, None]:
        """The batches of `jobs`, whose squares are kept."""
        kept.begin()
        for made in self.make(jobs):
            kept.add(KeptBatch(made.squares, made.labels, made.batch.indices))
            yield made.batch

    def _kept_batches(self, kept: KeptBatches) -> Generator[Batch, None, None]:
        """The batches again, from their squares."""
        for item in kept.batches:
            views = []
            for squares in item.squares:
                self.normalize.prepare(squares.shape[1])
                out = torch.empty(squares.shape, dtype=self.dtype, device=self.device)
                self.normalize(to_device(squares, self.device), out)
                views.append(out)
            yield batch_of(views, to_device(item.labels, self.device), item.rows)
