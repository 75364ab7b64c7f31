"""How far the trainings of a study are, and the results of those that have finished."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from resnet_dist.evaluation.comparison import (
    SeedSummary,
    summarize_accuracies,
    summarize_seeds,
)
from resnet_dist.logs.history import RunHistory, read_run
from resnet_dist.studies.study import Study, Trial
from resnet_dist.text import printable

State = Literal["missing", "interrupted", "finished"]

# An epoch may have a fraction, and metrics.jsonl rounds.
_EPOCH_TOLERANCE = 1e-6


@dataclass(frozen=True)
class TrialProgress:
    """How far one training is."""

    state: State
    epochs: float
    """epochs that are trained"""
    history: RunHistory | None
    """None if nothing is logged yet"""


@dataclass(frozen=True)
class Result:
    """The result of one finished training."""

    trial: Trial
    history: RunHistory
    accuracy: float
    """the study's metric at the end, in percent"""
    seconds: float
    """time of training and evaluation, by the study's clock"""
    seconds_to_target: dict[float, float]
    """for each target that was reached, the seconds until the first evaluation at or above it"""


Results = Mapping[str, Sequence[Result]]
"""for each run of a study, the results of its finished trainings in the order of the seeds"""


def progress_of(trial: Trial) -> TrialProgress:
    """Read from metrics.jsonl how far a training is."""
    try:
        history = read_run(trial.folder)
    except ValueError:
        return TrialProgress("missing", 0.0, None)
    if _is_finished(trial, history):
        return TrialProgress("finished", history.last_epoch, history)
    return TrialProgress("interrupted", history.last_epoch, history)


def _is_finished(trial: Trial, history: RunHistory) -> bool:
    """Whether all epochs are trained and the last one is evaluated."""
    planned = trial.config.train.epochs
    if history.last_epoch < planned - _EPOCH_TOLERANCE:
        return False
    evaluations = history.evaluations("val")
    if not evaluations:
        return False
    return evaluations[-1].epoch >= history.last_epoch - _EPOCH_TOLERANCE


def read_study_results(study: Study) -> Results:
    """Read the results of all finished trainings."""
    results: dict[str, list[Result]] = {}
    for run in study.run_names():
        results[run] = []
        for trial in study.of_run(run):
            progress = progress_of(trial)
            if progress.state != "finished":
                continue
            assert progress.history is not None
            result = _result(study, trial, progress.history)
            results[run].append(result)
    return results


def _result(study: Study, trial: Trial, history: RunHistory) -> Result:
    """The result of one finished training."""
    values = history.curve(study.metric).values
    if not values:
        raise ValueError(
            f"{printable(study.path)}: metric is {study.metric!r}, which "
            f"{printable(trial.folder)}/metrics.jsonl does not have"
        )
    return Result(
        trial=trial,
        history=history,
        accuracy=values[-1],
        seconds=history.seconds_so_far(study.clock)[-1],
        seconds_to_target=_times_to_targets(study, history),
    )


def _times_to_targets(study: Study, history: RunHistory) -> dict[float, float]:
    """The seconds until the accuracy first reached each target, over all sessions of a run."""
    times: dict[float, float] = {}
    all_seconds = history.seconds_so_far(study.clock)
    for record, seconds in zip(history.records, all_seconds, strict=True):
        accuracy = record.get(study.metric)
        if accuracy is None:
            continue
        for target in study.targets:
            if accuracy >= target:
                times.setdefault(target, seconds)
    return times


def summarize(results: Sequence[Result]) -> SeedSummary | None:
    """Mean, deviation and interval over the seeds; None for fewer than two results."""
    if len(results) < 2:
        return None
    return summarize_accuracies([result.accuracy for result in results])


def paired_difference(first: Sequence[Result], second: Sequence[Result]) -> SeedSummary | None:
    """`second` - `first`, seed by seed; None if fewer than two seeds have both results.

    Two runs with the same seed see the same images in the same order, so their difference varies
    less than that of two means.
    """
    accuracies_of_first = {}
    for result in first:
        accuracies_of_first[result.trial.seed] = result.accuracy
    differences = []
    for result in second:
        seed = result.trial.seed
        if seed in accuracies_of_first:
            differences.append(result.accuracy - accuracies_of_first[seed])
    if len(differences) < 2:
        return None
    return summarize_seeds(differences)
