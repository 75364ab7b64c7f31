"""The history of a run, read from its metrics.jsonl."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resnet_dist.evaluation.intervals import Interval, wilson_interval
from resnet_dist.logs.metrics_file import Record, read_metrics
from resnet_dist.text import printable

# Two lines come from the same process if their start times, computed from time and elapsed seconds,
# differ by less than this. Clocks drift.
_SAME_START_SECONDS = 2.0

Clock = Literal["wall", "cpu"]
_CLOCK_KEYS = {"wall": "elapsed", "cpu": "elapsed_cpu"}

# A rank is slow in its data if it waits longer than the others, by at least this fraction of the
# time of a step.
_SLOW_SHARE = 0.05

# A rank computes slowly if its probe takes longer than that of the others, by at least this factor,
# in at least this fraction of the log lines, of which there are at least so many.
_SLOW_FACTOR = 1.2
_SLOW_LINES = 0.75
_FEWEST_LINES = 4


@dataclass(frozen=True)
class Curve:
    """One quantity over the course of a run."""

    epochs: list[float]
    """the epoch of each value"""
    values: list[float]
    """the values, as many as epochs"""


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation. Accuracies are in percent."""

    epoch: float
    """number of epochs trained before"""
    top1: float
    top5: float | None
    """None if there are fewer than six classes"""
    interval: Interval | None
    """confidence interval of top1; None if the line has no number of images"""


@dataclass(frozen=True)
class SlowRank:
    """A rank that needs more time than the others. Times are medians over the log lines."""

    rank: int
    phase: Literal["waiting for data", "computing"]
    seconds: float
    """of waiting for data per step, or of the probe (`ComputeProbe`)"""
    seconds_of_others: float
    """the median of the other ranks"""


@dataclass(frozen=True)
class RunHistory:
    """The metrics of one run."""

    folder: Path
    """the output_dir of the run"""
    records: list[Record]
    """the lines of metrics.jsonl, at least one"""

    @property
    def name(self) -> str:
        """The name of the folder."""
        return printable(self.folder.absolute().name)

    @property
    def last_step(self) -> int:
        """Number of updates at the last line."""
        last = self.records[-1]
        return int(last["step"])

    @property
    def last_epoch(self) -> float:
        """The largest number of epochs of any line; 0 if no line has one."""
        epochs = self.curve("train/epoch").epochs
        return max(epochs, default=0.0)

    def curve(self, key: str) -> Curve:
        """Read one quantity.

        Args:
            key: The name of the quantity in metrics.jsonl, as "train/loss".

        Returns:
            The lines in which `key` is a number.
        """
        epochs = []
        values = []
        for record in self.records:
            if _has_number(record, key):
                epochs.append(float(record["train/epoch"]))
                values.append(float(record[key]))
        return Curve(epochs, values)

    def evaluations(self, prefix: str) -> list[Evaluation]:
        """Read all evaluations.

        Args:
            prefix: "val" for the weights that are trained, "val_ema" for their average.
        """
        evaluations = []
        for record in self.records:
            if _has_number(record, f"{prefix}/top1"):
                evaluations.append(_evaluation(record, prefix))
        return evaluations

    def curves_of_ranks(self, key: str) -> list[Curve]:
        """Read a quantity that each rank has.

        The number of ranks may change when a run resumes. Only lines with as many ranks as the last
        one are used.

        Args:
            key: The name of the quantity in metrics.jsonl, as "ranks/data_seconds".

        Returns:
            A curve for each rank; empty if no line has the quantity.
        """
        epochs = []
        rows = []
        for record in self.records:
            values = record.get(key)
            if isinstance(values, list) and values and all(map(_is_number, values)):
                epochs.append(float(record.get("train/epoch", 0.0)))
                rows.append(values)
        curves = []
        num_ranks = len(rows[-1]) if rows else 0
        for rank in range(num_ranks):
            curve = Curve([], [])
            for epoch, values in zip(epochs, rows, strict=True):
                if len(values) == num_ranks:
                    curve.epochs.append(epoch)
                    curve.values.append(float(values[rank]))
            curves.append(curve)
        return curves

    def slow_ranks(self) -> list[SlowRank]:
        """Find the rank that delays the others by its data, and the one that computes slowly.

        Waiting for data: the rank with the longest median wait per step, if that is longer than the
        median of the other ranks by at least 5 % of a step.

        Computing: the rank with the longest median time of the probe, if its probe takes at least
        20 % longer than the median of the other ranks in at least three quarters of the log lines,
        of which there must be four or more. GPUs of one kind differ by some percent, and single
        lines are noisy.

        Returns:
            At most one rank of each phase.
        """
        found = [self._slow_in_data(), self._slow_in_computing()]
        return [each for each in found if each is not None]

    def _slow_in_data(self) -> SlowRank | None:
        step_seconds = self.curve("train/step_seconds").values
        waits = self._lines_of_ranks("ranks/data_seconds")
        if not step_seconds or not waits:
            return None
        rank, seconds, seconds_of_others = _slowest(waits)
        excess = seconds - seconds_of_others
        if excess < _SLOW_SHARE * statistics.median(step_seconds):
            return None
        return SlowRank(rank, "waiting for data", seconds, seconds_of_others)

    def _slow_in_computing(self) -> SlowRank | None:
        probes = self._lines_of_ranks("ranks/probe_seconds")
        if len(probes) < _FEWEST_LINES:
            return None
        rank, seconds, seconds_of_others = _slowest(probes)
        num_slow = 0
        for line in probes:
            if line[rank] >= _SLOW_FACTOR * _median_of_others(line, rank):
                num_slow += 1
        if num_slow < _SLOW_LINES * len(probes):
            return None
        return SlowRank(rank, "computing", seconds, seconds_of_others)

    def _lines_of_ranks(self, key: str) -> list[list[float]]:
        """For each log line a value of each rank; empty with fewer than two ranks."""
        curves = self.curves_of_ranks(key)
        if len(curves) < 2:
            return []
        values = [curve.values for curve in curves]
        return [list(line) for line in zip(*values, strict=True)]

    def seconds_so_far(self, clock: Clock = "wall") -> list[float]:
        """For each line, the seconds of its session and of all sessions before it.

        Args:
            clock: "wall" for the time that passed, "cpu" for the CPU time of the main process.

        Raises:
            ValueError: A line has no CPU time: an earlier version wrote it.
        """
        key = _CLOCK_KEYS[clock]
        seconds = []
        earlier_sessions = 0.0
        last_timed: Record | None = None
        for record in self.records:
            if "elapsed" in record:
                if key not in record:
                    raise ValueError(
                        f"{printable(self.folder)}/metrics.jsonl has no {key}: an earlier version "
                        "wrote it; set clock: wall in the study, or train in another output_dir"
                    )
                if last_timed is not None and not _same_session(last_timed, record):
                    earlier_sessions += last_timed[key]
                last_timed = record
            elapsed = 0.0
            if last_timed is not None:
                elapsed = last_timed[key]
            seconds.append(earlier_sessions + elapsed)
        return seconds

    def session_seconds(self) -> list[float]:
        """How long each session trained, without steps that a later session had to repeat.

        A session is one start of the program. A run that was interrupted and resumed has several.

        Returns:
            The seconds of each session, in order.
        """
        timed = [record for record in self.records if "elapsed" in record]
        seconds = []
        for number, record in enumerate(timed):
            is_last_line = number + 1 == len(timed)
            if not is_last_line:
                following = timed[number + 1]
                is_last_line = not _same_session(record, following)
            if is_last_line:
                seconds.append(float(record["elapsed"]))
        return seconds


