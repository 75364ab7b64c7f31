"""Read settings from YAML files and from the nested dictionaries in checkpoints.

Settings are kept flat, as {"optim.base_lr": 0.1}. `build_config` turns them into a config.
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
from resnet_dist.settings.recipes import find_recipe
from resnet_dist.settings.rules import TypeHint, refuse_value, split_hint, type_origin
from resnet_dist.text import did_you_mean, printable

T = TypeVar("T")

Hints = Mapping[str, TypeHint]
"""The type hint, with rules, of each setting."""

RENAMED_SETTINGS: dict[str, str] = {}
"""For each setting that was renamed, {earlier name: present name}.

Files and checkpoints with the earlier name stay readable.
"""


@dataclass
class FileSettings:
    """The settings of one or more YAML files."""

    values: dict[str, Any] = field(default_factory=dict)
    """the value of each setting"""
    places: dict[str, str] = field(default_factory=dict)
    """file and line of each setting, as "configs/resnet50.yaml, line 12".
    """

    def update(self, later: "FileSettings") -> None:
        """Add the settings of another file. They override the present ones."""
        self.values.update(later.values)
        self.places.update(later.places)


@cache
def setting_hints(section: type = Config, prefix: str = "") -> dict[str, TypeHint]:
    """List all settings of a dataclass and of the dataclasses nested in it.

    Args:
        section: The dataclass.
        prefix: Text before each key, as "optim.".

    Returns:
        The type hint, with rules, of each setting.
    """
    hints: dict[str, TypeHint] = {}
    own_hints = get_type_hints(section, include_extras=True)
    for name, hint in own_hints.items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            inner_hints = setting_hints(hint, f"{key}.")
            hints.update(inner_hints)
        else:
            hints[key] = hint
    return hints


def read_yaml(path: Path, hints: Hints) -> FileSettings:
    """Read a YAML file of settings, and check the type and the rules of each value.

    Args:
        path: The file.
        hints: The known settings, see `setting_hints`.

    Raises:
        ValueError: The file cannot be read or is not valid YAML, a setting is unknown or set twice,
            or a value breaks its rule. The message names file and line.
    """
    settings = FileSettings()
    root = _parse_yaml(path)
    if root is None:
        return settings
    for key, node in _find_settings(root, hints, path):
        place = _place(path, node)
        if key in settings.values:
            first_place = settings.places[key]
            raise ValueError(f"{key} is set twice: {first_place} and {place}")
        value = _construct(node, path)
        if _is_text(node, hints[key]):
            value = node.value
        try:
            refuse_value(key, value, hints[key])
        except ValueError as problem:
            raise ValueError(f"{problem} ({place})") from problem
        settings.values[key] = value
        settings.places[key] = place
    return settings


def _parse_yaml(path: Path) -> yaml.Node | None:
    """Parse a YAML file.

    Returns:
        Its tree of nodes, which know their lines. None for an empty file.

    Raises:
        ValueError: The file cannot be read, or it is not valid YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return yaml.compose(text, Loader=SettingsLoader)
    except (OSError, UnicodeDecodeError) as problem:
        raise ValueError(f"cannot read {path}: {printable(problem)}") from problem
    except yaml.YAMLError as problem:
        raise _not_valid_yaml(path, problem) from problem


def _not_valid_yaml(path: Path, problem: yaml.YAMLError) -> ValueError:
    """The error for a file with a mistake in its YAML."""
    return ValueError(f"{path} is not valid YAML: {printable(problem)}")


def _place(path: Path, node: yaml.Node) -> str:
    """File and line of a YAML node. Lines count from 1."""
    line = node.start_mark.line + 1
    return f"{path}, line {line}"


def flatten_settings(tree: Mapping[str, Any], hints: Hints) -> dict[str, Any]:
    """Flatten nested settings: {"optim": {"base_lr": 0.1}} becomes {"optim.base_lr": 0.1}.

    Args:
        tree: The nested settings.
        hints: The known settings, see `setting_hints`.

    Raises:
        ValueError: A setting is unknown.
    """
    flat: dict[str, Any] = {}
    sections = _section_names(hints)

    def visit(branch: Mapping[str, Any], prefix: str) -> None:
        for name, value in branch.items():
            key = _present_name(f"{prefix}{name}")
            if key in sections and isinstance(value, Mapping):
                visit(value, f"{key}.")
            elif key in hints:
                flat[key] = value
            else:
                raise ValueError(unknown_setting(key, hints))

    visit(tree, "")
    return flat


def _present_name(key: str) -> str:
    """The name that a setting has in this version."""
    return RENAMED_SETTINGS.get(key, key)


def unknown_setting(key: str, hints: Hints) -> str:
    """The error message for a setting that does not exist.

    Args:
        key: What the user wrote.
        hints: The known settings, of which a similar one is suggested.
    """
    if key == "cluster" or key.startswith("cluster."):
        return f"there is no setting {key} here: it belongs to `resnet-dist submit`"
    suggestion = did_you_mean(key, list(hints))
    if not suggestion:
        # Perhaps the section is wrong, as in train.base_lr.
        last_part = key.split(".")[-1]
        for known in hints:
            if known.split(".")[-1] == last_part:
                suggestion = f"; did you mean {known}?"
                break
    return f"there is no setting {printable(key)}{suggestion}"


