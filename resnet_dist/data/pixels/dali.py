"""Decoding with NVIDIA DALI, which only this file imports: the graph, and a pipeline that can be
fed and mended.

One graph serves training and evaluation, and both devices: encoded bytes and a window -> decode
only that window -> for each view: resize with antialias -> a square out of it -> mirror -> uint8
HWC. On a GPU all of it runs there (decode "mixed"). On the CPU the graph ends after the window and
torch goes on (finish.py). Everything random comes in as numbers (crops.py); the graph has no state.

The CPU decoder gives the very pixels of Pillow, of whole images and of windows alike (measured: no
difference on 500 photographs, with every chroma subsampling, progressive, grayscale, CMYK, and PNG
of 1 to 8 bits with or without palette and alpha). Of PNG with 16 bits it takes the high byte, where
Pillow clips.

Batches are fed explicitly (feed_input, schedule_run, share_outputs) instead of through a callback:
exactly the wanted ones run, and a batch that fails can be mended and run again.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from resnet_dist.config import DataConfig
from resnet_dist.data.pixels.read import Encoded
from resnet_dist.data.sampling.augment import Plan
from resnet_dist.data.sampling.crops import Geometry


def build_pipeline(
    *,
    local_batch_size: int,
    threads: int,
    device_id: int | None,
    decode: str,
    views: int,
    slots: int = 0,
):
    """The DALI graph, not yet run.

    decode: "cpu", or "mixed" for a GPU; views: how many squares are resized, cut and mirrored by
    DALI as well, 0 for none; slots: operations of a Plan on the one view. Their device follows the
    decoder's. The GPU form can be defined and serialized without a GPU (device_id None). Inputs by
    name: encoded (uint8), anchor and extent (y, x and height, width of the window), flip, for each
    view size0, offset0, square0 (height, width of the square: an input, so that it may change
    without a new pipeline), and those of feed_slots. Outputs: the window, uint8 HWC; or the views.
    """
    from nvidia import dali
    from nvidia.dali import fn, types

    # The CPU decoder upsamples chroma as Pillow does; on a GPU that has to be asked for.
    like_pillow = {"jpeg_fancy_upsampling": True} if decode == "mixed" else {}

    # With depth 1, schedule_run starts the one batch that was fed; a second may be scheduled behind
    # it all the same. The dynamic executor leaves the outputs valid after release_outputs, as long
    # as somebody holds them.
    @dali.pipeline_def(
        batch_size=local_batch_size,
        num_threads=threads,
        device_id=device_id,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        enable_conditionals=slots > 0,
    )
    def graph():
        pixels = fn.decoders.image_slice(
            fn.external_source(name="encoded", dtype=types.UINT8, ndim=1),
            fn.external_source(name="anchor", dtype=types.INT32, ndim=1),
            fn.external_source(name="extent", dtype=types.INT32, ndim=1),
            axes=(0, 1),
            device=decode,
            output_type=types.RGB,
            adjust_orientation=False,
            **like_pillow,
        )
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0) if views else None
        squares = [_view(pixels, number, flip) for number in range(views)]
        return tuple(apply_slots(square, slots, decode == "mixed") for square in squares) or pixels

    return graph()


def _view(pixels, number: int, flip):
    """One square of the decoded window, resized, cut and mirrored, in the graph that is being
    defined.
    """
    from nvidia.dali import fn, types

    def pair(name: str, dtype):
        return fn.external_source(name=f"{name}{number}", dtype=dtype, ndim=1)

    pixels = fn.resize(
        pixels, size=pair("size", types.FLOAT), interp_type=types.INTERP_LINEAR, antialias=True
    )
    pixels = fn.slice(
        pixels,
        start=pair("offset", types.INT32),
        shape=pair("square", types.INT32),
        axes=(0, 1),
        out_of_bounds_policy="pad",
        fill_values=0,
    )
    return fn.flip(pixels, horizontal=flip)


def _operations(on_gpu: bool) -> list:
    """What apply_slots chooses from: nothing, all that is geometric, then the rest of
    augment.OPERATIONS one by one.

    They are torchvision's to within 2 levels: for geometry and hue those on uint8 tensors, else
    Pillow's. Sharpness filters the outermost pixels as well; equalize is exact where Pillow's step,
    a whole number of pixels, is coarse.
    """
    from nvidia.dali import fn, math, types

    white, over_all = (
        types.Constant(255, dtype=types.UINT8),
        {"axis_names": "HW", "keep_dims": True},
    )

    def here(matrix):  # what meets pixels in a formula must be where they are
        return matrix.gpu() if on_gpu else matrix

    def to_uint8(values):
        return fn.cast(values, dtype=types.UINT8)

    def warp(pixels, matrix):
        if on_gpu:
            return fn.warp_affine(pixels, matrix=matrix[:2], fill_value=0.0)
        # OpenCV's takes 0.3 ms for an image of 224 pixels, warp_affine 2.6 ms on the CPU.
        return fn.experimental.warp_perspective(pixels, matrix=matrix, fill_value=[0.0])

    def gray(pixels):
        return fn.color_space_conversion(pixels, image_type=types.RGB, output_type=types.GRAY)

    def blend(pixels, other, share):  # in 16 bits, where nothing is clipped
        kept = fn.brightness(pixels, brightness=share, dtype=types.INT16)
        left = fn.brightness(
            other, brightness=1 - share, brightness_shift=-0.49 / 32767, dtype=types.INT16
        )
        return to_uint8(kept + left)  # -0.49: torchvision truncates, DALI rounds

    def color(pixels, matrix):
        other = fn.color_space_conversion(
            gray(pixels), image_type=types.GRAY, output_type=types.RGB
        )
        return blend(pixels, other, matrix[0, 0])

    def autocontrast(pixels, matrix):
        low, high = fn.reductions.min(pixels, **over_all), fn.reductions.max(pixels, **over_all)
        flat = high == low  # such a channel stays as it is
        return to_uint8((pixels - low * (high > low)) * (255 / (high - low + flat * white)))

    return [
        lambda pixels, matrix: pixels,
        warp,
        lambda pixels, matrix: fn.brightness(
            pixels, brightness=matrix[0, 0], brightness_shift=-0.49 / 255
        ),
        color,
        lambda pixels, matrix: blend(
            pixels, fn.reductions.mean(gray(pixels), keep_dims=True), matrix[0, 0]
        ),
        lambda pixels, matrix: fn.filter(pixels, here(matrix)),
        lambda pixels, matrix: pixels & to_uint8(256 - math.pow(2.0, 8 - here(matrix)[0, 0])),
        lambda pixels, matrix: pixels ^ (pixels >= here(matrix)[0, 0]) * white,
        autocontrast,
        # DALI's is OpenCV's; Pillow's law is the same, seen from the other end of the scale.
        lambda pixels, matrix: fn.equalize(pixels ^ white) ^ white,
        lambda pixels, matrix: pixels ^ white,
        lambda pixels, matrix: _turn_hue(pixels, here(matrix)[0, 0]),
    ]


def _turn_hue(pixels, turns):
    """The hue of HSV, moved by `turns` around its hexagon, on which red lies at 0, green at 2 and
    blue at 4.
    """
    from nvidia.dali import fn, math, types

    red, green, blue = (pixels[:, :, i : i + 1] * 1.0 for i in range(3))
    high = math.max(red, math.max(green, blue))
    span = high - math.min(red, math.min(green, blue))
    is_red, is_green = red == high, (green == high) & (red != high)
    is_blue = is_red == is_green
    place = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    place = place / math.max(span, 1.0) + is_green * 2 + is_blue * 4 + turns * 6
    place = place - math.floor(place / 6) * 6
    parts = (math.fabs(place - 3) - 1, 2 - math.fabs(place - 2), 2 - math.fabs(place - 4))
    turned = (high - span + span * math.clamp(part, 0.0, 1.0) for part in parts)
    return fn.cast(fn.cat(*turned, axis=2), dtype=types.UINT8)


def _select(operations: list, first: int, branch, pixels, matrix):
    """Each image's own operation, found by halving; `first` is the branch of operations[0]."""
    half = len(operations) // 2
    if half == 0:
        pixels = operations[0](pixels, matrix)
    elif branch < first + half:
        pixels = _select(operations[:half], first, branch, pixels, matrix)
    else:
        pixels = _select(operations[half:], first + half, branch, pixels, matrix)
    return pixels


