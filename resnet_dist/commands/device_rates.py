"""What a device can do: its measured matrix rate, memory rate and all-reduce rate."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from resnet_dist.distributed.runtime import Runtime
from resnet_dist.precision import fastest_dtype

# Each rate is the median of so many measurements of this length.
_MEASUREMENTS = 5
_SECONDS_OF_A_MEASUREMENT = 0.06

# Sides of the square matrices, and bytes that are copied and that are reduced.
_MATRIX_SIDE = {"cuda": 8192, "cpu": 768}
_COPIED_BYTES = {"cuda": 2**30, "cpu": 2**26}
_REDUCED_BYTES = {"cuda": 2**28, "cpu": 2**22}


@dataclass(frozen=True)
class DeviceRates:
    """What one device was measured to do."""

    matrix_flops: float
    """floating-point operations per second of a large matrix product"""
    dtype: str
    """of the matrices"""
    memory_bytes: float
    """bytes per second, read and written, of a large copy"""


def measure_device(device: torch.device) -> DeviceRates:
    """Measure the matrix rate and the memory rate of a device. Takes about a second.

    Args:
        device: The device of this rank.
    """
    dtype = fastest_dtype(device)
    return DeviceRates(
        matrix_flops=matrix_rate(device, dtype),
        dtype=str(dtype).removeprefix("torch."),
        memory_bytes=memory_rate(device),
    )


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure a product of two large square matrices, in floating-point operations per second."""
    side = _MATRIX_SIDE[device.type]
    left = torch.randn(side, side, device=device).to(dtype)
    right = torch.randn(side, side, device=device).to(dtype)
    product = torch.empty_like(left)

    def multiply() -> None:
        torch.mm(left, right, out=product)

    seconds = seconds_per_call(multiply, device)
    # A multiplication and an addition for each of side**3 products.
    operations = 2 * side**3
    return operations / seconds


def memory_rate(device: torch.device) -> float:
    """Measure a copy within the memory of the device, in bytes read and written per second."""
    source = torch.ones(_COPIED_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    seconds = seconds_per_call(copy, device)
    num_bytes = 2 * source.numel()
    return num_bytes / seconds


def all_reduce_rate(runtime: Runtime) -> float:
    """Measure an all-reduce of a large tensor. Call it on every rank.

    Args:
        runtime: The ranks; at least two.

    Returns:
        Bus bandwidth in bytes per second: the size times 2 * (ranks - 1) / ranks, divided by the
        time, as nccl-tests define it (PERFORMANCE.md).
    """
    ranks = runtime.world_size
    num_bytes = _REDUCED_BYTES[runtime.device.type]
    tensor = torch.zeros(num_bytes // 4, device=runtime.device)
    calls = 5
    runtime.all_reduce_sum(tensor)
    synchronize(runtime.device)
    runtime.barrier()
    start = time.perf_counter()
    for _ in range(calls):
        runtime.all_reduce_sum(tensor)
    synchronize(runtime.device)
    seconds = (time.perf_counter() - start) / calls
    bytes_on_bus = num_bytes * 2 * (ranks - 1) / ranks
    return bytes_on_bus / seconds


def seconds_per_call(call: Callable[[], None], device: torch.device) -> float:
    """The median time of a call, after a warm-up, with the device's work included.

    Args:
        call: What is measured.
        device: Where its work runs.
    """
    for _ in range(2):
        call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    # A clock may be too coarse to see one call.
    seconds_of_one = max(1e-6, time.perf_counter() - start)
    calls = max(1, int(_SECONDS_OF_A_MEASUREMENT / seconds_of_one))

    seconds = []
    for _ in range(_MEASUREMENTS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        seconds_of_all = time.perf_counter() - start
        seconds.append(seconds_of_all / calls)
    return statistics.median(seconds)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
