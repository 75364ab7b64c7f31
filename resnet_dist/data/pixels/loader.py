"""Training and validation batches from image files: the threads between the index and the model.

One background thread per iteration asks the readers for the next files, hands them to DALI
(dali.py), finishes what DALI has decoded (finish.py; on the CPU in a pool of threads) and keeps the
batches ready.
"""

import atexit
import functools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from resnet_dist.config import AugmentConfig, DataConfig
from resnet_dist.data.pixels.dali import Augmenter, Decoder, Job, batch_to_torch, windows_to_torch
from resnet_dist.data.pixels.finish import (
    Normalizer,
    compute_alone,
    cut,
    erase,
    resize_exact,
    resize_fast,
)
from resnet_dist.data.pixels.read import Encoded, Quarantine, Reader, blank, next_good
from resnet_dist.data.sampling import augment as augmentations
from resnet_dist.data.sampling import crops, order
from resnet_dist.data.sources.index import Index
from resnet_dist.data.types import IGNORED_LABEL, Batch
from resnet_dist.rng import epoch_of_repetition

_PIECE_ELEMENTS = 32_768  # that are normalised at once, where an image has fewer
_READ_AHEAD = 2  # batches whose files are being read while an earlier one is decoded


def _run_ahead(items: Iterator, depth: int) -> Iterator:
    """Yield `items`, computed in a background thread that keeps up to `depth` of them ready.

    What the thread raises is raised here. Closing this generator stops the thread, closes `items`
    and waits for both.
    """
    ready, stopped = queue.Queue(maxsize=max(1, depth)), threading.Event()

    def put(kind: str, value) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        compute_alone()
        try:
            for item in items:
                if not put("item", item):
                    break
            items.close()
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()


def _close(loader: weakref.ref) -> None:
    """Close a loader that still exists."""
    if loader() is not None:
        loader().close()


