"""Run the trainings of a study, one after the other, or submit them to SLURM."""

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from resnet_dist import __version__
from resnet_dist.files import write_file
from resnet_dist.launch.status import find_queued_job
from resnet_dist.studies.results import progress_of
from resnet_dist.studies.study import Study, Trial
from resnet_dist.text import printable

_PACKAGE = Path(__file__).parents[1]
_PROGRAM = (sys.executable, "-m", "resnet_dist.cli")

FIRST_SIGNALLED = 128
"""A shell shows 128 + signal for a program that a signal has ended."""


def run_missing(study: Study, args: argparse.Namespace) -> int:
    """Train what is not finished, one training after the other.

    Args:
        study: The study.
        args: `ranks`, the processes of each training; `submit`, the cluster settings with which the
            trainings are submitted instead, or None.

    Returns:
        0; 1 if a training failed; 128 + signal if one was interrupted, which ends the study.
    """
    code = 0
    for trial in study.trials:
        state = progress_of(trial).state
        if state == "finished":
            continue
        title = printable(f"{study.name}: {trial.run}, seed {trial.seed}")
        if args.submit:
            job = find_queued_job(trial.folder)
            if job:
                print(f"{title}: job {job} has not ended")
                continue
            command = _submit_command(trial, args.submit)
        else:
            command = train_command(trial.words, args.ranks)
            _write_origin(trial, command)
        print(f"{title} ({state})", flush=True)
        ended = _run(command)
        if ended >= FIRST_SIGNALLED:
            return ended
        if ended:
            print(f"{title}: exit code {ended}")
            code = 1
    return code


def train_command(words: Sequence[str], num_ranks: int) -> list[str]:
    """The command line that starts or resumes a training.

    Args:
        words: Its settings as options.
        num_ranks: Number of processes.
    """
    launcher = []
    if num_ranks > 1:
        launcher = ["launch", "--standalone", "--nproc_per_node", str(num_ranks)]
    return [*_PROGRAM, *launcher, "train", *words]


def _submit_command(trial: Trial, profile: str) -> list[str]:
    """The command line that submits a training with the cluster settings of a file."""
    return [*_PROGRAM, "submit", "--config", profile, *trial.words]


def _run(command: Sequence[str]) -> int:
    """Run a command, and return its exit code as a shell shows it."""
    with _interrupts_left_to_the_training():
        code = subprocess.run(command, check=False).returncode
    if code < 0:
        return FIRST_SIGNALLED - code
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


def _write_origin(trial: Trial, command: Sequence[str]) -> None:
    """Write `study.json` beside the metrics: command, commit and machine of the first start."""
    path = trial.folder / "study.json"
    if path.exists():
        return
    words = command[len(_PROGRAM) :]
    origin = {
        "command": ["resnet-dist", *words],
        "commit": _commit(),
        "version": __version__,
        "machine": _machine(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(origin, indent=1) + "\n")


def _commit() -> str:
    """The commit of the package, with "-dirty" if files differ from it; "" outside of git."""
    command = ["git", "-C", str(_PACKAGE), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _machine() -> str:
    """The GPUs, or the cores and the name of the processor if there are none."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    num_cores = len(os.sched_getaffinity(0))
    cores = "core" if num_cores == 1 else "cores"
    return f"{num_cores} {cores} of {_processor()}"


def _processor() -> str:
    """The name of the processor."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
