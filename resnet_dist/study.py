"""Studies: several runs, with several seeds each, that answer one question.

A study is a YAML file:

    title: Shortcut A against shortcut B
    question: Does the projection of shortcut B help ResNet-20?
    config: study_cifar10
    output_dir: runs/studies/shortcuts
    seeds: [0, 1, 2]
    settings:
      train.epochs: 3
    runs:
      A: {model.shortcut: A}
      B: {model.shortcut: B}
    compare: [[A, B]]

`settings` hold for all runs. Each run has settings of its own, and each seed is one training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from resnet_dist.config import Config
from resnet_dist.evaluation.comparison import SeedSummary, summarize_seeds
from resnet_dist.files import expand_path
from resnet_dist.logs.history import RunHistory, read_run
from resnet_dist.settings.options import as_yaml
from resnet_dist.settings.reading import SettingsLoader, config_from_files
from resnet_dist.settings.recipes import find_recipe
from resnet_dist.text import did_you_mean, printable

State = Literal["missing", "interrupted", "finished"]

# An epoch may have a fraction, and metrics.jsonl rounds.
_EPOCH_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Trial:
    """One training of a study: a run with one seed."""

    run: str
    """name of the run in the study"""
    seed: int
    config: Config
    """all settings of the training"""
    words: list[str]
    """the same settings as options of `resnet-dist train`"""

    @property
    def folder(self) -> Path:
        """The output_dir of the training."""
        return Path(self.config.output_dir)


@dataclass(frozen=True)
class Study:
    """A question and the trainings that answer it."""

    path: Path
    """the YAML file"""
    title: str
    question: str
    notes: str
    """what to know about the result, in Markdown; may be empty"""
    metric: str
    """accuracy that is compared, for instance val/top1"""
    targets: tuple[float, ...]
    """accuracies in percent whose time is reported"""
    trainings: tuple[Trial, ...]
    compare: tuple[tuple[str, str], ...]
    """pairs of runs whose difference is reported"""

    @property
    def name(self) -> str:
        """The name of the file, without its suffix."""
        return self.path.stem

    def run_names(self) -> list[str]:
        """The names of the runs, in the order of the file."""
        names = []
        for training in self.trainings:
            if training.run not in names:
                names.append(training.run)
        return names

    def of_run(self, name: str) -> list[Trial]:
        """The trainings of one run, one for each seed."""
        return [training for training in self.trainings if training.run == name]


@dataclass(frozen=True)
class _Field:
    """A key of a study file."""

    kind: type
    default: object
    meaning: str


_REQUIRED = object()

_FIELDS = {
    "title": _Field(str, _REQUIRED, "a line of text"),
    "question": _Field(str, _REQUIRED, "a sentence"),
    "config": _Field(str, _REQUIRED, "a recipe or a YAML file"),
    "output_dir": _Field(str, _REQUIRED, "a folder"),
    "runs": _Field(dict, _REQUIRED, "settings by name of the run"),
    "seeds": _Field(list, _REQUIRED, "a list of whole numbers"),
    "settings": _Field(dict, {}, "settings of all runs"),
    "compare": _Field(list, [], "a list of pairs of runs"),
    "targets": _Field(list, [], "a list of accuracies in percent"),
    "metric": _Field(str, "val/top1", "a key of metrics.jsonl"),
    "notes": _Field(str, "", "text in Markdown"),
}


def read_study(path: Path, changes: Mapping[str, Any] | None = None) -> Study:
    """Read a study file and check the config of each training.

    Args:
        path: The YAML file.
        changes: Settings that override those of the file, as {"data.data_dir": "/data/cifar10"}.

    Raises:
        ValueError: The file cannot be read, or a key or a setting is missing or wrong.
    """
    values = _read_fields(path)
    seeds = _numbers(path, "seeds", values["seeds"])
    targets = _numbers(path, "targets", values["targets"])
    if not seeds:
        raise ValueError(f"{printable(path)}: seeds is empty: give at least one seed")
    shared = dict(values["settings"]) | dict(changes or {})
    trainings = []
    for run, own in values["runs"].items():
        if own is not None and not isinstance(own, dict):
            raise ValueError(
                f"{printable(path)}: runs.{printable(run)} is {own!r}: it must be a mapping of "
                "settings, for instance {model.shortcut: B}, or empty"
            )
        for seed in seeds:
            settings = shared | dict(own or {})
            trainings.append(_build_training(path, values, str(run), int(seed), settings))
    return Study(
        path=path,
        title=values["title"],
        question=values["question"],
        notes=values["notes"],
        metric=values["metric"],
        targets=tuple(targets),
        trainings=tuple(trainings),
        compare=_pairs(path, values),
    )


def _read_fields(path: Path) -> dict[str, Any]:
    """The keys of a study file, with defaults for those that it leaves out."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=SettingsLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise ValueError(f"cannot read the study {printable(path)}: {printable(problem)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{printable(path)} is no study: its keys are {', '.join(_FIELDS)}")
    for key in content:
        if key not in _FIELDS:
            hint = did_you_mean(str(key), _FIELDS)
            raise ValueError(f"{printable(path)}: a study has no key {printable(key)}{hint}")
    values = {}
    for key, field in _FIELDS.items():
        value = content.get(key, field.default)
        if value is _REQUIRED:
            raise ValueError(f"{printable(path)}: the key {key} is missing: {field.meaning}")
        if not isinstance(value, field.kind):
            raise ValueError(f"{printable(path)}: {key} is {value!r}: it must be {field.meaning}")
        values[key] = value
    if not values["runs"]:
        raise ValueError(f"{printable(path)}: runs is empty: name at least one run")
    return values


def _numbers(path: Path, key: str, values: Sequence[object]) -> list[float]:
    """A list of numbers of a study file."""
    numbers = []
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{printable(path)}: {key} holds {value!r}: it must be a number")
        numbers.append(value)
    return numbers


def _pairs(path: Path, values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """The pairs of runs to compare."""
    known = [str(name) for name in values["runs"]]
    pairs = []
    for pair in values["compare"]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{printable(path)}: compare holds {pair!r}: it must be two runs")
        first = str(pair[0])
        second = str(pair[1])
        for name in (first, second):
            if name not in known:
                raise ValueError(
                    f"{printable(path)}: compare names {printable(name)!r}, which is no run of "
                    f"this study{did_you_mean(name, known)}"
                )
        pairs.append((first, second))
    return tuple(pairs)


def _build_training(
    path: Path, values: Mapping[str, Any], run: str, seed: int, settings: dict[str, Any]
) -> Trial:
    """Check the config of one training."""
    folder = Path(expand_path(values["output_dir"])) / folder_name(run, seed)
    settings = settings | {"output_dir": str(folder), "seed": seed}
    try:
        config = config_from_files([str(find_recipe(values["config"]))], settings)
    except ValueError as problem:
        raise ValueError(f"{printable(path)}, run {printable(run)}: {problem}") from None
    words = ["--config", values["config"]]
    for key, value in settings.items():
        # Text is taken as it is written on a command line, without quotes.
        word = value if isinstance(value, str) else as_yaml(value)
        words += [f"--{key}", word]
    return Trial(run, seed, config, words)


def folder_name(run: str, seed: int) -> str:
    """The folder of one training, for instance "shortcut_A_seed0"."""
    characters = [character if character.isalnum() else "_" for character in run]
    return f"{''.join(characters)}_seed{seed}"


@dataclass(frozen=True)
class TrialProgress:
    """How far one training is."""

    state: State
    epochs: float
    """epochs that are trained"""
    history: RunHistory | None
    """None if nothing is logged yet"""


def move_results(study: Study, folder: Path) -> Study:
    """The same study with its results in `folder`/NAME, where `resnet-dist study --collect` puts
    them.
    """
    moved = []
    for training in study.trainings:
        place = folder / study.name / training.folder.name
        moved.append(replace(training, config=replace(training.config, output_dir=str(place))))
    return replace(study, trainings=tuple(moved))


def progress_of(training: Trial) -> TrialProgress:
    """Read from metrics.jsonl how far a training is."""
    try:
        history = read_run(training.folder)
    except ValueError:
        return TrialProgress("missing", 0.0, None)
    epochs = history.last_epoch
    evaluations = history.evaluations("val")
    is_evaluated = bool(evaluations) and evaluations[-1].epoch >= epochs - _EPOCH_TOLERANCE
    is_at_end = epochs >= training.config.train.epochs - _EPOCH_TOLERANCE
    if is_evaluated and is_at_end:
        return TrialProgress("finished", epochs, history)
    return TrialProgress("interrupted", epochs, history)


@dataclass(frozen=True)
class Result:
    """The result of one finished training."""

    training: Trial
    history: RunHistory
    accuracy: float
    """the study's metric at the end, in percent"""
    seconds: float
    """time of training and evaluation"""
    seconds_to_target: dict[float, float]
    """for each target that was reached, the seconds until the first evaluation at or above it"""


Results = Mapping[str, Sequence[Result]]
"""for each run of a study, the results of its finished trainings in the order of the seeds"""


def read_study_results(study: Study) -> Results:
    """Read the results of all finished trainings."""
    results: dict[str, list[Result]] = {}
    for run in study.run_names():
        results[run] = []
        for training in study.of_run(run):
            progress = progress_of(training)
            if progress.state == "finished" and progress.history is not None:
                results[run].append(_result(study, training, progress.history))
    return results


def _result(study: Study, training: Trial, history: RunHistory) -> Result:
    """The result of one finished training."""
    values = history.curve(study.metric).values
    if not values:
        raise ValueError(
            f"{printable(study.path)}: metric is {study.metric!r}, which "
            f"{printable(training.folder)}/metrics.jsonl does not have"
        )
    return Result(
        training=training,
        history=history,
        accuracy=values[-1],
        seconds=history.seconds_so_far()[-1],
        seconds_to_target=_times_to_targets(study, history),
    )


def _times_to_targets(study: Study, history: RunHistory) -> dict[float, float]:
    """The seconds until the accuracy first reached each target, over all sessions of a run."""
    times: dict[float, float] = {}
    for record, seconds in zip(history.records, history.seconds_so_far(), strict=True):
        accuracy = record.get(study.metric)
        if accuracy is None:
            continue
        for target in study.targets:
            if accuracy >= target and target not in times:
                times[target] = seconds
    return times


def summarize(results: Sequence[Result]) -> SeedSummary | None:
    """Mean, deviation and interval over the seeds; None for fewer than two results."""
    if len(results) < 2:
        return None
    return summarize_seeds([result.accuracy for result in results])


def paired_difference(first: Sequence[Result], second: Sequence[Result]) -> SeedSummary | None:
    """`second` - `first`, seed by seed; None if fewer than two seeds have both results.

    Two runs with the same seed see the same images in the same order, so their difference varies
    less than that of two means.
    """
    by_seed = {result.training.seed: result.accuracy for result in first}
    differences = []
    for result in second:
        if result.training.seed in by_seed:
            differences.append(result.accuracy - by_seed[result.training.seed])
    if len(differences) < 2:
        return None
    return summarize_seeds(differences)
