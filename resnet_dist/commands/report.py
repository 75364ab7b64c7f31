"""`resnet-dist report`: the results of one run, or a comparison of several runs.

All figures are read from the files metrics.jsonl of the runs.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from resnet_dist.commands.report_page import render_page
from resnet_dist.commands.report_plots import SPLITS, plot_run, plot_runs
from resnet_dist.files import write_file
from resnet_dist.history import Evaluation, RunHistory, read_run
from resnet_dist.intervals import difference_interval
from resnet_dist.text import printable

# A rank is reported as slow if it waits for data longer than the others, by at least this fraction
# of the time of a step.
_SLOW_SHARE = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument(
        "output_dir",
        nargs="+",
        help="folder of a run, with its metrics.jsonl; several are compared",
    )
    parser.add_argument(
        "--out",
        default=None,
        metavar="PNG",
        help="the picture; default: metrics.png in the first folder",
    )
    parser.add_argument(
        "--html",
        default=None,
        metavar="FILE",
        help="also write the report as one HTML page: curves, accuracies, settings",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table, draw the picture if matplotlib is installed, and write the HTML page.

    Returns:
        The exit code: 0, or 2 if there is nothing to report or a file cannot be written.
    """
    try:
        runs = [read_run(Path(folder)) for folder in args.output_dir]
    except ValueError as error:
        print(f"error: {printable(error)}")
        return 2
    if len(runs) == 1:
        print(summarize_run(runs[0]))
    else:
        print(compare_runs(runs))

    picture = runs[0].folder / "metrics.png"
    if args.out:
        picture = Path(args.out)
    code = _draw(runs, picture)
    if args.html:
        page_code = _write_page(runs, Path(args.html))
        code = max(code, page_code)
    return code


def summarize_run(run: RunHistory) -> str:
    """The table of one run, with a line for each of its results.

    It has the final and the best accuracy of the weights and of their moving average, the length of
    the run, its speed, and problems with the data.

    Args:
        run: the run.

    Returns:
        Several lines of text.
    """
    rows = {
        "run": printable(run.folder),
        "length": f"{run.last_step} steps, {run.last_epoch:.2f} epochs, {_duration(run)}",
    }
    rows.update(_accuracy_rows(run))
    rows.update(_speed_rows(run))
    bad_images = run.curve("train/bad_images").values
    if bad_images and bad_images[-1]:
        rows["bad images"] = f"{bad_images[-1]:.0f}"

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
        if evaluations:
            name = SPLITS[prefix][0]
            best = max(evaluations, key=_top1)
            rows[f"{name} final"] = _describe_evaluation(evaluations[-1])
            rows[f"{name} best"] = _describe_evaluation(best)
    return rows


def _speed_rows(run: RunHistory) -> dict[str, str]:
    """Images per second, the time of waiting for data, and the slowest rank."""
    rows = {}
    speeds = run.curve("train/images_per_second").values
    if speeds:
        speed = statistics.median(speeds)
        rows["speed"] = f"{speed:.0f} images/s (median)"
    waits = run.curve("train/data_wait_fraction").values
    if waits:
        percent = 100 * statistics.median(waits)
        rows["data wait"] = f"{percent:.1f} % of the time (median)"
    slowest = _describe_slowest_rank(run)
    if slowest:
        rows["slow rank"] = slowest
    return rows


def compare_runs(runs: Sequence[RunHistory]) -> str:
    """The table of several runs.

    Below the table is a sentence for each run after the first: whether its accuracy differs from
    that of the first run by more than chance.

    Args:
        runs: the runs.

    Returns:
        Several lines of text.
    """
    width = max(len(run.name) for run in runs)
    lines = [f"{'run':{width}}  epochs      time  train loss  val top-1  val top-5  best top-1"]
    for run in runs:
        lines.append(_comparison_row(run, width))
    first = runs[0]
    for other in runs[1:]:
        sentence = describe_difference(first, other)
        if sentence:
            lines.append(sentence)
    return "\n".join(lines)


