"""What a sink is, and what it is told about the run."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from resnet_dist.config import LogConfig

Numbers = Mapping[str, float]
"""Values of one step: "train/loss", "val/top1" and so on."""


@dataclass(frozen=True)
class Picture:
    """A picture for a person to look at."""

    png: bytes
    """the content of a PNG file"""
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of plain values."""

    columns: list[str]
    rows: list[list[str | int | float]]


@dataclass(frozen=True)
class ConfusionMatrix:
    """The class and the predicted class of each image of an evaluation."""

    labels: list[int]
    predicted: list[int]
    class_names: list[str]


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint that is kept under a name, with its versions."""

    path: Path
    name: str
    facts: dict[str, Any]
    """plain values that describe it"""


Attachment = Picture | Table | ConfusionMatrix | CheckpointFile
"""What a sink may get beside numbers."""


@dataclass(frozen=True)
class RunInfo:
    """The run as a sink sees it."""

    folder: Path
    """output_dir"""
    config: LogConfig
    run_config: dict[str, Any]
    """the whole config as plain values"""
    start_step: int
    """number of updates before the first one of this process"""
    earlier: list[dict[str, Any]]
    """the lines of metrics.jsonl that earlier processes of the run have written and that stay"""
    last_steps: dict[str, int]
    """key -> last step at which an earlier process of the run logged it"""
    say: Callable[[str], None]
    """prints a sentence"""
    warn: Callable[[str], None]
    """prints a warning"""


class Sink(Protocol):
    """A place that gets the numbers of a run.

    The methods are called from one thread that belongs to the sink: they may wait, and they may
    raise anything. An exception ends the sink, with a warning, and not the training.
    """

    name: str
    """as a user knows it: "W&B" """
    location: str
    """where the numbers are, for the summary at the end; set by `start`"""

    def start(self, run: RunInfo) -> None:
        """Prepare. The library of the sink is imported here, and nowhere else."""

    def log(self, step: int, values: Numbers) -> None:
        """Record the values of one step."""

    def attach(self, step: int, key: str, item: Attachment) -> None:
        """Record something else than a number; a sink that cannot show it ignores it."""

    def close(self, exit_code: int) -> None:
        """Write what is left. `exit_code` is that of the training."""


def require_library(name: str, advice: str) -> None:
    """Check that the library of a sink is there.

    Args:
        name: What is imported.
        advice: What the user can do without it.

    Raises:
        ValueError: It is not installed.
    """
    if importlib.util.find_spec(name) is None:
        raise ValueError(f"{name} is not installed: {advice}")
