"""Training and validation batches from image files: the threads between the index and the model.

One background thread per iteration asks the readers for the next files, hands them to DALI (dali.py), finishes what
DALI has decoded and keeps the batches ready. On the CPU, resize and normalisation run in a pool of threads, image by
image while it is in the cache: in training with torch's uint8 kernel, which takes a fraction of the time of DALI's
resize there and is nearer to Pillow; in evaluation with Pillow itself, so that a model is shown exactly the pixels that
it would get from torchvision.
"""

import atexit
import functools
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from resnet_dist.config import DataConfig
from resnet_dist.data import crops, order
from resnet_dist.data.dali import Decoder, Job, batch_to_torch, windows_to_torch
from resnet_dist.data.index import Index
from resnet_dist.data.read import Encoded, Quarantine, Reader, blank, next_good
from resnet_dist.data.types import IGNORED_LABEL, Batch

_READ_AHEAD = 2                  # batches whose files are being read while an earlier one is decoded
_SERIAL_ELEMENTS = 32767         # torch splits an operation of more elements over its own threads


def resize_fast(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """uint8 [h, w, 3] resized to `size`, with antialias: Pillow's arithmetic in 16 bits, vectorised.

    On photographs 0.4 ms an image where Pillow takes 1.7; 0.2 % of the values differ from Pillow's by 1, one in seven
    million by 2.
    """
    planes = pixels[None].permute(0, 3, 1, 2)                    # channels_last, which is what the fast kernel wants
    return functional.interpolate(planes, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def resize_exact(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """As `resize_fast`, by Pillow itself: the very values of torchvision's Resize on PIL images."""
    resized = Image.fromarray(pixels.numpy()).resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(resized))


def cut(
    pixels: torch.Tensor, size: tuple[int, int], offset: Sequence[int], flip: int, crop_size: int,
    resize: Callable = resize_fast,
) -> torch.Tensor:
    """Resize one decoded window, take the square out of it and mirror it: uint8 [h, w, 3] to [crop, crop, 3].

    The CPU's counterpart of the graph's second half. Negative offsets pad with black.
    """
    if size != tuple(pixels.shape[:2]):
        pixels = resize(pixels, size)
    if size != (crop_size, crop_size):
        top, left = (max(place, 0) for place in offset)
        pixels = pixels[top:top + crop_size, left:left + crop_size]
    if tuple(pixels.shape[:2]) != (crop_size, crop_size):
        top, left = (max(-place, 0) for place in offset)
        padded = pixels.new_zeros(crop_size, crop_size, 3)
        padded[top:top + pixels.shape[0], left:left + pixels.shape[1]] = pixels
        pixels = padded
    return pixels[None].permute(0, 3, 1, 2).flip(3)[0].permute(1, 2, 0) if flip else pixels


class Normalizer:
    """Pixels to what the model is fed: (pixel / 255 - mean) / std per channel, in the training precision."""

    def __init__(self, config: DataConfig, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """`width`: pixels of a row. The factors are laid out for a whole row, so that the inner loop has 3 * width
        elements instead of 3 and can be vectorised: 0.06 ms an image of 224 pixels on the CPU instead of 0.9."""
        mean, std = torch.tensor(config.mean, dtype=torch.float64), torch.tensor(config.std, dtype=torch.float64)
        self.scale = (1 / (255 * std)).repeat(width).to(device, torch.float32)
        self.shift = (-mean / std).repeat(width).to(device, torch.float32)
        self.dtype = dtype

    def __call__(self, pixels: torch.Tensor, out: torch.Tensor) -> None:
        """Fill `out` [..., W, 3] of the training precision, contiguous, from `pixels` uint8 [..., W, 3]."""
        rows, target = pixels.reshape(-1, len(self.scale)), out.view(-1, len(self.scale))
        # On the CPU in pieces that torch computes in the calling thread: the loader's threads must not each start a
        # team of their own beside the training's. A piece stays in the cache, too.
        block = len(rows) if rows.is_cuda else max(1, _SERIAL_ELEMENTS // len(self.scale))
        for piece, filled in zip(rows.split(block), target.split(block), strict=True):
            torch.addcmul(self.shift, piece.float(), self.scale, out=filled)


def _run_ahead(items: Iterator, depth: int) -> Iterator:
    """Yield `items`, computed in a background thread that keeps up to `depth` of them ready.

    What the thread raises is raised here. Closing this generator stops the thread, closes `items` and waits for both.
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
        self, index: Index, config: DataConfig, quarantine: Quarantine, *, crop_size: int, local_batch_size: int,
        dtype: torch.dtype, device: torch.device, threads: int,
    ) -> None:
        self.index = index
        self.config = config
        self.quarantine = quarantine
        self.crop_size = crop_size
        self.dtype = dtype
        self.device = device
        self.num_samples = len(index)
        self.class_names = index.class_names
        self.reader = Reader(index)
        self.decoder = Decoder(crop_size=crop_size, local_batch_size=local_batch_size, threads=threads, device=device)
        self.normalize = Normalizer(config, crop_size, dtype, device)
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="resize")
        self.running: Iterator[Batch] | None = None
        # A process that ends with an error may not come to close(). DALI aborts it when its pipelines are taken down at
        # exit under a thread that uses them; registered after DALI's own exit function, this one runs before it.
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
        self.decoder = None

    def _stop(self) -> None:
        if self.running is not None:
            self.running.close()
            self.running = None

    def _start(self, jobs: Iterator[Job]) -> Iterator[Batch]:
        """The batches of `jobs`; an iteration that still runs is ended, since both would feed one pipeline."""
        self._stop()
        self.running = _run_ahead(self._produce(jobs), self.config.prefetch_batches)
        return self.running

    def _produce(self, jobs: Iterator[Job]) -> Iterator[Batch]:
        """Each job read, decoded and finished, with reading and decoding of the next ones under way."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)                   # a thread starts on device 0
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
        job.images = [self._mend(job, slot, image) for slot, image in enumerate(self.reader.collect(requested))]
        job.geometry = self._geometry(job)
        self.decoder.submit(job)

    def _next_batch(self) -> Batch:
        """The oldest batch, finished; images that the decoder refuses are treated as bad and the batch runs again."""
        while True:
            try:
                job, decoded = self.decoder.collect()
                break
            except RuntimeError as failure:
                if not self._mend_pending():
                    raise RuntimeError("DALI failed, though it decodes every image of the batch alone") from failure
                self.decoder.restart()
        rows = np.array([image.row for image in job.images], dtype=np.int64)
        labels = torch.from_numpy(self._labels(job, rows))
        if self.device.type == "cpu":
            return Batch(self._finish_on_cpu(decoded, job.geometry), labels, rows)
        return Batch(self._finish_on_gpu(decoded), labels.pin_memory().to(self.device, non_blocking=True), rows)

    def _mend_pending(self) -> bool:
        """Treat what cannot be decoded in the first batch that has such images as bad; False when there is none."""
        for job in self.decoder.pending:
            found = self.decoder.culprits(job)
            for slot in found:
                broken = Encoded(job.images[slot].row, b"", 0, 0, "the decoder refuses it")
                job.images[slot] = self._mend(job, slot, broken)
            if found:
                job.geometry = self._geometry(job)
                return True
        return False

    def _finish_on_cpu(self, decoded, geometry: crops.Geometry) -> torch.Tensor:
        windows = windows_to_torch(decoded)
        sizes, offsets, flips = geometry.sizes.tolist(), geometry.offsets.tolist(), geometry.flips.tolist()
        out = torch.empty(len(windows), self.crop_size, self.crop_size, 3, dtype=self.dtype)

        def work(first: int) -> None:
            pixels = [cut(windows[i], tuple(sizes[i]), offsets[i], flips[i], self.crop_size, self.resize)
                      for i in range(first, min(first + together, len(windows)))]
            self.normalize(torch.stack(pixels), out[first:first + len(pixels)])

        # As many as are normalised in one piece: ten images of 32 pixels, which halves what they cost, one of 224.
        together = max(1, _SERIAL_ELEMENTS // (3 * self.crop_size**2))
        # One thread more would only wait for this one, and pass Python's lock to and fro.
        run = self.pool.map if self.threads > 1 else map
        list(run(work, range(0, len(windows), together)))
        return out.permute(0, 3, 1, 2)

    def _finish_on_gpu(self, decoded) -> torch.Tensor:
        pixels = batch_to_torch(decoded, self.device)
        out = torch.empty(pixels.shape, dtype=self.dtype, device=self.device)
        self.normalize(pixels, out)
        return out.permute(0, 3, 1, 2)

    def _sides(self, job: Job) -> tuple[np.ndarray, np.ndarray]:
        return np.array([image.height for image in job.images]), np.array([image.width for image in job.images])

    def _mend(self, job: Job, slot: int, image: Encoded) -> Encoded:
        """`image`, or what is shown in its place when it is bad."""
        raise NotImplementedError

    def _geometry(self, job: Job) -> crops.Geometry:
        raise NotImplementedError

    def _labels(self, job: Job, rows: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class DaliTrainLoader(_DaliLoader):
    """This rank's share of the training set (see types.TrainLoader).

    A bad image is replaced by the next good one of the index, with that one's label; `Batch.indices` names the image
    that is shown. Windows and flips belong to the sample that was asked for, so that the replacement, which has its own
    turn as well, is not shown twice alike.
    """

    resize = staticmethod(resize_fast)

    def __init__(
        self, index: Index, config: DataConfig, *, seed: int, global_batch_size: int, grad_accum_steps: int, rank: int,
        world_size: int, dtype: torch.dtype, device: torch.device, threads: int, output_dir: str,
    ) -> None:
        """`threads`: of DALI and, on the CPU, of the resize pool as well. Raises ValueError when the data set is
        smaller than `global_batch_size`."""
        self.steps_per_epoch = order.steps_per_epoch(len(index), global_batch_size)
        super().__init__(index, config, Quarantine(output_dir, "train", rank, config.max_bad_images),
                         crop_size=config.train_crop_size, dtype=dtype, device=device, threads=threads,
                         local_batch_size=global_batch_size // (world_size * grad_accum_steps))
        self.seed = seed
        self.fingerprint = index.fingerprint()
        self.layout = {"global_batch_size": global_batch_size, "grad_accum_steps": grad_accum_steps, "rank": rank,
                       "world_size": world_size}

    def batches(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """The micro-batches of steps [start_step, stop_step), grad_accum_steps of them for each step, in order.

        Raises ValueError when more than data.max_bad_images files are broken. Starting anew ends the iteration before.
        """
        return self._start(self._jobs(start_step, stop_step))

    def undecoded(self, start_step: int, stop_step: int) -> Iterator[Job]:
        """As `batches`, read and with their geometry, not decoded: what a benchmark finds beside the decoding."""
        for job in self._jobs(start_step, stop_step):
            images = self.reader.collect(self.reader.request(job.rows))
            job.images = [self._mend(job, slot, image) for slot, image in enumerate(images)]
            job.geometry = self._geometry(job)
            yield job

    def _jobs(self, start_step: int, stop_step: int) -> Iterator[Job]:
        known, rows = None, None
        for step in range(start_step, stop_step):
            epoch, inside = order.locate(step, self.steps_per_epoch)
            if epoch != known:
                known, rows = epoch, order.permutation(self.seed, epoch, len(self.index))
            for micro_step in range(self.layout["grad_accum_steps"]):
                yield Job(rows[order.micro_step_positions(inside, micro_step, **self.layout)], epoch, step)

    def _mend(self, job: Job, slot: int, image: Encoded) -> Encoded:
        if image.reason is None:
            return image
        return next_good(self.index, image, self.quarantine, wanted=int(job.rows[slot]), epoch=job.epoch, step=job.step)

    def _geometry(self, job: Job) -> crops.Geometry:
        config = self.config
        return crops.train_geometry(self.seed, job.epoch, job.rows, *self._sides(job), crop_size=self.crop_size,
                                    scale=config.crop_scale, ratio=config.crop_ratio,
                                    flip_probability=config.flip_probability)

    def _labels(self, job: Job, rows: np.ndarray) -> np.ndarray:
        return self.index.labels[rows]


class DaliValLoader(_DaliLoader):
    """This rank's share of the validation set (see types.ValLoader).

    On the CPU its pixels are those of torchvision's Resize and CenterCrop on PIL images, bit for bit. A bad image is
    not replaced: it is shown black, with the label IGNORED_LABEL, and counts as one that was not hit.
    """

    resize = staticmethod(resize_exact)

    def __init__(
        self, index: Index, config: DataConfig, *, rank: int, world_size: int, dtype: torch.dtype, device: torch.device,
        threads: int, output_dir: str,
    ) -> None:
        """`threads`: of DALI and, on the CPU, of the resize pool as well."""
        super().__init__(index, config, Quarantine(output_dir, "val", rank, None), crop_size=config.val_crop_size,
                         local_batch_size=min(config.val_batch_size, len(index)), dtype=dtype, device=device,
                         threads=threads)
        self.share = order.val_batches(len(index), config.val_batch_size, rank, world_size)
        self.rounds = len(self.share)

    def __iter__(self) -> Iterator[Batch | None]:
        """`rounds` items; None where other ranks still have a batch and this one has not."""
        jobs = (Job(np.array(rows, dtype=np.int64)) for rows in self.share if rows is not None)
        yield from self._start(jobs)
        yield from (None for rows in self.share if rows is None)     # only the last round can be without a batch

    def _mend(self, job: Job, slot: int, image: Encoded) -> Encoded:
        if image.reason is None:
            return image
        self.quarantine.add(self.index.path(image.row), image.reason)
        return blank(image)

    def _geometry(self, job: Job) -> crops.Geometry:
        heights, widths = self._sides(job)
        return crops.val_geometry(heights, widths, resize_size=self.config.val_resize_size, crop_size=self.crop_size)

    def _labels(self, job: Job, rows: np.ndarray) -> np.ndarray:
        bad = np.array([image.reason is not None for image in job.images])
        return np.where(bad, IGNORED_LABEL, self.index.labels[rows])
