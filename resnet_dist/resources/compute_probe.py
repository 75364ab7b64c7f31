"""How fast a rank computes: a fixed piece of work, which is timed at each log line.

Ranks wait for each other in every step, so that the step time of each rank is that of the slowest
one. The probe waits for no other rank. It takes longer on a GPU that is throttled or shared, and on
a CPU whose cores have other work.
"""

import time

import torch

from resnet_dist.precision import fastest_dtype

# Square matrices with this side, and how many products of them are one measurement: 0.6 ms of an
# H100 at its peak rate (989 TFLOP/s in bf16), and 1 to 2 ms of a CPU core.
_SIDE = {"cuda": 2048, "cpu": 384}
_NUM_PRODUCTS = {"cuda": 32, "cpu": 1}


class ComputeProbe:
    """Times matrix products on the device of this rank. On a GPU the host never waits for them.

    It draws no random numbers, and allocates its memory once: 16 MiB on a GPU, 1.1 MiB on a CPU.

    Args:
        device: The device of this rank.
        num_products: Number of products of one measurement; a test makes one rank slow by it.
    """

    def __init__(self, device: torch.device, num_products: int | None = None) -> None:
        if num_products is None:
            num_products = _NUM_PRODUCTS[device.type]
        self._num_products = num_products
        side = _SIDE[device.type]
        # Zeros would draw less power, and a GPU that is short of power would not show it.
        numbers = torch.linspace(-1, 1, side * side, device=device)
        self._matrix = numbers.reshape(side, side).to(fastest_dtype(device))
        self._product = torch.empty_like(self._matrix)
        self._stopwatch = _stopwatch_for(device)
        # The first product loads the library.
        self._multiply()
        self._measure()

    def take(self) -> float:
        """The seconds of the measurement that the last call began; begin the next one.

        On a GPU that measurement must have ended: call it where the host has waited for the device.
        """
        seconds = self._stopwatch.seconds()
        self._measure()
        return seconds

    def _measure(self) -> None:
        self._stopwatch.start()
        for _ in range(self._num_products):
            self._multiply()
        self._stopwatch.stop()

    def _multiply(self) -> None:
        torch.mm(self._matrix, self._matrix, out=self._product)


class _HostStopwatch:
    """Measures work of the host by its clock."""

    def __init__(self) -> None:
        self._started = 0.0
        self._stopped = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._stopped = time.perf_counter()

    def seconds(self) -> float:
        return self._stopped - self._started


class _CudaStopwatch:
    """Measures work in the current stream of a GPU by two events."""

    def __init__(self) -> None:
        self._started = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._stopped = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def start(self) -> None:
        self._started.record()

    def stop(self) -> None:
        self._stopped.record()

    def seconds(self) -> float:
        milliseconds: float = self._started.elapsed_time(self._stopped)
        return milliseconds / 1000


def _stopwatch_for(device: torch.device) -> _HostStopwatch | _CudaStopwatch:
    if device.type == "cuda":
        return _CudaStopwatch()
    return _HostStopwatch()
