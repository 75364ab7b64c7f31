"""`resnet-dist report`: the result of a run, or of several beside each other.

Everything comes from metrics.jsonl.
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

# A rank is called slow if it waits for data longer than the others by this share of a step.
_SLOW_SHARE = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
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
    """Print the table, and draw the picture if matplotlib is installed.

    Returns 0, or 2 if there is nothing to report or the picture cannot be written.
    """
    try:
        runs = [read_run(Path(folder)) for folder in args.output_dir]
    except ValueError as error:
        print(f"error: {printable(error)}")
        return 2
    print(summarize_run(runs[0]) if len(runs) == 1 else compare_runs(runs))
    out = Path(args.out) if args.out else runs[0].folder / "metrics.png"
    code = _draw(runs, out)
    return max(code, _write_page(runs, Path(args.html))) if args.html else code


def summarize_run(run: RunHistory) -> str:
    """The table of one run: final and best accuracy of raw and averaged weights, length, speed."""
    rows = {
        "run": printable(run.folder),
        "length": f"{run.last_step} steps, {run.last_epoch:.2f} epochs, {_duration(run)}",
    }
    for prefix in ("val", "val_ema"):
        evaluations = run.evaluations(prefix)
        if evaluations:
            name = SPLITS[prefix][0]
            best = max(evaluations, key=_top1)
            rows[f"{name} final"] = _describe_evaluation(evaluations[-1])
            rows[f"{name} best"] = _describe_evaluation(best)
    speeds = run.curve("train/images_per_second").values
    if speeds:
        rows["speed"] = f"{statistics.median(speeds):.0f} images/s (median)"
    waits = run.curve("train/data_wait_fraction").values
    if waits:
        rows["data wait"] = f"{100 * statistics.median(waits):.1f} % of the time (median)"
    slowest = _describe_slowest_rank(run)
    if slowest:
        rows["slow rank"] = slowest
    bad_images = run.curve("train/bad_images").values
    if bad_images and bad_images[-1]:
        rows["bad images"] = f"{bad_images[-1]:.0f}"
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}   {value}" for name, value in rows.items())


def compare_runs(runs: Sequence[RunHistory]) -> str:
    """A row for each run, and which differences in accuracy are more than chance."""
    width = max(len(run.name) for run in runs)
    header = f"{'run':{width}}  epochs      time  train loss  val top-1  val top-5  best top-1"
    lines = [header, *(_comparison_row(run, width) for run in runs)]
    first = runs[0]
    for other in runs[1:]:
        sentence = describe_difference(first, other)
        if sentence:
            lines.append(sentence)
    return "\n".join(lines)


def describe_difference(first: RunHistory, second: RunHistory) -> str:
    """Whether the final accuracies differ by more than chance; empty without evaluations."""
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
    """Draw the picture; returns the exit code."""
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
    """Write the HTML page; returns the exit code."""
    differences = [describe_difference(runs[0], other) for other in runs[1:]]
    page = render_page(runs, [sentence for sentence in differences if sentence])
    try:
        write_file(path, page)
    except OSError as error:
        print(f"error: --html {printable(path)} cannot be written: {printable(error)}")
        return 2
    print(f"page: {printable(path)}")
    return 0


def _top1(evaluation: Evaluation) -> float:
    return evaluation.top1


def _describe_evaluation(evaluation: Evaluation) -> str:
    text = f"top-1 {evaluation.top1:6.2f} %"
    if evaluation.interval is not None:
        text += f" (95 %: {evaluation.interval.low:.2f} to {evaluation.interval.high:.2f})"
    if evaluation.top5 is not None:
        text += f"   top-5 {evaluation.top5:6.2f} %"
    return f"{text}   at epoch {evaluation.epoch:.2f}"


def _comparison_row(run: RunHistory, width: int) -> str:
    losses = run.curve("train/loss").values
    loss = losses[-1] if losses else math.nan
    evaluations = run.evaluations("val")
    top1 = evaluations[-1].top1 if evaluations else math.nan
    top5 = evaluations[-1].top5 if evaluations else None
    best = max((evaluation.top1 for evaluation in evaluations), default=math.nan)
    seconds = timedelta(seconds=round(sum(run.session_seconds())))
    return (
        f"{run.name:{width}}  {run.last_epoch:6.2f}  {seconds!s:>8}  {loss:10.4f}  {top1:9.2f}  "
        f"{math.nan if top5 is None else top5:9.2f}  {best:10.2f}"
    )


def _describe_slowest_rank(run: RunHistory) -> str:
    """The rank that waits longest for data, if it costs a step more than the others' waiting."""
    seconds = run.data_seconds_of_ranks()
    step_seconds = run.curve("train/step_seconds").values
    if len(seconds) < 2 or not step_seconds:
        return ""
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    others = statistics.median(seconds[:slowest] + seconds[slowest + 1 :])
    excess = seconds[slowest] - others
    if excess < _SLOW_SHARE * statistics.median(step_seconds):
        return ""
    return (
        f"rank {slowest} waits {1000 * seconds[slowest]:.0f} ms per step for data, the others "
        f"{1000 * others:.0f} ms (medians)"
    )


def _duration(run: RunHistory) -> str:
    """Training time, without the breaks between sessions and without repeated steps."""
    seconds = run.session_seconds()
    text = f"{timedelta(seconds=round(sum(seconds)))} h"
    if len(seconds) > 1:
        text += f" in {len(seconds)} sessions"
    return text