class _DaliLoader:
    """What both splits share: files -> DALI -> batches on the device, in one background thread."""

    resize: Callable
    """how the CPU resizes a window"""

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        quarantine: Quarantine,
        *,
        local_batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
        threads: int,
        views: int = 1,
        slots: int = 0,
    ) -> None:
        self.index = index
        self.config = config
        self.quarantine = quarantine
        self.dtype = dtype
        self.device = device
        self.num_samples = len(index)
        self.class_names = index.class_names
        self.reader = Reader(index)
        self.decoder = Decoder(
            local_batch_size=local_batch_size,
            threads=threads,
            device=device,
            views=views,
            slots=slots,
        )
        self.augmenter = Augmenter(slots=slots, local_batch_size=local_batch_size, threads=threads)
        self.normalize = Normalizer(config, dtype, device)
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, "resize", initializer=compute_alone)
        self.running: Iterator[Batch] | None = None
        # A process that ends with an error may not come to close(). DALI aborts it when its
        # pipelines are taken down at exit under a thread that uses them; registered after DALI's
        # own exit function, this one runs before it.
        self.at_exit = functools.partial(_close, weakref.ref(self))
        atexit.register(self.at_exit)

    @property
    def num_bad(self) -> int:
        """Broken files that this process has met in this split."""
        return len(self.quarantine.files)

    def close(self) -> None:
        """End the threads and free the pipeline."""
        atexit.unregister(self.at_exit)
        self._stop()
        self.reader.close()
        self.pool.shutdown()
        self.decoder = self.augmenter = None

    def look(self, rows: np.ndarray, epoch: int = 0) -> Batch:
        """What `epoch` shows of `rows` (int64 [n], at most a batch), out of turn; ends an iteration
        that still runs.
        """
        return next(self._start(iter([self._job(rows, epoch)])))

    def _stop(self) -> None:
        if self.running is not None:
            self.running.close()
            self.running = None

    def _start(self, jobs: Iterator[Job]) -> Iterator[Batch]:
        """The batches of `jobs`; an iteration that still runs is ended, since both would feed one
        pipeline.
        """
        self._stop()
        self.running = _run_ahead(self._produce(jobs), self.config.prefetch_batches)
        return self.running

    def _produce(self, jobs: Iterator[Job]) -> Iterator[Batch]:
        """Each job read, decoded and finished, with reading and decoding of the next ones under
        way.
        """
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread starts on device 0
        reading: deque = deque()
        try:
            for job in jobs:
                reading.append((job, self.reader.request(job.rows)))
                if len(reading) > _READ_AHEAD:
                    self._submit(*reading.popleft())
                if len(self.decoder.pending) > 1:
                    yield self._next_batch()
            while reading:
                self._submit(*reading.popleft())
                if len(self.decoder.pending) > 1:
                    yield self._next_batch()
            while self.decoder.pending:
                yield self._next_batch()
        finally:
            for _, requested in reading:
                for future in requested:
                    future.cancel()
            self.decoder.drop_pending()

    def _submit(self, job: Job, requested: list) -> None:
        job.images = [
            self._mend(job, slot, image)
            for slot, image in enumerate(self.reader.collect(requested))
        ]
        job.geometry = self._geometry(job)
        self.decoder.submit(job)

    def _next_batch(self) -> Batch:
        """The oldest batch, finished; images that the decoder refuses are treated as bad and the
        batch runs again.
        """
        while True:
            try:
                job, decoded = self.decoder.collect()
                break
            except RuntimeError as failure:
                if not self._mend_pending():
                    raise RuntimeError(
                        "DALI failed, though it decodes every image of the batch alone"
                    ) from failure
                self.decoder.restart()
        rows = np.array([image.row for image in job.images], dtype=np.int64)
        labels = torch.from_numpy(self._labels(job, rows))
        finish = self._finish_on_gpu if self.device.type == "cuda" else self._finish_on_cpu
        first, *others = [finish(decoded, job, number) for number in range(len(job.geometry.views))]
        if job.boxes is not None:
            erase(first.permute(0, 2, 3, 1), job.boxes)
        if self.device.type == "cuda":
            labels = labels.pin_memory().to(self.device, non_blocking=True)
        return Batch(first, labels, rows, tuple(others))

    def _mend_pending(self) -> bool:
        """Treat what cannot be decoded in the first batch that has such images as bad; False when
        there is none.
        """
        for job in self.decoder.pending:
            found = self.decoder.culprits(job)
            for slot in found:
                broken = Encoded(job.images[slot].row, b"", 0, 0, "the decoder refuses it")
                job.images[slot] = self._mend(job, slot, broken)
            if found:
                job.geometry = self._geometry(job)
                return True
        return False

    def _finish_on_cpu(self, decoded, job: Job, number: int) -> torch.Tensor:
        """The view `number` of a batch, ready for the model: [n, 3, side, side]."""
        windows, view = windows_to_torch(decoded[0]), job.geometry.views[number]
        sizes, offsets, flips = (
            view.sizes.tolist(),
            view.offsets.tolist(),
            job.geometry.flips.tolist(),
        )
        out = torch.empty(len(windows), view.side, view.side, 3, dtype=self.dtype)
        self.normalize.prepare(view.side)

        def squares(first: int) -> torch.Tensor:
            pixels = [
                cut(windows[i], tuple(sizes[i]), offsets[i], flips[i], view.side, self.resize)
                for i in range(first, min(first + together, len(windows)))
            ]
            return torch.stack(pixels) if len(pixels) > 1 else pixels[0][None]

        def fill(first: int) -> None:
            part = slice(first, first + together)
            pixels = squares(first) if augmented is None else augmented[part]
            self.normalize(pixels, out[part], None if job.light is None else job.light[part])

        # As many as stay in the cache: ten images of 32 pixels, which halves what they cost, one of
        # 224.
        together = max(1, _PIECE_ELEMENTS // (3 * view.side**2))
        firsts = range(0, len(windows), together)
        # One thread more would only wait for this one, and pass Python's lock to and fro.
        run = self.pool.map if self.threads > 1 else map
        augmented = (
            None
            if job.plan is None
            else self.augmenter(torch.cat(list(run(squares, firsts))), job.plan)
        )
        list(run(fill, firsts))
        return out.permute(0, 3, 1, 2)

    def _finish_on_gpu(self, decoded, job: Job, number: int) -> torch.Tensor:
        """As `_finish_on_cpu`, of what DALI has cut already."""
        pixels = batch_to_torch(decoded[number], self.device)
        out = torch.empty(pixels.shape, dtype=self.dtype, device=self.device)
        self.normalize.prepare(pixels.shape[2])
        self.normalize(pixels, out, job.light)
        return out.permute(0, 3, 1, 2)

    def _job(self, rows: np.ndarray, epoch: int) -> Job:
        """What is to be shown of `rows`."""
        raise NotImplementedError

    def _sides(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        return np.array([image.height for image in job.images]), np.array(
            [image.width for image in job.images]
        )

    def _mend(self, job: Job, slot: int, image: Encoded) -> Encoded:
        """`image`, or what is shown in its place when it is bad."""
        raise NotImplementedError

    def _geometry(self, job: Job) -> crops.Geometry:
        raise NotImplementedError

    def _labels(self, job: Job, rows: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class DaliTrainLoader(_DaliLoader):
    """This rank's share of the training set (see types.TrainLoader).

    A bad image is replaced by the next good one of the index, with that one's label;
    `Batch.indices` names the image that is shown. Windows and flips belong to the sample that was
    asked for, so that the replacement, which has its own turn as well, is not shown twice alike.
    """

    resize = staticmethod(resize_fast)

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        augment: AugmentConfig,
        *,
        seed: int,
        global_batch_size: int,
        grad_accum_steps: int,
        rank: int,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device,
        threads: int,
        output_dir: str,
    ) -> None:
        """`threads`: of DALI and, on the CPU, of the resize pool as well. Raises ValueError when
        the data set is smaller than `global_batch_size`.
        """
        self.steps_per_epoch = order.steps_per_epoch(len(index), global_batch_size, augment.repeats)
        super().__init__(
            index,
            config,
            Quarantine(output_dir, "train", rank, config.max_bad_images),
            dtype=dtype,
            device=device,
            threads=threads,
            slots=augmentations.num_slots(augment),
            local_batch_size=global_batch_size // (world_size * grad_accum_steps),
        )
        self.augment = augment
        self.seed = seed
        self.fingerprint = index.fingerprint()
        self.layout = {
            "global_batch_size": global_batch_size,
            "grad_accum_steps": grad_accum_steps,
            "rank": rank,
            "world_size": world_size,
        }

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """The micro-batches of steps [start_step, stop_step), grad_accum_steps of them for each
        step, in order.

        Raises ValueError when more than data.max_bad_images files are broken. Starting anew ends
        the iteration before.
        """
        return self._start(self._jobs(start_step, stop_step))

    def undecoded(self, start_step: int, stop_step: int) -> Iterator[Job]:
        """As `batches`, read and with their geometry, not decoded: what a benchmark finds beside
        the decoding.
        """
        for job in self._jobs(start_step, stop_step):
            images = self.reader.collect(self.reader.request(job.rows))
            job.images = [self._mend(job, slot, image) for slot, image in enumerate(images)]
            job.geometry = self._geometry(job)
            yield job

    def _jobs(self, start_step: int, stop_step: int) -> Iterator[Job]:
        for step in range(start_step, stop_step):
            epoch, inside = order.locate(step, self.steps_per_epoch)
            for micro_step in range(self.layout["grad_accum_steps"]):
                positions = order.micro_step_positions(micro_step, **self.layout)
                rows, repetitions = order.samples_at(
                    self.seed,
                    epoch,
                    len(self.index),
                    inside,
                    positions,
                    self.layout["global_batch_size"],
                    self.augment.repeats,
                )
                yield self._job(rows, epoch, step, repetitions)

    def _job(
        self, rows: np.ndarray, epoch: int, step: int = 0, repetitions: np.ndarray | int = 0
    ) -> Job:
        draws, side, config = (
            epoch_of_repetition(epoch, repetitions),
            crops.train_side(epoch, self.config),
            self.augment,
        )
        return Job(
            rows,
            epoch,
            step,
            draws,
            side,
            plan=augmentations.plan(config, self.seed, draws, rows, side),
            light=augmentations.lighting(config, self.seed, draws, rows)
            if config.lighting_std
            else None,
            boxes=augmentations.erasing(config, self.seed, draws, rows, side)
            if config.random_erasing
            else None,
        )

    def _mend(self, job: Job, slot: int, image: Encoded) -> Encoded:
        if image.reason is None:
            return image
        return next_good(
            self.index,
            image,
            self.quarantine,
            wanted=int(job.rows[slot]),
            epoch=job.epoch,
            step=job.step,
        )

    def _geometry(self, job: Job) -> crops.Geometry:
        return crops.train_geometry(
            self.seed, job.draws, job.rows, *self._sides(job), job.side, self.config
        )

    def _labels(self, job: Job, rows: np.ndarray) -> np.ndarray:
        return self.index.labels_of(rows)


class DaliValLoader(_DaliLoader):
    """This rank's share of the validation set (see types.ValLoader).

    On the CPU its pixels are those of torchvision's Resize and CenterCrop on PIL images, bit for
    bit. A bad image is not replaced: it is shown black, with the label IGNORED_LABEL, and counts as
    one that was not hit.
    """

    resize = staticmethod(resize_exact)

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        rank: int,
        world_size: int,
        dtype: torch.dtype,
        device: torch.device,
        threads: int,
        output_dir: str,
    ) -> None:
        """`threads`: of DALI and, on the CPU, of the resize pool as well."""
        super().__init__(
            index,
            config,
            Quarantine(output_dir, "val", rank, None),
            dtype=dtype,
            device=device,
            local_batch_size=min(config.val_batch_size, len(index)),
            threads=threads,
            views=(len(config.val_scales) or 1) * (5 if config.val_crops == "ten" else 1),
        )
        self.mirrored = config.val_flip or config.val_crops == "ten"
        self.share = order.val_batches(len(index), config.val_batch_size, rank, world_size)
        self.rounds = len(self.share)

    def __iter__(self) -> Iterator[Batch | None]:
        """`rounds` items; None where other ranks still have a batch and this one has not."""
        jobs = (
            self._job(np.array(rows, dtype=np.int64)) for rows in self.share if rows is not None
        )
        yield from self._start(jobs)
        yield from (
            None for rows in self.share if rows is None
        )  # only the last round can be without a batch

    def _job(self, rows: np.ndarray, epoch: int = 0) -> Job:
        return Job(rows, epoch)

    def _mend(self, job: Job, slot: int, image: Encoded) -> Encoded:
        if image.reason is None:
            return image
        self.quarantine.add(self.index.path(image.row), image.reason)
        return blank(image)

    def _geometry(self, job: Job) -> crops.Geometry:
        return crops.val_geometry(*self._sides(job), self.config)

    def _labels(self, job: Job, rows: np.ndarray) -> np.ndarray:
        bad = np.array([image.reason is not None for image in job.images])
        return np.where(bad, IGNORED_LABEL, self.index.labels_of(rows))
