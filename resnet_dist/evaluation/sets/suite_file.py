"""The file of `resnet-dist evaluate --suite`: which data sets to evaluate, and where they are."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from resnet_dist.evaluation.sets.classes import Classes
from resnet_dist.files import expand_path
from resnet_dist.settings.reading import SettingsLoader
from resnet_dist.text import did_you_mean, printable

Kind = Literal[
    "folder",
    "imagenet",
    "real",
    "imagenet_v2",
    "imagenet_a",
    "imagenet_r",
    "imagenet_sketch",
    "imagenet_c",
    "cifar10",
    "cifar10_1",
    "cifar10_c",
]
"""The data sets whose layout is known; folder: any other one of class folders or tar shards."""

# The protocols of the authors: these have 200 of ImageNet's classes.
_MASKED_KINDS = ("imagenet_a", "imagenet_r")


@dataclass(frozen=True)
class SuiteEntry:
    """One data set of a suite."""

    name: str
    """what the table calls it"""
    kind: Kind
    data: str
    """folder of the data set"""
    classes: Classes = ""
    """see `classes.Classes`"""
    labels: str = ""
    """kind real: the file real.json"""
    version: Literal["v4", "v6"] = "v6"
    """kind cifar10_1: which of the two versions"""


_OPTIONS = [field.name for field in fields(SuiteEntry) if field.name != "name"]

# The options that only one kind has.
_OF_ONE_KIND = {
    "labels": "real",
    "version": "cifar10_1",
}

# The values of the options that are not free.
_CHOICES = {
    "kind": get_args(Kind),
    "classes": ("present", "all"),
    "version": ("v4", "v6"),
}


def read_suite(path: Path) -> list[SuiteEntry]:
    """Read a suite.

    It has one key, `sets`, with an entry for each data set: a name, and below it `kind`, `data` and
    further options.

    Args:
        path: The YAML file.

    Returns:
        The data sets in the order of the file.

    Raises:
        ValueError: The file cannot be read, or something in it is unknown or missing. The message
            names the key.
    """
    title = f"--suite {printable(path)}"
    entries = _read_sets(path, title)
    suite = []
    for name, entry in entries.items():
        suite.append(_read_entry(str(name), entry, title))
    return suite


def _read_sets(path: Path, title: str) -> dict[Any, Any]:
    """Read the file: what it has below its key `sets`, as it is written.

    Args:
        path: The YAML file.
        title: The beginning of a message about it.

    Raises:
        ValueError: It cannot be read, or `sets` is not its only key.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=SettingsLoader)
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"{title} cannot be read: {printable(problem)}") from problem
    except yaml.YAMLError as problem:
        raise ValueError(f"{title} is not valid YAML: {printable(problem)}") from problem
    if isinstance(content, dict) and list(content) == ["sets"]:
        entries = content["sets"]
        if isinstance(entries, dict) and entries:
            return entries
    raise ValueError(
        f"{title}: it must have the key sets, and below it a name for each data set with its "
        "kind and data, as in docs/evaluation.md"
    )


def _read_entry(name: str, entry: object, title: str) -> SuiteEntry:
    """Check one data set of the file.

    Args:
        name: Its name in the file.
        entry: What stands below the name.
        title: The beginning of a message about the file.

    Raises:
        ValueError: Something in it is unknown or missing.
    """
    place = f"{title}: sets.{printable(name)}"
    if not isinstance(entry, dict):
        raise ValueError(f"{place} must have kind and data below it")
    for key, value in entry.items():
        _check_option(place, key, value)
    _check_completeness(place, entry)

    options = dict(entry)
    for key in ("data", "labels"):
        if key in options:
            options[key] = _expand(options[key], f"{place}.{key}")
    if options["kind"] in _MASKED_KINDS:
        options.setdefault("classes", "present")
    return SuiteEntry(name=name, **options)


def _check_completeness(place: str, entry: dict[str, str]) -> None:
    """Raise ValueError if an option of a data set is missing, or is not for its kind."""
    for key in ("kind", "data"):
        if key not in entry:
            raise ValueError(f"{place} has no {key}")
    kind = entry["kind"]
    for key, only_kind in _OF_ONE_KIND.items():
        if key in entry and kind != only_kind:
            raise ValueError(f"{place}.{key} is only for the kind {only_kind}, and not for {kind}")
    if kind == "real" and "labels" not in entry:
        raise ValueError(f"{place} has no labels: name the file real.json")


def _check_option(place: str, key: object, value: object) -> None:
    """Raise ValueError if an option of a data set is unknown or has a wrong value."""
    if key not in _OPTIONS:
        name = printable(key)
        known = ", ".join(_OPTIONS)
        similar = did_you_mean(str(key), _OPTIONS)
        raise ValueError(f"{place} has the unknown option {name}; there are {known}{similar}")
    if not isinstance(value, str) or not value:
        raise ValueError(f"{place}.{key} is {printable(value)}: it must be a text")
    choices = _CHOICES.get(str(key))
    if choices is not None and value not in choices:
        given = printable(value)
        listed = ", ".join(choices)
        similar = did_you_mean(value, choices)
        raise ValueError(f"{place}.{key} is {given}: it must be one of {listed}{similar}")


def _expand(path: str, place: str) -> str:
    """Expand `~` and environment variables in a path."""
    try:
        return expand_path(path)
    except ValueError as problem:
        raise ValueError(f"{place} is {printable(path)}: {problem}") from problem
