"""Decoding with NVIDIA DALI: the graph, and a decoder that is fed batch by batch.

One graph serves training and evaluation on both devices: decode a window of an encoded image; for
each view resize it with antialias, take a square out of it and mirror it; uint8 HWC. On a GPU all
of this runs there. On the CPU the graph ends after the window, and torch does the rest (finish.py).
The graph holds no randomness: windows, flips and operations are inputs (see sampling/).

The CPU decodes the window alone. A GPU decodes the whole image and then takes the window: with the
chroma upsampling of Pillow, nvImageCodec's GPU decoders refuse to decode a window, and DALI would
decode on the CPU without saying so.

The CPU decoder gives exactly the pixels of Pillow, for whole images and for windows (measured: no
difference on 500 photographs, with every chroma subsampling, progressive, grayscale, CMYK, and PNG
of 1 to 8 bits with and without palette and alpha). Of PNG with 16 bits it takes the high byte,
where Pillow clips.

Batches are fed explicitly (feed_input, schedule_run, share_outputs), not through a callback: only
the batches that are wanted run, and a batch that fails can be repaired and run again.
"""

import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from resnet_dist.config import DecoderConfig
from resnet_dist.data.arrays import BoolArray, IntArray, StringArray
from resnet_dist.data.dali_operations import DaliForm, DaliNode
from resnet_dist.data.operations import BRANCH_OF_OP, DALI_FORMS
from resnet_dist.data.pixels.read import Encoded
from resnet_dist.data.sampling.crops import Geometry
from resnet_dist.data.types import Job, OperationPlan

DaliPipeline = Any
DaliType = Any
DaliTensors = Any
"""DALI's TensorListCPU or TensorListGPU."""

LOG_LEVEL = "DALI_NVIMGCODEC_LOG_LEVEL"
"""Environment variable of DALI, read when a pipeline starts: what its decoders print. 1: errors;
2, the default: warnings too.
"""


@dataclass(frozen=True)
class GraphSpec:
    """What a DALI graph is built from."""

    local_batch_size: int
    """of the largest batch"""
    threads: int
    """that decode, on the CPU"""
    decode: str = "cpu"
    """"cpu", or "mixed" for a GPU; the device of the other operators follows from it"""
    device_id: int | None = None
    """None for no GPU; a graph for a GPU can be defined and serialized without one"""
    views: int = 0
    """number of squares that DALI resizes, crops and mirrors; 0 ends the graph after the window"""
    slots: int = 0
    """operations of an OperationPlan on the one view"""
    options: DecoderConfig = field(default_factory=DecoderConfig)
    """of the GPU decoder"""
    is_decoded: bool = False
    """whether the input is the pixels of whole images in place of their files"""


def build_pipeline(spec: GraphSpec) -> DaliPipeline:
    """Define the DALI graph, without running it.

    Inputs by name: encoded (uint8 bytes), or pixels (uint8 HWC) if `is_decoded`; anchor and extent
    ((y, x) and (height, width) of the window); flip; interpolation (a number of DALI's
    DALIInterpType); for each view size0, offset0 and square0 ((height, width) of the square, an
    input so that it can change without a new pipeline); and those of `feed_operations`. Outputs:
    the window, uint8 HWC; or the views.
    """
    from nvidia import dali
    from nvidia.dali import fn, types

    def graph() -> DaliNode:
        pixels = _decode_window(spec)
        if spec.views == 0:
            return pixels
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        number_of_filter = fn.external_source(name="interpolation", dtype=types.INT32, ndim=0)
        interpolation = fn.reinterpret(number_of_filter, dtype=types.INTERP_TYPE)
        squares = []
        for number in range(spec.views):
            squares.append(_resize_and_crop(pixels, number, flip, interpolation))
        on_gpu = spec.decode == "mixed"
        return tuple(apply_operations(square, spec.slots, on_gpu) for square in squares)

    # With depth 1, schedule_run starts the one batch that was fed; a second batch may be scheduled
    # behind it. With the dynamic executor the outputs stay valid after release_outputs, as long as
    # somebody holds them.
    define = dali.pipeline_def(
        batch_size=spec.local_batch_size,
        num_threads=spec.threads,
        device_id=spec.device_id,
        prefetch_queue_depth=1,
        exec_dynamic=True,
        enable_conditionals=spec.slots > 0,
    )
    return define(graph)()


