"""The records of an explanation, and how facts and verdicts become records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from implicitlayer.base._tree import flatten_with_names
from implicitlayer.explain._explain_names import name_closed_over, tensors_inside
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
    known = name_closed_over(problem.function, "objective", problem.theta)
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
    if not isinstance(problem.function, nn.Module):
        return []
    met = {id(t) for t in problem.tensors}
    verdict = Verdict("none", "the objective never reads it, so its .grad stays as it is.")
    return [
        record(f"objective.{name}", "closed over", parameter, Facts(), verdict, "module parameter")
        for name, parameter in problem.function.named_parameters()
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
