"""The Python work for an image that a GPU trains on, measured without a GPU.

The threads that load images share Python's lock with the thread that trains. Reading and decoding
release the lock; the work that is measured here holds it. One H100 trained on 5,658 images/s
(docs/gpu.md, the compiled bare loop), which leaves 177 us for an image, training included.
"""

import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from resnet_dist.data.pixels.dali import Decoder, GraphSpec, LoadedJob, Portion
from resnet_dist.data.pixels.loader import DaliTrainLoader
from resnet_dist.data.pixels.read import examine
from resnet_dist.data.sampling.augment import num_slots
from resnet_dist.data.sampling.crops import Geometry
from resnet_dist.data.sampling.jobs import job_geometry
from resnet_dist.data.types import Job

T = TypeVar("T")


class _Stopwatch:
    """Records the CPU time of this thread, by what it did."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Do some work, and record its time under `name`."""
        start = time.thread_time()
        result = work()
        passed = time.thread_time() - start
        self.seconds.setdefault(name, []).append(passed)
        return result


def measure_host_work(loader: DaliTrainLoader, num_batches: int) -> dict[str, float]:
    """The time that one thread needs for an image, in microseconds, by kind of work.

    The steps are those of the loader. DALI gets what the graph for a GPU gets, and runs that graph
    on the CPU, in threads of its own.

    Args:
        loader: Of files, not of a cache.
        num_batches: How many batches are measured.

    Returns:
        "plan", "lookup", "header", "geometry" and "feeding", each of the batch where it was least:
        other programs make a thread slower, by their use of caches and cores.
    """
    decoder = _decoder_with_the_graph_of_a_gpu(loader)
    stopwatch = _Stopwatch()
    with closing(decoder):
        for number in range(num_batches):
            loaded = _load(loader, number, stopwatch)
            portion = Portion(loaded, 0, len(loaded.images))
            stopwatch.time("feeding", partial(decoder.submit, portion))
            decoder.collect()
    num_images = loader.sampling.layout.local_batch_size
    microseconds = {}
    for name, seconds_of_batches in stopwatch.seconds.items():
        per_image = min(seconds_of_batches) / num_images
        microseconds[name] = round(1e6 * per_image, 2)
    return microseconds


def _decoder_with_the_graph_of_a_gpu(loader: DaliTrainLoader) -> Decoder:
    """A decoder on the CPU that finishes images in DALI, as on a GPU."""
    slots = num_slots(loader.sampling.augment)
    local_batch_size = loader.sampling.layout.local_batch_size
    decoder = Decoder(
        local_batch_size=local_batch_size,
        threads=loader.threads,
        device=torch.device("cpu"),
    )
    decoder.spec = GraphSpec(local_batch_size, loader.threads, views=1, slots=slots)
    decoder.restart()
    return decoder


def _load(loader: DaliTrainLoader, step: int, stopwatch: _Stopwatch) -> LoadedJob:
    """The images of a step; reading them is not measured."""

    def plan() -> Job:
        (job,) = loader.jobs(step, step + 1)
        return job

    job = stopwatch.time("plan", plan)
    loaded = loader.load(job)
    images = loaded.images

    def look_up() -> None:
        for image in images:
            loader.index.place(image.row)

    def check_headers() -> None:
        for image in images:
            # Images out of a cache have arrays.
            assert isinstance(image.data, bytes)
            examine(image.row, image.data)

    def find_geometry() -> Geometry:
        heights = np.array([image.height for image in images])
        widths = np.array([image.width for image in images])
        return job_geometry(job, heights, widths, loader.config)

    stopwatch.time("lookup", look_up)
    stopwatch.time("header", check_headers)
    stopwatch.time("geometry", find_geometry)
    return loaded