def _decode_window(spec: GraphSpec) -> DaliNode:
    """The decoded window of each image, in the graph that is being defined."""
    from nvidia.dali import fn, types

    anchor = fn.external_source(name="anchor", dtype=types.INT32, ndim=1)
    extent = fn.external_source(name="extent", dtype=types.INT32, ndim=1)
    if spec.is_decoded:
        pixels = fn.external_source(
            name="pixels", dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True
        )
        if spec.decode == "mixed":
            pixels = pixels.gpu()
        return fn.slice(pixels, start=anchor, shape=extent, axes=(0, 1))
    # Copying a file of 114 kB takes 12 us of Python's lock. DALI holds the arrays while it needs
    # them.
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    if spec.decode == "mixed":
        return fn.slice(_decode_on_gpu(encoded, spec), start=anchor, shape=extent, axes=(0, 1))
    # The CPU decoder upsamples chroma as Pillow does.
    return fn.decoders.image_slice(
        encoded,
        anchor,
        extent,
        axes=(0, 1),
        device="cpu",
        output_type=types.RGB,
        adjust_orientation=False,
    )


def _decode_on_gpu(encoded: DaliNode, spec: GraphSpec) -> DaliNode:
    """Whole images, decoded on a GPU, in the graph that is being defined."""
    from nvidia.dali import fn, types

    options = spec.options
    return fn.decoders.image(
        encoded,
        device="mixed",
        output_type=types.RGB,
        adjust_orientation=False,
        # Upsample chroma as Pillow does.
        jpeg_fancy_upsampling=True,
        hw_decoder_load=options.hw_decoder_load,
        preallocate_width_hint=options.preallocate_width,
        preallocate_height_hint=options.preallocate_height,
        device_memory_padding=options.device_memory_padding_mb * 2**20,
        host_memory_padding=options.host_memory_padding_mb * 2**20,
    )


def _resize_and_crop(
    pixels: DaliNode, number: int, flip: DaliNode, interpolation: DaliNode
) -> DaliNode:
    """One square of the decoded window, in the graph that is being defined.

    The counterpart of `finish.resize_and_crop`.

    Args:
        pixels: The windows, uint8 HWC.
        number: Which of the views to make; it ends the names of the inputs.
        flip: 1 for images to mirror, else 0.
        interpolation: The filter of each image.
    """
    from nvidia.dali import fn, types

    def pair(name: str, dtype: DaliType) -> DaliNode:
        return fn.external_source(name=f"{name}{number}", dtype=dtype, ndim=1)

    size = pair("size", types.FLOAT)
    offset = pair("offset", types.INT32)
    square = pair("square", types.INT32)
    pixels = fn.resize(
        pixels,
        size=size,
        interp_type=interpolation,
        antialias=True,
    )
    pixels = fn.slice(
        pixels,
        start=offset,
        shape=square,
        axes=(0, 1),
        out_of_bounds_policy="pad",
        fill_values=0,
    )
    return fn.flip(pixels, horizontal=flip)


def apply_operations(pixels: DaliNode, slots: int, on_gpu: bool) -> DaliNode:
    """Add `slots` operations of an OperationPlan to a graph that has conditionals.

    `pixels` are uint8 HWC squares. An image pays for its own operations only. The inputs are those
    of `feed_operations`.
    """
    from nvidia.dali import fn, types

    for slot in range(slots):
        branch = fn.external_source(name=f"branch{slot}", dtype=types.INT32, ndim=0)
        matrix = fn.external_source(name=f"matrix{slot}", dtype=types.FLOAT, ndim=2)
        pixels = _select_form(DALI_FORMS, 0, branch, pixels, matrix, on_gpu)
    return pixels