def apply_slots(pixels, slots: int, on_gpu: bool):
    """Add `slots` operations of a Plan behind `pixels`, uint8 HWC squares, to a graph that has
    conditionals.

    An image pays for its own operations only. The inputs are those of feed_slots.
    """
    from nvidia.dali import fn, types

    for slot in range(slots):
        pixels = _select(
            _operations(on_gpu),
            0,
            fn.external_source(name=f"branch{slot}", dtype=types.INT32, ndim=0),
            pixels,
            fn.external_source(name=f"matrix{slot}", dtype=types.FLOAT, ndim=2),
        )
    return pixels


def feed_slots(pipeline, plan: Plan, places: Sequence[int]) -> None:
    """Give the operations on the chosen places of a batch to a pipeline."""
    branches = np.maximum(np.minimum(plan.ops, 1), plan.ops - 4)  # 1 to 5 are geometric
    for slot in range(plan.ops.shape[1]):
        pipeline.feed_input(f"branch{slot}", branches[places, slot])
        pipeline.feed_input(f"matrix{slot}", plan.matrices[places, slot])


class Augmenter:
    """The operations of Plans on the CPU, behind what torch does to an image."""

    def __init__(self, *, slots: int, local_batch_size: int, threads: int) -> None:
        """`slots`: augment.num_slots; `local_batch_size`: of the largest batch."""
        self.slots, self.pipeline = slots, None
        self.arguments = {"batch_size": local_batch_size, "num_threads": threads}

    def __call__(self, pixels: torch.Tensor, plan: Plan) -> torch.Tensor:
        """`pixels`, uint8 [n, S, S, 3], augmented, in new memory. Raises RuntimeError when DALI
        fails.
        """
        from nvidia import dali
        from nvidia.dali import fn, types

        @dali.pipeline_def(
            enable_conditionals=True, device_id=None, prefetch_queue_depth=1, exec_dynamic=True
        )
        def graph():
            images = fn.external_source(
                name="pixels", dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True
            )
            return apply_slots(images, self.slots, on_gpu=False)

        pipeline, self.pipeline = (
            self.pipeline or graph(**self.arguments),
            None,
        )  # it does not survive an error
        pipeline.feed_input("pixels", pixels.numpy())
        feed_slots(pipeline, plan, range(len(plan.ops)))
        pipeline.schedule_run()
        augmented = torch.stack(windows_to_torch(pipeline.share_outputs()[0]))
        pipeline.release_outputs()
        self.pipeline = pipeline
        return augmented


