"""`resnet-dist evaluate --suite`: several data sets in one go, and one table of the results.

The tables are written again after each part. A later run with the same weights and settings takes
the parts that are finished from there.
"""

import argparse
import json
import sys
import tempfile
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from resnet_dist.checkpoints.saved_network import (
    SavedNetwork,
    build_network,
    load_into,
    preferred_kind,
)
from resnet_dist.commands.evaluate import count_mapped, hint_at_guessing, print_remarks
from resnet_dist.config import Config
from resnet_dist.data.types import ValLoader
from resnet_dist.distributed.process import run_process
from resnet_dist.distributed.runtime import Runtime
from resnet_dist.evaluation.sets.classes import ClassMap, map_classes
from resnet_dist.evaluation.sets.known_sets import Part, parts_of
from resnet_dist.evaluation.sets.label_sets import LabelSetCounter, read_label_sets, sets_of_rows
from resnet_dist.evaluation.sets.layouts import index_of
from resnet_dist.evaluation.sets.suite_file import SuiteEntry, read_suite
from resnet_dist.evaluation.sets.suite_results import (
    PartCounts,
    SetResult,
    format_csv,
    format_markdown,
    parts_from_plain,
)
from resnet_dist.files import write_file
from resnet_dist.models.zoo import check_image_size
from resnet_dist.text import printable

_STEM = "suite"


@dataclass(frozen=True)
class _Evaluation:
    """What all sets of a suite have in common."""

    saved: SavedNetwork
    model: nn.Module
    config: Config
    runtime: Runtime
    folder: Path
    """of the tables"""
    identity: dict[str, Any]
    """what the counts depend on beside the data"""

    @property
    def stem(self) -> Path:
        """The path of the tables without a suffix."""
        return self.folder / _STEM


def run(saved: SavedNetwork, config: Config, options: argparse.Namespace) -> int:
    """Evaluate a network on the data sets of a suite, and print and write the table.

    Of a checkpoint with averaged weights, these are evaluated. A data set that cannot be evaluated
    does not stop the others.

    Args:
        saved: The weights.
        config: The settings of their run.
        options: `suite`, the file; `output`, the folder for the tables; `json`, whether to print
            them as JSON.

    Returns:
        The exit code: 0, or 2 if something could not be evaluated.
    """
    suite = Path(options.suite)
    folder = Path(f"{suite.stem}_results")
    if options.output:
        folder = Path(options.output)

    def body(config: Config, runtime: Runtime) -> int:
        entries = runtime.on_main(lambda: read_suite(suite))
        with tempfile.TemporaryDirectory() as scratch:
            config = replace(config, output_dir=scratch)
            evaluation = _prepare(saved, config, runtime, folder)
            results = _evaluate_all(evaluation, entries)
        if runtime.is_main:
            _print_results(evaluation, results, options.json)
            _print_problems(results, folder)
        runtime.on_main(lambda: _write(evaluation, results))
        has_problem = any(result.problem for result in results)
        if has_problem:
            return 2
        return 0

    return run_process(config, body)


def _print_results(evaluation: _Evaluation, results: list[SetResult], as_json: bool) -> None:
    """Print the table, or all results as JSON."""
    text = format_markdown(results)
    if as_json:
        content = _as_plain(evaluation, results)
        text = json.dumps(content)
    print(text, flush=True)


def _prepare(saved: SavedNetwork, config: Config, runtime: Runtime, folder: Path) -> _Evaluation:
    """Build the network once for all sets.

    Args:
        saved: The weights.
        config: The settings.
        runtime: The process group.
        folder: The folder for the tables.

    Raises:
        ValueError: The weights do not fit, or the folder for the tables cannot be made.
    """
    check_image_size(config.model.name, config.data)
    runtime.on_main(lambda: _make_folder(folder))
    kind = preferred_kind(saved)
    model = build_network(saved, config, runtime.device)
    load_into(model, saved, kind)
    identity = _identify(saved, kind, config)
    if runtime.is_main:
        print_remarks(saved.remarks)
    return _Evaluation(
        saved=saved,
        model=model,
        config=config,
        runtime=runtime,
        folder=folder,
        identity=identity,
    )


