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
        print(f"{printable(study.name)}: {printable(study.title)}")
        for run in study.run_names():
            seconds_left += _say_of_run(study.of_run(run), measures, num_ranks)
    known = [seconds for seconds in seconds_left if seconds is not None]
    num_unknown = len(seconds_left) - len(known)
    if known:
        print(f"in all: about {_minutes(sum(known))}")
    if num_unknown:
        print(f"{num_unknown} trainings of unknown speed: --measure measures it")


def _say_of_run(trials: Sequence[Trial], measures: bool, num_ranks: int) -> list[float | None]:
    """Print what is missing of one run.

    Returns:
        The time that each training still needs, in seconds; None where the speed is not known.
    """
    progresses = [progress_of(trial) for trial in trials]
    is_missing = any(progress.state != "finished" for progress in progresses)
    rate = _known_rate(progresses)
    if rate is None and is_missing and measures:
        rate = _measure(trials[0], num_ranks)
    seconds_left: list[float | None] = []
    for trial, progress in zip(trials, progresses, strict=True):
        line = f"  {printable(trial.run)}, seed {trial.seed}: {progress.state}"
        if progress.state != "finished":
            epochs_left = trial.config.train.epochs - progress.epochs
            seconds = None if rate is None else rate * epochs_left
            seconds_left.append(seconds)
            line += f", {epochs_left:g} epochs left"
            if seconds is not None:
                line += f", about {_minutes(seconds)}"
        print(line, flush=True)
    return seconds_left


def _minutes(seconds: float) -> str:
    """A duration in words."""
    return f"{seconds / 60:.1f} min"


def _known_rate(progresses: Sequence[TrialProgress]) -> float | None:
    """Seconds per epoch, evaluation included, of the first training that has logged something."""
    for progress in progresses:
        if progress.history is not None and progress.epochs:
            return progress.history.seconds_so_far()[-1] / progress.epochs
    return None


def _measure(trial: Trial, num_ranks: int) -> float:
    """Train a part of an epoch, and return the seconds of a whole one without evaluation."""
    history = _train_part(trial, num_ranks, _MEASURED_EPOCHS)
    if history.last_step < _FEWEST_STEPS:
        steps_per_epoch = history.last_step / history.last_epoch
        history = _train_part(trial, num_ranks, _FEWEST_STEPS / steps_per_epoch)
    return _rate_of_steps(history)


def _train_part(trial: Trial, num_ranks: int, epochs: float) -> RunHistory:
    """Train a part of an epoch in a temporary folder, and return what was logged."""
    with tempfile.TemporaryDirectory() as folder:
        words = list(trial.words)
        settings = {**_MEASURED_SETTINGS, "train.epochs": epochs, "output_dir": folder}
        for key, value in settings.items():
            words += [f"--{key}", str(value)]
        command = train_command(words, num_ranks)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip()[-_LAST_CHARACTERS:]
            raise ValueError(f"{trial.run} cannot be measured: {reason}")
        return read_run(Path(folder))


def _rate_of_steps(history: RunHistory) -> float:
    """Seconds per epoch from the times of the steps, without the first half of them."""
    seconds = history.curve("train/step_seconds").values
    settled = seconds[len(seconds) // 2 :]
    steps_per_epoch = history.last_step / history.last_epoch
    return statistics.fmean(settled) * steps_per_epoch
