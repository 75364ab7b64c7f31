"""The history of a run, as its metrics.jsonl tells it."""

import math
import statistics
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from resnet_dist.intervals import Interval, wilson_interval
from resnet_dist.metrics_file import Record, read_metrics
from resnet_dist.text import printable

# Two lines are of one process if their times tell of the same start, up to the drift of the clocks.
_SAME_START_SECONDS = 2.0


@dataclass(frozen=True)
class Curve:
    """The numbers of one key."""

    epochs: list[float]
    values: list[float]


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of one evaluation, in percent; top5 is None with fewer than six classes."""

    epoch: float
    top1: float
    top5: float | None
    interval: Interval | None
    """of top1; None if the line does not tell the number of images"""


@dataclass(frozen=True)
class RunHistory:
    """The lines of one run."""

    folder: Path
    records: list[Record]

    @property
    def name(self) -> str:
        """The name of the folder."""
        return printable(self.folder.absolute().name)

    @property
    def last_step(self) -> int:
        """Number of updates at the last line."""
        return int(self.records[-1]["step"])

    @property
    def last_epoch(self) -> float:
        """Epochs at the last line that tells them."""
        return max(self.curve("train/epoch").epochs, default=0.0)

    def curve(self, key: str) -> Curve:
        """The lines at which `key` has a number."""
        lines = [record for record in self.records if _has_number(record, key)]
        return Curve(
            [float(line["train/epoch"]) for line in lines], [float(line[key]) for line in lines]
        )

    def evaluations(self, prefix: str) -> list[Evaluation]:
        """All evaluations of the raw weights ("val") or of their average ("val_ema")."""
        lines = [record for record in self.records if _has_number(record, f"{prefix}/top1")]
        return [_evaluation(line, prefix) for line in lines]

    def data_seconds_of_ranks(self) -> list[float]:
        """For each rank, the median of the seconds per step that it waited for data.

        Empty if no line tells them; only lines with as many ranks as the last one count.
        """
        lines = [
            line["ranks/data_seconds"] for line in self.records if "ranks/data_seconds" in line
        ]
        alike = [line for line in lines if len(line) == len(lines[-1])]
        return [statistics.median(seconds) for seconds in zip(*alike, strict=True)]

    def session_seconds(self) -> list[float]:
        """How long each session trained, without what a later one had to repeat.

        A session is one start of the program. Interrupted and resumed, a run has several.
        """
        timed = [record for record in self.records if "elapsed" in record]
        starts = [record["time"] - record["elapsed"] for record in timed]
        seconds = []
        for number, (start, next_start) in enumerate(pairwise([*starts, math.inf])):
            is_last_line = abs(next_start - start) > _SAME_START_SECONDS
            if is_last_line:
                seconds.append(float(timed[number]["elapsed"]))
        return seconds


def read_run(folder: Path) -> RunHistory:
    """The history of the run in `folder`. Raises ValueError if there is none."""
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


def _has_number(record: Record, key: str) -> bool:
    return _is_number(record.get(key)) and _is_number(record.get("train/epoch"))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _evaluation(record: Record, prefix: str) -> Evaluation:
    top1 = float(record[f"{prefix}/top1"])
    top5 = record.get(f"{prefix}/top5")
    num = record.get(f"{prefix}/num")
    interval = None
    if isinstance(num, int) and num > 0:
        correct = record.get(f"{prefix}/correct1", round(top1 * num / 100))
        interval = wilson_interval(int(correct), num)
    return Evaluation(
        epoch=float(record["train/epoch"]),
        top1=top1,
        top5=None if top5 is None else float(top5),
        interval=interval,
    )
