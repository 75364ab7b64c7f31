"""Print messages and a progress bar: in a terminal, in a file, and in the log of a job.

In a terminal the bar is the last line of the screen, and messages appear above it. Elsewhere there
is no bar, since its control characters would fill a file or a pipe.
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

# The bar keeps at least this width, in characters; the figures beside it are left out first.
_LEAST_BAR_WIDTH = 10

# The widest remaining time for which the line has room.
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
        """Whether the bar is shown and standard output is a terminal.

        Lines with the same figures would then only repeat what the bar shows.
        """
        return self.bar is not None and is_terminal(sys.stdout)

    def say(self, text: str) -> None:
        """Print a message to standard output, above the progress bar."""
        self._print(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Print a warning to standard error, on one line."""
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

    Figures that do not fit into the width of the terminal are left out, the least important first.

    Args:
        total_steps: Number of steps at the end of the training.
        start_step: Number of steps that earlier processes have done.
    """

    def __init__(self, total_steps: int, start_step: int) -> None:
        # tqdm's monitor thread refreshes bars that are updated rarely. This one is updated in every
        # step.
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
        """Move the bar to `step`; cheap enough to call in every step."""
        steps = step - self._start_step
        if steps > 0 and not self._has_figures:
            seconds = time.monotonic() - self._started
            pace = steps / seconds
            self._tqdm.set_postfix_str(f"{pace:.2f} steps/s", refresh=False)
        self._tqdm.update(step - self._tqdm.n)

    def show(self, figures: Sequence[str]) -> None:
        """Show figures beside the bar.

        Args:
            figures: Short texts, the most important first. Those that do not fit are left out.
        """
        self._has_figures = True
        digits = len(str(self._tqdm.total))
        punctuation = len("100% || / eta , ")
        others = punctuation + 2 * digits + len(_LONGEST_ETA)
        # The user may change the size of the window at any time.
        descriptor = self._stream.fileno()
        columns = os.get_terminal_size(descriptor).columns
        room = columns - others - _LEAST_BAR_WIDTH
        self._tqdm.set_postfix_str(fit(figures, room))

    def print_above(self, text: str, stream: TextIO) -> None:
        """Print lines above the bar."""
        self._tqdm.write(text, file=stream)

    def close(self) -> None:
        """Erase the bar."""
        self._tqdm.close()


class Progress:
    """Show the progress of a long command, as a context manager.

    In a terminal this is a bar. Elsewhere a line is printed twice a minute, so that the log of a
    job shows that the command still runs, and a pipe gets no control characters.

    Args:
        total: Number of units at the end; None if it is not known.
        title: Text before the numbers.
        unit: What is counted.
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
        """Record that `count` more units are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._printed < _SECONDS_BETWEEN_LINES:
            return
        self._printed = now
        line = self._line(now - self._started)
        with contextlib.suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        """Format the progress after `seconds`."""
        elapsed = timedelta(seconds=round(seconds))
        if self._total is None:
            return f"{self._title}: {self._done} {self._unit}, {elapsed} elapsed"
        rest = 0.0
        if self._done:
            seconds_per_unit = seconds / self._done
            rest = seconds_per_unit * (self._total - self._done)
        remaining = timedelta(seconds=round(rest))
        return (
            f"{self._title}: {self._done} of {self._total} {self._unit}, "
            f"{elapsed} elapsed, {remaining} remaining"
        )


def fit(figures: Sequence[str], width: int) -> str:
    """Join as many of the first `figures` as fit into `width` characters, with two spaces."""
    text = ""
    for figure in figures:
        longer = f"{text}  {figure}" if text else figure
        if len(longer) > width:
            break
        text = longer
    return text


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal with a size.

    A container may have a terminal of 0 x 0 characters, which cannot show a bar.
    """
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return False
    return size.columns > 0 and size.lines > 0
