"""Which decoder serves baseline JPEGs, found by decoding one.

The name of a GPU does not say it: the decoder also depends on the driver and on the version of the
libraries. So each decoder of nvImageCodec decodes a small baseline JPEG alone, with the chroma
upsampling that training asks for.
"""

import contextlib
import functools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from resnet_dist.config import DecoderConfig
from resnet_dist.data.pixels.dali import LOG_LEVEL, Decoder, LoadedJob, Portion
from resnet_dist.data.pixels.image_header import image_size
from resnet_dist.data.pixels.read import Encoded
from resnet_dist.data.sampling.crops import Geometry, View, whole_windows
from resnet_dist.data.types import Job
from resnet_dist.text import printable

_BASELINE_JPEG = Path(__file__).with_name("baseline.jpg")
# Images of the batch that shows whether the graph of training falls back, and their side.
_PROBE_IMAGES = 8
_PROBE_SIDE = 32

_WARNING = re.compile(rb"\[(WARNING|ERROR)\]")


@dataclass(frozen=True)
class JpegBackend:
    """A decoder of nvImageCodec."""

    kind: str
    """its name in `nvidia.nvimgcodec.BackendKind`"""
    title: str


# In the order in which DALI prefers them.
BACKENDS = (
    JpegBackend("HW_GPU_ONLY", "hardware decoder"),
    JpegBackend("GPU_ONLY", "CUDA decoder"),
    JpegBackend("HYBRID_CPU_GPU", "hybrid decoder (Huffman codes on the CPU, the rest in CUDA)"),
    JpegBackend("CPU_ONLY", "CPU decoder"),
)

Decodes = Callable[[JpegBackend], bool]
"""Whether a decoder alone decodes the baseline JPEG."""


def find_jpeg_decoder(decodes: Decodes) -> JpegBackend | None:
    """The first decoder that decodes a baseline JPEG alone; None if none does."""
    for backend in BACKENDS:
        if decodes(backend):
            return backend
    return None


def describe_jpeg_decoder(
    device: torch.device,
    options: DecoderConfig | None = None,
    decodes: Decodes | None = None,
    run_graph: Callable[[], None] | None = None,
) -> tuple[str, str]:
    """Say which decoder serves baseline JPEGs on `device`, and whether training falls back.

    Args:
        device: the device of training.
        options: the decoder section of the config.
        decodes: tries one decoder; by default nvImageCodec on `device`.
        run_graph: decodes a batch of baseline JPEGs; by default with the graph of training.

    Returns:
        ("ok", "warning" or "error", a sentence).
    """
    if device.type != "cuda":
        return "ok", "JPEG: CPU decoder"
    if decodes is None:
        decodes = _NvImageCodec(device)
    with count_library_warnings() as warnings:
        backend = find_jpeg_decoder(decodes)
    counted = f" ({warnings.count} warnings of nvImageCodec)" if warnings.count else ""
    if backend is None:
        return "warning", f"JPEG: no decoder of nvImageCodec decodes a baseline JPEG{counted}"
    text = f"JPEG: {backend.title}"
    if backend.kind == "CPU_ONLY":
        return "warning", (
            f"{text}: no GPU decoder of nvImageCodec decodes a baseline JPEG here, so the CPU "
            f"limits the speed{counted}. Check the driver and the versions of DALI and nvImageCodec"
        )
    if run_graph is None:
        run_graph = functools.partial(decode_probe_batch, device, options)
    try:
        with count_library_warnings() as of_training:
            run_graph()
    except RuntimeError as error:
        return "error", printable(f"{text}, but the graph of training fails: {error}")
    if of_training.count:
        return "warning", (
            f"{text}, but the graph of training printed {of_training.count} warnings of its "
            f"libraries for a batch of {_PROBE_IMAGES} JPEGs, so it may decode elsewhere. They are "
            f"not shown again. Check the versions of DALI and nvImageCodec"
        )
    return "ok", text


