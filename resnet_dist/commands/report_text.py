"""The tables and sentences of `resnet-dist report`, as plain text."""

import math
import statistics
from collections.abc import Sequence
from datetime import timedelta

from resnet_dist.commands.report_input import (
    Evaluated,
    ReportedRun,
    compare_evaluated,
    different_images,
    group_by_recipe,
)
from resnet_dist.commands.report_plots import SPLITS
from resnet_dist.evaluation.calibration import Calibration
from resnet_dist.evaluation.comparison import difference_of_means, summarize_accuracies
from resnet_dist.evaluation.intervals import Interval, difference_interval
from resnet_dist.logs.history import Evaluation, RunHistory, SlowRank
from resnet_dist.text import printable

# Of a column in the table of several runs.
_CELL_WIDTH = 10


def summarize_run(run: ReportedRun) -> str:
    """The table of one run, with a line for each of its results.

    It has the final and the best accuracy of the weights and of their moving average, the length of
    the run, its speed, and problems with the data.

    Args:
        run: The run.

    Returns:
        Several lines of text.
    """
    history = run.history
    duration = _describe_duration(history)
    rows = {
        "run": printable(history.folder),
        "length": f"{history.last_step} steps, {history.last_epoch:.2f} epochs, {duration}",
    }
    rows.update(_accuracy_rows(history))
    rows.update(_detail_rows(run))
    rows.update(_speed_rows(history))
    rows.update(_bad_image_rows(history))

    width = max(map(len, rows))
    lines = []
    for name, value in rows.items():
        lines.append(f"{name:<{width}}   {value}")
    return "\n".join(lines)


def _accuracy_rows(run: RunHistory) -> dict[str, str]:
    """Final and best accuracy of the weights, and of their moving average if there is one."""
    rows = {}
    for prefix in ("val", "val_ema"):
        evaluations = run.evaluations(prefix)
        if not evaluations:
            continue
        name, _ = SPLITS[prefix]
        final = evaluations[-1]
        best = max(evaluations, key=_top1)
        rows[f"{name} final"] = _describe_evaluation(final)
        rows[f"{name} best"] = _describe_evaluation(best)
    return rows


def _detail_rows(run: ReportedRun) -> dict[str, str]:
    """Calibration, and the class with the lowest accuracy, if the run has an evaluation.json."""
    if run.evaluation is None:
        return {}
    details = run.evaluation.details
    if details is None:
        return {}
    rows = {}
    if details.calibration is not None:
        rows["calibration"] = _describe_calibration(details.calibration)
    # The classes are sorted by accuracy.
    worst = details.classes[0]
    class_names = details.network.class_names
    class_name = class_names[worst.label]
    name = printable(class_name)
    rows["worst class"] = f"{name}: {worst.correct1} of {worst.num} images"
    return rows


def _describe_calibration(calibration: Calibration) -> str:
    """The measures of calibration, on one line."""
    percent = 100 * calibration.ece
    figures = [
        f"ECE {percent:.2f} %",
        f"NLL {calibration.loss:.4f}",
        f"Brier {calibration.brier:.4f}",
    ]
    return ", ".join(figures)


def _speed_rows(run: RunHistory) -> dict[str, str]:
    """Images per second, memory, the time of waiting for data, and slow ranks."""
    rows = {}
    speeds = run.curve("train/images_per_second").values
    if speeds:
        speed = statistics.median(speeds)
        rows["speed"] = f"{speed:.0f} images/s (median)"

    waits = run.curve("train/data_wait_fraction").values
    if waits:
        percent = 100 * statistics.median(waits)
        rows["data wait"] = f"{percent:.1f} % of the time (median)"

    memory = run.curve("train/memory_gib").values
    if memory:
        peak = max(memory)
        rows["memory"] = f"{peak:.2f} GiB at most on a rank"

    slow_ranks = describe_slow_ranks(run)
    if slow_ranks:
        rows["slow rank"] = "; ".join(slow_ranks)
    return rows


