"""Copies of what holds functions of the user's: a function that closes over what is being copied follows the copy."""

# copy.deepcopy takes functions as they are. A module whose layer has a lambda over the module itself,
#     self.layer = il.argmin(lambda x, t: self.net(x, t), solver),
# would then have a copy whose layer reads the weights of the original. So where a cell of a function (or a default, an
# argument of a partial) holds what the copy in progress has copied already, the module itself above all, the function
# is made anew over the copy. What is met for the first time stays shared, as Python has it: a function is no owner.

from __future__ import annotations

import copy
import types
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T", bound="CopiesFunctions")


class CopiesFunctions:
    """Base of what holds functions of the user's: ``copy.deepcopy`` gives them the objects of the copy."""

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        made: T = object.__new__(type(self))
        memo[id(self)] = made
        state: Any = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # Python 3.10 has none
        for name, value in (state or {}).items():
            made.__dict__[name] = _copied(value, memo)
        return made


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.FunctionType):
        return _rebuilt(value, memo) if _follows(value, memo, set()) else value
    if isinstance(value, partial) and _follows(value, memo, set()):
        arguments = [_within(item, memo) for item in value.args]
        keywords = {name: _within(item, memo) for name, item in value.keywords.items()}
        return partial(_within(value.func, memo), *arguments, **keywords)
    return copy.deepcopy(value, memo)


def _within(value: Any, memo: dict[int, Any]) -> Any:
    """What stands in a function: the copy if there is one, itself if not."""
    return _copied(value, memo) if _follows(value, memo, set()) else value


def _parts(value: Any) -> list[Any]:
    """What a function reads, as far as it holds it."""
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if not isinstance(value, types.FunctionType):
        return []
    held = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    for cell in value.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # a name without a value yet
            continue
    return held


def _follows(value: Any, memo: dict[int, Any], seen: set[int]) -> bool:
    """Whether ``value`` has a copy, or is a function that reads something that has."""
    if id(value) in memo:
        return True
    if id(value) in seen:  # functions may close over each other
        return False
    seen.add(id(value))
    return any(_follows(part, memo, seen) for part in _parts(value))


def _rebuilt(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """The same function over the objects of the copy."""
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, None, cells if function.__closure__ else None
    )
    memo[id(function)] = made  # a function may close over itself
    made.__defaults__ = function.__defaults__ and tuple(_within(item, memo) for item in function.__defaults__)
    made.__kwdefaults__ = {name: _within(item, memo) for name, item in (function.__kwdefaults__ or {}).items()}
    for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    made.__dict__.update(function.__dict__)
    for new, old in zip(cells, function.__closure__ or (), strict=True):
        try:
            new.cell_contents = _within(old.cell_contents, memo)
        except ValueError:
            continue
    return made
