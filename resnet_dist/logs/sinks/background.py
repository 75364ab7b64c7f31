"""Run each sink in a thread, so that a sink that fails or hangs never stops the training."""

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable

from resnet_dist.logs.sinks.base import Attachment, Numbers, RunInfo, Sink
from resnet_dist.text import printable

CLOSE_SECONDS = 35.0
"""Time that all sinks together have at the end of a training."""

# A sink that hangs must not fill the memory. At one row per 50 steps this is 500,000 steps.
_MOST_WAITING_ROWS = 10_000

# At the end of a run, a sink may still be busy with its start.
_LOCATION_SECONDS = 5.0


class BackgroundSink:
    """Call the methods of a sink from a thread, and wait for them only at the end.

    Args:
        sink: The sink.
        run: What the sink is told about the run; its `warn` prints the error of the sink.
    """

    def __init__(self, sink: Sink, run: RunInfo) -> None:
        self.name = sink.name
        self._sink = sink
        self._run = run
        # Calls of the sink; None is the last item.
        self._rows: queue.Queue[Callable[[], None] | None] = queue.Queue(_MOST_WAITING_ROWS)
        self._start_is_over = threading.Event()
        self._failed = threading.Event()
        # Until `request_close` knows better, the training has ended by an error.
        self._exit_code = 1
        self._thread = threading.Thread(target=self._work, name=f"sink {sink.name}", daemon=True)
        self._thread.start()

    @property
    def location(self) -> str:
        """Where the metrics are stored.

        This waits a few seconds for a sink that is still starting.
        """
        has_started = self._start_is_over.wait(_LOCATION_SECONDS)
        if not has_started:
            return "not started yet"
        return self._sink.location

    def log(self, step: int, values: Numbers) -> None:
        """Queue the values of one step for the sink. This never waits."""
        self._queue(functools.partial(self._sink.log, step, values))

    def attach(self, step: int, key: str, item: Attachment) -> None:
        """Queue a picture, a table or a file for the sink. This never waits."""
        self._queue(functools.partial(self._sink.attach, step, key, item))

    def _queue(self, call: Callable[[], None]) -> None:
        """Queue a call of the sink."""
        if self._failed.is_set():
            return
        try:
            self._rows.put_nowait(call)
        except queue.Full:
            self._give_up("it has not taken a value for a long time")

    def request_close(self, exit_code: int) -> None:
        """Let the sink close after it has taken the queued rows.

        Args:
            exit_code: The exit code of the training.
        """
        self._exit_code = exit_code
        with contextlib.suppress(queue.Full):
            self._rows.put_nowait(None)

    def wait_closed(self, deadline: float) -> None:
        """Wait until the sink is closed, or until `deadline` (of time.monotonic)."""
        seconds_left = deadline - time.monotonic()
        self._thread.join(max(0.0, seconds_left))
        if self._thread.is_alive():
            self._give_up("it did not finish in time")

    def _work(self) -> None:
        """Call the methods of the sink, in its thread."""
        try:
            self._sink.start(self._run)
            self._start_is_over.set()
            self._log_rows()
            self._sink.close(self._exit_code)
        except Exception as error:
            self._give_up(describe_error(error))
            if self._start_is_over.is_set():
                # What is already recorded should not be lost with the rest.
                with contextlib.suppress(Exception):
                    self._sink.close(1)
        finally:
            self._start_is_over.set()

    def _log_rows(self) -> None:
        """Pass the queued rows to the sink until it is asked to close."""
        while True:
            call = self._rows.get()
            if call is None:
                return
            call()

    def _give_up(self, reason: str) -> None:
        """Warn that the sink has failed, once."""
        if self._failed.is_set():
            return
        self._failed.set()
        self._run.warn(f"{self.name} failed ({reason}); training continues without it")


def describe_error(error: BaseException) -> str:
    """Return the first line of an error, with its type unless it is a ValueError.

    The message of a ValueError is written for the user.
    """
    lines = str(error).splitlines()
    first = lines[0] if lines else ""
    text = printable(first)[:200]
    if isinstance(error, ValueError):
        return text
    return f"{type(error).__name__}: {text}"