def _select_form(
    forms: tuple[DaliForm, ...],
    first: int,
    branch: DaliNode,
    pixels: DaliNode,
    matrix: DaliNode,
    on_gpu: bool,
) -> DaliNode:
    """Each image's own operation, found by bisection; `first` is the branch of forms[0]."""
    half = len(forms) // 2
    if half == 0:
        pixels = forms[0](pixels, matrix, on_gpu)
    elif branch < first + half:
        pixels = _select_form(forms[:half], first, branch, pixels, matrix, on_gpu)
    else:
        pixels = _select_form(forms[half:], first + half, branch, pixels, matrix, on_gpu)
    return pixels


def feed_operations(pipeline: DaliPipeline, plan: OperationPlan) -> None:
    """Give the operations of a batch to a pipeline."""
    branches = BRANCH_OF_OP[plan.ops]
    num_slots = plan.ops.shape[1]
    for slot in range(num_slots):
        branch = np.ascontiguousarray(branches[:, slot])
        matrix = np.ascontiguousarray(plan.matrices[:, slot])
        pipeline.feed_input(f"branch{slot}", branch)
        pipeline.feed_input(f"matrix{slot}", matrix)


class Augmenter:
    """Carries out the operations of a plan on the CPU, on squares that torch has cropped."""

    def __init__(self, *, slots: int, local_batch_size: int, threads: int) -> None:
        """`slots`: `augment.num_slots`; `local_batch_size`: of the largest batch."""
        self.slots = slots
        self.local_batch_size = local_batch_size
        self.threads = threads
        self.pipeline: DaliPipeline = None

    def __call__(self, pixels: torch.Tensor, plan: OperationPlan) -> torch.Tensor:
        """`pixels`, uint8 [n, S, S, 3], augmented, in new memory.

        Raises RuntimeError when DALI fails.
        """
        # A pipeline cannot be used after an error: it is kept only when all went well.
        pipeline = self.pipeline
        self.pipeline = None
        if pipeline is None:
            pipeline = self._build_pipeline()
        pipeline.feed_input("pixels", pixels.numpy())
        feed_operations(pipeline, plan)
        pipeline.schedule_run()
        (outputs,) = pipeline.share_outputs()
        augmented = torch.stack(windows_to_torch(outputs))
        pipeline.release_outputs()
        self.pipeline = pipeline
        return augmented

    def close(self) -> None:
        """Free the pipeline."""
        self.pipeline = None

    def _build_pipeline(self) -> DaliPipeline:
        from nvidia import dali
        from nvidia.dali import fn, types

        def graph() -> DaliNode:
            images = fn.external_source(
                name="pixels", dtype=types.UINT8, ndim=3, layout="HWC", no_copy=True
            )
            return apply_operations(images, self.slots, on_gpu=False)

        define = dali.pipeline_def(
            batch_size=self.local_batch_size,
            num_threads=self.threads,
            device_id=None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
            enable_conditionals=True,
        )
        return define(graph)()


@dataclass
class LoadedJob:
    """A job whose files have been read."""

    job: Job
    images: list[Encoded]
    """empty where the images are decoded already"""
    geometry: Geometry
    rows: IntArray | None = None
    """int64 [n]: the rows that are shown, where `images` does not say it"""

    def shown_rows(self) -> IntArray:
        """The row of each image that is shown: int64 [n]."""
        if self.rows is not None:
            return self.rows
        return np.array([image.row for image in self.images], dtype=np.int64)

    def shown_as_bad(self) -> BoolArray:
        """Whether each image is a black one in place of a bad one: bool [n]."""
        if self.rows is not None:
            return np.zeros(len(self.rows), bool)
        return np.array([image.reason is not None for image in self.images], dtype=bool)

    def window_pixels(self) -> IntArray:
        """Pixels of each window: int64 [n]."""
        heights = self.geometry.windows[:, 2]
        widths = self.geometry.windows[:, 3]
        return heights * widths

    def image_pixels(self) -> IntArray:
        """Pixels of each whole image: int64 [n]."""
        sizes = [image.height * image.width for image in self.images]
        return np.array(sizes, np.int64)