def build_section(
    section: type[T],
    values: Mapping[str, Any],
    prefix: str = "",
) -> T:
    """Build a dataclass, and the dataclasses nested in it, from flat settings.

    Lists become tuples and integers become floats where the field has that type.

    Args:
        section: The dataclass.
        values: Flat settings. Fields that are absent keep their default.
        prefix: Text before the keys of this section, as "optim.".
    """
    arguments: dict[str, Any] = {}
    hints = get_type_hints(section, include_extras=True)
    for name, hint in hints.items():
        key = f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            arguments[name] = build_section(hint, values, f"{key}.")
        elif key in values:
            plain_hint, _ = split_hint(hint)
            arguments[name] = _convert(values[key], plain_hint)
    return section(**arguments)


def build_config(values: Mapping[str, Any]) -> Config:
    """Build the config from flat settings.

    Raises:
        ValueError: As in `config.check_config`.
    """
    return build_section(Config, values)


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """Build the config from nested settings, such as those in a checkpoint.

    This is the inverse of `config.to_dict`.

    Raises:
        ValueError: A setting is unknown, or as in `config.check_config`.
    """
    hints = setting_hints()
    values = flatten_settings(tree, hints)
    return build_config(values)


def config_from_files(names: list[str], changes: Mapping[str, Any]) -> Config:
    """Build the config from YAML files and flat settings.

    Args:
        names: Files, or names of recipes. Later ones override.
        changes: Flat settings that override the files.

    Raises:
        ValueError: A file or a setting does not exist, or a value breaks a rule.
    """
    hints = setting_hints()
    files = FileSettings()
    for name in names:
        path = find_recipe(name)
        files.update(read_yaml(path, hints))
    for key, value in changes.items():
        if key not in hints:
            raise ValueError(unknown_setting(key, hints))
        refuse_value(key, value, hints[key])
    return build_config({**files.values, **changes})


class SettingsLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Reads YAML 1.1 as PyYAML does, but takes 1e-4 as a number, not as text.

    A key that is there twice is refused. PyYAML would take the last one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The dictionary of a node.

        Raises:
            yaml.YAMLError: A key is there twice.
        """
        doubled = _doubled_key(node)
        if doubled is not None:
            line = doubled.start_mark.line + 1
            raise yaml.YAMLError(f"{doubled.value} is there twice (line {line})")
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


SettingsLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _doubled_key(node: yaml.MappingNode) -> yaml.ScalarNode | None:
    """The second of two equal keys; None if all differ."""
    seen = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            continue
        if key_node.value in seen:
            return key_node
        seen.add(key_node.value)
    return None


def _find_settings(
    node: yaml.Node,
    hints: Hints,
    path: Path,
    prefix: str = "",
) -> Iterator[tuple[str, yaml.Node]]:
    """Find all settings in a YAML mapping and in the mappings nested in it.

    Args:
        node: The mapping.
        hints: The known settings.
        path: The file, for error messages.
        prefix: Text before the keys of the mapping, as "optim.".

    Yields:
        The key and the value node of each setting.

    Raises:
        ValueError: `node` is not a mapping, or a setting is unknown.
    """
    if not isinstance(node, yaml.MappingNode):
        name = prefix.removesuffix(".") or "the file"
        place = _place(path, node)
        raise ValueError(f"{name} must hold settings, one `key: value` per line ({place})")
    sections = _section_names(hints)
    # Replaces merge keys (`<<: *anchor`) by the entries that they refer to.
    SettingsLoader("").flatten_mapping(node)
    for key_node, value_node in node.value:
        key = _present_name(f"{prefix}{key_node.value}")
        if key in sections:
            yield from _find_settings(value_node, hints, path, f"{key}.")
        elif key in hints:
            yield key, value_node
        else:
            message = unknown_setting(key, hints)
            place = _place(path, key_node)
            raise ValueError(f"{message} ({place})")


def _section_names(hints: Hints) -> set[str]:
    """The names of the sections that settings belong to.

    For "optim.base_lr" this is "optim".
    """
    names = set()
    for key in hints:
        section = key.rpartition(".")[0]
        if section:
            names.add(section)
    return names


def _is_text(node: yaml.Node, hint: TypeHint) -> bool:
    """Whether a scalar is the value of a text setting, which is taken as it is written.

    PyYAML writes the text 1e5 without quotes, which this module's YAML reads as a number.
    """
    plain_hint, _ = split_hint(hint)
    return plain_hint is str and isinstance(node, yaml.ScalarNode)


def _construct(node: yaml.Node, path: Path) -> object:
    """The Python value of a YAML node.

    Raises:
        ValueError: The value is not valid YAML.
    """
    loader = SettingsLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.YAMLError as problem:
        raise _not_valid_yaml(path, problem) from problem
    finally:
        loader.dispose()


def _convert(value: object, hint: TypeHint) -> object:
    """Convert an integer to float, or a list to a tuple, if the field has that type.

    Args:
        value: The value as it was read.
        hint: The type hint of the field, without rules.
    """
    # In Python, True and False are integers too.
    is_bool = isinstance(value, bool)
    if isinstance(value, int) and not is_bool and _takes_float(hint):
        return float(value)
    if type_origin(hint) is tuple and isinstance(value, (list, tuple)):
        item_hint = get_args(hint)[0]
        items = [_convert(item, item_hint) for item in value]
        return tuple(items)
    return value


def _takes_float(hint: TypeHint) -> bool:
    """Whether a field takes a float.

    Its type hint is float, or a union with it such as `float | None`.
    """
    if hint is float:
        return True
    if type_origin(hint) is tuple:
        return False
    return float in get_args(hint)
