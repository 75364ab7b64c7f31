"""Decoding with NVIDIA DALI, which only this file imports: the graph, and a pipeline that can be fed and mended.

One graph serves training and evaluation, and both devices: encoded bytes and a window -> decode only that window ->
resize with antialias -> a square out of it -> mirror -> uint8 HWC. On a GPU all of it runs there (decode "mixed"). On
the CPU the graph ends after the window and torch goes on (loader.py). Everything random comes in as numbers (crops.py);
the graph has no state.

The CPU decoder gives the very pixels of Pillow, of whole images and of windows alike (measured: no difference on 500
photographs, with every chroma subsampling, progressive, grayscale, CMYK, and PNG of 1 to 8 bits with or without
palette and alpha). Of PNG with 16 bits it takes the high byte, where Pillow clips.

Batches are fed explicitly (feed_input, schedule_run, share_outputs) instead of through a callback: exactly the wanted
ones run, and a batch that fails can be mended and run again.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from resnet_dist.config import DataConfig
from resnet_dist.data.crops import Geometry
from resnet_dist.data.read import Encoded


def build_pipeline(
    *, crop_size: int, local_batch_size: int, threads: int, device_id: int | None, decode: str, finish: bool,
):
    """The DALI graph, not yet run.

    decode: "cpu", or "mixed" for a GPU; finish: whether resize, square and mirror are DALI's as well. Their device
    follows the decoder's. The GPU form can be defined and serialized without a GPU (device_id None). Inputs by name:
    encoded (uint8), anchor and extent (y, x and height, width of the window), and to finish: size, offset, flip.
    Output: uint8 HWC, of shape [extent] or [crop_size, crop_size, 3].
    """
    from nvidia import dali
    from nvidia.dali import fn, types

    # With depth 1, schedule_run starts the one batch that was fed; a second may be scheduled behind it all the same.
    # The dynamic executor leaves the outputs valid after release_outputs, as long as somebody holds them.
    pipeline = dali.Pipeline(batch_size=local_batch_size, num_threads=threads, device_id=device_id,
                             prefetch_queue_depth=1, exec_dynamic=True)
    # The CPU decoder upsamples chroma as Pillow does; on a GPU that has to be asked for.
    like_pillow = {"jpeg_fancy_upsampling": True} if decode == "mixed" else {}
    with pipeline:
        pixels = fn.decoders.image_slice(
            fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
            fn.external_source(name="anchor", dtype=types.INT32, ndim=1),
            fn.external_source(name="extent", dtype=types.INT32, ndim=1),
            axes=(0, 1), device=decode, output_type=types.RGB, adjust_orientation=False, **like_pillow)
        if finish:
            pixels = fn.resize(pixels, size=fn.external_source(name="size", dtype=types.FLOAT, ndim=1),
                               interp_type=types.INTERP_LINEAR, antialias=True)
            pixels = fn.slice(pixels, start=fn.external_source(name="offset", dtype=types.INT32, ndim=1),
                              shape=(crop_size, crop_size), axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
            pixels = fn.flip(pixels, horizontal=fn.external_source(name="flip", dtype=types.INT32, ndim=0))
        pipeline.set_outputs(pixels)
    return pipeline


def plain_batches(folder: str, config: DataConfig, local_batch_size: int, threads: int, device: torch.device):
    """DALI's pipeline for class folders as its examples write it, to compare with: batches(start, stop), float NCHW."""
    from nvidia import dali
    from nvidia.dali import fn

    decode = {"device": "mixed" if device.type == "cuda" else "cpu"}
    with dali.Pipeline(local_batch_size, threads, device.index if device.type == "cuda" else None) as pipeline:
        encoded, labels = fn.readers.file(file_root=folder, random_shuffle=True)
        pixels = fn.decoders.image_random_crop(encoded, random_area=config.crop_scale,
                                               random_aspect_ratio=config.crop_ratio, **decode)
        pixels = fn.crop_mirror_normalize(
            fn.resize(pixels, size=[config.train_crop_size] * 2), mirror=fn.random.coin_flip(),
            mean=[255 * value for value in config.mean], std=[255 * value for value in config.std])
        pipeline.set_outputs(pixels, labels)

    def batches(start: int, stop: int):
        pipeline.schedule_run()
        for batch in range(start, stop):
            if batch + 1 < stop:                                 # two under way, DALI's default, and none too many
                pipeline.schedule_run()
            yield pipeline.share_outputs()
            pipeline.release_outputs()
    return batches


