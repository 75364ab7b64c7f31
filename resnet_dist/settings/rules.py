"""Rules about the values of settings. A rule is part of the type hint of its field.

A field with a rule is, for instance,
`keep: Annotated[int, AtLeast(1, "resuming needs a checkpoint")] = 3`. The function `check_values`
checks the types and the rules of a dataclass and of all dataclasses in it.
"""

import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

# Python has no common type of int, int | None, tuple[int, ...] and Annotated[int, ...].
TypeHint: TypeAlias = Any


class SettingError(ValueError):
    """A setting has a value that is not allowed.

    Args:
        key: the key of the setting, such as "train.epochs".
        value: its value.
        rule: what is allowed, as a sentence.
    """

    def __init__(self, key: str, value: object, rule: str) -> None:
        super().__init__(f"{key} is {value!r}: {rule}")
        self.key = key


class Rule:
    """A condition on a number, or on each number of a list."""

    why: str
    """the reason for the rule, which follows it in messages; may be empty"""

    def holds(self, value: object) -> bool:
        """Whether a value is allowed.

        Args:
            value: a value of the type of the field. None is always allowed.
        """
        return all(self._allows(number) for number in _numbers(value))

    def text(self) -> str:
        """The rule as a sentence, such as "it must be at least 1"."""
        rule = f"it must {self._condition()}"
        if self.why:
            return f"{rule}, {self.why}"
        return rule

    def _allows(self, number: float) -> bool:
        """Whether a number is allowed."""
        raise NotImplementedError

    def _condition(self) -> str:
        """The condition as it follows "must" in a sentence."""
        raise NotImplementedError


@dataclass(frozen=True)
class AtLeast(Rule):
    """The rule low <= number."""

    low: float
    why: str = ""

    def _allows(self, number: float) -> bool:
        return number >= self.low

    def _condition(self) -> str:
        return f"be at least {self.low:g}"


# Types of options of the command line.
PositiveInt: TypeAlias = Annotated[int, AtLeast(1)]
NonNegativeInt: TypeAlias = Annotated[int, AtLeast(0)]
NonNegativeFloat: TypeAlias = Annotated[float, AtLeast(0)]


@dataclass(frozen=True)
class Above(Rule):
    """The rule low < number."""

    low: float
    why: str = ""

    def _allows(self, number: float) -> bool:
        return number > self.low

    def _condition(self) -> str:
        return f"be above {self.low:g}"


@dataclass(frozen=True)
class Within(Rule):
    """The rule low <= number <= high."""

    low: float
    high: float
    why: str = ""

    def _allows(self, number: float) -> bool:
        return self.low <= number <= self.high

    def _condition(self) -> str:
        return f"be in [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class BelowOne(Rule):
    """The rule 0 <= number < 1."""

    why: str = ""

    def _allows(self, number: float) -> bool:
        return 0 <= number < 1

    def _condition(self) -> str:
        return "be in [0, 1)"


@dataclass(frozen=True)
class Factor(Rule):
    """The rule 0 < number <= 1."""

    why: str = ""

    def _allows(self, number: float) -> bool:
        return 0 < number <= 1

    def _condition(self) -> str:
        return "be in (0, 1]"


@dataclass(frozen=True)
class Range(Rule):
    """The rule low <= high for a pair (low, high)."""

    why: str = ""

    def holds(self, value: object) -> bool:
        """Whether the first number is at most the second one."""
        low, high = _numbers(value)
        return low <= high

    def _condition(self) -> str:
        return "be (low, high) with low <= high"


@dataclass(frozen=True)
class NotEmpty(Rule):
    """The rule that a text is not empty."""

    why: str = ""

    def holds(self, value: object) -> bool:
        """Whether the text has other characters than white space."""
        return bool(str(value).strip())

    def _condition(self) -> str:
        return "not be empty"


def check_values(section: object, prefix: str = "") -> None:
    """Check the types and the rules of all fields of a dataclass and of the dataclasses in it.

    Args:
        section: the dataclass.
        prefix: text before each key in messages, such as "train.".

    Raises:
        SettingError: for the first value that is not allowed.
    """
    for key, value, hint in walk(section, prefix):
        refuse_value(key, value, hint)


def refuse_value(key: str, value: object, hint: TypeHint) -> None:
    """Check the type and the rules of one value.

    Args:
        key: the key of the setting, for the message.
        value: the value to check.
        hint: the type hint of the field, with its rules.

    Raises:
        SettingError: if the value is not allowed.
    """
    plain, rules = split_hint(hint)
    if not has_type(value, plain):
        raise SettingError(key, value, f"it must be {describe_type(plain)}")
    for number in _numbers(value):
        if not math.isfinite(number):
            raise SettingError(key, value, "it must be finite")
    for rule in rules:
        if not rule.holds(value):
            raise SettingError(key, value, rule.text())


