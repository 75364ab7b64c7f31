"""The command line: a parser for settings and options, with clear error messages."""

import ast
import inspect
import os
import re
import sys
from argparse import SUPPRESS, Action
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from resnet_dist.config import Config, to_dict
from resnet_dist.files import expand_path
from resnet_dist.settings.cluster import ClusterConfig
from resnet_dist.settings.reading import (
    FileSettings,
    build_config,
    build_section,
    read_yaml,
    setting_hints,
    unknown_setting,
)
from resnet_dist.settings.recipes import find_recipe
from resnet_dist.settings.rules import (
    SettingError,
    TypeHint,
    describe_type,
    refuse_value,
    split_hint,
    type_origin,
)
from resnet_dist.text import did_you_mean, printable


class OptionHelp(DefaultHelpFormatter):
    """Formats help texts, with the default at the end if it is informative."""

    def _get_help_string(self, action: Action) -> str:
        text = action.help or ""
        is_positional = not action.option_strings
        has_no_default = action.default in (None, False, "", SUPPRESS)
        if is_positional or has_no_default or "default: " in text:
            return text
        return f"{text} (default: %(default)s)"


class Parser(ArgumentParser):
    """A jsonargparse parser whose error messages name the option, its value and its rule.

    Args:
        usage: The arguments in the usage line; None lists all options.
        description: The first paragraph of the help.

    Attributes:
        option_names: All options, for suggestions.
        own_hints: The type hint, with rules, of each option that is not a setting.
        path_names: Options that are paths.
        setting_hints: The type hint, with rules, of each setting.
    """

    def __init__(
        self,
        usage: str | None = None,
        description: str | None = None,
    ) -> None:
        if usage:
            usage = f"%(prog)s {usage}"
        super().__init__(
            usage=usage or None,
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
        """Add an option, or a positional argument.

        Args:
            name: The name, with "--" for an option.
            **details: As for `add_argument`. The type may carry rules: Annotated[int, AtLeast(1)].
        """
        self.option_names.append(name)
        hint = details.get("type")
        if hint is not None:
            key = name.lstrip("-")
            self.own_hints[key] = hint
            plain_hint, _ = split_hint(hint)
            details["type"] = plain_hint
        self.add_argument(name, **details)

    def add_path(self, name: str, **details: Any) -> None:
        """Add an option for one or more paths, in which `~` stands for the home folder.

        Args:
            name: The name, with "--" for an option.
            **details: As for `add_option`.
        """
        self.add_option(name, **details)
        key = details.get("dest", name.lstrip("-"))
        self.path_names.append(key)

    def add_settings(self, section: type, prefix: str = "") -> None:
        """Add an option for each field of a dataclass and of the dataclasses nested in it.

        Args:
            section: The dataclass.
            prefix: Text before the name of each option, as "optim.".
        """
        meanings = field_meanings(section)
        meaning = inspect.getdoc(section) or ""
        # The help puts a colon behind it.
        group = self.add_argument_group(meaning.removesuffix("."))
        hints = get_type_hints(section, include_extras=True)
        for one in fields(section):
            hint: TypeHint = hints[one.name]
            key = f"{prefix}{one.name}"
            if isinstance(hint, type) and is_dataclass(hint):
                self.add_settings(hint, f"{key}.")
                continue
            plain_hint, _ = split_hint(hint)
            default = one.default
            if one.default_factory is not MISSING:
                default = one.default_factory()
            type_name = describe_type(plain_hint)
            meaning = meanings[one.name]
            extra: dict[str, Any] = {}
            if plain_hint is bool or bool in get_args(plain_hint):
                # `--cluster.dry_run` alone means true.
                extra = {"nargs": "?", "const": True}
            group.add_argument(
                f"--{key}",
                type=plain_hint,
                default=default,
                metavar=_metavar(plain_hint),
                help=f"{meaning} ({type_name}; default: {as_yaml(default)})",
                **extra,
            )
            self.option_names.append(f"--{key}")
            self.setting_hints[key] = hint

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print an error message, and exit with code 2.

        If there are several ranks, only rank 0 prints.

        Args:
            message: What is wrong.
            ex: Unused; jsonargparse passes it.
        """
        rank = os.environ.get("RANK", "0")
        if rank == "0":
            usage = self.format_usage().strip()
            clear_message = self._translate(message)
            print(usage, file=sys.stderr)
            print(f"error: {printable(clear_message)}", file=sys.stderr)
            print(f"`{self.prog} --help` lists all options", file=sys.stderr)
        sys.exit(2)

    def _translate(self, message: str) -> str:
        """Translate an error message of argparse or jsonargparse to our own words."""
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            return self._unknown_option(unknown[1])
        no_value = re.match(r"argument (\S+): expected one argument", message)
        if no_value:
            return f"{no_value[1]} needs a value"
        choice = re.match(r"argument (\S+): invalid choice: (\S+) \(choose from (.*)\)", message)
        if choice:
            name = choice[1]
            value = choice[2].strip("'")
            choices = choice[3].replace("'", "")
            similar = did_you_mean(value, choices.split(", "))
            return f"{name} is {value}: it must be one of {choices}{similar}"
        wrong_type = re.match(r'Parser key "(.+?)":', message)
        if wrong_type:
            key = wrong_type[1]
            value = message.rpartition("alue: ")[2]
            hint = self.setting_hints.get(key) or self.own_hints.get(key)
            if hint:
                rule = _type_in_words(hint, value)
                return f"{_spelling(key)} is {printable(value)}: it must be {rule}"
        return message

    def _unknown_option(self, word: str) -> str:
        """The error message for a word that the parser does not know."""
        name = word.partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {printable(word)}; write values right after their option"
        similar = did_you_mean(name, self.option_names)
        if self.setting_hints and not similar:
            key = name.lstrip("-")
            return unknown_setting(key, self.setting_hints)
        return f"there is no option {printable(name)}{similar}"


@dataclass
class CommandLine:
    """The arguments of a command, and the parser for them.

    Options on the command line override files, wherever they stand. The arguments are therefore
    parsed twice: the first pass finds the files, and their settings are the defaults of the second
    pass.
    """

    top: Parser
    """the parser of the program"""
    parser: Parser
    """the parser of the command"""
    command: tuple[str, ...]
    """the words of the command, as ("data", "pack")"""
    arguments: list[str]
    """all arguments of the program"""

    def typed(self) -> Namespace:
        """Parse the options that the user has given, without defaults."""
        namespace = self.top.parse_args(self.arguments, defaults=False)
        return self._checked(namespace)

    def options(self) -> Namespace:
        """Parse all options, with the defaults of the parser."""
        namespace = self.top.parse_args(self.arguments)
        return self._checked(namespace)

    def settings(
        self,
        first_file: str = "",
        defaults: Mapping[str, Any] | None = None,
    ) -> tuple[Config, Namespace]:
        """Build the config from defaults, files and options.

        Later ones override earlier ones: the defaults of the config, `defaults`, `first_file`, the
        files of --config in their order, the options. If they are wrong, this prints a message and
        exits.

        Args:
            first_file: A YAML file or the name of a recipe; empty = none.
            defaults: Flat settings.

        Returns:
            The config, and all options.
        """
        typed = self.typed()
        files = self._read_files([first_file, *typed.get("config", [])])
        values = {**(defaults or {}), **files.values}
        # jsonargparse extends a list or a mapping by what was typed (`--cluster.setup+=LINE`), so
        # the settings of the files must be its defaults.
        self.parser.set_defaults(values)
        options = self.options()
        for key in setting_hints():
            if key in typed:
                # With --checkpoint PATH, jsonargparse omits `checkpoint.*` in the second pass.
                values[key] = options.get(key, typed[key])
        config_values = {}
        for key in setting_hints():
            if key in values:
                config_values[key] = values[key]
        try:
            config = build_config(config_values)
        except SettingError as problem:
            message = str(problem)
            is_from_file = problem.key not in typed and problem.key in files.places
            if is_from_file:
                message += f" ({files.places[problem.key]})"
            self.parser.error(message)
        return config, options

    def _read_files(self, names: list[str]) -> FileSettings:
        """Read YAML files or recipes; later ones override. Exits if one is wrong."""
        files = FileSettings()
        try:
            for name in names:
                if name:
                    path = find_recipe(name)
                    files.update(read_yaml(path, self.parser.setting_hints))
        except ValueError as problem:
            self.parser.error(str(problem))
        return files

    def cluster(self, options: Namespace) -> ClusterConfig:
        """Build the settings of `resnet-dist submit`. Exits if they are wrong.

        Args:
            options: All options of the command.
        """
        prefix = "cluster."
        values = {}
        for key in setting_hints(ClusterConfig, prefix):
            values[key] = options.get(key)
        try:
            return build_section(ClusterConfig, values, prefix)
        except ValueError as problem:
            self.parser.error(str(problem))

    def _checked(self, namespace: Namespace) -> Namespace:
        """Check the rules of the options that are not settings. Exits if one is broken.

        Settings are checked when the config is built.

        Args:
            namespace: The result of the parser of the program.

        Returns:
            The part of the command, with `~` and environment variables in paths expanded.
        """
        for name in self.command:
            namespace = namespace[name]
        try:
            for name in self.parser.path_names:
                value = namespace.get(name)
                # Without --checkpoint PATH, jsonargparse puts the section `checkpoint` here.
                if isinstance(value, (str, list)):
                    namespace[name] = _expand(value)
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
        "--print_config",
        action="store_true",
        help="print the resulting settings as YAML and exit",
    )
    parser.add_settings(Config)


def config_or_print(line: CommandLine, **sources: Any) -> tuple[Config, Namespace]:
    """As `CommandLine.settings`; with --print_config it prints them and ends the process."""
    config, options = line.settings(**sources)
    if options.print_config:
        text = yaml.safe_dump(to_dict(config), sort_keys=False)
        print(text, end="")
        sys.exit(0)
    return config, options


def is_first_rank() -> bool:
    """Whether this process prints what all ranks would print."""
    rank = os.environ.get("RANK", "0")
    return rank == "0"


def print_error(problem: object) -> None:
    """Print a message on stderr as one line, on the first rank."""
    if is_first_rank():
        print(f"error: {printable(problem)}", file=sys.stderr)


def add_json_option(parser: Parser) -> None:
    """Add --json."""
    parser.add_option(
        "--json", action="store_true", help="print only the result, as one line of JSON"
    )


def program_name(command: tuple[str, ...]) -> str:
    """How the user started this command, for usage lines: "python train.py".

    Args:
        command: The words of the command, as ("data", "pack").
    """
    script = Path(sys.argv[0])
    if script.name in ("train.py", "submit.py"):
        return f"python {script}"
    program = "resnet-dist"
    if script.name == "cli.py":
        program = "python -m resnet_dist.cli"
    return " ".join([program, *command])


@cache
def field_meanings(section: type) -> dict[str, str]:
    """Read the docstrings of the fields of a dataclass from its source.

    Python does not keep the string below a field.

    Args:
        section: The dataclass.

    Returns:
        The text of each field that has one, in one line.
    """
    source = inspect.getsource(section)
    definition = ast.parse(source).body[0]
    assert isinstance(definition, ast.ClassDef)
    meanings = {}
    statements = definition.body
    for statement, following in pairwise(statements):
        if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
            name = ast.unparse(statement.target)
            text = ast.literal_eval(following.value)
            meanings[name] = " ".join(text.split())
    return meanings


def as_yaml(value: object) -> str:
    """Format a value as in a YAML file: null, true, [0.9, 0.999]."""
    if isinstance(value, tuple):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    # PyYAML ends a plain value with a line of three dots.
    return text.removesuffix("\n").removesuffix("\n...")


def _expand(path: str | list[str]) -> str | list[str]:
    """Expand `~` and environment variables in one or more paths."""
    if isinstance(path, list):
        return [expand_path(one) for one in path]
    return expand_path(path)


def _metavar(hint: TypeHint) -> str | None:
    """The placeholder of a value in the help, by the type of the setting."""
    origin = type_origin(hint)
    if origin is Literal:
        choices = ",".join(get_args(hint))
        return f"{{{choices}}}"
    if origin is tuple:
        return "[X,...]"
    if origin in (list, dict):
        return "YAML"
    types = get_args(hint) or (hint,)
    if type_origin(types[0]) is Literal:
        # `Literal["auto"] | bool`
        choices = ",".join(get_args(types[0]))
        return f"{{{choices},true,false}}"
    # Of `int | None` the first type.
    names = {
        bool: "BOOL",
        int: "N",
        float: "X",
        str: "TEXT",
    }
    return names[types[0]]


def _type_in_words(hint: TypeHint, value: str) -> str:
    """What a value must be, with a suggestion if there are choices.

    Args:
        hint: The type hint of the setting or option.
        value: What the user wrote.
    """
    plain_hint, _ = split_hint(hint)
    words = describe_type(plain_hint)
    if type_origin(plain_hint) is Literal:
        choices = get_args(plain_hint)
        words += did_you_mean(value, choices)
    return words


def _spelling(key: str) -> str:
    """How messages write a setting or option.

    Settings are written as in files, train.epochs, and other options as on the command line, --top.
    """
    is_setting = "." in key or key in setting_hints()
    if is_setting:
        return key
    return f"--{key}"
