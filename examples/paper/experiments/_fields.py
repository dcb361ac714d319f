"""Settings that check themselves: the type and the range of every field, and the way to JSON and back."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def number(default: Any, *, least: float | None = None, above: float | None = None, below: float | None = None) -> Any:
    """A dataclass field with a range; None is let through where the type allows it."""
    return dataclasses.field(default=default, metadata={"least": least, "above": above, "below": below})


class Checked:
    """Base of the settings: a value of the wrong type or out of its range is refused where it is given."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, entry.name)
            if not fits(value, hints[entry.name]):
                raise ValueError(f"{entry.name}={value!r} must be {words_of(hints[entry.name])}.")
            _check_range(entry, value)


def _check_range(entry: dataclasses.Field[Any], value: Any) -> None:
    limits = {name: limit for name, limit in entry.metadata.items() if limit is not None}
    if value is None or not limits:
        return
    if not math.isfinite(value):
        raise ValueError(f"{entry.name}={value!r} must be a finite number.")
    good = (
        value >= limits.get("least", -math.inf)
        and value > limits.get("above", -math.inf)
        and value < limits.get("below", math.inf)
    )
    if not good:
        words = {"least": "at least", "above": "more than", "below": "less than"}
        rule = " and ".join(f"{words[name]} {limit}" for name, limit in limits.items())
        raise ValueError(f"{entry.name}={value!r} must be {rule}.")


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is what the annotation ``hint`` says; an integer is a float, a truth value is no number."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in typing.get_args(hint))
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, typing.get_args(hint)[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def words_of(hint: Any) -> str:
    """The annotation in words, for messages."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(words_of(option) for option in typing.get_args(hint))
    if origin is tuple:
        return f"a list of {words_of(typing.get_args(hint)[0])}"
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): "none"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def from_json(kind: type[T], value: Any, where: str = "") -> T:
    """A settings object of class ``kind`` from what :func:`json.load` gave.

    Args:
        kind: a dataclass of settings, perhaps of further ones.
        value: a dict with some of its fields; those that are left out keep their defaults.
        where: the path to it, for messages.

    Raises:
        ValueError: an unknown field, or a value of the wrong type or out of its range; the message has the whole path.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'the configuration'}={value!r} must be an object with named fields.")
    hints = typing.get_type_hints(kind)
    unknown = [name for name in value if name not in hints]
    if unknown:
        raise ValueError(
            f"{_join(where, unknown[0])} is no field of the configuration. Fields there: {', '.join(hints)}."
        )
    arguments = {}
    for name, item in value.items():
        if dataclasses.is_dataclass(hints[name]):
            arguments[name] = from_json(hints[name], item, _join(where, name))
        else:
            arguments[name] = tuple(item) if isinstance(item, list) else item
    try:
        return kind(**arguments)
    except ValueError as error:
        raise ValueError(_join(where, str(error))) from None


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def differences(there: Any, here: Any, *, ignore: tuple[str, ...] = (), where: str = "") -> list[str]:
    """The fields in which two settings of one class differ, as ``"data.num_ways: 5 there, 20 here"``.

    Args:
        there, here: two objects of one settings class.
        ignore: paths that may differ, such as ``"run.dir"``.
    """
    found = []
    for entry in dataclasses.fields(here):
        path, old, new = _join(where, entry.name), getattr(there, entry.name), getattr(here, entry.name)
        if dataclasses.is_dataclass(new):
            found += differences(old, new, ignore=ignore, where=path)
        elif path not in ignore and old != new:
            found.append(f"{path}: {old!r} there, {new!r} here")
    return found
