"""`resnet-dist study`: run what is missing of a study, and write its table, picture and page."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from resnet_dist.commands.study_forecast import say_what_is_missing
from resnet_dist.commands.study_page import describe_study, write_page
from resnet_dist.commands.study_trials import FIRST_SIGNALLED, run_missing
from resnet_dist.settings.reading import SettingsLoader
from resnet_dist.studies.results import progress_of, read_study_results
from resnet_dist.studies.study import Study, move_results
from resnet_dist.studies.study_file import read_study
from resnet_dist.text import printable


def add_study_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command to its parser."""
    parser.add_argument("files", nargs="+", metavar="STUDY", help="YAML files of studies")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of all trainings, for instance data.data_dir=/data/cifar10; repeatable",
    )
    parser.add_argument(
        "--ranks", type=int, default=1, metavar="N", help="processes of each training (default: 1)"
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="only say what is missing, and how long it takes where the speed is known",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="with --dry_run: train a tenth of an epoch of each run to know its speed, without "
        "evaluations",
    )
    parser.add_argument(
        "--submit",
        metavar="PROFILE",
        help="submit what is missing and not queued to SLURM, with the cluster settings of this "
        "YAML file",
    )
    parser.add_argument(
        "--collect",
        metavar="FOLDER",
        help="copy metrics.jsonl of the finished trainings to FOLDER/STUDY/RUN",
    )
    parser.add_argument(
        "--page",
        metavar="FILE",
        help="only write the page in Markdown, with pictures, from the results in --collect",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command.

    Returns:
        The exit code: 0; 1 if a training failed; 2 for a mistake in a study or an option; 128 +
        signal if a training was interrupted.
    """
    try:
        changes = _read_changes(args.set)
        studies = [read_study(Path(name), changes) for name in args.files]
        if args.page:
            _write_page(studies, args)
            return 0
        if args.dry_run:
            say_what_is_missing(studies, args.measure, args.ranks)
            return 0
        return _run_studies(studies, args)
    except (ValueError, OSError) as problem:
        print(f"error: {printable(problem)}", file=sys.stderr)
        return 2


def _read_changes(words: Sequence[str]) -> dict[str, Any]:
    """The settings that `--set` names. Raises ValueError for a word that is not KEY=VALUE."""
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--set is {word!r}: write KEY=VALUE, for instance train.epochs=2")
        try:
            changes[key] = yaml.load(value, Loader=SettingsLoader)
        except yaml.YAMLError as problem:
            raise ValueError(f"--set {word} is not valid YAML: {problem}") from problem
    return changes


def _write_page(studies: Sequence[Study], args: argparse.Namespace) -> None:
    """Write the page of the results that `--collect` has copied."""
    if not args.collect:
        raise ValueError("--page needs --collect, the folder that holds the results")
    folder = Path(args.collect)
    collected = [move_results(study, folder) for study in studies]
    try:
        write_page(collected, Path(args.page))
    except ImportError as problem:
        raise ValueError(
            "--page draws pictures with matplotlib: pip install 'resnet-dist[report]'"
        ) from problem
    print(f"page: {printable(args.page)}")


def _run_studies(studies: Sequence[Study], args: argparse.Namespace) -> int:
    """Run what is missing of all studies, and print their tables."""
    code = 0
    for study in studies:
        failed = run_missing(study, args)
        if failed >= FIRST_SIGNALLED:
            return failed
        code = max(code, failed)
        if args.collect:
            _collect(study, Path(args.collect))
        print(describe_study(study, read_study_results(study)))
    return code


def _collect(study: Study, folder: Path) -> None:
    """Copy what the page needs of the finished trainings."""
    for trial in study.trials:
        if progress_of(trial).state != "finished":
            continue
        place = folder / study.name / trial.folder.name
        place.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "study.json"):
            source = trial.folder / name
            if source.exists():
                shutil.copyfile(source, place / name)