def _bad_image_rows(run: RunHistory) -> dict[str, str]:
    """How many images could not be decoded, if there were any."""
    numbers = run.curve("train/bad_images").values
    if not numbers:
        return {}
    num_bad = numbers[-1]
    if not num_bad:
        return {}
    return {"bad images": f"{num_bad:.0f}"}


def describe_slow_ranks(run: RunHistory) -> list[str]:
    """The ranks that delay the others, and in which phase: a sentence each."""
    return [_describe_slow_rank(found) for found in run.slow_ranks()]


def _describe_slow_rank(found: SlowRank) -> str:
    """The rank, the phase, and its time beside that of the others."""
    own = 1000 * found.seconds
    others = 1000 * found.seconds_of_others
    if found.phase == "computing":
        return (
            f"rank {found.rank} computes slowly: {own:.2f} ms for a fixed matrix product, the "
            f"others {others:.2f} ms (medians)"
        )
    return (
        f"rank {found.rank} waits for data for {own:.0f} ms per step, the others {others:.0f} ms "
        "(medians)"
    )


def compare_runs(runs: Sequence[ReportedRun]) -> str:
    """The table of several runs, and below it what can be said about their differences.

    Args:
        runs: The runs.

    Returns:
        Several lines of text.
    """
    names = [run.name for run in runs]
    width = max(map(len, names))
    has_top5 = any(_has_top5(run.history) for run in runs)
    rows = []
    for run in runs:
        cells = _comparison_cells(run.history, has_top5)
        rows.append(cells)
    titles = list(rows[0])
    lines = [_comparison_line("run", titles, width)]
    for name, cells in zip(names, rows, strict=True):
        values = list(cells.values())
        line = _comparison_line(name, values, width)
        lines.append(line)
    lines.extend(describe_differences(runs))
    return "\n".join(lines)


def describe_differences(runs: Sequence[ReportedRun]) -> list[str]:
    """Sentences about the final accuracies of several runs.

    Runs that differ in their seed alone are one group, of which mean, deviation and interval are
    given. Each later group is compared with the first one.

    Args:
        runs: The runs, at least one.
    """
    groups = group_by_recipe(runs)
    sentences = []
    for group in groups:
        if len(group) > 1:
            sentence = _describe_seeds(group)
            sentences.append(sentence)
    first = groups[0]
    for group in groups[1:]:
        sentence = _describe_groups(first, group)
        sentences.append(sentence)
    return [sentence for sentence in sentences if sentence]


def _describe_seeds(group: Sequence[ReportedRun]) -> str:
    """Mean, deviation and interval of runs of one recipe; "" without evaluations.

    They are called seeds if no seed occurs twice.
    """
    values = _final_top1(group)
    if len(values) < 2:
        return ""
    names = _join_names(group)
    seeds = {run.settings.get("seed") for run in group}
    kind = "seeds"
    if len(seeds) < len(group):
        kind = "runs"
    summary = summarize_accuracies(values)
    interval = summary.interval
    bounds = f"{interval.low:.2f} to {interval.high:.2f} %"
    return (
        f"{names}: {summary.num} {kind} of one recipe, final val top-1 {summary.mean:.2f} %, "
        f"standard deviation {summary.deviation:.2f}, 95 % interval of the mean {bounds}"
    )


def _join_names(group: Sequence[ReportedRun]) -> str:
    """The names of several runs."""
    return ", ".join(run.name for run in group)


def _final_top1(group: Sequence[ReportedRun]) -> list[float]:
    """The accuracy of the last evaluation of each run that has one, in percent."""
    values = []
    for run in group:
        evaluations = run.history.evaluations("val")
        if evaluations:
            final = evaluations[-1]
            values.append(final.top1)
    return values


