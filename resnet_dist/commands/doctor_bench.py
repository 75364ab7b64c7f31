"""`resnet-dist doctor --bench`: what each rank's device, network and storage can do.

Every rank measures the same things at the same time. A rank that is much slower than the others
slows all of them down in each step, so it is named.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from resnet_dist.commands.device_rates import (
    all_reduce_rate,
    matrix_dtype,
    matrix_rate,
    memory_rate,
)
from resnet_dist.config import Config
from resnet_dist.data.build import build_train_loader
from resnet_dist.data.pixels.loader import DaliTrainLoader
from resnet_dist.data.pixels.read import READ_THREADS, load, read_limits
from resnet_dist.distributed.runtime import Runtime

# A rank below this share of the median is an outlier.
_OUTLIER = 0.85

# How many images each rank reads.
_READ_IMAGES = 256


def check_matrix_rate(config: Config, runtime: Runtime) -> tuple[str, str]:
    """The rate of a large matrix product on each rank, in the fastest training precision."""
    dtype = matrix_dtype(runtime.device)
    name = str(dtype).removeprefix("torch.")

    def measure() -> float:
        flops = matrix_rate(runtime.device, dtype)
        return flops / 1e12

    rates, problem = _on_each_rank(measure, runtime)
    return _describe(rates, f"TFLOP/s ({name})", runtime, problem)


def check_memory_rate(config: Config, runtime: Runtime) -> tuple[str, str]:
    """The rate of a copy within the memory of each rank's device."""

    def measure() -> float:
        num_bytes = memory_rate(runtime.device)
        return num_bytes / 1e9

    rates, problem = _on_each_rank(measure, runtime)
    return _describe(rates, "GB/s", runtime, problem)


def check_all_reduce(config: Config, runtime: Runtime) -> tuple[str, str]:
    """The bandwidth of an all-reduce over all ranks."""
    if runtime.world_size == 1:
        return "ok", "one rank: nothing to reduce"

    def measure() -> float:
        num_bytes = all_reduce_rate(runtime)
        return num_bytes / 1e9

    rates, problem = _on_each_rank(measure, runtime)
    level, text = _describe(rates, "GB/s bus bandwidth", runtime, problem)
    return level, f"{text}; the slowest link sets it"


def check_reading(config: Config, runtime: Runtime) -> tuple[str, str]:
    """How fast each rank reads images from `data.data_dir`, all of them at the same time."""
    if config.data.kind == "synthetic":
        return "ok", "synthetic data: nothing to read"
    # Raises ValueError on every rank, if it does.
    loader = build_train_loader(config, runtime)
    assert isinstance(loader, DaliTrainLoader)

    def measure() -> float:
        return _read_some(loader, runtime)

    rates, problem = _on_each_rank(measure, runtime)
    loader.close()
    return _describe(rates, "MB/s", runtime, problem)


def _read_some(loader: DaliTrainLoader, runtime: Runtime) -> float:
    """Read images of this rank, from the storage if possible, in megabytes per second."""
    index = loader.index
    generator = np.random.default_rng(0)
    order = generator.permutation(len(index))
    rows_of_rank = order[runtime.rank :: runtime.world_size]
    rows = rows_of_rank[:_READ_IMAGES].tolist()

    limits = read_limits(loader.config)

    def read(row: int) -> int:
        image = load(index, row, limits)
        return len(image.data)

    for row in rows:
        path, _, _ = index.place(row)
        _forget_file(path)
    start = time.perf_counter()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        sizes = list(pool.map(read, rows))
    seconds = time.perf_counter() - start
    return sum(sizes) / 1e6 / seconds


def _forget_file(path: str) -> None:
    """Ask Linux to drop a file from the page cache, so that it is read from the storage again."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _on_each_rank(measure: Callable[[], float], runtime: Runtime) -> tuple[list[float], str]:
    """Measure on every rank, and gather the figures.

    Returns:
        The figures in order of rank, NaN for a rank that failed; and this rank's error, or "".
    """
    problem = ""
    try:
        figure = measure()
    except Exception as error:
        # The other ranks wait for this one's figure.
        figure = math.nan
        problem = f"{type(error).__name__}: {error}"
    gathered = runtime.gather_numbers([figure])
    return [numbers[0] for numbers in gathered], problem


def _describe(rates: Sequence[float], unit: str, runtime: Runtime, problem: str) -> tuple[str, str]:
    """The level and the sentence about one figure of all ranks.

    The main process reports what concerns several ranks; the others report their own errors only.

    Args:
        rates: The figure of each rank; higher is better.
        unit: Its unit.
        runtime: Knows the hosts of the ranks.
        problem: The error of this rank, or "".
    """
    if problem:
        return "error", problem
    if not runtime.is_main:
        return "ok", ""
    failed = [rank for rank, rate in enumerate(rates) if math.isnan(rate)]
    if failed:
        return "error", f"{_name_ranks(failed, runtime)} failed"
    # Of two ranks the better one is the measure.
    median = statistics.median_high(rates)
    if len(rates) == 1:
        return "ok", f"{median:.4g} {unit}"
    text = f"{median:.4g} {unit} (median of {len(rates)} ranks, lowest {min(rates):.4g})"
    slow = find_outliers(rates)
    if not slow:
        return "ok", text
    shares = []
    for rank in slow:
        share = rates[rank] / median
        shares.append(f"{share:.0%}")
    names = _name_ranks(slow, runtime)
    return "warning", f"{text}; slow: {names} with {', '.join(shares)} of the median"


def find_outliers(rates: Sequence[float]) -> list[int]:
    """The ranks whose rate is far below the median of all.

    Args:
        rates: One figure of each rank; higher is better.
    """
    limit = _OUTLIER * statistics.median_high(rates)
    return [rank for rank, rate in enumerate(rates) if rate < limit]


def _name_ranks(ranks: Sequence[int], runtime: Runtime) -> str:
    """Name ranks with their hosts."""
    assert runtime.watchdog is not None
    names = []
    for rank in ranks:
        host = runtime.watchdog.peers[rank].host
        names.append(f"rank {rank} on {host}")
    return ", ".join(names)