def plain_batches(
    folder: str, config: DataConfig, local_batch_size: int, threads: int, device: torch.device
):
    """DALI's pipeline for class folders as its examples write it, to compare with: batches(start,
    stop), float NCHW.
    """
    from nvidia import dali
    from nvidia.dali import fn

    decode = {"device": "mixed" if device.type == "cuda" else "cpu"}
    with dali.Pipeline(
        local_batch_size, threads, device.index if device.type == "cuda" else None
    ) as pipeline:
        encoded, labels = fn.readers.file(file_root=folder, random_shuffle=True)
        pixels = fn.decoders.image_random_crop(
            encoded, random_area=config.crop_scale, random_aspect_ratio=config.crop_ratio, **decode
        )
        pixels = fn.crop_mirror_normalize(
            fn.resize(pixels, size=[config.train_crop_size] * 2),
            mirror=fn.random.coin_flip(),
            mean=[255 * value for value in config.mean],
            std=[255 * value for value in config.std],
        )
        pipeline.set_outputs(pixels, labels)

    def batches(start: int, stop: int):
        pipeline.schedule_run()
        for batch in range(start, stop):
            if batch + 1 < stop:
                pipeline.schedule_run()
            yield pipeline.share_outputs()
            pipeline.release_outputs()

    pipeline.schedule_run()  # the very first call starts two, DALI's default
    for _ in range(2):
        pipeline.share_outputs()
        pipeline.release_outputs()
    return batches


