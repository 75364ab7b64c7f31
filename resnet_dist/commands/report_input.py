"""What `resnet-dist report` reads: runs, and files about evaluations."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from resnet_dist.checkpoints.resume_rules import FREE_TO_CHANGE
from resnet_dist.data.arrays import BoolArray
from resnet_dist.evaluation.comparison import PairedTest, paired_test
from resnet_dist.evaluation.evaluation_file import (
    EVALUATION_FILE,
    EvaluatedNetwork,
    EvaluationDetails,
    read_evaluation,
)
from resnet_dist.evaluation.intervals import Interval, wilson_interval
from resnet_dist.evaluation.predictions_file import read_predictions
from resnet_dist.logs.history import RunHistory, read_run
from resnet_dist.logs.sinks.wandb import URL_FILE
from resnet_dist.text import printable


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The result of an evaluation for each image."""

    name: str
    """what the report calls it"""
    network: EvaluatedNetwork
    images: str
    """a hash of the paths and labels of all images"""
    is_hit: BoolArray
    """[n]: whether the most probable class of each image is its label"""
    num_top5_hits: int
    details: EvaluationDetails | None
    """None for a file of predictions"""

    @property
    def interval(self) -> Interval:
        """Top-1 accuracy in percent, with its 95 % confidence interval."""
        return wilson_interval(int(self.is_hit.sum()), len(self.is_hit))


@dataclass(frozen=True, eq=False)
class ReportedRun:
    """A run, as the report shows it."""

    history: RunHistory
    settings: dict[str, str]
    """values as JSON by "section.key"; empty if config.yaml is missing or damaged"""
    evaluation: Evaluated | None
    """the content of evaluation.json, if it is there"""
    wandb_url: str
    """address of the run at W&B; empty if it is offline or disabled"""
    remarks: list[str] = field(default_factory=list)
    """sentences about files that cannot be read"""

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.history.name

    def recipe(self) -> dict[str, str]:
        """The settings that influence the weights, without the seed."""
        return {key: value for key, value in self.settings.items() if not _is_free(key)}


def _is_free(key: str) -> bool:
    """Whether a setting has no influence on the weights, or is the seed."""
    section = key.partition(".")[0]
    return key == "seed" or key in FREE_TO_CHANGE or section in FREE_TO_CHANGE


def read_reported_run(folder: Path) -> ReportedRun:
    """Read a run.

    Args:
        folder: Its output_dir.

    Raises:
        ValueError: metrics.jsonl cannot be read, or has no lines.
    """
    history = read_run(folder)
    remarks = []
    evaluation = None
    path = folder / EVALUATION_FILE
    if path.exists():
        try:
            evaluation = read_evaluated(path, history.name)
        except ValueError as problem:
            remarks.append(str(problem))
    return ReportedRun(
        history=history,
        settings=_read_settings(folder / "config.yaml"),
        evaluation=evaluation,
        wandb_url=_read_url(folder / URL_FILE),
        remarks=remarks,
    )


def read_evaluated(path: Path, name: str) -> Evaluated:
    """Read an evaluation.json, or a Parquet file of predictions.

    Args:
        path: The file; the suffix .parquet means predictions.
        name: What the report calls it.

    Raises:
        ValueError: The file cannot be read, or is damaged.
    """
    if path.suffix == ".parquet":
        found = read_predictions(path)
        return Evaluated(name, found.network, found.images, found.is_hit, found.num_top5_hits, None)
    details = read_evaluation(path)
    return Evaluated(
        name,
        details.network,
        details.images,
        details.is_hit,
        details.num_top5_hits,
        details,
    )


def compare_evaluated(first: Evaluated, second: Evaluated) -> PairedTest | None:
    """Compare two networks on the same images; None if the images differ."""
    if first.images != second.images:
        return None
    return paired_test(first.is_hit, second.is_hit)


def different_images(first: ReportedRun, second: ReportedRun) -> str:
    """Why two runs do not share a validation set; "" if they do, as far as is known."""
    if first.evaluation is not None and second.evaluation is not None:
        if first.evaluation.images == second.evaluation.images:
            return ""
        return "they were evaluated on different images"
    numbers = []
    for run in (first, second):
        values = run.history.curve("val/num").values
        if values:
            numbers.append(int(values[-1]))
    if len(numbers) == 2 and numbers[0] != numbers[1]:
        return f"they were evaluated on {numbers[1]} and {numbers[0]} images"
    for key in ("data.kind", "data.data_dir"):
        if first.settings.get(key) != second.settings.get(key):
            return (
                f"{key} is {second.settings.get(key)} and {first.settings.get(key)}, and there is "
                "no evaluation.json that tells whether the images are the same"
            )
    return ""


def group_by_recipe(runs: Sequence[ReportedRun]) -> list[list[ReportedRun]]:
    """Put the runs together that differ in their seed alone, and share a validation set.

    A run whose settings are not known is a group of its own. The groups, and the runs in them, keep
    their order.
    """
    groups: list[list[ReportedRun]] = []
    for run in runs:
        recipe = run.recipe()
        same = None
        for group in groups:
            is_same_recipe = bool(recipe) and group[0].recipe() == recipe
            if is_same_recipe and not different_images(group[0], run):
                same = group
        if same is None:
            groups.append([run])
        else:
            same.append(run)
    return groups


def _read_url(path: Path) -> str:
    """The address of the run at W&B; empty if there is none."""
    try:
        url = path.read_text().strip()
    except (OSError, ValueError):
        return ""
    if not url.startswith(("https://", "http://")):
        return ""
    return printable(url)


def _read_settings(path: Path) -> dict[str, str]:
    """Read config.yaml.

    Returns:
        The values as JSON, by "section.key"; empty if the file is missing or damaged.
    """
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    flat: dict[str, str] = {}
    if isinstance(tree, dict):
        _flatten(tree, "", flat)
    return flat


def _flatten(tree: dict[str, Any], prefix: str, flat: dict[str, str]) -> None:
    """Add the values of a tree to `flat`, with their keys joined by dots."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            _flatten(value, f"{name}.", flat)
        else:
            flat[name] = json.dumps(value, default=str)