@dataclass(frozen=True)
class Portion:
    """Consecutive images of a job that are decoded together; nearly always all of them."""

    loaded: LoadedJob
    start: int
    stop: int
    num_pixels: int = 0
    """decoded pixels, all together"""

    @property
    def places(self) -> slice:
        """The places of the images in the job."""
        return slice(self.start, self.stop)

    @property
    def is_last(self) -> bool:
        """Whether the job is complete with it."""
        return self.stop == len(self.loaded.geometry.windows)


def split_into_portions(
    loaded: LoadedJob, max_pixels: int, whole_images: bool = False
) -> Iterator[Portion]:
    """Divide a job into portions that are decoded together.

    A few files of some kilobytes can declare gigabytes of pixels.

    Args:
        loaded: The job and its images.
        max_pixels: Most decoded pixels of a portion, unless a single image has more.
        whole_images: Count the pixels of whole images in place of windows.
    """
    sizes = loaded.window_pixels()
    if whole_images:
        sizes = loaded.image_pixels()
    num_images = len(sizes)
    total = int(sizes.sum())
    if total <= max_pixels:
        yield Portion(loaded, 0, num_images, total)
        return

    start = 0
    pixels = 0
    for place, size in enumerate(sizes.tolist()):
        is_full = pixels + size > max_pixels
        if is_full and place > start:
            yield Portion(loaded, start, place, pixels)
            start = place
            pixels = 0
        pixels += size
    yield Portion(loaded, start, num_images, pixels)