def decode_probe_batch(device: torch.device, options: DecoderConfig | None = None) -> None:
    """Decode a small batch of baseline JPEGs with the graph of training.

    Args:
        device: the device of training.
        options: the decoder section of the config.
    """
    data = _BASELINE_JPEG.read_bytes()
    height, width = image_size(data)
    images = [Encoded(row, data, height, width) for row in range(_PROBE_IMAGES)]
    rows = np.arange(_PROBE_IMAGES)
    windows = whole_windows(np.full(_PROBE_IMAGES, height), np.full(_PROBE_IMAGES, width))
    sizes = np.full((_PROBE_IMAGES, 2), _PROBE_SIDE)
    view = View(sizes, np.zeros_like(sizes), _PROBE_SIDE)
    filters = np.full(_PROBE_IMAGES, "bilinear")
    geometry = Geometry(windows, (view,), np.zeros_like(rows), filters)
    loaded = LoadedJob(Job(rows, training=True, side=_PROBE_SIDE), images, geometry)

    decoder = Decoder(local_batch_size=_PROBE_IMAGES, threads=1, device=device, options=options)
    decoder.submit(Portion(loaded, 0, _PROBE_IMAGES))
    _, (decoded, *_) = decoder.collect()
    if device.type == "cuda":
        # Wait for the GPU, so that nothing is printed later.
        decoded.as_cpu()
    decoder.close()


class _NvImageCodec:
    """Tries decoders of nvImageCodec on one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device_id = device.index or 0
        self.encoded = _BASELINE_JPEG.read_bytes()

    def __call__(self, backend: JpegBackend) -> bool:
        from nvidia import nvimgcodec

        kind = getattr(nvimgcodec.BackendKind, backend.kind)
        device_id = self.device_id
        if backend.kind == "CPU_ONLY":
            device_id = nvimgcodec.NVIMGCODEC_DEVICE_CPU_ONLY
        try:
            decoder = nvimgcodec.Decoder(
                device_id=device_id,
                backends=[nvimgcodec.Backend(kind)],
                options=":fancy_upsampling=1",
            )
            return decoder.decode(self.encoded) is not None
        except RuntimeError:
            # This kind of decoder does not exist here.
            return False


@dataclass
class LibraryWarnings:
    """Warnings that C++ libraries printed."""

    count: int = 0


@contextlib.contextmanager
def count_library_warnings() -> Iterator[LibraryWarnings]:
    """Count the warnings that libraries print on the standard error stream, and hide them.

    DALI's decoders that start meanwhile print their warnings, which they do not do in training.

    Everything else that was printed there is printed at the end. Only for a short piece of work:
    meanwhile nothing of this process appears on that stream.
    """
    warnings = LibraryWarnings()
    sys.stderr.flush()
    kept = os.dup(2)
    with _log_level("2"), tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield warnings
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            captured.seek(0)
            for line in captured:
                if _WARNING.search(line):
                    warnings.count += 1
                else:
                    os.write(2, line)


@contextlib.contextmanager
def _log_level(level: str) -> Iterator[None]:
    """Set what DALI's decoders print that start inside the block."""
    before = os.environ.get(LOG_LEVEL)
    os.environ[LOG_LEVEL] = level
    try:
        yield
    finally:
        del os.environ[LOG_LEVEL]
        if before is not None:
            os.environ[LOG_LEVEL] = before


def describe_dali_wheels(installed: list[str] | None = None) -> tuple[str, str]:
    """Say which build of DALI is installed.

    Every build is a wheel of its own (nvidia-dali-cuda120, nvidia-dali-cuda130), and all of them
    own the same package.

    Returns:
        ("ok", "warning" or "error", a sentence).
    """
    if installed is None:
        names = {distribution.metadata["Name"] for distribution in metadata.distributions()}
        installed = sorted(
            f"{name} {metadata.version(name)}"
            for name in names
            if name and name.lower().startswith("nvidia-dali-cuda")
        )
    if not installed:
        return "error", (
            "DALI is not installed: install nvidia-dali-cuda120 or nvidia-dali-cuda130, whichever "
            "fits the driver"
        )
    if len(installed) > 1:
        return "warning", (
            f"{' and '.join(installed)} are installed, and each overwrites the other's files: "
            f"uninstall all of them, then install one"
        )
    return "ok", installed[0]
