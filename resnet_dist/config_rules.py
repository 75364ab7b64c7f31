"""Rules about config values, written beside the field that they belong to.

A field with a rule reads `keep: Annotated[int, AtLeast(1, "resuming needs a checkpoint")] = 3`.
`check_values` checks the types and the rules of a whole tree of dataclasses.
"""

import math
import types
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin, get_type_hints

# Python has no common type for int, int | None, tuple[int, ...] and Annotated[int, ...].
TypeHint: TypeAlias = Any


class SettingError(ValueError):
    """A setting has a value that is not allowed."""

    def __init__(self, key: str, value: object, rule: str) -> None:
        super().__init__(f"{key} is {value!r}: {rule}")
        self.key = key


class Rule:
    """A condition on a value; for a list of numbers, on each of them."""

    why: str

    def holds(self, value: object) -> bool:
        """Whether `value`, which has the type of its field, is allowed. null always is."""
        return all(self._allows(number) for number in _numbers(value))

    def text(self) -> str:
        """The rule as part of a sentence: "it must be at least 1"."""
        rule = f"it must {self._condition()}"
        return f"{rule}, {self.why}" if self.why else rule

    def _allows(self, number: float) -> bool:
        raise NotImplementedError

    def _condition(self) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class AtLeast(Rule):
    """low <= number."""

    low: float
    why: str = ""

    def _allows(self, number: float) -> bool:
        return number >= self.low

    def _condition(self) -> str:
        return f"be at least {self.low:g}"


@dataclass(frozen=True)
class Above(Rule):
    """low < number."""

    low: float
    why: str = ""

    def _allows(self, number: float) -> bool:
        return number > self.low

    def _condition(self) -> str:
        return f"be above {self.low:g}"


@dataclass(frozen=True)
class Within(Rule):
    """low <= number <= high."""

    low: float
    high: float
    why: str = ""

    def _allows(self, number: float) -> bool:
        return self.low <= number <= self.high

    def _condition(self) -> str:
        return f"be in [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class BelowOne(Rule):
    """0 <= number < 1."""

    why: str = ""

    def _allows(self, number: float) -> bool:
        return 0 <= number < 1

    def _condition(self) -> str:
        return "be in [0, 1)"


@dataclass(frozen=True)
class Factor(Rule):
    """0 < number <= 1."""

    why: str = ""

    def _allows(self, number: float) -> bool:
        return 0 < number <= 1

    def _condition(self) -> str:
        return "be in (0, 1]"


@dataclass(frozen=True)
class Range(Rule):
    """A pair (low, high) with low <= high."""

    why: str = ""

    def holds(self, value: object) -> bool:
        """Whether the first of both numbers is at most the second."""
        low, high = _numbers(value)
        return low <= high

    def _condition(self) -> str:
        return "be (low, high) with low <= high"


@dataclass(frozen=True)
class NotEmpty(Rule):
    """A text that is not empty."""

    why: str = ""

    def holds(self, value: object) -> bool:
        """Whether the text has any character but spaces."""
        return bool(str(value).strip())

    def _condition(self) -> str:
        return "not be empty"


def check_values(section: object, prefix: str = "") -> None:
    """Check the type and the rules of every field of a dataclass and of the dataclasses in it.

    Raises ValueError with the key, the value and the rule. `prefix` is put before each key.
    """
    for key, value, hint in walk(section, prefix):
        refuse_value(key, value, hint)


def refuse_value(key: str, value: object, hint: TypeHint) -> None:
    """Raise ValueError if `value` has not the type `hint` or breaks a rule that `hint` carries."""
    plain, rules = split_hint(hint)
    if not has_type(value, plain):
        raise SettingError(key, value, f"it must be {describe_type(plain)}")
    if not all(math.isfinite(number) for number in _numbers(value)):
        raise SettingError(key, value, "it must be finite")
    for rule in rules:
        if not rule.holds(value):
            raise SettingError(key, value, rule.text())


def walk(section: object, prefix: str = "") -> Iterator[tuple[str, object, TypeHint]]:
    """Yield (key, value, type hint) of every field of a dataclass; keys of inner ones have dots."""
    for name, hint in get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if is_dataclass(hint) and is_dataclass(value):
            yield from walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value, hint


def split_hint(hint: TypeHint) -> tuple[TypeHint, list[Rule]]:
    """The type and the rules of a type hint: `Annotated[int, AtLeast(1)]` -> int, [AtLeast(1)]."""
    if type_origin(hint) is not Annotated:
        return hint, []
    plain, *rules = get_args(hint)
    return plain, rules


def type_origin(hint: TypeHint) -> object:
    """What stands before the brackets of a type: tuple[int, ...] -> tuple, Literal["a"] -> Literal.

    As `typing.get_origin`, whose static type differs between kinds of hints.
    """
    return get_origin(hint)


def has_type(value: object, hint: TypeHint) -> bool:
    """Whether `value` has the type that a field's hint asks for.

    A whole number is a number, a list may stand for a tuple, but a bool is not a number.
    """
    origin, arguments = type_origin(hint), get_args(hint)
    if _is_union(hint):
        return any(has_type(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, (tuple, list)) and _items_have_types(value, arguments)
    if origin is list:
        return isinstance(value, list) and all(has_type(item, arguments[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            has_type(key, arguments[0]) and has_type(item, arguments[1])
            for key, item in value.items()
        )
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, (int, float))
    return isinstance(value, hint)


def describe_type(hint: TypeHint) -> str:
    """The values that a type hint allows, in words: "a number", "one of sgd, lars"."""
    hint = split_hint(hint)[0]
    origin, arguments = type_origin(hint), get_args(hint)
    if _is_union(hint):
        return " or ".join(describe_type(one) for one in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} {_plural(arguments[0])}"
    if origin in (tuple, list):
        return f"a list of {_plural(arguments[0])}"
    if origin is dict:
        return "a mapping from names to values"
    return _NAMES[hint][0]


# Singular with its article, and plural.
_NAMES = {
    bool: ("true or false", "booleans"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    str: ("text", "texts"),
    type(None): ("null", "nulls"),
}


def _plural(hint: TypeHint) -> str:
    if type_origin(hint) is Literal:
        return f"values out of {', '.join(map(str, get_args(hint)))}"
    return _NAMES[hint][1]


def _items_have_types(
    values: tuple[object, ...] | list[object], hints: tuple[TypeHint, ...]
) -> bool:
    if Ellipsis in hints:
        return all(has_type(value, hints[0]) for value in values)
    if len(values) != len(hints):
        return False
    return all(has_type(value, hint) for value, hint in zip(values, hints, strict=True))


def _is_union(hint: TypeHint) -> bool:
    return type_origin(hint) in (Union, types.UnionType)


def _numbers(value: object) -> list[float]:
    """The numbers in a value: itself, or the items of a tuple or list; none in text and null."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return [one for one in values if isinstance(one, (int, float)) and not isinstance(one, bool)]