def read_run(folder: Path) -> RunHistory:
    """Read the history of a run.

    Args:
        folder: The output_dir of the run.

    Raises:
        ValueError: metrics.jsonl cannot be read, or has no lines.
    """
    path = folder / "metrics.jsonl"
    try:
        records = read_metrics(path)
    except OSError as error:
        raise ValueError(
            f"{printable(path)} cannot be read ({error.strerror}): name the output_dir of a run"
        ) from error
    if not records:
        raise ValueError(f"{printable(path)} has no line yet: the run has not logged anything")
    return RunHistory(folder, records)


def _slowest(lines: Sequence[Sequence[float]]) -> tuple[int, float, float]:
    """The rank with the longest median time, that time, and the median of the other ranks."""
    medians = [statistics.median(values) for values in zip(*lines, strict=True)]
    seconds = max(medians)
    rank = medians.index(seconds)
    return rank, seconds, _median_of_others(medians, rank)


def _median_of_others(values: Sequence[float], rank: int) -> float:
    """The median of the values of all ranks but one."""
    others = list(values)
    del others[rank]
    return statistics.median(others)


def _same_session(record: Record, following: Record) -> bool:
    """Whether two lines with times were written by the same start of the program."""
    start = record["time"] - record["elapsed"]
    following_start = following["time"] - following["elapsed"]
    difference = abs(following_start - start)
    return bool(difference <= _SAME_START_SECONDS)


def _has_number(record: Record, key: str) -> bool:
    """Whether a line has a number under `key`, and an epoch."""
    value = record.get(key)
    epoch = record.get("train/epoch")
    return _is_number(value) and _is_number(epoch)


def _is_number(value: object) -> bool:
    """Whether a JSON value is a number. In Python, True and False are numbers too."""
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float))


def _evaluation(record: Record, prefix: str) -> Evaluation:
    """Read the evaluation in a line that has one."""
    top1 = float(record[f"{prefix}/top1"])
    top5 = record.get(f"{prefix}/top5")
    if top5 is not None:
        top5 = float(top5)
    num = record.get(f"{prefix}/num")
    interval = None
    if isinstance(num, int) and num > 0:
        # A line without the count: recover it from the accuracy.
        estimate = round(top1 * num / 100)
        correct = record.get(f"{prefix}/correct1", estimate)
        interval = wilson_interval(int(correct), num)
    return Evaluation(
        epoch=float(record["train/epoch"]),
        top1=top1,
        top5=top5,
        interval=interval,
    )
