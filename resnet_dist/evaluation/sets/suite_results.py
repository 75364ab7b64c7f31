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

    def figures(self) -> dict[str, float | int]:
        """The figures of the table, in percent: top1 with its interval, top5, loss, mce, ..."""
        total = self.total()
        if total is None or total.num == 0:
            return {}
        interval = wilson_interval(total.correct1, total.num)
        figures: dict[str, float | int] = {
            "num": total.num,
            "top1": 100 * total.correct1 / total.num,
            "top1_low": interval.low,
            "top1_high": interval.high,
        }
        if total.correct5 is not None:
            figures["top5"] = 100 * total.correct5 / total.num
        if self.entry.kind != "real":
            figures["loss"] = total.loss_sum / total.num
        if total.num_bad:
            figures["bad_images"] = total.num_bad
        return {**figures, **self._corruption_figures()}

    def corruption_errors(self) -> dict[str, float]:
        """The error of each corruption that has all five severities, in [0, 1]."""
        errors = {}
        for name, counts in self.parts.items():
            if counts.num:
                errors[name] = 1 - counts.correct1 / counts.num
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
        plain = {}
        for key, value in asdict(self.entry).items():
            if value:
                plain[key] = value
        plain["problem"] = self.problem
        plain["remarks"] = self.remarks
        plain["figures"] = self.figures()
        parts = {}
        for name, counts in self.parts.items():
            parts[name] = asdict(counts)
        plain["parts"] = parts
        return plain


def parts_from_plain(plain: Mapping[str, Any]) -> dict[str, PartCounts]:
    """The counts in the JSON of an earlier run. Raises KeyError or TypeError if it is damaged."""
    parts = {}
    for name, counts in plain["parts"].items():
        parts[str(name)] = PartCounts(**counts)
    return parts


_TITLES = ("set", "images", "top-1 %", "95 % interval", "top-5 %", "loss", "further")
_ALIGNMENTS = ("---", "---:", "---:", "---:", "---:", "---:", "---")


def _cells(result: SetResult) -> list[str]:
    """One row of the table as texts."""
    figures = result.figures()
    if not figures:
        return [result.entry.name, "", "", "", "", "", result.problem]
    top5 = ""
    if "top5" in figures:
        top5 = f"{figures['top5']:.2f}"
    loss = ""
    if "loss" in figures:
        loss = f"{figures['loss']:.3f}"
    return [
        result.entry.name,
        str(figures["num"]),
        f"{figures['top1']:.2f}",
        f"{figures['top1_low']:.2f} to {figures['top1_high']:.2f}",
        top5,
        loss,
        _further_cell(result, figures),
    ]


def _further_cell(result: SetResult, figures: Mapping[str, float | int]) -> str:
    """What only some sets have, and what went wrong."""
    parts = []
    if "mce" in figures:
        parts.append(f"mCE {figures['mce']:.2f} %")
    if "mean_error" in figures:
        parts.append(f"mean error {figures['mean_error']:.2f} %")
    if "bad_images" in figures:
        parts.append(f"{figures['bad_images']} images cannot be decoded")
    if result.problem:
        parts.append(result.problem)
    return "; ".join(parts)


def format_markdown(results: list[SetResult]) -> str:
    """The table of a suite in Markdown."""
    lines = [markdown_row(_TITLES), markdown_row(_ALIGNMENTS)]
    for result in results:
        lines.append(markdown_row(_cells(result)))
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
    writer.writerow(["set", "kind", *_COLUMNS, "problem"])
    for result in results:
        figures = result.figures()
        values = [figures.get(column, "") for column in _COLUMNS]
        writer.writerow([result.entry.name, result.entry.kind, *values, result.problem])
    return buffer.getvalue()