def walk(section: object, prefix: str = "") -> Iterator[tuple[str, object, TypeHint]]:
    """Iterate over all fields of a dataclass and of the dataclasses in it.

    Args:
        section: the dataclass.
        prefix: text before each key.

    Yields:
        (key, value, type hint). The key of a field of an inner dataclass is "outer.inner".
    """
    hints = get_type_hints(type(section), include_extras=True)
    for name, hint in hints.items():
        value = getattr(section, name)
        if is_dataclass(hint) and is_dataclass(value):
            yield from walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, hint


def split_hint(hint: TypeHint) -> tuple[TypeHint, list[Rule]]:
    """Split a type hint into the type and the rules.

    For instance, `Annotated[int, AtLeast(1)]` is split into `int` and `[AtLeast(1)]`.
    """
    if type_origin(hint) is not Annotated:
        return hint, []
    plain, *rules = get_args(hint)
    return plain, rules


def type_origin(hint: TypeHint) -> object:
    """The type without its arguments: tuple for `tuple[int, ...]`, Literal for `Literal["a"]`.

    This is `typing.get_origin` with one static type for all kinds of hints.
    """
    return get_origin(hint)


def has_type(value: object, hint: TypeHint) -> bool:
    """Whether a value has the type of a hint.

    An int is allowed for float, and a list is allowed for a tuple. A bool is not a number.

    Args:
        value: the value.
        hint: a type hint without rules.
    """
    origin = type_origin(hint)
    arguments = get_args(hint)
    if _is_union(hint):
        return any(has_type(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, (tuple, list)) and _items_have_types(value, arguments)
    if origin is list:
        return isinstance(value, list) and all(has_type(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and _entries_have_types(value, arguments)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, (int, float))
    return isinstance(value, hint)


def describe_type(hint: TypeHint) -> str:
    """Describe the values that a type hint allows, such as "a number" or "one of sgd, lars"."""
    hint, _ = split_hint(hint)
    origin = type_origin(hint)
    arguments = get_args(hint)
    if _is_union(hint):
        return " or ".join(describe_type(one) for one in arguments)
    if origin is Literal:
        choices = ", ".join(map(str, arguments))
        if len(arguments) == 1:
            return choices
        return f"one of {choices}"
    if origin in (tuple, list):
        items = _plural(arguments[0])
        has_fixed_length = origin is tuple and Ellipsis not in arguments
        if has_fixed_length:
            return f"a list of {len(arguments)} {items}"
        return f"a list of {items}"
    if origin is dict:
        return "a mapping from names to values"
    singular, _ = _NAMES[hint]
    return singular


# The names of types in messages: singular with its article, and plural.
_NAMES = {
    bool: ("true or false", "booleans"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    type(None): ("null", "nulls"),
}


def _plural(hint: TypeHint) -> str:
    """Describe several values of a type, such as "whole numbers"."""
    if type_origin(hint) is Literal:
        choices = ", ".join(map(str, get_args(hint)))
        return f"values out of {choices}"
    _, plural = _NAMES[hint]
    return plural


def _items_have_types(
    values: tuple[object, ...] | list[object],
    hints: tuple[TypeHint, ...],
) -> bool:
    """Whether the items of a tuple or list have their types.

    Args:
        values: the items.
        hints: the arguments of `tuple[...]`: one type for each item, or one type for all items and
            an ellipsis.
    """
    if Ellipsis in hints:
        return all(has_type(value, hints[0]) for value in values)
    if len(values) != len(hints):
        return False
    pairs = zip(values, hints, strict=True)
    return all(has_type(value, hint) for value, hint in pairs)


def _entries_have_types(
    mapping: dict[object, object],
    hints: tuple[TypeHint, ...],
) -> bool:
    """Whether the keys and values of a dictionary have their types, given as (key, value)."""
    key_hint, value_hint = hints
    for key, value in mapping.items():
        if not has_type(key, key_hint) or not has_type(value, value_hint):
            return False
    return True


def _is_union(hint: TypeHint) -> bool:
    """Whether a type hint is `A | B` or `Union[A, B]`."""
    return type_origin(hint) in (Union, types.UnionType)


def _numbers(value: object) -> list[float]:
    """The numbers in a value: the value itself, or the items of a tuple or list.

    Booleans, text and None are not numbers.
    """
    values = value if isinstance(value, (tuple, list)) else [value]
    numbers: list[float] = []
    for one in values:
        # A bool is an int in Python.
        if isinstance(one, (int, float)) and not isinstance(one, bool):
            numbers.append(one)
    return numbers