@dataclass
class Job:
    """One batch on its way through the loader."""

    rows: np.ndarray
    """int64 [n], what the epoch's order asks for"""
    epoch: int = 0
    step: int = 0
    images: list[Encoded] = field(default_factory=list)
    geometry: Geometry | None = None


class Decoder:
    """A DALI pipeline with the batches that were given to it and not yet taken out, oldest first."""

    def __init__(self, *, crop_size: int, local_batch_size: int, threads: int, device: torch.device) -> None:
        """`local_batch_size`: of the largest batch; `threads`: that decode, on the CPU."""
        self.local_batch_size = local_batch_size
        on_gpu = device.type == "cuda"
        self.arguments = {"crop_size": crop_size, "threads": threads, "device_id": device.index if on_gpu else None,
                          "decode": "mixed" if on_gpu else "cpu", "finish": on_gpu}
        self.pending: deque[Job] = deque()
        self.restart()

    def restart(self) -> None:
        """Run every pending batch, in a new pipeline."""
        self.pipeline = build_pipeline(local_batch_size=self.local_batch_size, **self.arguments)
        self.failure: RuntimeError | None = None
        self.fed = 0
        jobs, self.pending = self.pending, deque()
        for job in jobs:
            self.submit(job)

    def submit(self, job: Job) -> None:
        """Start to decode a batch, behind those that are pending."""
        self.pending.append(job)
        try:
            if self.failure is None:
                self._feed(self.pipeline, job, range(len(job.rows)))
                self.fed += 1
        except RuntimeError as error:                            # of an earlier batch; collect() comes to it in turn
            self.failure = error

    def collect(self):
        """(job, DALI's TensorList) of the oldest batch.

        Raises RuntimeError when it, or one behind it, has failed; all of them are still pending then.
        """
        if self.fed == 0:
            raise self.failure
        (decoded,) = self.pipeline.share_outputs()
        self.pipeline.release_outputs()                          # its buffers live as long as `decoded` does
        self.fed -= 1
        return self.pending.popleft(), decoded

    def culprits(self, job: Job) -> list[int]:
        """The places in a batch whose images cannot be decoded, found by decoding each one alone."""
        found, pipeline = [], None
        for slot in range(len(job.rows)):
            try:
                pipeline = pipeline or build_pipeline(local_batch_size=1, **self.arguments)
                self._feed(pipeline, job, [slot])
                pipeline.share_outputs()
                pipeline.release_outputs()
            except RuntimeError:
                found.append(slot)
                pipeline = None                                  # a pipeline does not survive an error
        return found

    def drop_pending(self) -> None:
        """Forget the batches under way."""
        try:
            while self.pending:
                self.collect()
        except RuntimeError:
            self.pending.clear()
            self.restart()

    def _feed(self, pipeline, job: Job, slots: Sequence[int]) -> None:
        """Give the chosen places of a batch to a pipeline and start it."""
        slots, geometry = list(slots), job.geometry
        windows = geometry.windows[slots].astype(np.int32)
        pipeline.feed_input("encoded", [np.frombuffer(job.images[slot].data, np.uint8) for slot in slots])
        pipeline.feed_input("anchor", np.ascontiguousarray(windows[:, :2]))
        pipeline.feed_input("extent", np.ascontiguousarray(windows[:, 2:]))
        if self.arguments["finish"]:
            pipeline.feed_input("size", geometry.sizes[slots].astype(np.float32))
            pipeline.feed_input("offset", geometry.offsets[slots].astype(np.int32))
            pipeline.feed_input("flip", geometry.flips[slots].astype(np.int32))
        pipeline.schedule_run()


def windows_to_torch(decoded) -> list[torch.Tensor]:
    """The images of a CPU batch, uint8 [h, w, 3] of different sizes, without a copy."""
    return [torch.from_numpy(np.asarray(pixels)) for pixels in decoded]


def batch_to_torch(decoded, device: torch.device) -> torch.Tensor:
    """A GPU batch of equal images, copied to uint8 [n, h, w, 3] on torch's current stream."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    batch = decoded.as_tensor()
    pixels = torch.empty(batch.shape(), dtype=torch.uint8, device=device)
    # Given a stream, DALI orders the reuse of its buffer behind the copy.
    feed_ndarray(batch, pixels, cuda_stream=torch.cuda.current_stream())
    return pixels
