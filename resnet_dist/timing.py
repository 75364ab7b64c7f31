"""Throughput, and the share of time that training waits for data, measured by the host's clock.

Nothing here waits for the device. The host is some steps ahead of it, so a figure is exact only
where the loop waits for the device anyway: at a log line.
"""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Adds up times since the last `take`: in all, waiting for data, and not counted."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.started = time.perf_counter()
        self.waited = 0.0
        self.left_out = 0.0
        self.images = 0
        self.steps = 0

    @contextlib.contextmanager
    def data_wait(self) -> Iterator[None]:
        """Around `next(loader)`: the time during which training has no batch to work on."""
        entered = time.perf_counter()
        try:
            yield
        finally:
            self.waited += time.perf_counter() - entered

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Around what is not training, such as an evaluation: it does not lower the speed."""
        entered = time.perf_counter()
        try:
            yield
        finally:
            self.left_out += time.perf_counter() - entered

    def step(self, num_images: int) -> None:
        """Note one update of `num_images` images, over all ranks."""
        self.steps += 1
        self.images += num_images

    def take(self) -> dict[str, float]:
        """The figures since the last call; the next window begins now.

        Returns: images_per_second (of all ranks, if `step` counted those of all ranks),
            data_wait_fraction (0 to 1) and step_seconds. All are 0 if there was no step.
        """
        seconds = time.perf_counter() - self.started - self.left_out
        images = self.images
        steps = self.steps
        waited = self.waited
        self._reset()
        if not steps or seconds <= 0:
            return {"images_per_second": 0.0, "data_wait_fraction": 0.0, "step_seconds": 0.0}
        return {
            "images_per_second": images / seconds,
            "data_wait_fraction": min(1.0, waited / seconds),
            "step_seconds": seconds / steps,
        }
