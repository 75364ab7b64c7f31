"""`resnet-dist report`: the results of one run, or a comparison of several runs or evaluations.

All figures are read from files: metrics.jsonl, evaluation.json and config.yaml of the runs, or
files that `resnet-dist evaluate` has written.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from resnet_dist.commands.report_input import (
    Evaluated,
    ReportedRun,
    read_evaluated,
    read_reported_run,
)
from resnet_dist.commands.report_page import render_evaluations, render_runs
from resnet_dist.commands.report_plots import plot_run, plot_runs
from resnet_dist.commands.report_text import (
    compare_runs,
    describe_evaluated,
    summarize_run,
)
from resnet_dist.files import write_file
from resnet_dist.text import printable

_SUFFIXES_OF_EVALUATIONS = (".parquet", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument(
        "output_dir",
        nargs="+",
        metavar="RUN_OR_FILE",
        help="folder of a run, with its metrics.jsonl; or files of evaluations: .parquet of "
        "`evaluate --predictions`, .json of `evaluate --details`. Several are compared",
    )
    parser.add_argument(
        "--out",
        default=None,
        metavar="PNG",
        help="the picture of runs; default: metrics.png in the first folder",
    )
    parser.add_argument(
        "--html",
        default=None,
        metavar="FILE",
        help="also write the report as one HTML page: curves, evaluations, images, settings",
    )


def run(args: argparse.Namespace) -> int:
    """Print the tables, draw the picture if matplotlib is installed, and write the HTML page.

    Returns:
        The exit code: 0, or 2 if there is nothing to report or a file cannot be written.
    """
    places = [Path(text) for text in args.output_dir]
    of_evaluations = [_is_evaluation(place) for place in places]
    try:
        if not any(of_evaluations):
            return _report_runs([read_reported_run(place) for place in places], args)
        if not all(of_evaluations):
            raise ValueError(
                "folders of runs and files of evaluations cannot be mixed: name either only runs "
                "or only files"
            )
        names = _short_names(places)
        files = []
        for place, name in zip(places, names, strict=True):
            files.append(read_evaluated(place, name))
    except ValueError as error:
        print(f"error: {printable(error)}")
        return 2
    return _report_evaluations(files, args)


def _is_evaluation(place: Path) -> bool:
    """Whether an argument names a file about an evaluation, and not a run."""
    return place.suffix in _SUFFIXES_OF_EVALUATIONS and not place.is_dir()


def _short_names(places: Sequence[Path]) -> list[str]:
    """Names that tell files apart: the file names, or whole paths if two of them are equal."""
    names = [printable(place.name) for place in places]
    if len(set(names)) == len(names):
        return names
    return [printable(place) for place in places]


def _report_runs(runs: Sequence[ReportedRun], args: argparse.Namespace) -> int:
    """Report about runs. Returns the exit code."""
    for each in runs:
        for remark in each.remarks:
            print(f"warning: {printable(remark)}")
    if len(runs) == 1:
        print(summarize_run(runs[0]))
    else:
        print(compare_runs(runs))

    picture = runs[0].history.folder / "metrics.png"
    if args.out:
        picture = Path(args.out)
    code = _draw(runs, picture)
    if args.html:
        page_code = _write_page(render_runs(runs), Path(args.html))
        code = max(code, page_code)
    return code


def _report_evaluations(files: Sequence[Evaluated], args: argparse.Namespace) -> int:
    """Report about evaluations. Returns the exit code."""
    print(describe_evaluated(files))
    if args.out:
        print("no picture: --out is for runs, and --html shows evaluations")
    if args.html:
        return _write_page(render_evaluations(files), Path(args.html))
    return 0


def _draw(runs: Sequence[ReportedRun], out: Path) -> int:
    """Draw the picture and write it to `out`. Returns the exit code."""
    histories = [each.history for each in runs]
    try:
        if len(histories) == 1:
            plot_run(histories[0], out)
        else:
            plot_runs(histories, out)
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


def _write_page(page: str, path: Path) -> int:
    """Write the HTML page to `path`. Returns the exit code."""
    try:
        write_file(path, page)
    except OSError as error:
        print(f"error: --html {printable(path)} cannot be written: {printable(error)}")
        return 2
    print(f"page: {printable(path)}")
    return 0
