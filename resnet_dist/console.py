"""Sentences and a progress bar for the user: in a terminal, in a file, and in a job's log.

In a terminal the bar is the last line of the screen, and sentences appear above it. Elsewhere there
is no bar: its control characters would fill a file or a pipe.
"""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from resnet_dist.text import printable, printable_lines

# No bar is narrower than this, whatever stands beside it.
_LEAST_BAR_WIDTH = 10

# The widest remaining time that the line is laid out for.
_LONGEST_ETA = "100:00:00"

# Without a terminal, a long job prints a line this often.
_SECONDS_BETWEEN_LINES = 30.0


class Console:
    """Prints for the main process; every method does nothing in the others."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.bar: StatusBar | None = None

    def start_bar(self, total_steps: int, start_step: int) -> None:
        """Show a progress bar from now on, if standard error is a terminal."""
        if self.enabled and is_terminal(sys.stderr):
            self.bar = StatusBar(total_steps, start_step)

    def close_bar(self) -> None:
        """Erase the progress bar, so that what is printed last stays last on the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def has_only_the_bar(self) -> bool:
        """Whether the user sees the bar and nothing else records what it shows."""
        return self.bar is not None and is_terminal(sys.stdout)

    def say(self, text: str) -> None:
        """Print a sentence, above the progress bar."""
        self._print(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Print a sentence that the user should not miss, on one line."""
        self._print(f"warning: {printable(text)}", sys.stderr)

    def _print(self, text: str, stream: TextIO) -> None:
        if not self.enabled:
            return
        safe = printable_lines(text)
        # ValueError: the stream is closed. OSError: its reader is gone or its disk is full.
        # Neither may end a training.
        with contextlib.suppress(OSError, ValueError):
            if self.bar is None:
                print(safe, file=stream)
            else:
                self.bar.print_above(safe, stream)
            stream.flush()


class StatusBar:
    """The last line of the screen: percentage, bar, steps, remaining time, and figures.

    The figures that do not fit into the width of the terminal are left out, least important last.
    """

    def __init__(self, total_steps: int, start_step: int) -> None:
        # tqdm's monitor thread would only wake up a bar that is updated at every step anyway.
        tqdm.monitor_interval = 0
        self._stream = sys.stderr
        self._start_step = start_step
        self._started = time.monotonic()
        self._has_figures = False
        self._tqdm = tqdm(
            total=total_steps,
            initial=start_step,
            file=self._stream,
            dynamic_ncols=True,
            leave=False,
            smoothing=0.05,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} eta {remaining}{postfix}",
        )
        self._tqdm.set_postfix_str("waiting for the first step")

    def advance(self, step: int) -> None:
        """Move the bar to `step`; cheap enough for every step."""
        steps = step - self._start_step
        if steps > 0 and not self._has_figures:
            pace = steps / (time.monotonic() - self._started)
            self._tqdm.set_postfix_str(f"{pace:.2f} steps/s", refresh=False)
        self._tqdm.update(step - self._tqdm.n)

    def show(self, figures: Sequence[str]) -> None:
        """Show `figures`, the most important first, as far as they fit beside the bar."""
        self._has_figures = True
        total = len(str(self._tqdm.total))
        others = len("100% || / eta , ") + 2 * total + len(_LONGEST_ETA)
        # Measured each time, since the user may change the size of the window.
        columns = os.get_terminal_size(self._stream.fileno()).columns
        self._tqdm.set_postfix_str(fit(figures, columns - others - _LEAST_BAR_WIDTH))

    def print_above(self, text: str, stream: TextIO) -> None:
        """Print lines above the bar."""
        self._tqdm.write(text, file=stream)

    def close(self) -> None:
        """Erase the bar."""
        self._tqdm.close()


class Progress:
    """The progress of a long command, as a context manager.

    A bar in a terminal. Elsewhere a line twice a minute, so that a job's log shows that the command
    is alive, and a pipe gets no control characters.
    """

    def __init__(self, total: int | None, title: str, unit: str = "img") -> None:
        self._total = total
        self._title = title
        self._unit = unit
        self._done = 0
        self._started = time.monotonic()
        self._printed = self._started
        self._bar: tqdm | None = None
        if is_terminal(sys.stderr):
            self._bar = tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1) -> None:
        """Note that `count` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            with contextlib.suppress(OSError, ValueError):
                print(self._line(now - self._started), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        elapsed = timedelta(seconds=round(seconds))
        if self._total is None:
            return f"{self._title}: {self._done} {self._unit}, {elapsed} elapsed"
        rest = seconds / self._done * (self._total - self._done) if self._done else 0.0
        remaining = timedelta(seconds=round(rest))
        return (
            f"{self._title}: {self._done} of {self._total} {self._unit}, "
            f"{elapsed} elapsed, {remaining} remaining"
        )


def fit(figures: Sequence[str], width: int) -> str:
    """As many of the first `figures`, separated by two spaces, as fit into `width` characters."""
    text = ""
    for figure in figures:
        longer = f"{text}  {figure}" if text else figure
        if len(longer) > width:
            break
        text = longer
    return text


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal with a size.

    A container may have a terminal of 0 x 0 characters, in which a bar shows nothing.
    """
    try:
        return min(os.get_terminal_size(stream.fileno())) > 0
    except (OSError, ValueError):
        return False
