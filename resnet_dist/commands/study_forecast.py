"""What is missing of studies, and how long it takes: `resnet-dist study --dry_run`."""

import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from resnet_dist.commands.study_trials import train_command
from resnet_dist.logs.history import RunHistory, read_run
from resnet_dist.studies.results import TrialProgress, progress_of
from resnet_dist.studies.study import Study, Trial
from resnet_dist.text import printable

# Part of an epoch that a measurement trains, and the fewest steps that tell a speed.
_MEASURED_EPOCHS = 0.1
_FEWEST_STEPS = 10

# What a measurement changes, besides its length and its folder.
_MEASURED_SETTINGS = {
    "schedule.warmup_epochs": 0,
    "train.eval_interval_epochs": 0,
    "log.interval_steps": 1,
    "log.wandb": "disabled",
}

# How much is shown of what a failed measurement has printed.
_LAST_CHARACTERS = 300


def say_what_is_missing(studies: Sequence[Study], measures: bool, num_ranks: int) -> None:
    """Print the state of each training and the time that is left, where the speed is known.

    Args:
        studies: The studies.
        measures: Whether to measure runs of unknown speed.
        num_ranks: Processes of each training.

    Raises:
        ValueError: A measurement fails.
    """
    seconds_left: list[float | None] = []
    for study in studies:
        title = printable(f"{study.name}: {study.title}")
        print(title)
        for run in study.run_names():
            trials = study.of_run(run)
            seconds_left += _say_of_run(trials, measures, num_ranks)
    _say_total(seconds_left)


def _say_total(seconds_left: Sequence[float | None]) -> None:
    """Print the sum of the known times, and the number of unknown ones."""
    known = [seconds for seconds in seconds_left if seconds is not None]
    if known:
        total = _minutes(sum(known))
        print(f"in all: about {total}")
    num_unknown = len(seconds_left) - len(known)
    if num_unknown:
        print(f"{num_unknown} trainings of unknown speed: --measure measures it")


def _say_of_run(trials: Sequence[Trial], measures: bool, num_ranks: int) -> list[float | None]:
    """Print what is missing of one run.

    Args:
        trials: The run with each seed.
        measures: Whether to measure the speed if it is not known.
        num_ranks: Processes of each training.

    Returns:
        The time that each unfinished training still needs, in seconds; None where the speed is not
        known.
    """
    progresses = [progress_of(trial) for trial in trials]
    rate = _known_rate(progresses)
    if rate is None and measures:
        is_missing = any(progress.state != "finished" for progress in progresses)
        if is_missing:
            rate = _measure(trials[0], num_ranks)

    seconds_left: list[float | None] = []
    for trial, progress in zip(trials, progresses, strict=True):
        run = printable(trial.run)
        line = f"  {run}, seed {trial.seed}: {progress.state}"
        if progress.state != "finished":
            epochs_left = trial.config.train.epochs - progress.epochs
            line += f", {epochs_left:g} epochs left"
            seconds = None
            if rate is not None:
                seconds = rate * epochs_left
                line += f", about {_minutes(seconds)}"
            seconds_left.append(seconds)
        print(line, flush=True)
    return seconds_left


def _minutes(seconds: float) -> str:
    """A duration in words."""
    minutes = seconds / 60
    return f"{minutes:.1f} min"


def _known_rate(progresses: Sequence[TrialProgress]) -> float | None:
    """Seconds per epoch, evaluation included, of the first training that has logged something."""
    for progress in progresses:
        if progress.history is not None and progress.epochs:
            seconds = progress.history.seconds_so_far()[-1]
            return seconds / progress.epochs
    return None


def _measure(trial: Trial, num_ranks: int) -> float:
    """Train a part of an epoch, and return the seconds of a whole one without evaluation.

    Raises:
        ValueError: The training fails.
    """
    history = _train_part(trial, num_ranks, _MEASURED_EPOCHS)
    if history.last_step < _FEWEST_STEPS:
        epochs = _FEWEST_STEPS / _steps_per_epoch(history)
        history = _train_part(trial, num_ranks, epochs)
    return _rate_of_steps(history)


def _train_part(trial: Trial, num_ranks: int, epochs: float) -> RunHistory:
    """Train a part of an epoch in a temporary folder, and return what was logged.

    Raises:
        ValueError: The training fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **_MEASURED_SETTINGS,
            "train.epochs": epochs,
            "output_dir": folder,
        }
        words = list(trial.words)
        for key, value in settings.items():
            words += [f"--{key}", str(value)]
        command = train_command(words, num_ranks)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            printed = done.stderr.strip()
            reason = printed[-_LAST_CHARACTERS:]
            raise ValueError(f"{trial.run} cannot be measured: {reason}")
        return read_run(Path(folder))


def _rate_of_steps(history: RunHistory) -> float:
    """Seconds per epoch from the times of the steps, without the first half of them."""
    seconds = history.curve("train/step_seconds").values
    half = len(seconds) // 2
    seconds_per_step = statistics.fmean(seconds[half:])
    return seconds_per_step * _steps_per_epoch(history)


def _steps_per_epoch(history: RunHistory) -> float:
    """How many steps an epoch has, by what was logged."""
    return history.last_step / history.last_epoch