def _describe_groups(
    first: Sequence[ReportedRun],
    second: Sequence[ReportedRun],
) -> str:
    """Whether two groups of runs differ; a sentence, or "" without evaluations."""
    name = _join_names(second)
    other = _join_names(first)
    mismatch = different_images(first[0], second[0])
    if mismatch:
        return f"{name} and {other} cannot be compared: {mismatch}"

    are_single_runs = len(first) == 1 and len(second) == 1
    if are_single_runs:
        return describe_difference(first[0], second[0])

    values = _final_top1(second)
    values_of_first = _final_top1(first)
    fewest_seeds = min(len(values), len(values_of_first))
    if fewest_seeds < 2:
        return (
            f"{name} and {other}: no statement, since one of them has a single seed; train at "
            "least two seeds of each"
        )
    difference = difference_of_means(values_of_first, values)
    return _verdict(name, other, difference, "mean final val top-1")


def describe_difference(
    first: ReportedRun,
    second: ReportedRun,
) -> str:
    """Whether the final accuracies of two runs differ by more than chance.

    The test is paired if both runs have an evaluation.json about the same images.

    Args:
        first: The run to compare with.
        second: The other run.

    Returns:
        A sentence, or "" if a run has no evaluation with a confidence interval.
    """
    if first.evaluation is not None and second.evaluation is not None:
        return describe_pair(first.evaluation, second.evaluation)
    interval_of_first = _final_interval(first)
    interval_of_second = _final_interval(second)
    if interval_of_first is None or interval_of_second is None:
        return ""
    difference = difference_interval(interval_of_first, interval_of_second)
    return _verdict(second.name, first.name, difference, "final val top-1")


def _final_interval(run: ReportedRun) -> Interval | None:
    """The accuracy of the last evaluation with its interval; None if it is not known."""
    evaluations = run.history.evaluations("val")
    if not evaluations:
        return None
    return evaluations[-1].interval


def _verdict(
    name: str,
    other: str,
    difference: Interval,
    what: str,
) -> str:
    """A sentence about a difference; it is called one only if its interval does not contain 0.

    Args:
        name: The run, or the group of runs.
        other: What it is compared with.
        difference: The accuracy of `name` minus that of `other`.
        what: The name of this accuracy.
    """
    bounds = f"{difference.low:+.2f} to {difference.high:+.2f}"
    if difference.contains(0.0):
        return (
            f"{name} and {other}: no difference in {what} beyond chance "
            f"(95 % interval {bounds} points)"
        )
    return (
        f"{name} has {difference.value:+.2f} points of {what} against {other} "
        f"(95 % interval {bounds})"
    )


def describe_pair(
    first: Evaluated,
    second: Evaluated,
) -> str:
    """Whether two networks differ on the same images, by McNemar's exact test.

    Args:
        first: The network to compare with.
        second: The other network.

    Returns:
        A sentence; another one if the images differ.
    """
    test = compare_evaluated(first, second)
    if test is None:
        numbers = f"{len(second.is_hit)} and {len(first.is_hit)}"
        return (
            f"{second.name} and {first.name} cannot be compared: they were evaluated on different "
            f"images ({numbers})"
        )
    counts = (
        f"right where the other is wrong: {test.only_second} and {test.only_first} of "
        f"{test.num} images, McNemar p = {test.p_value:.2g}"
    )
    if not test.is_different:
        return f"{second.name} and {first.name}: no difference in top-1 beyond chance ({counts})"
    return f"{second.name} has {test.points:+.2f} points of top-1 against {first.name} ({counts})"


def describe_evaluated(files: Sequence[Evaluated]) -> str:
    """A table of evaluations, and each later one compared with the first one.

    Args:
        files: The evaluations, at least one.

    Returns:
        Several lines of text.
    """
    title = "evaluation"
    names = [each.name for each in files]
    width = max(map(len, [title, *names]))
    titles = f"{title:{width}}   images   top-1 (95 % interval)"
    if any(each.network.has_top5 for each in files):
        titles += "        top-5"
    lines = [titles]
    for each in files:
        row = _evaluated_row(each, width)
        lines.append(row)
    first = files[0]
    for other in files[1:]:
        sentence = describe_pair(first, other)
        lines.append(sentence)
    return "\n".join(lines)


