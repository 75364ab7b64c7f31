"""The table of a study, and the page in Markdown of several studies."""

import json
import os
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from resnet_dist.commands.report_plots import plot_runs
from resnet_dist.evaluation.comparison import SeedSummary
from resnet_dist.files import write_file
from resnet_dist.studies.results import (
    Result,
    Results,
    paired_difference,
    read_study_results,
    summarize,
)
from resnet_dist.studies.study import Study, Trial
from resnet_dist.text import markdown_table

_HEADER = """# Results

This page is written by `make results-page` from the study files in
[configs/studies](../configs/studies) and the metrics in [results](results). Do not edit it.
`make results DATA=FOLDER` runs what is missing and resumes what was interrupted;
`resnet-dist study FILE --dry_run --measure` says before how long it takes.

Each row is the mean over the seeds that have finished. The deviation is that of one training, the
interval contains the mean over all seeds with 95 % confidence (Student's t, cut to 0 and 100 %).
Two runs are compared seed by seed; a difference counts only if its interval does not contain zero.
"""


def describe_study(study: Study, results: Results) -> str:
    """The table of a study and its comparisons, in Markdown.

    Args:
        study: The study.
        results: What `read_study_results` returned for it.
    """
    time = "time"
    if study.clock == "cpu":
        time = "CPU time"
    titles = [
        "run",
        "seeds",
        study.metric,
        "deviation",
        "95 % interval",
        time,
        "images/s",
    ]
    for target in study.targets:
        titles.append(f"{time} to {target:g} %")
    rows = []
    for run in study.run_names():
        row = _run_row(study, run, results[run])
        rows.append(row)
    table = markdown_table(titles, rows)
    if not study.compare:
        return table

    lines = [table, ""]
    for first, second in study.compare:
        sentence = _compare(results, first, second)
        lines.append(f"- {sentence}")
    return "\n".join(lines)


def write_page(studies: Sequence[Study], path: Path) -> None:
    """Write the page of several studies, and a picture beside the results of each.

    Args:
        studies: The studies, in the order of the page.
        path: The file of the page.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: A file cannot be written.
    """
    sections = [_HEADER]
    waiting = []
    for study in studies:
        results = read_study_results(study)
        has_results = any(results.values())
        if has_results:
            section = _section(study, results, path)
            sections.append(section)
        else:
            waiting.append(f"- **{study.title}** (`{study.name}`): {study.question}")
    if waiting:
        sections.extend(["## Not run yet", "", *waiting, ""])
    page = "\n".join(sections)
    write_file(path, page)


def _section(study: Study, results: Results, page: Path) -> str:
    """One study on the page.

    Args:
        study: The study.
        results: Its results, at least one.
        page: The file of the page, to which links are relative.
    """
    paragraphs = [
        f"## {study.title}",
        study.question,
        describe_study(study, results),
    ]
    picture = _draw(study, results, page)
    paragraphs.append(f"![{study.metric} of {study.title}]({picture})")
    if study.notes:
        paragraphs.append(study.notes.strip())
    commands = _commands(study)
    paragraphs.extend(
        [
            "<details><summary>Every training</summary>",
            _table_of_trainings(results, page),
            f"{commands}\n</details>\n",
        ]
    )
    return "\n\n".join(paragraphs)


def _run_row(study: Study, run: str, results: Sequence[Result]) -> list[str]:
    """The cells of one run.

    Args:
        study: The study.
        run: The name of the run.
        results: Its finished trainings.
    """
    num_seeds = len(study.of_run(run))
    seeds = _seeds_cell(len(results), num_seeds)
    cells = [run, seeds]
    if not results:
        # Deviation, interval, time, speed and the time to each target.
        num_empty = 4 + len(study.targets)
        cells.append("not run")
        cells.extend([""] * num_empty)
        return cells

    mean_seconds = statistics.fmean(result.seconds for result in results)
    cells.extend(_accuracy_cells(results))
    cells.append(_duration(mean_seconds))
    cells.append(_speed_cell(results))
    for target in study.targets:
        cell = _target_cell(results, target)
        cells.append(cell)
    return cells


def _seeds_cell(num_finished: int, num_seeds: int) -> str:
    """How many seeds have finished."""
    if num_finished == num_seeds:
        return str(num_seeds)
    return f"{num_finished} of {num_seeds}"


