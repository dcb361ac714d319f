"""``il.explain_gradient``: why is my gradient None, or zero?"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from implicitlayer import _torch
from implicitlayer._errors import UnsupportedTransformError
from implicitlayer.api._module import ArgminLayer
from implicitlayer.base._sharding import Sharding, mesh_of
from implicitlayer.base._surroundings import plain_surroundings
from implicitlayer.base._tree import flatten, flatten_with_names
from implicitlayer.constrained._constrained import ProxLayer
from implicitlayer.equation._flat import Signature
from implicitlayer.explain._explain_probe import Facts, Problem, ask_layer, closed_over_tensors, probe, quietly
from implicitlayer.explain._explain_trace import SourceLine
from implicitlayer.explain._explain_verdicts import WORDS, Outcome, Verdict, verdict_of, verdict_of_unknown
from implicitlayer.layer._layer import ImplicitLayer, check_init, without_aux


def explain_gradient(layer: ImplicitLayer | ArgminLayer, /, *args: Any) -> GradientExplanation:
    """Why the gradient of a layer is None, or zero: a verdict on every theta leaf and every closed-over tensor.

    The solver is not run. The objective (residual, map) is evaluated a few times at and near init, and its derivatives
    decide: theta gets a gradient where the gradient of the objective in x has a derivative in theta. Calls where a
    tensor leaves its graph are watched on the way, to name the line. What is flat near init may not be so at the
    solution: pass the layer's own answer as init to ask there. Elsewhere any entry of x may be held by a set, or free.

    Args:
        layer: what :func:`argmin`, :func:`root` or :func:`fixed_point` returns, or an :class:`ArgminLayer`.
        args: as the layer is called: ``init, *theta``; for a module its forward's arguments.

    Returns:
        A :class:`GradientExplanation`: ``.leaves``, ``.unknowns``, ``.notes``, one leaf by ``[name]``; prints readably.

    Raises:
        TypeError: ``layer`` is something else.
        UnsupportedTransformError: called inside a torch.func transform.
        ObjectiveError: the objective returns what no layer accepts.

    Source: mixed derivatives as in the implicit function theorem (see :func:`argmin`), with no linear solve.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.argmin(lambda x, t: ((x - t["a"]) ** 2).sum() + t["b"] ** 2, lambda f, x, t: t["a"])
        >>> t = {name: torch.ones((), requires_grad=True) for name in "ab"}
        >>> print(il.explain_gradient(layer, torch.zeros(()), t))
        theta[0]['a'] (float32, shape (), requires_grad=True): gets its gradient.
        theta[0]['b'] (float32, shape (), requires_grad=True): its gradient is zero: it reaches the objective, but
        not the gradient of the objective in x: it stands in a term of its own, on which the solution does not depend.
        Zero is right.
        x (float32, shape (), requires_grad=False): in order.
    """
    settings, init, theta = _resolve(layer, args)
    if _torch.transforms_active():
        raise UnsupportedTransformError(
            "explain_gradient was called inside a torch.func transform, whose tensors have no requires_grad to "
            "explain. Call it outside, with plain tensors that require a gradient."
        )
    x, x_names = flatten_with_names(init, "x")
    check_init(x, x_names, settings.batch_dims)
    if mesh_of(x) is not None:
        sharding = Sharding(init)
        settings, init = settings.inside(sharding, init), sharding.inside(init)
        x = flatten(init)[0]
    notes = _mode_notes()
    with torch.inference_mode(False), torch.enable_grad(), plain_surroundings(x), quietly():
        problem = _problem(settings, init, theta)
        x_facts, facts = probe(problem)
        ask_layer(problem, facts)
    if not any(t.requires_grad for t in problem.tensors):
        notes.append("Nothing here requires a gradient: the layer's answer has no graph.")
    held = isinstance(settings, ProxLayer)
    words = WORDS["constrained" if held else settings.kind]
    verdicts = [verdict_of(t, fact, words) for t, fact in zip(problem.tensors, facts, strict=True)]
    if notes:  # no call has a graph now, so no tensor gets anything
        verdicts = [Verdict("none", v.sentence, v.where) for v in verdicts]
    regular = held or settings.damping > 0 or settings.curvature != "hessian"
    unknowns = [
        record(name, "unknown", t, fact, verdict_of_unknown(t, fact, words, regular=regular))
        for name, t, fact in zip(x_names, x, x_facts, strict=True)
    ]
    leaves = (*theta_leaves(problem, facts, verdicts), *closed_leaves(problem, facts, verdicts))
    return GradientExplanation(tuple(notes), tuple(unknowns), (*leaves, *unread_parameters(problem)))


def _resolve(layer: Any, args: tuple[Any, ...]) -> tuple[ImplicitLayer, Any, tuple[Any, ...]]:
    """The layer with its function as the user wrote it, init and theta."""
    stored = None
    if isinstance(layer, ArgminLayer):
        stored, layer = layer.init, replace(layer._layer, function=layer.objective)
        if callable(stored) and not isinstance(stored, torch.Tensor):
            with torch.no_grad():
                stored = stored(*args)
    if isinstance(layer, ImplicitLayer):
        if stored is None and not args:
            raise TypeError("explain_gradient(layer, init, *theta) needs init: the layer has stored none.")
        return (layer, args[0], args[1:]) if stored is None else (layer, stored, args)
    inside = ""
    if isinstance(layer, nn.Module):
        held = [name for name, module in layer.named_modules() if isinstance(module, ArgminLayer)]
        inside = f" It holds one at {held[0]!r}: pass layer.get_submodule({held[0]!r})." if held else ""
    raise TypeError(
        f"explain_gradient got {type(layer).__name__}: it takes what il.argmin, il.root or il.fixed_point returns, or "
        f"an il.ArgminLayer. Of a wrapper, pass the layer inside it, with the arguments that the layer gets.{inside}"
    )


def _problem(layer: ImplicitLayer, init: Any, theta: tuple[Any, ...]) -> Problem:
    value_of = without_aux(layer.function) if layer.objective_has_aux else layer.function
    function, parts = value_of, {"objective": layer.function}
    if isinstance(layer, ProxLayer):
        function = partial(layer.with_conditions, value_of)
        parts[layer.terms_name] = layer.terms
    x, x_spec = flatten(init)
    signature = Signature.of(theta)
    closed = closed_over_tensors(function, (init, *theta))
    tensors = [*signature.tensors, *closed]
    return Problem(layer, parts, function, init, theta, x, x_spec, signature, tensors, closed)


def _mode_notes() -> list[str]:
    """What the surroundings of the call do to every gradient."""
    if torch.is_inference_mode_enabled():
        what, case = "Inference mode is on here", "outside of it"
    elif not torch.is_grad_enabled():
        what, case = "Grad mode is off here (torch.no_grad())", "with grad mode on"
    else:
        return []
    return [f"{what}: a call of the layer has no graph and no tensor gets a gradient. What follows is the case {case}."]


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
