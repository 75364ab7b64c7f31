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
from dataclasses import dataclass

import numpy as np

from resnet_dist.addresses import is_url
from resnet_dist.commands.device_rates import (
    all_reduce_rate,
    matrix_rate,
    memory_rate,
)
from resnet_dist.config import Config
from resnet_dist.data.build import build_train_loader
from resnet_dist.data.pixels.loader import DaliTrainLoader
from resnet_dist.data.pixels.read import READ_THREADS, load, read_limits
from resnet_dist.data.sources.index import Index
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.precision import fastest_dtype

# A rank below this share of the median is an outlier.
_OUTLIER = 0.85

# How many images each rank reads.
_READ_IMAGES = 256

_TERA = 1e12
_GIGA = 1e9
_MEGA = 1e6


@dataclass(frozen=True)
class RankRates:
    """One figure of all ranks, as this rank knows it."""

    rates: list[float]
    """of each rank, in order; higher is better, and NaN stands for a rank that failed"""
    problem: str
    """the error of this rank; empty for none"""


def check_matrix_rate(config: Config, runtime: Runtime) -> tuple[str, str]:
    """The rate of a large matrix product on each rank, in the fastest training precision."""
    device = runtime.device
    dtype = fastest_dtype(device)
    name = str(dtype).removeprefix("torch.")

    def measure() -> float:
        flops = matrix_rate(device, dtype)
        return flops / _TERA

    return _compare_ranks(measure, f"TFLOP/s ({name})", runtime)


def check_memory_rate(config: Config, runtime: Runtime) -> tuple[str, str]:
    """The rate of a copy within the memory of each rank's device."""

    def measure() -> float:
        num_bytes = memory_rate(runtime.device)
        return num_bytes / _GIGA

    return _compare_ranks(measure, "GB/s", runtime)


def check_all_reduce(config: Config, runtime: Runtime) -> tuple[str, str]:
    """The bandwidth of an all-reduce over all ranks."""
    if runtime.world_size == 1:
        return "ok", "one rank: nothing to reduce"

    def measure() -> float:
        num_bytes = all_reduce_rate(runtime)
        return num_bytes / _GIGA

    level, text = _compare_ranks(measure, "GB/s bus bandwidth", runtime)
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

    level, text = _compare_ranks(measure, "MB/s", runtime)
    loader.close()
    return level, text


def _read_some(loader: DaliTrainLoader, runtime: Runtime) -> float:
    """Read images of this rank, from the storage if possible, in megabytes per second."""
    index = loader.index
    rows = _choose_rows(len(index), runtime)
    for path in _files_of(index, rows):
        _forget_file(path)

    limits = read_limits(loader.config)

    def read(row: int) -> int:
        image = load(index, row, limits)
        return len(image.data)

    start = time.perf_counter()
    with ThreadPoolExecutor(READ_THREADS) as pool:
        sizes = pool.map(read, rows)
        num_bytes = sum(sizes)
    seconds = time.perf_counter() - start
    return num_bytes / _MEGA / seconds


def _choose_rows(num_images: int, runtime: Runtime) -> list[int]:
    """The rows that this rank reads; no other rank reads them."""
    generator = np.random.default_rng(0)
    order = generator.permutation(num_images)
    rows_of_rank = order[runtime.rank :: runtime.world_size]
    rows: list[int] = rows_of_rank[:_READ_IMAGES].tolist()
    return rows


def _files_of(index: Index, rows: Sequence[int]) -> set[str]:
    """The files on a disk that hold some images."""
    paths = set()
    for row in rows:
        path, _, _ = index.place(row)
        if not is_url(path):
            paths.add(path)
    return paths


def _forget_file(path: str) -> None:
    """Ask Linux to drop a file from the page cache, so that it is read from the storage again."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _compare_ranks(measure: Callable[[], float], unit: str, runtime: Runtime) -> tuple[str, str]:
    """Measure on every rank at the same time, and compare the ranks.

    Args:
        measure: Returns the figure of this rank; higher is better.
        unit: The unit of the figure.
        runtime: The ranks.

    Returns:
        The level and the sentence of this rank.
    """
    found = _measure_on_each_rank(measure, runtime)
    if found.problem:
        return "error", found.problem
    # The main process reports what concerns several ranks.
    if not runtime.is_main:
        return "ok", ""
    return _describe(found.rates, unit, runtime)


def _measure_on_each_rank(measure: Callable[[], float], runtime: Runtime) -> RankRates:
    """Measure on every rank, and gather the figures."""
    problem = ""
    try:
        figure = measure()
    except Exception as error:
        # The other ranks wait for this one's figure.
        figure = math.nan
        problem = f"{type(error).__name__}: {error}"
    rates = []
    for figures in runtime.gather_numbers([figure]):
        rates += figures
    return RankRates(rates, problem)


def _describe(rates: Sequence[float], unit: str, runtime: Runtime) -> tuple[str, str]:
    """The level and the sentence about one figure of all ranks, for the main process.

    Args:
        rates: The figure of each rank.
        unit: Its unit.
        runtime: Knows the hosts of the ranks.
    """
    failed = [rank for rank, rate in enumerate(rates) if math.isnan(rate)]
    if failed:
        names = _name_ranks(failed, runtime)
        return "error", f"{names} failed"
    median = _median(rates)
    num_ranks = len(rates)
    if num_ranks == 1:
        return "ok", f"{median:.4g} {unit}"
    lowest = min(rates)
    text = f"{median:.4g} {unit} (median of {num_ranks} ranks, lowest {lowest:.4g})"
    slow = find_outliers(rates)
    if not slow:
        return "ok", text
    slow_rates = [rates[rank] for rank in slow]
    names = _name_ranks(slow, runtime)
    shares = _format_shares(slow_rates, median)
    return "warning", f"{text}; slow: {names} with {shares} of the median"


def _format_shares(rates: Sequence[float], median: float) -> str:
    """Some rates in percent of the median.

    Args:
        rates: The rates.
        median: The median of all ranks.

    Returns:
        A list such as "50%, 70%".
    """
    shares = []
    for rate in rates:
        share = rate / median
        shares.append(f"{share:.0%}")
    return ", ".join(shares)


def _median(rates: Sequence[float]) -> float:
    """The median; of two ranks the better one is the measure."""
    return statistics.median_high(rates)


def find_outliers(rates: Sequence[float]) -> list[int]:
    """The ranks whose rate is far below the median of all.

    Args:
        rates: One figure of each rank; higher is better.
    """
    limit = _OUTLIER * _median(rates)
    return [rank for rank, rate in enumerate(rates) if rate < limit]


def _name_ranks(ranks: Sequence[int], runtime: Runtime) -> str:
    """Name ranks with their hosts.

    Args:
        ranks: The ranks to name.
        runtime: Its watchdog knows the hosts.
    """
    assert runtime.watchdog is not None
    peers = runtime.watchdog.peers
    names = []
    for rank in ranks:
        host = peers[rank].host
        names.append(f"rank {rank} on {host}")
    return ", ".join(names)
