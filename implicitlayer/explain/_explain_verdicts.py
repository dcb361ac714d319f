"""Facts about tensors as sentences: what gradient a tensor gets, why, and what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from implicitlayer.explain._explain_probe import Facts
from implicitlayer.explain._explain_trace import Call, SourceLine

Outcome = Literal["gradient", "zero", "none", "error"]

_REMEDIES = {
    "exit": "Use the tensor itself: the layer hands detached data to the solver anyway.",
    "copy": "Use the tensor itself (torch.stack for several).",
    "no_grad": "That line runs without grad mode: take it out of torch.no_grad().",
    "integers": "Integers have no derivative: stay with floating tensors, or use a smooth operation.",
    "numpy": "Write that part in torch operations.",
}


@dataclass(frozen=True)
class Words:
    """How a problem is spoken of: its function, the equation F = 0, and the matrix, "" where a set makes it another."""

    value: str
    equation: str
    matrix: str


WORDS = {
    "argmin": Words("the objective", "the gradient of the objective in x", "Hessian"),
    "root": Words("the residual", "the residual", "Jacobian"),
    "fixed_point": Words("the map", "the map", "Jacobian"),
    "constrained": Words("the problem", "the condition of optimality", ""),
}


@dataclass(frozen=True)
class Verdict:
    """What the layer gives a tensor, the sentence that says so, and the line of the user's code to look at."""

    outcome: Outcome
    sentence: str
    where: SourceLine | None = None


def verdict_of(tensor: torch.Tensor, fact: Facts, words: Words) -> Verdict:
    """The verdict on a theta leaf or closed-over tensor."""
    wanted = tensor.requires_grad
    if tensor.is_complex():
        advice = "Pass torch.view_as_real of it and rebuild it inside with torch.view_as_complex."
        if wanted:
            return Verdict("error", f"the layer refuses complex tensors that require a gradient. {advice}")
        return Verdict("none", f"gets no gradient: it is complex. {advice}")
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        return Verdict(
            "none", f"gets no gradient: {kind} has no derivative. Pass .double() of it if it is to be learned."
        )
    if fact.failure is not None:
        call = fact.numpy or next(iter(fact.cuts), None)
        message = str(fact.failure).strip().split("\n")[0]
        if fact.numpy is not None:
            message = f"NumPy reads it at {fact.numpy}, which a backward cannot follow. {_REMEDIES['numpy']}"
        sentence = f"the layer raises {type(fact.failure).__name__}: {message}"
        return Verdict("error", sentence, None if call is None else call.where)
    reason, culprit = _why_not(fact, words) if tensor.numel() else ("", None)
    where = culprit.where if culprit is not None else None
    if not wanted:
        sentence = "gets no gradient: requires_grad is False. Call .requires_grad_() if it is to be learned."
        if fact.numpy is not None:
            where, reason = fact.numpy.where, f"NumPy reads it at {fact.numpy}. {_REMEDIES['numpy']}"
        return Verdict("none", sentence + (f" That alone would not do: {reason}" if reason else ""), where)
    if reason:
        return Verdict("zero", f"its gradient is zero: {reason}", where)
    sentence = "gets its gradient."
    exits = _exits(fact)
    if exits:
        sentence += f" If {words.value} uses the value that leaves it at {exits[0]}, that part is missing."
        where = exits[0].where
    return Verdict("gradient", sentence, where)


def verdict_of_unknown(tensor: torch.Tensor, fact: Facts, words: Words, *, regular: bool) -> Verdict:
    """The verdict on a leaf of x; ``regular``: the matrix of the linear solve is more than the plain Hessian."""
    exits = _exits(fact)
    first = exits[0] if exits else None
    singular = "" if regular else f" The {words.matrix} has zeros for it: the linear solve of a backward is singular."
    if fact.numpy is not None:
        first = fact.numpy
        sentence = f"NumPy reads it at {first}: the layer raises an error. {_REMEDIES['numpy']}"
    elif tensor.numel() == 0:
        sentence = "it has no entries."
    elif fact.first_read is None:
        sentence = f"{words.value} never reads it." + (singular if words is not WORDS["fixed_point"] else "")
    elif fact.value_path == "none" and fact.path != "nonzero":
        lost = f"it is detached at {first}. {_REMEDIES[first.kind]}" if first is not None else "autograd sees no path."
        sentence = f"{words.value} does not depend on it in a way that autograd can see: {lost}{singular}"
    elif first is not None:
        sentence = (
            f"it leaves its graph at {first}: if {words.value} uses that value, derivatives in x miss it and every "
            f"gradient is wrong. {_REMEDIES[first.kind]}"
        )
    elif fact.path != "nonzero" and words.matrix:
        sentence = (
            f"{words.value} depends on it, but {words.equation} does not change with it near init (linear in x, or "
            f"flat).{singular} Add curvature, such as a small strength * (x**2).sum()."
        )
    else:
        sentence = "in order."
    if tensor.requires_grad:
        sentence += " init requires a gradient and gets none: a solution does not depend on where the search started."
    return Verdict("none", sentence, first.where if first is not None else None)


def _why_not(fact: Facts, words: Words) -> tuple[str, Call | None]:
    """Why F has no derivative in a tensor, with a remedy, and the call to look at; "" if it has one."""
    if fact.path == "nonzero":
        return "", None
    equation = words.equation
    if fact.first_read is None:
        return f"{words.value} never reads it.", None
    exits = _exits(fact)
    branches = [cut for cut in fact.cuts if cut.kind == "branch"]
    if fact.path == "zero" and fact.vanishes is not None:
        also = f" It also leaves its graph at {exits[0]}." if exits else ""
        return (
            f"it reaches {equation} through {fact.vanishes}, whose derivative is zero near init. Use a smooth "
            f"operation in its place, or a value where it is not flat.{also}",
            fact.vanishes,
        )
    if exits and fact.matters is not False:
        also = "".join(f", and at {cut}" for cut in exits[1:3])
        return f"it is detached at {exits[0]}{also}. {_REMEDIES[exits[0].kind]}", exits[0]
    if exits and exits[0].kind == "integers" and fact.value_path == "none":
        return f"it goes on as integers only, at {exits[0]}. {_REMEDIES['integers']}", exits[0]
    if branches and fact.value_path == "none":
        return (
            f"only a truth value leaves it, at {branches[0]}, and what it selects is piecewise constant in it. Use a "
            "smooth weight (torch.sigmoid).",
            branches[0],
        )
    if fact.matters is False and fact.value_path == "nonzero" and fact.path == "none":
        return (
            f"it reaches {words.value}, but not {equation}: it stands in a term of its own, on which the solution does "
            "not depend. Zero is right.",
            None,
        )
    if fact.matters is False:
        return (
            f"it is read at {fact.first_read}, but its value does not change {equation} near init. Zero is "
            "right there.",
            fact.first_read,
        )
    if fact.path == "zero":
        held = "" if words.matrix else " Entries of x that are held do not follow the objective, free ones no bound."
        return f"it reaches {equation}, but the derivative in it is zero at the points tried near init.{held}", None
    return (
        f"{equation} changes with its value, but autograd sees no path from it (a Function without that derivative, an "
        "extension).",
        fact.first_read,
    )


def _exits(fact: Facts) -> list[Call]:
    """Cuts where a value leaves, one for each line."""
    return list({str(cut): cut for cut in fact.cuts if cut.kind != "branch"}.values())
