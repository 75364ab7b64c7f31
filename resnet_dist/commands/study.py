"""`resnet-dist study`: run what is missing of a study, and write its table, picture and page."""

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from resnet_dist import __version__
from resnet_dist.commands.study_page import describe_study, write_page
from resnet_dist.files import write_file
from resnet_dist.logs.history import RunHistory, read_run
from resnet_dist.settings.reading import SettingsLoader
from resnet_dist.study import (
    Study,
    Trial,
    TrialProgress,
    move_results,
    progress_of,
    read_study,
    read_study_results,
)
from resnet_dist.text import printable

_PACKAGE = Path(__file__).parents[1]

# A shell shows 128 + signal for a program that a signal has ended.
_SIGNALLED = 128

# Part of an epoch that `--measure` trains.
_MEASURED_EPOCHS = 0.1


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
        help="with --dry_run: train a tenth of an epoch of each run to know its speed",
    )
    parser.add_argument(
        "--submit",
        metavar="PROFILE",
        help="submit what is missing to SLURM, with the cluster settings of this YAML file",
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
        if args.page and not args.collect:
            raise ValueError("--page needs --collect, the folder that holds the results")
        if args.page:
            collected = [move_results(study, Path(args.collect)) for study in studies]
            write_page(collected, Path(args.page))
            print(f"page: {printable(args.page)}")
            return 0
        if args.dry_run:
            return _say_what_is_missing(studies, args.measure)
        return _run_studies(studies, args)
    except (ValueError, OSError) as problem:
        print(f"error: {printable(problem)}", file=sys.stderr)
        return 2


def _read_changes(words: Sequence[str]) -> dict[str, Any]:
    """The settings that `--set` names."""
    changes = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--set is {word!r}: write KEY=VALUE, for instance train.epochs=2")
        changes[key] = yaml.load(value, Loader=SettingsLoader)
    return changes


def _run_studies(studies: Sequence[Study], args: argparse.Namespace) -> int:
    """Run what is missing of all studies, and print their tables."""
    code = 0
    for study in studies:
        failed = _run_missing(study, args)
        if failed >= _SIGNALLED:
            return failed
        code = max(code, failed)
        if args.collect:
            _collect(study, Path(args.collect))
        print(describe_study(study, read_study_results(study)))
    return code


def _run_missing(study: Study, args: argparse.Namespace) -> int:
    """Train what is not finished, one training after the other.

    Returns:
        0; 1 if a training failed; 128 + signal if one was interrupted, which ends the study.
    """
    code = 0
    for training in study.trainings:
        progress = progress_of(training)
        if progress.state == "finished":
            continue
        command = _command(training, args)
        print(f"{_title(training, study)} ({progress.state})", flush=True)
        if not args.submit:
            _write_origin(training, command)
        with _interrupts_left_to_the_training():
            ended = subprocess.run(command, check=False).returncode
        if ended < 0:
            ended = _SIGNALLED - ended
        if ended >= _SIGNALLED:
            return ended
        if ended:
            print(f"{_title(training, study)}: exit code {ended}")
            code = 1
    return code


@contextlib.contextmanager
def _interrupts_left_to_the_training() -> Iterator[None]:
    """Do nothing at Ctrl-C, which the terminal sends to the training as well.

    Python would kill the training a quarter of a second later, before it has saved.
    """

    def wait_for_it(signal_number: int, frame: FrameType | None) -> None:
        """The exit code of the training tells that it was interrupted."""

    before = signal.signal(signal.SIGINT, wait_for_it)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _title(training: Trial, study: Study) -> str:
    """Study, run and seed, for messages."""
    return printable(f"{study.name}: {training.run}, seed {training.seed}")


def _command(training: Trial, args: argparse.Namespace) -> list[str]:
    """The command line that starts or resumes a training."""
    program = [sys.executable, "-m", "resnet_dist.cli"]
    if args.submit:
        return [*program, "submit", "--config", args.submit, *training.words]
    if args.ranks == 1:
        return [*program, "train", *training.words]
    launcher = ["launch", "--standalone", "--nproc_per_node", str(args.ranks)]
    return [*program, *launcher, "train", *training.words]


def _write_origin(training: Trial, command: Sequence[str]) -> None:
    """Write `study.json` beside the metrics: command, commit and machine of the first start."""
    path = training.folder / "study.json"
    if path.exists():
        return
    origin = {
        "command": ["resnet-dist", *command[3:]],
        "commit": _commit(),
        "version": __version__,
        "machine": _machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(origin, indent=1) + "\n")


def _commit() -> str:
    """The commit of the package, with "-dirty" if files differ from it; "" outside of git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return ""
    return done.stdout.strip()


def _machine() -> str:
    """The processor, or the GPUs if there are any."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
                break
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


def _collect(study: Study, folder: Path) -> None:
    """Copy what the page needs of the finished trainings."""
    for training in study.trainings:
        if progress_of(training).state != "finished":
            continue
        place = folder / study.name / training.folder.name
        place.mkdir(parents=True, exist_ok=True)
        for name in ("metrics.jsonl", "study.json"):
            source = training.folder / name
            if source.exists():
                shutil.copyfile(source, place / name)


def _say_what_is_missing(studies: Sequence[Study], measures: bool) -> int:
    """Print the state of each training and the time that is left, where the speed is known."""
    total = 0.0
    unknown = 0
    for study in studies:
        print(f"{printable(study.name)}: {printable(study.title)}")
        rates: dict[str, float | None] = {}
        for training in study.trainings:
            progress = progress_of(training)
            line = f"  {printable(training.run)}, seed {training.seed}: {progress.state}"
            if progress.state != "finished":
                if training.run not in rates:
                    rates[training.run] = _seconds_per_epoch(study, training.run, measures)
                rate = rates[training.run]
                left = training.config.train.epochs - progress.epochs
                line += f", {left:g} epochs left"
                if rate is None:
                    unknown += 1
                else:
                    total += left * rate
                    line += f", about {_minutes(left * rate)}"
            print(line)
    print(f"in all: {_minutes(total)}")
    if unknown:
        print(f"and {unknown} trainings of unknown speed: --measure measures it")
    return 0


def _minutes(seconds: float) -> str:
    """A duration in words."""
    return f"{seconds / 60:.1f} min"


def _seconds_per_epoch(study: Study, run: str, measures: bool) -> float | None:
    """The time of an epoch of a run, from one of its trainings or from a measurement."""
    for training in study.of_run(run):
        progress = progress_of(training)
        rate = _measured_rate(progress)
        if rate is not None:
            return rate
    if not measures:
        return None
    return _measure(study.of_run(run)[0])


def _measured_rate(progress: TrialProgress) -> float | None:
    """Seconds per epoch, evaluation included, of a training that has logged something."""
    if progress.history is None or not progress.epochs:
        return None
    return progress.history.seconds_so_far()[-1] / progress.epochs


def _measure(training: Trial) -> float:
    """Train a small part of an epoch, and return the seconds of a whole one without evaluation.

    Raises:
        ValueError: The training fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        short = {
            "output_dir": folder,
            "train.epochs": _MEASURED_EPOCHS,
            "schedule.warmup_epochs": 0,
            "train.eval_interval_epochs": 0,
            "log.interval_steps": 1,
            "log.wandb": "disabled",
        }
        words = list(training.words)
        for key, value in short.items():
            words += [f"--{key}", str(value)]
        done = subprocess.run(
            [sys.executable, "-m", "resnet_dist.cli", "train", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ValueError(f"{training.run} cannot be measured: {done.stderr.strip()[-300:]}")
        return _rate_of_steps(read_run(Path(folder)))


def _rate_of_steps(history: RunHistory) -> float:
    """Seconds per epoch from the times of the steps, without the first ones."""
    seconds = history.curve("train/step_seconds").values
    settled = seconds[len(seconds) // 2 :]
    mean = sum(settled) / len(settled)
    epochs_per_step = history.last_epoch / history.last_step
    return mean / epochs_per_step
