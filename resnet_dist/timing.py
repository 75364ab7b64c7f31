"""Throughput and the share of time that training waits for data, from the host's clock alone.

Nothing here waits for the device. The host runs ahead of it by some steps, so a figure is exact
when it is taken where the loop waits for the device anyway: at a log line.
"""

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Adds up the time since the last `take`: all of it, what went on waiting for data, and what
    does not count.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.started = time.perf_counter()
        self.waited = self.left_out = 0.0
        self.images = self.steps = 0

    def data_wait(self) -> contextlib.AbstractContextManager:
        """Around `next(loader)`: the time that training has no batch to work on."""
        return self._added_to("waited")

    def excluded(self) -> contextlib.AbstractContextManager:
        """Around what is not training, such as an evaluation or a checkpoint: it slows no figure
        down.
        """
        return self._added_to("left_out")

    @contextlib.contextmanager
    def _added_to(self, total: str) -> Iterator[None]:
        entered = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, total, getattr(self, total) + time.perf_counter() - entered)

    def step(self, num_images: int) -> None:
        """Note one update of `num_images` images, over all ranks."""
        self.steps += 1
        self.images += num_images

    def take(self) -> dict[str, float]:
        """The figures since the last call, which begins the next window.

        images_per_second (of all ranks, if `step` was told so), data_wait_fraction (0 to 1),
        step_seconds; all of them 0 where there was no step.
        """
        seconds = time.perf_counter() - self.started - self.left_out
        images, steps, waited = self.images, self.steps, self.waited
        self._reset()
        if not steps or seconds <= 0:
            return {"images_per_second": 0.0, "data_wait_fraction": 0.0, "step_seconds": 0.0}
        return {
            "images_per_second": images / seconds,
            "data_wait_fraction": min(1.0, waited / seconds),
            "step_seconds": seconds / steps,
        }