@dataclass
class Job:
    """One batch on its way through the loader."""

    rows: np.ndarray
    """int64 [n], what the epoch's order asks for"""
    epoch: int = 0
    step: int = 0
    draws: np.ndarray | int = 0
    """the epoch and, where an epoch shows an image several times, which time it is (rng.draw)"""
    side: int = 0
    """of the training crop, in pixels"""
    images: list[Encoded] = field(default_factory=list)
    geometry: Geometry | None = None
    plan: Plan | None = None
    """operations on the pixels (augment.plan)"""
    light: np.ndarray | None = None
    """float32 [n, 3], what PCA lighting adds (augment.lighting)"""
    boxes: np.ndarray | None = None
    """int64 [n, 4], what is erased (augment.erasing)"""


class Decoder:
    """A DALI pipeline with the batches that were given to it and not yet taken out, oldest first."""

    def __init__(
        self,
        *,
        local_batch_size: int,
        threads: int,
        device: torch.device,
        views: int = 1,
        slots: int = 0,
    ) -> None:
        """`local_batch_size`: of the largest batch; `threads`: that decode, on the CPU; `views` and
        `slots`: that a GPU makes, the latter from Job.plan.
        """
        self.local_batch_size = local_batch_size
        on_gpu = device.type == "cuda"
        self.arguments = {
            "threads": threads,
            "device_id": device.index if on_gpu else None,
            "decode": "mixed" if on_gpu else "cpu",
            "views": views if on_gpu else 0,
            "slots": slots,
        }
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
        except RuntimeError as error:  # of an earlier batch; collect() comes to it in turn
            self.failure = error

    def collect(self):
        """(job, DALI's TensorLists: the windows, or a list for each view) of the oldest batch.

        Raises RuntimeError when it, or one behind it, has failed; all of them are still pending
        then.
        """
        if self.fed == 0:
            raise self.failure
        decoded = self.pipeline.share_outputs()
        self.pipeline.release_outputs()  # its buffers live as long as `decoded` does
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
                pipeline = None  # a pipeline does not survive an error
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
        pipeline.feed_input(
            "encoded", [np.frombuffer(job.images[slot].data, np.uint8) for slot in slots]
        )
        pipeline.feed_input("anchor", np.ascontiguousarray(windows[:, :2]))
        pipeline.feed_input("extent", np.ascontiguousarray(windows[:, 2:]))
        if self.arguments["views"]:
            pipeline.feed_input("flip", geometry.flips[slots].astype(np.int32))
            for number, view in enumerate(geometry.views):
                pipeline.feed_input(f"size{number}", view.sizes[slots].astype(np.float32))
                pipeline.feed_input(f"offset{number}", view.offsets[slots].astype(np.int32))
                pipeline.feed_input(
                    f"square{number}", np.full((len(slots), 2), view.side, np.int32)
                )
            if self.arguments["slots"]:
                feed_slots(pipeline, job.plan, slots)
        pipeline.schedule_run()


def windows_to_torch(decoded) -> list[torch.Tensor]:
    """The images of a CPU batch, uint8 [h, w, 3] of different sizes, without a copy."""
    return [torch.from_numpy(np.asarray(pixels)) for pixels in decoded]


def batch_to_torch(decoded, device: torch.device) -> torch.Tensor:
    """One view of a GPU batch, copied to uint8 [n, h, w, 3] on torch's current stream."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    batch = decoded.as_tensor()
    pixels = torch.empty(batch.shape(), dtype=torch.uint8, device=device)
    # Given a stream, DALI orders the reuse of its buffer behind the copy.
    feed_ndarray(batch, pixels, cuda_stream=torch.cuda.current_stream())
    return pixels
