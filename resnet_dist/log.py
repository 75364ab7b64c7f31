"""The log of a run: console, `metrics.jsonl`, and sinks such as W&B.

Only the main process logs; in the others every call does nothing. Nothing that goes wrong here ends
a training: what cannot be written is warned about once. The single exception is a second process in
the same folder: the older one stops. `metrics.jsonl` is the source for reports; the sinks get the
same numbers.
"""

import math
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from resnet_dist.config import LogConfig
from resnet_dist.console import Console
from resnet_dist.metrics_file import MetricsFile, Record
from resnet_dist.sinks import build_sinks
from resnet_dist.sinks.background import CLOSE_SECONDS, BackgroundSink
from resnet_dist.sinks.base import RunInfo
from resnet_dist.text import printable


def _always_allowed() -> None:
    """The claim of a process that nobody can take over from."""


class Log:
    """Prints and records what happens: `start` before the first `metrics`, `close` at the end."""

    def __init__(
        self, config: LogConfig, output_dir: str, is_main: bool, run_config: dict[str, Any]
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
        self._warned_about_file = False

    def start(
        self,
        start_step: int,
        total_steps: int,
        evaluated: bool = True,
        check_claim: Callable[[], None] = _always_allowed,
    ) -> None:
        """Begin to log a training that has done `start_step` updates and ends at `total_steps`.

        Lines of metrics.jsonl about steps that are repeated are dropped: an earlier process may
        have got further than its last checkpoint. The progress bar and the sinks start here.

        Args:
            start_step: number of updates of the state that training starts from.
            total_steps: number of updates at the end.
            evaluated: whether the starting state has been evaluated already.
            check_claim: raises ValueError if another process has taken over the folder.
        """
        if not self.is_main:
            return
        self.start_step = start_step
        self.total_steps = total_steps
        self.started = time.monotonic()
        self.file = MetricsFile(self.folder / "metrics.jsonl", check_claim, evaluated)
        try:
            self.file.start(start_step)
        except OSError as error:
            self._warn_about_file(error)
        run = RunInfo(
            folder=self.folder,
            config=self.config,
            run_config=self.run_config,
            start_step=start_step,
            earlier=self.file.kept,
            last_steps=self.file.last_steps,
            say=self.say,
            warn=self.warn,
        )
        self.sinks = [BackgroundSink(sink, run) for sink in build_sinks(self.config)]
        if self.config.progress_bar:
            self.console.start_bar(total_steps, start_step)

    def progress(self, step: int) -> None:
        """Move the progress bar; cheap enough for every step."""
        if self.console.bar is not None:
            self.console.bar.advance(step)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Record `values` ("train/loss": ..., "val/top1": ...) of update `step` everywhere.

        Raises ValueError if another process has taken over the folder.
        """
        if not self.is_main:
            return
        # Numbers of numpy and torch become Python's.
        plain = {
            key: value.item() if hasattr(value, "item") else value for key, value in values.items()
        }
        self._write(step, plain)
        numbers = {key: value for key, value in plain.items() if isinstance(value, (int, float))}
        for sink in self.sinks:
            sink.log(step, numbers)
        self.progress(step)
        for prefix in ("train", "val", "val_ema"):
            if f"{prefix}/loss" in plain:
                self._show(step, prefix, plain)

    def say(self, text: str) -> None:
        """Print a sentence, above the progress bar."""
        self.console.say(text)

    def warn(self, text: str) -> None:
        """Print a sentence that the user should not miss."""
        self.console.warn(text)

    def summary(self, text: str) -> None:
        """Print the last words of the run, in place of the progress bar."""
        self.console.close_bar()
        self.console.say(text)

    def locations(self) -> dict[str, str]:
        """Where the numbers are: name of the sink -> address, folder or file."""
        return {sink.name: sink.location for sink in self.sinks}

    def close(self, exit_code: int = 0) -> None:
        """End the progress bar and the sinks, within about half a minute whatever the sinks do."""
        self.console.close_bar()
        if self.file is not None:
            try:
                self.file.flush()
            except ValueError:
                # Another process has taken over, and writes these steps itself.
                pass
            except OSError as error:
                self.warn(f"the last lines of {self.file.path} are lost: {error}")
        for sink in self.sinks:
            sink.request_close(exit_code)
        deadline = time.monotonic() + CLOSE_SECONDS
        for sink in self.sinks:
            sink.wait_closed(deadline)

    def _write(self, step: int, values: Mapping[str, Any]) -> None:
        assert self.file is not None, "Log.start comes before Log.metrics"
        record: Record = {
            "step": step,
            "time": round(time.time(), 3),
            "elapsed": round(time.monotonic() - self.started, 3),
        }
        record.update({key: _as_json(value) for key, value in values.items()})
        try:
            self.file.append(record)
        except OSError as error:
            self._warn_about_file(error)

    def _warn_about_file(self, error: OSError) -> None:
        if self._warned_about_file:
            return
        self._warned_about_file = True
        self.warn(
            f"{printable(self.folder / 'metrics.jsonl')} cannot be written ({printable(error)}); "
            "training continues, and the lines are kept in memory until it can be written again"
        )

    def _show(self, step: int, prefix: str, values: Mapping[str, Any]) -> None:
        """Print one group of values, or show it beside the progress bar."""
        place = f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"
        if prefix != "train":
            self.say(f"{place}  {_evaluation_line(prefix, values)}")
            return
        if self.console.bar is not None:
            self.console.bar.show(_figures(values))
        if not self.console.has_only_the_bar():
            self.say(f"{place}  {_training_line(values)}  eta {self._remaining(step)}")

    def _remaining(self, step: int) -> timedelta:
        """Time to the end at the mean pace so far, including evaluations and checkpoints."""
        seconds = time.monotonic() - self.started
        pace = seconds / max(1, step - self.start_step)
        return timedelta(seconds=round(pace * (self.total_steps - step)))


def build_log(config: LogConfig, output_dir: str, is_main: bool, run_config: dict[str, Any]) -> Log:
    """The log of a run in `output_dir`; silent unless `is_main`.

    `run_config` is the whole config as plain values, for the sinks that show it.
    """
    return Log(config, output_dir, is_main, run_config)


def _as_json(value: object) -> object:
    """`value`, or None for a number that JSON does not have."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number(values: Mapping[str, Any], key: str) -> float:
    return float(values.get(key, math.nan))


def _common(prefix: str, values: Mapping[str, Any]) -> str:
    """The columns that training and evaluation lines share."""
    epoch = _number(values, "train/epoch")
    loss = _number(values, f"{prefix}/loss")
    top1 = _number(values, f"{prefix}/top1")
    return f"epoch {epoch:6.2f}  {prefix:<7}  loss {loss:7.4f}  top1 {top1:6.2f} %"


def _evaluation_line(prefix: str, values: Mapping[str, Any]) -> str:
    line = _common(prefix, values)
    if f"{prefix}/top5" in values:
        line += f"  top5 {values[f'{prefix}/top5']:6.2f} %"
    return f"{line}  ({values.get(f'{prefix}/num')} images)"


def _training_line(values: Mapping[str, Any]) -> str:
    """The last log interval; the speed is in images per second, of all ranks."""
    lr = _number(values, "train/lr")
    speed = _number(values, "train/images_per_second")
    wait = 100 * _number(values, "train/data_wait_fraction")
    line = f"{_common('train', values)}  lr {lr:8.3g}  {speed:7.0f} img/s  wait {wait:5.1f} %"
    if values.get("train/bad_images"):
        line += f"  bad images {values['train/bad_images']}"
    return line


def _figures(values: Mapping[str, Any]) -> list[str]:
    """The figures of the progress bar, the most important first."""
    figures = [
        f"loss {_number(values, 'train/loss'):.3f}",
        f"{_number(values, 'train/images_per_second'):.0f} img/s",
        f"top1 {_number(values, 'train/top1'):.1f} %",
        f"wait {100 * _number(values, 'train/data_wait_fraction'):.0f} %",
        f"epoch {_number(values, 'train/epoch'):.2f}",
        f"lr {_number(values, 'train/lr'):.3g}",
    ]
    if values.get("train/bad_images"):
        figures.append(f"bad images {values['train/bad_images']}")
    return figures
