"""The results of a suite: integer counts of each part, the figures of each set, and the tables."""

import csv
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from resnet_dist.evaluation.intervals import wilson_interval
from resnet_dist.evaluation.sets.corruptions import (
    average_errors,
    mean_corruption_error,
    mean_error,
    missing_corruptions,
)
from resnet_dist.evaluation.sets.suite_file import SuiteEntry
from resnet_dist.text import markdown_row

Figures = dict[str, float | int]
"""figures of a data set by name, for instance "top1"; what is not known is left out"""


@dataclass(frozen=True)
class PartCounts:
    """What was counted on one part of a data set."""

    num: int
    """images that count"""
    correct1: int
    correct5: int | None
    """None if there are fewer than six classes, and for label sets"""
    loss_sum: float
    num_bad: int
    """images that could not be decoded, which are misses"""


def _add_counts(first: PartCounts, second: PartCounts) -> PartCounts:
    """The counts of two parts together."""
    correct5 = None
    if first.correct5 is not None and second.correct5 is not None:
        correct5 = first.correct5 + second.correct5
    return PartCounts(
        num=first.num + second.num,
        correct1=first.correct1 + second.correct1,
        correct5=correct5,
        loss_sum=first.loss_sum + second.loss_sum,
        num_bad=first.num_bad + second.num_bad,
    )


@dataclass
class SetResult:
    """The results of one data set."""

    entry: SuiteEntry
    parts: dict[str, PartCounts] = field(default_factory=dict)
    """by the name of the part"""
    problem: str = ""
    """why the data set, or a part of it, could not be evaluated; empty if all was"""
    remarks: list[str] = field(default_factory=list)
    """sentences about what was assumed"""

    def total(self) -> PartCounts | None:
        """The counts of all parts together; None if there are none."""
        counts = list(self.parts.values())
        if not counts:
            return None
        total = counts[0]
        for further in counts[1:]:
            total = _add_counts(total, further)
        return total

    def figures(self) -> Figures:
        """The figures of the table, in percent: top1 with its interval, top5, loss, mce, ..."""
        total = self.total()
        if total is None or total.num == 0:
            return {}
        num = total.num
        interval = wilson_interval(total.correct1, num)
        figures: Figures = {
            "num": num,
            "top1": 100 * total.correct1 / num,
            "top1_low": interval.low,
            "top1_high": interval.high,
        }
        if total.correct5 is not None:
            figures["top5"] = 100 * total.correct5 / num
        if self.entry.kind != "real":
            figures["loss"] = total.loss_sum / num
        if total.num_bad:
            figures["bad_images"] = total.num_bad
        figures.update(self._corruption_figures())
        return figures

    def corruption_errors(self) -> dict[str, float]:
        """The error of each corruption that has all five severities, in [0, 1]."""
        errors = {}
        for name, counts in self.parts.items():
            if counts.num:
                accuracy = counts.correct1 / counts.num
                errors[name] = 1 - accuracy
        return average_errors(errors)

    def _corruption_figures(self) -> dict[str, float]:
        """The mean over all corruptions, if all are there."""
        if self.entry.kind not in ("imagenet_c", "cifar10_c"):
            return {}
        averages = self.corruption_errors()
        if missing_corruptions(averages):
            return {}
        if self.entry.kind == "imagenet_c":
            return {"mce": mean_corruption_error(averages)}
        return {"mean_error": mean_error(averages)}

    def as_plain(self) -> dict[str, Any]:
        """The results as plain types, for JSON."""
        options = {}
        for key, value in asdict(self.entry).items():
            if value:
                options[key] = value
        parts = {}
        for name, counts in self.parts.items():
            parts[name] = asdict(counts)
        return {
            **options,
            "problem": self.problem,
            "remarks": self.remarks,
            "figures": self.figures(),
            "parts": parts,
        }


def parts_from_plain(plain: Mapping[str, Any]) -> dict[str, PartCounts]:
    """The counts in the JSON of an earlier run.

    Args:
        plain: What `SetResult.as_plain` returned.

    Raises:
        KeyError, TypeError, AttributeError: It is damaged.
    """
    parts = {}
    for name, counts in plain["parts"].items():
        key = str(name)
        parts[key] = PartCounts(**counts)
    return parts


_TITLES = ("set", "images", "top-1 %", "95 % interval", "top-5 %", "loss", "further")
_ALIGNMENTS = ("---", "---:", "---:", "---:", "---:", "---:", "---")


def _cells(result: SetResult) -> list[str]:
    """One row of the table as texts."""
    name = result.entry.name
    figures = result.figures()
    if not figures:
        return [name, "", "", "", "", "", result.problem]
    low = _decimals(figures, "top1_low", 2)
    high = _decimals(figures, "top1_high", 2)
    return [
        name,
        str(figures["num"]),
        _decimals(figures, "top1", 2),
        f"{low} to {high}",
        _decimals(figures, "top5", 2),
        _decimals(figures, "loss", 3),
        _further_cell(result, figures),
    ]


def _decimals(figures: Figures, name: str, digits: int) -> str:
    """A figure with some digits behind the point; empty if it is not known."""
    if name not in figures:
        return ""
    return f"{figures[name]:.{digits}f}"


def _further_cell(result: SetResult, figures: Figures) -> str:
    """What only some sets have, and what went wrong."""
    parts = []
    mce = _decimals(figures, "mce", 2)
    if mce:
        parts.append(f"mCE {mce} %")
    error = _decimals(figures, "mean_error", 2)
    if error:
        parts.append(f"mean error {error} %")
    num_bad = figures.get("bad_images")
    if num_bad:
        parts.append(f"{num_bad} images cannot be decoded")
    if result.problem:
        parts.append(result.problem)
    return "; ".join(parts)


def format_markdown(results: list[SetResult]) -> str:
    """The table of a suite in Markdown."""
    lines = [
        markdown_row(_TITLES),
        markdown_row(_ALIGNMENTS),
    ]
    for result in results:
        cells = _cells(result)
        lines.append(markdown_row(cells))
    return "\n".join(lines) + "\n"


_COLUMNS = (
    "num",
    "top1",
    "top1_low",
    "top1_high",
    "top5",
    "loss",
    "mce",
    "mean_error",
    "bad_images",
)


def format_csv(results: list[SetResult]) -> str:
    """The table of a suite as CSV, with all digits."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    header = ["set", "kind", *_COLUMNS, "problem"]
    writer.writerow(header)
    for result in results:
        entry = result.entry
        figures = result.figures()
        values = [figures.get(column, "") for column in _COLUMNS]
        row = [entry.name, entry.kind, *values, result.problem]
        writer.writerow(row)
    return buffer.getvalue()
