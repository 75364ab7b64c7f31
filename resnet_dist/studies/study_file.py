"""Read the YAML file of a study.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import yaml

from resnet_dist.files import expand_path
from resnet_dist.logs.history import Clock
from resnet_dist.settings.options import as_yaml
from resnet_dist.settings.reading import SettingsLoader, config_from_files
from resnet_dist.settings.recipes import find_recipe
from resnet_dist.studies.study import Study, Trial, folder_name
from resnet_dist.text import did_you_mean, printable

Settings = dict[str, Any]
"""values by their keys, as {"train.epochs": 3}"""


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
    "clock": _Field(str, "wall", "wall, or cpu for the CPU time of the main process"),
    "metric": _Field(str, "val/top1", "a key of metrics.jsonl"),
    "notes": _Field(str, "", "text in Markdown"),
}


def read_study(path: Path, changes: Mapping[str, Any] | None = None) -> Study:
    """Read a study file and check the config of each training.

    Args:
        path: The YAML file.
        changes: Settings of all runs, as {"data.data_dir": "/data/cifar10"}. They override
            `settings` of the file; what a run sets itself stays.

    Raises:
        ValueError: The file cannot be read, or a key or a setting is missing or wrong.
    """
    try:
        fields = _read_fields(path)
        return _build_study(path, fields, dict(changes or {}))
    except ValueError as problem:
        raise ValueError(f"{printable(path)}: {problem}") from None


def _read_fields(path: Path) -> dict[str, Any]:
    """The keys of a study file, with defaults for those that it leaves out.

    Raises:
        ValueError: The file cannot be read, or a key is unknown, missing or of a wrong type.
    """
    content = _read_mapping(path)
    _refuse_unknown_keys(content)
    fields = {}
    for key, field in _FIELDS.items():
        value = content.get(key, field.default)
        if value is _REQUIRED:
            raise ValueError(f"the key {key} is missing: {field.meaning}")
        if not isinstance(value, field.kind):
            raise ValueError(f"{key} is {value!r}: it must be {field.meaning}")
        fields[key] = value
    return fields


def _read_mapping(path: Path) -> dict[Any, Any]:
    """The content of a YAML file. Raises ValueError if it is no mapping."""
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=SettingsLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as problem:
        raise ValueError(f"cannot read the study: {printable(problem)}") from None
    if not isinstance(content, dict):
        known = ", ".join(_FIELDS)
        raise ValueError(f"this is no study: its keys are {known}")
    return content


def _refuse_unknown_keys(content: Mapping[Any, Any]) -> None:
    """Raise ValueError for a key that a study does not have."""
    for key in content:
        if key not in _FIELDS:
            name = printable(key)
            hint = did_you_mean(str(key), _FIELDS)
            raise ValueError(f"a study has no key {name}{hint}")


def _build_study(path: Path, fields: Mapping[str, Any], changes: Settings) -> Study:
    """Build the study of the keys of its file; see `read_study`."""
    targets = _numbers("targets", fields["targets"])
    trials = _build_trials(fields, changes)
    run_names = [str(name) for name in fields["runs"]]
    pairs = _pairs(fields["compare"], run_names)
    return Study(
        path=path,
        title=fields["title"],
        question=fields["question"],
        notes=fields["notes"],
        metric=fields["metric"],
        clock=_clock(fields["clock"]),
        targets=tuple(targets),
        trials=tuple(trials),
        compare=tuple(pairs),
    )


def _build_trials(fields: Mapping[str, Any], changes: Settings) -> list[Trial]:
    """Each run with each seed."""
    seeds = _seeds(fields["seeds"])
    if not fields["runs"]:
        raise ValueError("runs is empty: name at least one run")
    output_dir = expand_path(fields["output_dir"])
    trials = []
    for name, own in fields["runs"].items():
        run = str(name)
        # A later one overrides the earlier ones.
        settings_of_run = {
            **fields["settings"],
            **changes,
            **_settings_of_run(run, own),
        }
        for seed in seeds:
            folder = Path(output_dir, folder_name(run, seed))
            settings = {
                **settings_of_run,
                "output_dir": str(folder),
                "seed": seed,
            }
            trial = _build_trial(run, seed, fields["config"], settings)
            trials.append(trial)
    return trials


def _seeds(values: Sequence[object]) -> list[int]:
    """The seeds of each run. Raises ValueError unless they are whole numbers that differ."""
    seeds: list[int] = []
    for number in _numbers("seeds", values):
        if not float(number).is_integer():
            raise ValueError(f"seeds holds {number!r}: it must be a whole number")
        seed = int(number)
        # A training that counts twice would make the interval too narrow.
        if seed in seeds:
            raise ValueError(f"seeds holds {seed} twice: give each seed once")
        seeds.append(seed)
    if not seeds:
        raise ValueError("seeds is empty: give at least one seed")
    return seeds


def _settings_of_run(run: str, own: object) -> Settings:
    """The settings of one run; a run without settings may be empty."""
    if own is None:
        return {}
    if not isinstance(own, dict):
        raise ValueError(
            f"runs.{printable(run)} is {own!r}: it must be a mapping of settings, for instance "
            "{model.shortcut: B}, or empty"
        )
    return own


def _build_trial(run: str, seed: int, recipe: str, settings: Settings) -> Trial:
    """Check the config of one training.

    Args:
        run: The name of the run.
        seed: The seed.
        recipe: The name of a recipe, or a YAML file.
        settings: Changes of the recipe.

    Raises:
        ValueError: A setting is unknown or wrong.
    """
    try:
        path = find_recipe(recipe)
        config = config_from_files([str(path)], settings)
    except ValueError as problem:
        raise ValueError(f"run {printable(run)}: {problem}") from None
    words = ["--config", recipe]
    for key, value in settings.items():
        words += [f"--{key}", _as_word(value)]
    return Trial(run, seed, config, words)


def _as_word(value: object) -> str:
    """A value as it is written on a command line, where text has no quotes."""
    if isinstance(value, str):
        return value
    return as_yaml(value)


def _numbers(key: str, values: Sequence[object]) -> list[float]:
    """A list of numbers of a study file. Raises ValueError if something else is in it."""
    numbers = []
    for value in values:
        # To Python, True is a number.
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{key} holds {value!r}: it must be a number")
        numbers.append(value)
    return numbers


def _clock(name: str) -> Clock:
    """The clock that times are read from."""
    if name not in get_args(Clock):
        raise ValueError(f"clock is {printable(name)}: it must be {_FIELDS['clock'].meaning}")
    return cast("Clock", name)


def _pairs(compare: Sequence[object], known: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of runs to compare.

    Args:
        compare: The value of the key.
        known: The names of all runs.

    Raises:
        ValueError: Something is not a pair of runs of this study.
    """
    pairs = []
    for pair in compare:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"compare holds {pair!r}: it must be two runs")
        first, second = map(str, pair)
        _refuse_unknown_run(first, known)
        _refuse_unknown_run(second, known)
        pairs.append((first, second))
    return pairs


def _refuse_unknown_run(name: str, known: Sequence[str]) -> None:
    """Raise ValueError for a name that is no run of the study."""
    if name in known:
        return
    shown = printable(name)
    hint = did_you_mean(name, known)
    raise ValueError(f"compare names {shown!r}, which is no run of this study{hint}")