def _evaluated_row(evaluated: Evaluated, width: int) -> str:
    """The line of an evaluation in the table of several, whose first column has `width`."""
    num_images = len(evaluated.is_hit)
    interval = evaluated.interval
    bounds = f"{interval.low:.2f} to {interval.high:.2f}"
    top1 = f"{interval.value:6.2f} % ({bounds})"
    cells = [
        f"{evaluated.name:{width}}",
        f"{num_images:7d}",
        f"{top1:<26}",
    ]
    if evaluated.network.has_top5:
        top5 = 100 * evaluated.num_top5_hits / num_images
        cell = f"{top5:6.2f} %"
        cells.append(cell)
    line = "  ".join(cells)
    return line.rstrip()


def _top1(evaluation: Evaluation) -> float:
    """The sort key of evaluations."""
    return evaluation.top1


def _describe_evaluation(evaluation: Evaluation) -> str:
    """The accuracies of an evaluation in percent, with the confidence interval of the first."""
    top1 = f"top-1 {evaluation.top1:6.2f} %"
    interval = evaluation.interval
    if interval is not None:
        bounds = f"{interval.low:.2f} to {interval.high:.2f}"
        top1 += f" (95 %: {bounds})"
    parts = [top1]
    if evaluation.top5 is not None:
        top5 = f"top-5 {evaluation.top5:6.2f} %"
        parts.append(top5)
    epoch = f"at epoch {evaluation.epoch:.2f}"
    parts.append(epoch)
    return "   ".join(parts)


def _has_top5(run: RunHistory) -> bool:
    """Whether any evaluation has a top-5 accuracy; there is none with fewer than six classes."""
    return any(evaluation.top5 is not None for evaluation in run.evaluations("val"))


def _comparison_cells(
    run: RunHistory,
    has_top5: bool,
) -> dict[str, str]:
    """The figures of a run in the table of several, by the title of their column.

    Args:
        run: The run.
        has_top5: Whether the table has a column of top-5 accuracies.

    Returns:
        The figures as text; unknown ones are nan.
    """
    loss = math.nan
    losses = run.curve("train/loss").values
    if losses:
        loss = losses[-1]

    final_top1 = math.nan
    final_top5 = math.nan
    best_top1 = math.nan
    evaluations = run.evaluations("val")
    if evaluations:
        final = evaluations[-1]
        final_top1 = final.top1
        if final.top5 is not None:
            final_top5 = final.top5
        best_top1 = max(map(_top1, evaluations))

    duration = _duration(run)
    cells = {
        "epochs": f"{run.last_epoch:.2f}",
        "time": str(duration),
        "train loss": f"{loss:.4f}",
        "val top-1": f"{final_top1:.2f}",
    }
    if has_top5:
        cells["val top-5"] = f"{final_top5:.2f}"
    cells["best top-1"] = f"{best_top1:.2f}"
    return cells


def _comparison_line(
    name: str,
    cells: Sequence[str],
    width: int,
) -> str:
    """A line of the table of several runs: a name in a column of `width`, and the cells."""
    columns = [name.ljust(width)]
    for cell in cells:
        column = cell.rjust(_CELL_WIDTH)
        columns.append(column)
    return "  ".join(columns)


def _describe_duration(run: RunHistory) -> str:
    """The time of training, and the number of sessions if there are several."""
    duration = _duration(run)
    num_sessions = len(run.session_seconds())
    if num_sessions > 1:
        return f"{duration} h in {num_sessions} sessions"
    return f"{duration} h"


def _duration(run: RunHistory) -> timedelta:
    """The time of training, without breaks between sessions and without repeated steps."""
    seconds = sum(run.session_seconds())
    return timedelta(seconds=round(seconds))
