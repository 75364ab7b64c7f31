"""Reading settings: YAML files with line numbers, and nested dicts as a checkpoint holds them.

Settings are kept flat, as {"optim.base_lr": 0.1}. `build_config` makes the config of them.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import yaml

from resnet_dist.config import Config
from resnet_dist.config_rules import TypeHint, refuse_value, split_hint, type_origin
from resnet_dist.recipes import find_recipe
from resnet_dist.text import did_you_mean, printable

T = TypeVar("T")

# Names that a setting had in an earlier version, and the name that it has now. Files and
# checkpoints with the earlier name stay readable.
RENAMED_SETTINGS: dict[str, str] = {}


@dataclass
class FileSettings:
    """The settings of one or more YAML files, and where each of them stands."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """For each setting its file and line, as "configs/resnet50.yaml, line 12"."""

    def update(self, later: "FileSettings") -> None:
        """Take over the settings of another file, which override those so far."""
        self.values.update(later.values)
        self.places.update(later.places)


@cache
def setting_hints(section: type = Config, prefix: str = "") -> dict[str, TypeHint]:
    """The type hint, with rules, of every setting of a tree of dataclasses."""
    hints: dict[str, TypeHint] = {}
    for name, hint in get_type_hints(section, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            hints.update(setting_hints(hint, f"{prefix}{name}."))
        else:
            hints[f"{prefix}{name}"] = hint
    return hints


def read_yaml(path: Path, hints: Mapping[str, TypeHint]) -> FileSettings:
    """Read a YAML file with the settings that `hints` lists, and check their types and rules.

    Raises ValueError with file and line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"cannot read {path}: {printable(problem)}") from problem
    except yaml.YAMLError as problem:
        raise ValueError(f"{path} is not valid YAML: {printable(problem)}") from problem
    settings = FileSettings()
    if root is None:
        return settings
    for key, node in _leaves(root, hints, path):
        place = f"{path}, line {node.start_mark.line + 1}"
        if key in settings.values:
            raise ValueError(f"{key} is set twice: {settings.places[key]} and {place}")
        value = _construct(node, path)
        try:
            refuse_value(key, value, hints[key])
        except ValueError as problem:
            raise ValueError(f"{problem} ({place})") from problem
        settings.values[key] = value
        settings.places[key] = place
    return settings


def flatten_settings(tree: Mapping[str, Any], hints: Mapping[str, TypeHint]) -> dict[str, Any]:
    """Nested settings as flat ones: {"optim": {"base_lr": 0.1}} -> {"optim.base_lr": 0.1}.

    Raises ValueError for a setting that `hints` does not list.
    """
    flat: dict[str, Any] = {}
    sections = _sections(hints)

    def visit(branch: Mapping[str, Any], prefix: str) -> None:
        for name, value in branch.items():
            key = RENAMED_SETTINGS.get(f"{prefix}{name}", f"{prefix}{name}")
            if key in sections and isinstance(value, Mapping):
                visit(value, f"{key}.")
            elif key in hints:
                flat[key] = value
            else:
                raise ValueError(unknown_setting(key, hints))

    visit(tree, "")
    return flat


def unknown_setting(key: str, hints: Mapping[str, TypeHint]) -> str:
    """The sentence about a setting that does not exist, with a similar one if there is one."""
    if key == "cluster" or key.startswith("cluster."):
        return f"there is no setting {key} here: it belongs to `resnet-dist submit`"
    same_end = [known for known in hints if known.split(".")[-1] == key.split(".")[-1]]
    similar = did_you_mean(key, list(hints))
    if not similar and same_end:
        similar = f"; did you mean {same_end[0]}?"
    return f"there is no setting {printable(key)}{similar}"


def build_section(section: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Build a dataclass, and the dataclasses in it, from flat settings; others get their default.

    Lists become tuples and whole numbers become floats where the type of the field says so.
    """
    arguments: dict[str, Any] = {}
    for name, hint in get_type_hints(section, include_extras=True).items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            arguments[name] = build_section(hint, values, f"{key}.")
        elif key in values:
            arguments[name] = _convert(values[key], split_hint(hint)[0])
    return section(**arguments)


def build_config(values: Mapping[str, Any]) -> Config:
    """The config of flat settings. Raises ValueError as `config.check_config` does."""
    return build_section(Config, values)


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """The config of nested settings, as `config.to_dict` makes them and a checkpoint holds them."""
    return build_config(flatten_settings(tree, setting_hints()))


def config_from_files(names: list[str], changes: Mapping[str, Any]) -> Config:
    """The config of YAML files or recipes by name, with flat settings that override them.

    Raises ValueError if a file or a setting does not exist, or a value breaks a rule.
    """
    hints = setting_hints()
    files = FileSettings()
    for name in names:
        files.update(read_yaml(find_recipe(name), hints))
    for key, value in changes.items():
        if key not in hints:
            raise ValueError(unknown_setting(key, hints))
        refuse_value(key, value, hints[key])
    return build_config({**files.values, **changes})


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML 1.1 as PyYAML reads it, with numbers such as 1e-4, which PyYAML takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _leaves(
    node: yaml.Node, hints: Mapping[str, TypeHint], path: Path, prefix: str = ""
) -> Iterator[tuple[str, yaml.Node]]:
    """Yield (key, value node) of every setting in a YAML mapping."""
    sections = _sections(hints)
    if not isinstance(node, yaml.MappingNode):
        name = prefix.removesuffix(".") or "the file"
        raise ValueError(
            f"{name} must hold settings, one `key: value` per line "
            f"({path}, line {node.start_mark.line + 1})"
        )
    # Replaces a merge key (`<<: *anchor`) by what it stands for.
    _Loader("").flatten_mapping(node)
    for key_node, value_node in node.value:
        key = f"{prefix}{key_node.value}"
        key = RENAMED_SETTINGS.get(key, key)
        if key in sections:
            yield from _leaves(value_node, hints, path, f"{key}.")
        elif key in hints:
            yield key, value_node
        else:
            line = key_node.start_mark.line + 1
            raise ValueError(f"{unknown_setting(key, hints)} ({path}, line {line})")


def _sections(hints: Mapping[str, TypeHint]) -> set[str]:
    return {key.rpartition(".")[0] for key in hints} - {""}


def _construct(node: yaml.Node, path: Path) -> object:
    """The Python value of a YAML node."""
    loader = _Loader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError as problem:
        raise ValueError(f"{path} is not valid YAML: {printable(problem)}") from problem
    finally:
        loader.dispose()


def _convert(value: object, hint: TypeHint) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and _takes_float(hint):
        return float(value)
    if type_origin(hint) is tuple and isinstance(value, (list, tuple)):
        item_hint = get_args(hint)[0]
        return tuple(_convert(item, item_hint) for item in value)
    return value


def _takes_float(hint: TypeHint) -> bool:
    return hint is float or float in get_args(hint) and type_origin(hint) is not tuple
