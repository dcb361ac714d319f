"""The records of an explanation, and how facts and verdicts become records."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from implicitlayer.base._tree import flatten_with_names
from implicitlayer.explain._explain_probe import Facts, Problem
from implicitlayer.explain._explain_trace import SourceLine
from implicitlayer.explain._explain_verdicts import Outcome, Verdict

Role = Literal["theta", "closed over", "unknown"]


@dataclass(frozen=True)
class GradientLeaf:
    """One tensor in one role, and what the layer gives it.

    Attributes:
        name: ``theta[0]['w']``, ``x``, or the name a closed-over tensor has in the user's code.
        role: what it is to the layer.
        shape, dtype: None for what is no tensor (a number, an object).
        requires_grad, is_leaf: its flags; a tensor that is no leaf has no ``.grad`` of its own.
        read: whether the objective reads it.
        reaches_value: whether the value of the objective (residual, map) has a derivative in it, or would have one
            if it required a gradient.
        reaches_gradient: the same of the gradient of the objective in x (of the residual, of the map); without it
            the gradient of the layer is zero.
        outcome: what a backward through the layer leaves: ``"gradient"``, ``"zero"``, ``"none"``, or ``"error"``.
        verdict: one sentence or two, with the remedy.
        where: the line of the user's code that the verdict points at, if there is one.
    """

    name: str
    role: Role
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    requires_grad: bool
    is_leaf: bool
    read: bool
    reaches_value: bool
    reaches_gradient: bool
    outcome: Outcome
    verdict: str
    where: SourceLine | None = None
    found_in: str = ""

    def __str__(self) -> str:
        about = [self.found_in] if self.found_in else []
        if self.dtype is not None:
            kind = str(self.dtype).removeprefix("torch.")
            about += [kind, f"shape {self.shape}", f"requires_grad={self.requires_grad}"]
        head = f"closed over `{self.name}`" if self.role == "closed over" else self.name
        return f"{head} ({', '.join(about)}): {self.verdict}" if about else f"{head}: {self.verdict}"


@dataclass(frozen=True)
class GradientExplanation:
    """What :func:`explain_gradient` found; ``print`` it.

    Attributes:
        notes: what concerns the whole call.
        unknowns: the leaves of x.
        leaves: every leaf of every theta, then every closed-over tensor.
    """

    notes: tuple[str, ...]
    unknowns: tuple[GradientLeaf, ...]
    leaves: tuple[GradientLeaf, ...]

    def __getitem__(self, name: str) -> GradientLeaf:
        every = (*self.leaves, *self.unknowns)
        found = [leaf for leaf in every if leaf.name == name]
        if not found:
            raise KeyError(f"no leaf is named {name!r}; there are {[leaf.name for leaf in every]}.")
        return found[0]

    def __str__(self) -> str:
        return "\n".join([*self.notes, *map(str, self.leaves), *map(str, self.unknowns)])


def record(
    name: str, role: Role, tensor: torch.Tensor, fact: Facts, verdict: Verdict, found_in: str = "", extra: str = ""
) -> GradientLeaf:
    about = (tuple(tensor.shape), tensor.dtype, tensor.requires_grad, tensor.is_leaf)
    reach = (fact.first_read is not None, fact.value_path == "nonzero", fact.path == "nonzero")
    return GradientLeaf(name, role, *about, *reach, verdict.outcome, verdict.sentence + extra, verdict.where, found_in)


def theta_leaves(problem: Problem, facts: list[Facts], verdicts: list[Verdict]) -> list[GradientLeaf]:
    """Every leaf of theta, tensors and others, in order."""
    tensor_names, result, i = _tensor_names(problem), [], 0
    for leaf, name in zip(*flatten_with_names(problem.theta, "theta"), strict=True):
        if isinstance(leaf, torch.Tensor):
            result.append(record(name, "theta", leaf, facts[i], verdicts[i], extra=_roles(problem, i, tensor_names)))
            i += 1
        else:
            result.append(_no_tensor(name, leaf))
    return result


def _no_tensor(name: str, leaf: Any) -> GradientLeaf:
    kind = type(leaf).__name__
    held = tensors_inside(leaf, name)
    if held:
        sentence = (
            f"pytrees take a {kind} as one leaf, so the tensors in it ({', '.join(held[:3])}) are no leaves of theta: "
            "those that the objective reads count as closed over. Pass them in a dict, a list or a tuple."
        )
    elif isinstance(leaf, (bool, int, float, complex)):
        sentence = (
            "a Python number gets no gradient. Pass torch.tensor(..., requires_grad=True) if it is to be learned."
        )
    else:
        sentence = f"a {kind} is passed through and gets no gradient."
    return GradientLeaf(name, "theta", None, None, False, True, True, False, False, "none", sentence, found_in=kind)


def _tensor_names(problem: Problem) -> list[str]:
    pairs = zip(*flatten_with_names(problem.theta, "theta"), strict=True)
    return [name for leaf, name in pairs if isinstance(leaf, torch.Tensor)]


def closed_leaves(problem: Problem, facts: list[Facts], verdicts: list[Verdict]) -> list[GradientLeaf]:
    """Every closed-over tensor, with the name it has in the user's code."""
    tensor_names = _tensor_names(problem)
    known = name_closed_over(problem.parts, problem.theta)
    result = []
    for i in range(len(tensor_names), len(problem.tensors)):
        tensor = problem.tensors[i]
        unnamed = (f"closed_over[{i - len(tensor_names)}]", "its name was not found")
        name, found_in = known.get(id(tensor), unnamed)
        extra = _roles(problem, i, tensor_names)
        result.append(record(name, "closed over", tensor, facts[i], verdicts[i], found_in, extra))
    return result