def _identify(saved: SavedNetwork, kind: str, config: Config) -> dict[str, Any]:
    """What the counts depend on beside the data: the weights and how they are evaluated."""
    data = config.data
    return {
        "sha256": saved.sha256,
        "kind": kind,
        "model": asdict(config.model),
        "precision": config.train.precision,
        "val_resize_size": data.val_resize_size,
        "val_crop_size": data.val_crop_size,
        "val_interpolation": data.val_interpolation,
        "val_crops": data.val_crops,
        "val_scales": list(data.val_scales),
        "val_flip": data.val_flip,
        "mean": list(data.mean),
        "std": list(data.std),
    }


def _make_folder(folder: Path) -> None:
    """Make the folder for the tables. Raises ValueError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ValueError(
            f"--output {printable(folder)} cannot be made ({problem.strerror}): name another folder"
        ) from problem


def _evaluate_all(evaluation: _Evaluation, entries: list[SuiteEntry]) -> list[SetResult]:
    """Evaluate all sets, and write the tables after each part. Call it on every rank."""
    runtime = evaluation.runtime
    earlier = runtime.on_main(lambda: _read_earlier(evaluation))
    results = []
    for entry in entries:
        result = SetResult(entry)
        result.parts = _finished_parts(entry, earlier)
        num_finished = len(result.parts)
        if num_finished:
            path = evaluation.stem.with_suffix(".json")
            result.remarks.append(
                f"{num_finished} finished parts are taken from {path}; remove it to evaluate them "
                "again"
            )
        results.append(result)
    for result in results:
        _evaluate_set(evaluation, result, results)
        if runtime.is_main:
            name = result.entry.name
            remarks = [f"{name}: {remark}" for remark in result.remarks]
            print_remarks(remarks)
    return results


def _finished_parts(entry: SuiteEntry, earlier: dict[str, Any]) -> dict[str, PartCounts]:
    """The parts of a set in the file of an earlier run, if they were counted in the same way."""
    plain = earlier.get(entry.name)
    if not isinstance(plain, dict):
        return {}
    options = asdict(entry)
    for key, value in options.items():
        # Options without a value are not in the file.
        if plain.get(key, "") != value:
            return {}
    try:
        return parts_from_plain(plain)
    except (KeyError, TypeError, AttributeError):
        return {}


def _read_earlier(evaluation: _Evaluation) -> dict[str, Any]:
    """The sets in the JSON file of an earlier run with the same weights and settings."""
    path = evaluation.stem.with_suffix(".json")
    try:
        text = path.read_text()
        content = json.loads(text)
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    if content.get("identity") != evaluation.identity:
        return {}
    sets = content.get("sets")
    if not isinstance(sets, dict):
        return {}
    return sets


def _evaluate_set(evaluation: _Evaluation, result: SetResult, results: list[SetResult]) -> None:
    """Evaluate the parts of one set that are not finished.

    Args:
        evaluation: What all sets have in common.
        result: The results of the set, to which the parts are added.
        results: The results of all sets, which are written after each part.
    """
    is_main = evaluation.runtime.is_main
    problems = []
    parts = parts_of(result.entry)
    for part in parts:
        if part.name in result.parts:
            continue
        try:
            counts = _evaluate_part(evaluation, result, part)
            result.parts[part.name] = counts
            if is_main:
                _print_progress(result.entry, part, counts)
        except ValueError as problem:
            problems.append(str(problem))
        result.problem = _summary(problems, len(parts))
        if is_main:
            _keep(evaluation, results)


def _print_progress(entry: SuiteEntry, part: Part, counts: PartCounts) -> None:
    """Print one line to standard error: a suite may take hours."""
    title = printable(f"{entry.name} {part.name}").strip()
    line = f"{title}: {counts.correct1} of {counts.num} images"
    print(line, file=sys.stderr, flush=True)


def _summary(problems: list[str], num_parts: int) -> str:
    """One sentence about the parts that could not be evaluated."""
    if not problems:
        return ""
    first = printable(problems[0])
    if num_parts == 1:
        return first
    num_problems = len(problems)
    return f"{num_problems} of {num_parts} parts cannot be evaluated: {first}"


def _evaluate_part(evaluation: _Evaluation, result: SetResult, part: Part) -> PartCounts:
    """Evaluate one part of a set. Call it on every rank.

    Args:
        evaluation: What all sets have in common.
        result: The results of the set, to which remarks are added.
        part: The part.

    Raises:
        ValueError: On every rank, if it cannot be evaluated.
    """
    config = evaluation.config
    runtime = evaluation.runtime
    entry = result.entry
    loader = part.open(config, runtime)
    with closing(loader):
        class_map = _map_classes(evaluation, loader, result)
        counter = _label_set_counter(entry, loader, class_map, runtime)
        counts = count_mapped(evaluation.model, loader, class_map, config, runtime, counter)
        num_bad = runtime.sum_integer(loader.num_bad)
    figures = counts.result(class_map.num_competing)
    if entry.kind == "imagenet":
        hint = hint_at_guessing(figures["top1"], class_map, evaluation.saved.reported_top1)
        result.remarks.extend(hint)
    if counter is not None:
        hits, num = counter.reduce(runtime)
        return PartCounts(num, correct1=hits, correct5=None, loss_sum=0.0, num_bad=num_bad)
    correct5 = None
    if "correct5" in figures:
        correct5 = int(figures["correct5"])
    return PartCounts(
        num=int(figures["num"]),
        correct1=int(figures["correct1"]),
        correct5=correct5,
        loss_sum=float(counts.loss_sum),
        num_bad=num_bad,
    )


def _map_classes(evaluation: _Evaluation, loader: ValLoader, result: SetResult) -> ClassMap:
    """Find the output of each class of a part, and keep what is to be remarked, once for a set."""
    entry = result.entry
    names = evaluation.saved.names_or(loader.class_names)
    class_map = map_classes(
        loader.class_names,
        names,
        entry.classes,
        place=f"sets.{entry.name}: {entry.data}",
        option="classes: ",
    )
    for remark in class_map.remarks:
        if remark not in result.remarks:
            result.remarks.append(remark)
    return class_map


def _label_set_counter(
    entry: SuiteEntry,
    loader: ValLoader,
    class_map: ClassMap,
    runtime: Runtime,
) -> LabelSetCounter | None:
    """The counter for a data set whose images have several labels; None for another."""
    if entry.kind != "real":
        return None
    path = Path(entry.labels)
    label_sets = runtime.on_main(lambda: read_label_sets(path))
    index = index_of(loader)
    rows = sets_of_rows(index, label_sets, class_map.names)
    return LabelSetCounter(rows, runtime.device)


def _as_plain(evaluation: _Evaluation, results: list[SetResult]) -> dict[str, Any]:
    """All results as plain types."""
    saved = evaluation.saved
    step = None
    if not saved.is_foreign:
        step = saved.step
    sets = {}
    for result in results:
        name = result.entry.name
        sets[name] = result.as_plain()
    return {
        "weights": str(saved.path),
        "step": step,
        "identity": evaluation.identity,
        "sets": sets,
    }


def _write(evaluation: _Evaluation, results: list[SetResult]) -> None:
    """Write the three tables. Raises OSError."""
    content = _as_plain(evaluation, results)
    texts = {
        ".json": json.dumps(content, indent=1) + "\n",
        ".md": format_markdown(results),
        ".csv": format_csv(results),
    }
    for suffix, text in texts.items():
        path = evaluation.stem.with_suffix(suffix)
        write_file(path, text)


def _keep(evaluation: _Evaluation, results: list[SetResult]) -> None:
    """Write the tables so far. A full disk does not end the evaluation."""
    try:
        _write(evaluation, results)
    except OSError as problem:
        reason = printable(problem)
        print(f"warning: the tables cannot be written: {reason}", file=sys.stderr)


def _print_problems(results: list[SetResult], folder: Path) -> None:
    """Say where the tables are, and which sets are missing in them."""
    for result in results:
        if result.problem:
            text = printable(f"{result.entry.name}: {result.problem}")
            print(f"error: {text}", file=sys.stderr)
    stem = printable(folder / _STEM)
    print(f"tables: {stem}.json, .md and .csv", file=sys.stderr, flush=True)