def describe_difference(first: RunHistory, second: RunHistory) -> str:
    """Whether the final accuracies of two runs differ by more than chance.

    Args:
        first: the run to compare with.
        second: the other run.

    Returns:
        A sentence, or "" if a run has no evaluation with a confidence interval.
    """
    intervals = []
    for run in (first, second):
        evaluations = run.evaluations("val")
        if not evaluations or evaluations[-1].interval is None:
            return ""
        intervals.append(evaluations[-1].interval)
    difference = difference_interval(intervals[0], intervals[1])
    bounds = f"{difference.low:+.2f} to {difference.high:+.2f}"
    if difference.contains(0.0):
        return (
            f"{second.name} and {first.name}: no difference in final val top-1 beyond chance "
            f"(95 % interval {bounds} points)"
        )
    return (
        f"{second.name} has {difference.value:+.2f} points of final val top-1 against {first.name} "
        f"(95 % interval {bounds})"
    )


def _draw(runs: Sequence[RunHistory], out: Path) -> int:
    """Draw the picture and write it to `out`. Returns the exit code."""
    try:
        if len(runs) == 1:
            plot_run(runs[0], out)
        else:
            plot_runs(runs, out)
    except ImportError:
        print("no picture, since matplotlib is not installed: pip install resnet-dist[report]")
    except (OSError, ValueError) as error:
        print(
            f"error: the picture {printable(out)} cannot be written: {printable(error)}; "
            "--out names another file"
        )
        return 2
    else:
        print(f"picture: {printable(out)}")
    return 0


def _write_page(runs: Sequence[RunHistory], path: Path) -> int:
    """Write the HTML page to `path`. Returns the exit code."""
    sentences = []
    for other in runs[1:]:
        sentence = describe_difference(runs[0], other)
        if sentence:
            sentences.append(sentence)
    page = render_page(runs, sentences)
    try:
        write_file(path, page)
    except OSError as error:
        print(f"error: --html {printable(path)} cannot be written: {printable(error)}")
        return 2
    print(f"page: {printable(path)}")
    return 0


def _top1(evaluation: Evaluation) -> float:
    """The sort key of evaluations."""
    return evaluation.top1


def _describe_evaluation(evaluation: Evaluation) -> str:
    """The accuracies of an evaluation in percent, with the confidence interval of the first."""
    text = f"top-1 {evaluation.top1:6.2f} %"
    interval = evaluation.interval
    if interval is not None:
        text += f" (95 %: {interval.low:.2f} to {interval.high:.2f})"
    if evaluation.top5 is not None:
        text += f"   top-5 {evaluation.top5:6.2f} %"
    return f"{text}   at epoch {evaluation.epoch:.2f}"


def _comparison_row(run: RunHistory, width: int) -> str:
    """The line of a run in the table of several; unknown values are nan."""
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
        # The top-5 accuracy may be missing, for instance if there are few classes.
        if final.top5 is not None:
            final_top5 = final.top5
        best_top1 = max(map(_top1, evaluations))

    duration = timedelta(seconds=round(sum(run.session_seconds())))
    cells = [
        f"{run.name:{width}}",
        f"{run.last_epoch:6.2f}",
        f"{duration!s:>8}",
        f"{loss:10.4f}",
        f"{final_top1:9.2f}",
        f"{final_top5:9.2f}",
        f"{best_top1:10.2f}",
    ]
    return "  ".join(cells)


def _describe_slowest_rank(run: RunHistory) -> str:
    """The rank that waits longest for data.

    Returns:
        A sentence, or "" if the rank does not wait much longer than the others.
    """
    seconds = run.data_seconds_of_ranks()
    step_seconds = run.curve("train/step_seconds").values
    if len(seconds) < 2 or not step_seconds:
        return ""
    longest = max(seconds)
    slowest = seconds.index(longest)
    seconds_of_others = seconds[:slowest] + seconds[slowest + 1 :]
    others = statistics.median(seconds_of_others)
    excess = longest - others
    if excess < _SLOW_SHARE * statistics.median(step_seconds):
        return ""
    return (
        f"rank {slowest} waits {1000 * longest:.0f} ms per step for data, the others "
        f"{1000 * others:.0f} ms (medians)"
    )


def _duration(run: RunHistory) -> str:
    """The time of training, without breaks between sessions and without repeated steps."""
    seconds = run.session_seconds()
    total = timedelta(seconds=round(sum(seconds)))
    text = f"{total} h"
    if len(seconds) > 1:
        text += f" in {len(seconds)} sessions"
    return text
