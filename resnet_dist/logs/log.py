"""The log of a run: console, `metrics.jsonl`, and sinks such as W&B.

Only the main process logs; in the others every call does nothing. An error of the log does not end
the training: it is printed once, as a warning. There is one exception: when a second process has
started in the same folder, the older one stops. `metrics.jsonl` is the source for reports; the
sinks get the same numbers.
"""

import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from resnet_dist.config import LogConfig
from resnet_dist.logs.console import Console
from resnet_dist.logs.metrics_file import MetricsFile, Record
from resnet_dist.logs.sinks import build_sinks
from resnet_dist.logs.sinks.background import CLOSE_SECONDS, BackgroundSink
from resnet_dist.logs.sinks.base import Attachment, RunInfo
from resnet_dist.text import printable


def _always_allowed() -> None:
    """Check the claim of a process whose folder no other process uses."""


class Log:
    """Print and record the metrics and messages of a run.

    Call `start` before the first `metrics`, and `close` at the end.

    Args:
        config: The section `log` of the config.
        output_dir: The folder of the run.
        is_main: Whether this is the main process; in the others every method does nothing.
        run_config: The whole config as plain values, for the sinks that show it.
    """

    def __init__(
        self,
        config: LogConfig,
        output_dir: str,
        is_main: bool,
        run_config: dict[str, Any],
    ) -> None:
        self.config = config
        self.is_main = is_main
        self.run_config = run_config
        self.folder = Path(output_dir)
        self.console = Console(is_main)
        self.file: MetricsFile | None = None
        self.sinks: list[BackgroundSink] = []
        self.start_step = 0
        self.total_steps = 0
        self.started = time.monotonic()
        self.cpu_at_start = time.process_time()
        self._warned_about_file = False

    def start(
        self,
        start_step: int,
        total_steps: int,
        evaluated: bool = True,
        check_claim: Callable[[], None] = _always_allowed,
    ) -> None:
        """Start the metrics file, the sinks and the progress bar.

        An earlier process may have trained further than its last checkpoint. The lines of
        metrics.jsonl about the steps that are repeated are removed.

        Args:
            start_step: Number of updates of the state that training starts from.
            total_steps: Number of updates at the end.
            evaluated: Whether the starting state has been evaluated already.
            check_claim: Raises ValueError if another process has taken over the folder.
        """
        if not self.is_main:
            return
        self.start_step = start_step
        self.total_steps = total_steps
        self.started = time.monotonic()
        self.cpu_at_start = time.process_time()
        path = self.folder / "metrics.jsonl"
        self.file = MetricsFile(path, check_claim, evaluated)
        try:
            self.file.start(start_step)
        except OSError as error:
            self._warn_about_file(error)
        self._start_sinks(self.file)
        if self.config.progress_bar:
            self.console.start_bar(total_steps, start_step)

    def _start_sinks(self, file: MetricsFile) -> None:
        """Start the sinks of the config, each in a thread."""
        run = RunInfo(
            folder=self.folder,
            config=self.config,
            run_config=self.run_config,
            start_step=self.start_step,
            earlier=file.kept,
            last_steps=file.last_steps,
            say=self.say,
            warn=self.warn,
        )
        self.sinks = []
        for sink in build_sinks(self.config):
            in_background = BackgroundSink(sink, run)
            self.sinks.append(in_background)

    def progress(self, step: int) -> None:
        """Move the progress bar to `step`; cheap enough to call in every step."""
        if self.console.bar is not None:
            self.console.bar.advance(step)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Record metrics in the file and the sinks, and print a line about them.

        Args:
            step: The update that they belong to.
            values: The metrics, such as "train/loss" or "val/top1".

        Raises:
            ValueError: Another process has taken over the folder.
        """
        if not self.is_main:
            return
        plain = {}
        numbers = {}
        for key, value in values.items():
            # Numbers of NumPy and torch become those of Python.
            if hasattr(value, "item"):
                value = value.item()
            plain[key] = value
            if isinstance(value, (int, float)):
                numbers[key] = value
        self._write(step, plain)
        for sink in self.sinks:
            sink.log(step, numbers)
        self.progress(step)
        for prefix in ("train", "val", "val_ema"):
            if f"{prefix}/loss" in plain:
                self._show(step, prefix, plain)

    def attach(self, step: int, key: str, item: Attachment) -> None:
        """Give a picture, a table or a file to the sinks; each shows what it can.

        Args:
            step: The update that it belongs to.
            key: Its name, such as "samples".
            item: The picture, table or file.
        """
        for sink in self.sinks:
            sink.attach(step, key, item)

    def say(self, text: str) -> None:
        """Print a sentence, above the progress bar."""
        self.console.say(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.warn(text)

    def summary(self, text: str) -> None:
        """Print the summary of the run, in place of the progress bar."""
        self.console.close_bar()
        self.console.say(text)

    def locations(self) -> dict[str, str]:
        """Return the address, folder or file of each sink, by the name of the sink."""
        found = {}
        for sink in self.sinks:
            found[sink.name] = sink.location
        return found

    def close(self, exit_code: int = 0) -> None:
        """Close the progress bar, the metrics file and the sinks.

        This takes at most about half a minute, even if a sink hangs.

        Args:
            exit_code: The exit code of the training, for the sinks.
        """
        self.console.close_bar()
        if self.file is not None:
            self._flush_file(self.file)
        for sink in self.sinks:
            sink.request_close(exit_code)
        deadline = time.monotonic() + CLOSE_SECONDS
        for sink in self.sinks:
            sink.wait_closed(deadline)

    def _flush_file(self, file: MetricsFile) -> None:
        """Write the lines that are still in memory, or warn that they are lost."""
        try:
            file.flush()
        except ValueError:
            # Another process has taken over the folder, and writes these steps itself.
            return
        except OSError as error:
            self.warn(f"the last lines of {file.path} are lost: {error}")

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        assert self.file is not None, "Log.start comes before Log.metrics"
        elapsed = time.monotonic() - self.started
        elapsed_cpu = time.process_time() - self.cpu_at_start
        record: Record = {
            "step": step,
            "time": round(time.time(), 3),
            "elapsed": round(elapsed, 3),
            "elapsed_cpu": round(elapsed_cpu, 3),
        }
        for key, value in values.items():
            record[key] = _as_json(value)
        try:
            self.file.append(record)
        except OSError as error:
            self._warn_about_file(error)

    def _warn_about_file(self, error: OSError) -> None:
        """Warn once that metrics.jsonl cannot be written."""
        if self._warned_about_file:
            return
        self._warned_about_file = True
        path = printable(self.folder / "metrics.jsonl")
        reason = printable(error)
        self.warn(
            f"{path} cannot be written ({reason}); "
            "training continues, and the lines are kept in memory until it can be written again"
        )

    def _show(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        """Print the metrics with a prefix, or show them beside the progress bar."""
        total = str(self.total_steps)
        number = str(step).rjust(len(total))
        place = f"step {number}/{total}"
        if prefix != "train":
            line = _evaluation_line(prefix, values)
            self.say(f"{place}  {line}")
            return
        if self.console.bar is not None:
            figures = _figures(values)
            self.console.bar.show(figures)
        if not self.console.has_only_the_bar():
            line = _training_line(values)
            remaining = self._remaining(step)
            self.say(f"{place}  {line}  eta {remaining}")

    def _remaining(self, step: int) -> timedelta:
        """Estimate the time to the end from the mean time per step, evaluations included."""
        seconds = time.monotonic() - self.started
        steps_done = max(1, step - self.start_step)
        seconds_per_step = seconds / steps_done
        steps_left = self.total_steps - step
        seconds_left = round(seconds_per_step * steps_left)
        return timedelta(seconds=seconds_left)


def build_log(
    config: LogConfig,
    output_dir: str,
    is_main: bool,
    run_config: dict[str, Any],
) -> Log:
    """Create the log of a run; see `Log` for the arguments."""
    return Log(config, output_dir, is_main, run_config)


def _as_json(value: object) -> object:
    """Return `value`, or None for NaN and infinity, which JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    """Return a metric, or NaN if it is missing."""
    value = values.get(key, math.nan)
    return float(value)