class Decoder:
    """A DALI pipeline, and the portions that were given to it and not yet collected, oldest
    first.
    """

    def __init__(
        self,
        *,
        local_batch_size: int,
        threads: int,
        device: torch.device,
        views: int = 1,
        slots: int = 0,
        options: DecoderConfig | None = None,
        is_decoded: bool = False,
    ) -> None:
        """Start a pipeline.

        Args:
            local_batch_size: of the largest batch.
            threads: that decode, on the CPU.
            device: where the pixels are wanted.
            views: squares of each image, which only a GPU makes.
            slots: operations on each image, which only a GPU applies.
            options: of the GPU decoder.
            is_decoded: whether the images are whole images' pixels, which only a GPU gets.
        """
        if device.type == "cuda":
            # A decoder that falls back to another one warns for each image (measured: 15 MB in
            # 80 s). The probe at the start counts such warnings (probe.py).
            os.environ.setdefault(LOG_LEVEL, "1")
            self.spec = GraphSpec(
                local_batch_size,
                threads,
                decode="mixed",
                device_id=device.index,
                views=views,
                slots=slots,
                options=options or DecoderConfig(),
                is_decoded=is_decoded,
            )
        else:
            self.spec = GraphSpec(local_batch_size, threads)
        self.pending: deque[Portion] = deque()
        self.restart()

    @property
    def pending_pixels(self) -> int:
        """Decoded pixels of all pending portions."""
        return sum(portion.num_pixels for portion in self.pending)

    def restart(self) -> None:
        """Run every pending portion again, in a new pipeline."""
        self.pipeline: DaliPipeline = build_pipeline(self.spec)
        self.failure: RuntimeError | None = None
        self.num_fed = 0
        portions = self.pending
        self.pending = deque()
        for portion in portions:
            self.submit(portion)

    def submit(self, portion: Portion) -> None:
        """Start to decode a portion, behind the pending ones."""
        self.pending.append(portion)
        if self.failure is not None:
            return
        try:
            self._feed(self.pipeline, portion)
            self.num_fed += 1
        except RuntimeError as error:
            # The failure of an earlier portion; collect() raises it when that one's turn comes.
            self.failure = error

    def collect(self) -> tuple[Portion, tuple[DaliTensors, ...]]:
        """The oldest portion and DALI's outputs: the windows, or one list for each view.

        Raises:
            RuntimeError: when this portion or one behind it has failed. All are still pending then.
        """
        if self.num_fed == 0:
            assert self.failure is not None, "no portion was submitted"
            raise self.failure
        decoded = self.pipeline.share_outputs()
        # The memory of the outputs lives as long as `decoded`.
        self.pipeline.release_outputs()
        self.num_fed -= 1
        return self.pending.popleft(), decoded

    def find_undecodable(self, portion: Portion) -> list[int]:
        """The places in the job of images that cannot be decoded, found by decoding each alone."""
        found = []
        pipeline = None
        for place in range(portion.start, portion.stop):
            if pipeline is None:
                pipeline = build_pipeline(replace(self.spec, local_batch_size=1))
            try:
                self._feed(pipeline, Portion(portion.loaded, place, place + 1))
                pipeline.share_outputs()
                pipeline.release_outputs()
            except RuntimeError:
                found.append(place)
                # A pipeline cannot be used after an error.
                pipeline = None
        return found

    def drop_pending(self) -> None:
        """Forget the pending portions."""
        try:
            while self.pending:
                self.collect()
        except RuntimeError:
            self.pending.clear()
            self.restart()

    def close(self) -> None:
        """Free the pipeline."""
        self.pipeline = None

    def _feed(self, pipeline: DaliPipeline, portion: Portion) -> None:
        """Give a portion to a pipeline and start it."""
        loaded = portion.loaded
        places = portion.places
        geometry = loaded.geometry
        windows = geometry.windows[places].astype(np.int32)
        anchors = np.ascontiguousarray(windows[:, :2])
        extents = np.ascontiguousarray(windows[:, 2:])
        self._feed_images(pipeline, loaded.images[places])
        pipeline.feed_input("anchor", anchors)
        pipeline.feed_input("extent", extents)

        if self.spec.views:
            flips = geometry.flips[places].astype(np.int32)
            pipeline.feed_input("flip", flips)
            filters = interpolation_numbers(geometry.interpolations[places])
            pipeline.feed_input("interpolation", filters)
            for number, view in enumerate(geometry.views):
                sizes = view.sizes[places].astype(np.float32)
                offsets = view.offsets[places].astype(np.int32)
                squares = np.full((len(windows), 2), view.side, np.int32)
                pipeline.feed_input(f"size{number}", sizes)
                pipeline.feed_input(f"offset{number}", offsets)
                pipeline.feed_input(f"square{number}", squares)

        if self.spec.slots:
            assert loaded.job.operations is not None
            operations = loaded.job.operations.select(places)
            feed_operations(pipeline, operations)
        pipeline.schedule_run()

    def _feed_images(self, pipeline: DaliPipeline, images: list[Encoded]) -> None:
        """Give the contents of images to a pipeline."""
        contents = [np.frombuffer(image.data, np.uint8) for image in images]
        if not self.spec.is_decoded:
            pipeline.feed_input("encoded", contents)
            return
        pixels = []
        for image, content in zip(images, contents, strict=True):
            pixels.append(content.reshape(image.height, image.width, 3))
        pipeline.feed_input("pixels", pixels)


def interpolation_numbers(interpolations: StringArray) -> np.ndarray:
    """The numbers of filters in DALI's DALIInterpType: int32 [n].

    Args:
        interpolations: [n], "bilinear" or "bicubic".
    """
    from nvidia.dali import types

    is_bicubic = interpolations == "bicubic"
    numbers = np.where(is_bicubic, int(types.INTERP_CUBIC), int(types.INTERP_LINEAR))
    return numbers.astype(np.int32)


def windows_to_torch(decoded: DaliTensors) -> list[torch.Tensor]:
    """The images of a CPU batch, uint8 [h, w, 3] of different sizes, without a copy."""
    windows = []
    for pixels in decoded:
        array = np.asarray(pixels)
        windows.append(torch.from_numpy(array))
    return windows


def batch_to_torch(decoded: DaliTensors, device: torch.device) -> torch.Tensor:
    """One view of a GPU batch, copied to uint8 [n, h, w, 3] on torch's current stream."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    batch = decoded.as_tensor()
    pixels = torch.empty(batch.shape(), dtype=torch.uint8, device=device)
    # Given a stream, DALI orders the reuse of its buffer behind the copy.
    feed_ndarray(batch, pixels, cuda_stream=torch.cuda.current_stream())
    return pixels
