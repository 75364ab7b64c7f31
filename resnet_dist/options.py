"""The options of the command line: a parser for settings, with messages in plain words."""

import ast
import inspect
import os
import re
import sys
from argparse import SUPPRESS, Action
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from resnet_dist.cluster import ClusterConfig
from resnet_dist.config import Config
from resnet_dist.config_rules import (
    SettingError,
    TypeHint,
    describe_type,
    refuse_value,
    split_hint,
    type_origin,
)
from resnet_dist.recipes import find_recipe
from resnet_dist.settings import (
    FileSettings,
    build_config,
    build_section,
    read_yaml,
    setting_hints,
    unknown_setting,
)
from resnet_dist.text import did_you_mean, printable


class OptionHelp(DefaultHelpFormatter):
    """Help texts as they are written, with the default at the end unless it says nothing."""

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        says_nothing = action.default in (None, False, "", SUPPRESS) or not action.option_strings
        if says_nothing or "default: " in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(ArgumentParser):
    """A jsonargparse parser whose error messages name the option, its value and its rule."""

    def __init__(self, usage: str | None = None, description: str | None = None) -> None:
        super().__init__(
            usage=f"%(prog)s {usage}" if usage else None,
            description=description,
            formatter_class=OptionHelp,
            allow_abbrev=False,
            print_config=None,
        )
        self.option_names: list[str] = []
        self.own_hints: dict[str, TypeHint] = {}
        self.path_names: list[str] = []
        self.setting_hints: dict[str, TypeHint] = {}

    def add_option(self, name: str, **details: Any) -> None:
        """As `add_argument`, for a type that may carry rules: Annotated[int, AtLeast(1)]."""
        self.option_names.append(name)
        hint = details.get("type")
        if hint is not None:
            self.own_hints[name.lstrip("-")] = hint
            details["type"] = split_hint(hint)[0]
        self.add_argument(name, **details)

    def add_path(self, name: str, **details: Any) -> None:
        """As `add_option`, for one or more paths, in which `~` stands for the home folder."""
        self.add_option(name, **details)
        self.path_names.append(details.get("dest", name.lstrip("-")))

    def add_settings(self, section: type, prefix: str = "") -> None:
        """Add an option for each field of a dataclass and of the dataclasses in it."""
        meanings = field_meanings(section)
        group = self.add_argument_group(inspect.getdoc(section))
        hints = get_type_hints(section, include_extras=True)
        for one in fields(section):
            hint: TypeHint = hints[one.name]
            key = f"{prefix}{one.name}"
            if isinstance(hint, type) and is_dataclass(hint):
                self.add_settings(hint, f"{key}.")
                continue
            plain, _ = split_hint(hint)
            default = one.default if one.default_factory is MISSING else one.default_factory()
            words = f"{describe_type(plain)}; default: {as_yaml(default)}"
            # `--cluster.dry_run` alone means true.
            flag: dict[str, Any] = {"nargs": "?", "const": True} if plain is bool else {}
            group.add_argument(
                f"--{key}",
                type=plain,
                default=default,
                metavar=_metavar(plain),
                help=f"{meanings[one.name]} ({words})",
                **flag,
            )
            self.option_names.append(f"--{key}")
            self.setting_hints[key] = hint

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and end the process with code 2. Of several ranks, rank 0 prints."""
        if os.environ.get("RANK", "0") == "0":
            print(self.format_usage().strip(), file=sys.stderr)
            print(f"error: {printable(self._in_words(message))}", file=sys.stderr)
            print(f"`{self.prog} --help` lists all options", file=sys.stderr)
        sys.exit(2)

    def _in_words(self, message: str) -> str:
        """An error message of argparse or jsonargparse in the words of our own rules."""
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            return self._unknown_option(found[1])
        if found := re.match(r"argument (\S+): expected one argument", message):
            return f"{found[1]} needs a value"
        if found := re.match(
            r"argument (\S+): invalid choice: (\S+) \(choose from (.*)\)", message
        ):
            name, value, choices = found[1], found[2].strip("'"), found[3].replace("'", "")
            similar = did_you_mean(value, choices.split(", "))
            return f"{name} is {value}: it must be one of {choices}{similar}"
        if found := re.match(r'Parser key "(.+?)":', message):
            key, value = found[1], message.rpartition("alue: ")[2]
            hint = self.setting_hints.get(key) or self.own_hints.get(key)
            if hint:
                words = _type_in_words(hint, value)
                return f"{_spelling(key)} is {printable(value)}: it must be {words}"
        return message

    def _unknown_option(self, word: str) -> str:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {printable(word)}; write values right after their option"
        similar = did_you_mean(name, self.option_names)
        if self.setting_hints and not similar:
            return unknown_setting(name.lstrip("-"), self.setting_hints)
        return f"there is no option {printable(name)}{similar}"


@dataclass
class CommandLine:
    """The arguments of a command, and the parser that understands them.

    Options on the command line override files, wherever they stand: the first pass finds the files,
    whose settings are the defaults of the second.
    """

    top: Parser
    parser: Parser
    command: tuple[str, ...]
    arguments: list[str]

    def typed(self) -> Namespace:
        """What was typed, without defaults."""
        return self._checked(self.top.parse_args(self.arguments, defaults=False))

    def options(self) -> Namespace:
        """All options, with the defaults of the parser."""
        return self._checked(self.top.parse_args(self.arguments))

    def settings(
        self, first_file: str = "", defaults: Mapping[str, Any] | None = None
    ) -> tuple[Config, Namespace]:
        """The config, and all options.

        From weak to strong: the defaults of the config, `defaults`, `first_file`, the files of
        --config in their order, the options. Ends the process with a message if they are wrong.
        """
        typed = self.typed()
        try:
            files = FileSettings()
            for name in [first_file, *typed.get("config", [])]:
                if name:
                    files.update(read_yaml(find_recipe(name), self.parser.setting_hints))
        except ValueError as problem:
            self.parser.error(str(problem))
        values = {**(defaults or {}), **files.values}
        # The parser adds to a list (`--cluster.setup+=LINE`) or a mapping what was typed.
        self.parser.set_defaults(values)
        options = self.options()
        # With --checkpoint PATH there, jsonargparse leaves `checkpoint.*` out of the second pass.
        values |= {key: options.get(key, typed[key]) for key in setting_hints() if key in typed}
        try:
            config = build_config({key: values[key] for key in setting_hints() if key in values})
        except SettingError as problem:
            place = "" if problem.key in typed else files.places.get(problem.key, "")
            self.parser.error(f"{problem} ({place})" if place else str(problem))
        return config, options

    def cluster(self, options: Namespace) -> ClusterConfig:
        """The settings of `resnet-dist submit`. Ends the process if they are wrong."""
        keys = setting_hints(ClusterConfig, "cluster.")
        values = {key: options.get(key) for key in keys}
        try:
            return build_section(ClusterConfig, values, "cluster.")
        except ValueError as problem:
            self.parser.error(str(problem))

    def _checked(self, namespace: Namespace) -> Namespace:
        """The command's own part of the parser's result.

        Ends the process if one of its own options breaks a rule. Settings are checked when they
        become a config.
        """
        for name in self.command:
            namespace = namespace[name]
        for name in self.parser.path_names:
            value = namespace.get(name)
            # Where --checkpoint is missing, jsonargparse puts the section of that name there.
            if isinstance(value, (str, list)):
                namespace[name] = _expand_home(value)
        try:
            for name, hint in self.parser.own_hints.items():
                if name in namespace:
                    refuse_value(f"--{name}", namespace[name], hint)
        except ValueError as problem:
            self.parser.error(str(problem))
        return namespace


def add_config_options(parser: Parser) -> None:
    """Add --config, --print_config and an option for every setting of `Config`."""
    parser.add_option(
        "--config",
        action="append",
        default=[],
        metavar="FILE",
        help="YAML file or name of a recipe (resnet50); of several, the later ones override",
    )
    parser.add_option(
        "--print_config", action="store_true", help="print the resulting settings as YAML and exit"
    )
    parser.add_settings(Config)


def program_name(command: tuple[str, ...]) -> str:
    """How the user started this command, for usage lines: "python train.py"."""
    script = Path(sys.argv[0])
    if script.name in ("train.py", "submit.py"):
        return f"python {script}"
    program = "python -m resnet_dist.cli" if script.name == "cli.py" else "resnet-dist"
    return " ".join([program, *command])


@cache
def field_meanings(section: type) -> dict[str, str]:
    """The text below each field of a dataclass, which Python itself does not keep."""
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    meanings = {}
    for one, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(one, ast.AnnAssign) and isinstance(following, ast.Expr):
            text = ast.literal_eval(following.value)
            meanings[ast.unparse(one.target)] = " ".join(text.split())
    return meanings


def as_yaml(value: object) -> str:
    """A value as one would write it in a YAML file: null, true, [0.9, 0.999]."""
    value = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def _expand_home(path: str | list[str]) -> str | list[str]:
    if isinstance(path, list):
        return [os.path.expanduser(one) for one in path]
    return os.path.expanduser(path)


def _metavar(hint: TypeHint) -> str | None:
    names = {bool: "BOOL", int: "N", float: "X", str: "TEXT"}
    if type_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    if type_origin(hint) is tuple:
        return "[X,...]"
    if type_origin(hint) in (list, dict):
        return "YAML"
    first = get_args(hint)[0] if get_args(hint) else hint
    return names[first]


def _type_in_words(hint: TypeHint, value: str) -> str:
    plain, _ = split_hint(hint)
    words = describe_type(plain)
    if type_origin(plain) is Literal:
        words += did_you_mean(value, get_args(plain))
    return words


def _spelling(key: str) -> str:
    """Settings are called by their key, also in files: train.epochs; other options --top."""
    return key if "." in key or key in setting_hints() else f"--{key}"