def _common(prefix: str, values: Mapping[str, Any]) -> str:
    """Format the columns that training and evaluation lines share."""
    epoch = _number(values, "train/epoch")
    loss = _number(values, f"{prefix}/loss")
    top1 = _number(values, f"{prefix}/top1")
    columns = [
        f"epoch {epoch:6.2f}",
        f"{prefix:<7}",
        f"loss {loss:7.4f}",
        f"top1 {top1:6.2f} %",
    ]
    return "  ".join(columns)


def _evaluation_line(prefix: str, values: Mapping[str, Any]) -> str:
    """Format an evaluation, with the number of its images."""
    line = _common(prefix, values)
    top5 = values.get(f"{prefix}/top5")
    if top5 is not None:
        line += f"  top5 {top5:6.2f} %"
    num_images = values.get(f"{prefix}/num")
    return f"{line}  ({num_images} images)"


def _training_line(values: Mapping[str, Any]) -> str:
    """Format a log interval of the training; the speed is in images per second of all ranks."""
    common = _common("train", values)
    lr = _number(values, "train/lr")
    speed = _number(values, "train/images_per_second")
    wait = 100 * _number(values, "train/data_wait_fraction")
    columns = [
        common,
        f"lr {lr:8.3g}",
        f"{speed:7.0f} img/s",
        f"wait {wait:5.1f} %",
    ]
    if "gpu/memory_gib" in values:
        columns.append(_gpu_column(values))
    bad_images = values.get("train/bad_images")
    if bad_images:
        columns.append(f"bad images {bad_images}")
    return "  ".join(columns)


def _gpu_column(values: Mapping[str, Any]) -> str:
    """Format the speed of one GPU and its memory."""
    speed = _number(values, "gpu/images_per_second")
    allocated = _number(values, "gpu/memory_gib")
    peak = _number(values, "gpu/peak_memory_gib")
    return f"per GPU {speed:.0f} img/s, {allocated:.1f} GiB (peak {peak:.1f})"


def _figures(values: Mapping[str, Any]) -> list[str]:
    """Format the figures beside the progress bar, the most important first."""
    loss = _number(values, "train/loss")
    speed = _number(values, "train/images_per_second")
    top1 = _number(values, "train/top1")
    wait = 100 * _number(values, "train/data_wait_fraction")
    epoch = _number(values, "train/epoch")
    lr = _number(values, "train/lr")
    figures = [
        f"loss {loss:.3f}",
        f"{speed:.0f} img/s",
        f"top1 {top1:.1f} %",
        f"wait {wait:.0f} %",
        f"epoch {epoch:.2f}",
        f"lr {lr:.3g}",
    ]
    bad_images = values.get("train/bad_images")
    if bad_images:
        figures.append(f"bad images {bad_images}")
    return figures