def unread_parameters(problem: Problem) -> list[GradientLeaf]:
    """Parameters of an objective that is a module, which no run of it met."""
    met = {id(t) for t in problem.tensors}
    verdict = Verdict("none", "the objective never reads it, so its .grad stays as it is.")
    return [
        record(f"{part_name}.{name}", "closed over", parameter, Facts(), verdict, "module parameter")
        for part_name, part in problem.parts.items()
        for name, parameter in (part.named_parameters() if isinstance(part, nn.Module) else ())
        if parameter.requires_grad and id(parameter) not in met
    ]


def _roles(problem: Problem, i: int, names: list[str]) -> str:
    """What else is to be said of a tensor: other roles it plays, and where its gradient goes."""
    tensor, text = problem.tensors[i], ""
    if tensor.requires_grad and not tensor.is_leaf and not tensor.retains_grad:
        text += (
            " It is no leaf: its own .grad stays None, the gradient goes on to what it was computed from "
            "(.retain_grad() keeps it)."
        )
    twins = [name for name, t in zip(names, problem.tensors, strict=False) if t is tensor]
    others = [name for name in twins if i >= len(names) or name != names[i]]
    if others:
        text += f" It is the same tensor as {others[0]}: what both roles get adds up."
    if any(t is tensor for t in problem.x):
        text += " It is also init, which gets no gradient: only this role counts."
    return text


_MAX_DEPTH = 5  # containers in objects in closures: deeper than that is a data structure, not a name
_MAX_ITEMS = 1000  # entries of one container that are looked at
_MAX_OBJECTS = 20_000
Named = dict[int, tuple[str, str]]


def name_closed_over(parts: dict[str, Any], theta: tuple[Any, ...]) -> Named:
    """``id(tensor) -> (name, where it was found)`` of the tensors that ``parts`` can reach.

    Their own names begin those of their attributes; tensors inside objects of ``theta`` that are no pytrees are named
    after them.
    """
    found: Named = {}
    seen: set[int] = set()
    for name, part in parts.items():
        _walk(part, name, "attribute", found, seen, 0)
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
