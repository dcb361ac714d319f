"""Names of closed-over tensors, as the user wrote them: closure, globals, attributes, module parameters."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

_MAX_DEPTH = 5  # containers in objects in closures: deeper than that is a data structure, not a name
_MAX_ITEMS = 1000  # entries of one container that are looked at
_MAX_OBJECTS = 20_000
Named = dict[int, tuple[str, str]]


def name_closed_over(function: Callable[..., Any], root: str, theta: tuple[Any, ...] = ()) -> Named:
    """``id(tensor) -> (name, where it was found)`` of the tensors that ``function`` can reach.

    ``root`` is what the function itself is called in the names of its attributes; tensors inside objects of ``theta``
    that are no pytrees are named after them.
    """
    found: Named = {}
    seen: set[int] = set()
    _walk(function, root, "attribute", found, seen, 0)
    for i, argument in enumerate(theta):
        _walk(argument, f"theta[{i}]", "inside an object that is no pytree", found, seen, 0)
    return found


def tensors_inside(value: Any, name: str) -> list[str]:
    """Names of the tensors that an object holds, for one that pytrees take as a single leaf."""
    found: Named = {}
    _walk(value, name, "", found, set(), 0)
    return [entry for entry, _ in found.values()]


def _walk(value: Any, name: str, where: str, found: Named, seen: set[int], depth: int) -> None:
    if isinstance(value, torch.Tensor):
        found.setdefault(id(value), (name, where))
        return
    if id(value) in seen or depth > _MAX_DEPTH or len(seen) > _MAX_OBJECTS:
        return
    if isinstance(value, (str, bytes, int, float, complex, type, type(None))):
        return
    seen.add(id(value))
    for child, child_name, child_where in _children(value, name, where):
        _walk(child, child_name, child_where, found, seen, depth + 1)


def _children(value: Any, name: str, where: str) -> Iterator[tuple[Any, str, str]]:
    """What ``value`` holds, with its names."""
    if isinstance(value, dict):
        yield from ((v, f"{name}[{k!r}]", where) for k, v in list(value.items())[:_MAX_ITEMS])
    elif isinstance(value, (list, tuple)):
        yield from ((v, f"{name}[{i}]", where) for i, v in enumerate(value[:_MAX_ITEMS]))
    elif isinstance(value, functools.partial):
        yield value.func, name, where
        yield from ((v, f"{name}.args[{i}]", "partial argument") for i, v in enumerate(value.args))
        yield from ((v, k, "partial argument") for k, v in value.keywords.items())
    elif inspect.ismethod(value):
        yield value.__self__, "self", "attribute"
        yield value.__func__, name, where
    elif inspect.isfunction(value):
        yield from _variables(value)
    elif isinstance(value, nn.Module):
        for kind, tensors in (("parameter", value.named_parameters), ("buffer", value.named_buffers)):
            yield from ((t, f"{name}.{k}", f"module {kind}") for k, t in tensors(remove_duplicate=False))
        own = {k: v for k, v in vars(value).items() if not k.startswith("_")}
        yield from ((v, f"{name}.{k}", "attribute") for k, v in own.items())
        yield from ((v, f"{name}.{k}", "attribute") for k, v in value.named_children())
        yield type(value).forward, name, where
    elif not isinstance(value, types.ModuleType) and hasattr(value, "__dict__"):
        yield from ((v, f"{name}.{k}", where or "attribute") for k, v in vars(value).items())
        if callable(value) and inspect.isfunction(method := inspect.getattr_static(type(value), "__call__", None)):
            yield method, name, where


def _variables(function: types.FunctionType) -> Iterator[tuple[Any, str, str]]:
    """What a function reads besides its arguments: closure, defaults, globals."""
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield cell.cell_contents, key, "closure"
        except ValueError:  # not assigned yet
            continue
    for key, parameter in inspect.signature(function, follow_wrapped=False).parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            yield parameter.default, key, "default argument"
    read = set(_global_names(function.__code__))
    for key in sorted(read):
        value = function.__globals__.get(key)
        if isinstance(value, types.ModuleType):  # `settings.weight`: only what is named beside it
            members = {k: vars(value).get(k) for k in sorted(read)}
            yield from ((t, f"{key}.{k}", "globals") for k, t in members.items() if isinstance(t, torch.Tensor))
        elif value is not None:
            yield value, key, "globals"


def _global_names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):  # a lambda or comprehension inside
            yield from _global_names(constant)