def _accuracy_cells(results: Sequence[Result]) -> list[str]:
    """Mean, deviation and interval; for a single seed only its value."""
    summary = summarize(results)
    if summary is None:
        accuracy = results[0].accuracy
        return [f"{accuracy:.2f} %", "one seed", "one seed"]
    interval = summary.interval
    return [
        f"{summary.mean:.2f} %",
        f"{summary.deviation:.2f}",
        f"{interval.low:.2f} to {interval.high:.2f}",
    ]


def _speed_cell(results: Sequence[Result]) -> str:
    """The median speed over the lines of all trainings."""
    speeds = []
    for result in results:
        curve = result.history.curve("train/images_per_second")
        speeds.extend(curve.values)
    if not speeds:
        return ""
    median = statistics.median(speeds)
    return f"{median:.0f}"


def _target_cell(results: Sequence[Result], target: float) -> str:
    """The mean time to a target, if every seed has reached it."""
    times = []
    for result in results:
        seconds = result.seconds_to_target.get(target)
        if seconds is not None:
            times.append(seconds)
    num_reached = len(times)
    num_results = len(results)
    if num_reached < num_results:
        return f"{num_reached} of {num_results} reached it"
    mean_seconds = statistics.fmean(times)
    return _duration(mean_seconds)


def _compare(results: Results, first: str, second: str) -> str:
    """One sentence about the difference of two runs."""
    difference = paired_difference(results[first], results[second])
    title = f"{second} against {first}"
    if difference is None:
        return f"{title}: fewer than two seeds of both have finished, so nothing follows."
    return f"{title}: {_describe_difference(difference)}"


def _describe_difference(difference: SeedSummary) -> str:
    """The difference with its interval, and whether it is one."""
    interval = difference.interval
    bounds = f"{interval.low:+.2f} to {interval.high:+.2f}"
    numbers = f"{difference.mean:+.2f} points, 95 % interval {bounds} over {difference.num} seeds"
    if interval.contains(0.0):
        return f"{numbers}: no difference is shown."
    return f"{numbers}."


def _table_of_trainings(results: Results, page: Path) -> str:
    """The accuracy of each training, with its origin."""
    titles = ["run", "seed", "accuracy", "commit", "machine", "metrics"]
    rows = []
    for of_run in results.values():
        for result in of_run:
            row = _training_row(result, page)
            rows.append(row)
    return markdown_table(titles, rows)


def _training_row(result: Result, page: Path) -> list[str]:
    """The cells of one training."""
    trial = result.trial
    origin = _read_origin(trial)
    metrics = _relative(trial.folder / "metrics.jsonl", page)
    return [
        trial.run,
        str(trial.seed),
        f"{result.accuracy:.2f} %",
        origin.get("commit", ""),
        origin.get("machine", ""),
        f"[metrics.jsonl]({metrics})",
    ]


def _read_origin(trial: Trial) -> dict[str, str]:
    """The content of study.json; empty if there is none."""
    path = trial.folder / "study.json"
    if not path.exists():
        return {}
    origin: dict[str, str] = json.loads(path.read_text())
    return origin


def _commands(study: Study) -> str:
    """The command of the first seed of each run."""
    lines = []
    for run in study.run_names():
        first = study.of_run(run)[0]
        options = shlex.join(first.words)
        lines.append(f"resnet-dist train {options}")
    commands = "\n".join(lines)
    return f"```text\n{commands}\n```"


def _draw(study: Study, results: Results, page: Path) -> str:
    """Draw the curves of the first finished seed of each run.

    Args:
        study: The study.
        results: Its results, at least one.
        page: The file of the page.

    Returns:
        The path of the picture, as the page links to it.
    """
    histories = []
    for of_run in results.values():
        if of_run:
            first = of_run[0]
            histories.append(first.history)
    folder = study.trials[0].folder.parent
    picture = folder / "curves.png"
    plot_runs(histories, picture)
    return _relative(picture, page)


def _relative(path: Path, page: Path) -> str:
    """A path as the page links to it."""
    relative = os.path.relpath(path, page.parent)
    return Path(relative).as_posix()


def _duration(seconds: float) -> str:
    """A duration as "4 min 59 s"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s"
