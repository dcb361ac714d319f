"""Where the graph of a value ends: tensors that are no arguments, and functions that cannot be differentiated twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicitlayer._errors import ClosureError, ObjectiveError
from implicitlayer.equation._limits_of_torch import PLAINLY
from implicitlayer.equation._normalisation import NORMALISATIONS, wrong_third_derivative


def refuse_hidden_tensors(
    function: Callable[[list[torch.Tensor], list[torch.Tensor]], list[torch.Tensor]],
    x: list[torch.Tensor],
    theta: list[torch.Tensor],
) -> None:
    """Raise if ``function(x, theta)`` depends on a tensor that requires a gradient and is not an argument.

    Catches what the finder cannot see: a tensor read on a branch that was not taken at ``init``, or by a scripted
    module or an extension. Inside a torch.func level the arguments' own graph is on that level, so whatever graph the
    value has outside of it comes from elsewhere.
    """
    with torch.enable_grad():
        vjp: Callable[..., Any] = torch.func.vjp  # torch annotates its results as two or three values
        values, _ = vjp(lambda x_: function(x_, theta), x)
    for value in values:
        if value.requires_grad:
            raise _not_followed(next(iter(leaves_of([value])), None))


def other_leaves(
    leaves: Sequence[torch.Tensor], known: Sequence[torch.Tensor], again: Callable[[], Sequence[torch.Tensor]]
) -> list[torch.Tensor]:
    """Those of the ``leaves`` of a run of a function that are neither ``known`` nor made by the function itself.

    A leaf that the function makes, to take a derivative, is another one when it is run ``again``.
    """
    ids = {id(tensor) for tensor in known}
    others = [leaf for leaf in leaves if id(leaf) not in ids]
    if not others:
        return others
    same = {id(leaf) for leaf in leaves_of(again())}
    return [leaf for leaf in others if id(leaf) in same]


def _not_followed(leaf: torch.Tensor | None) -> ClosureError:
    shape = "" if leaf is None else f" of shape {tuple(leaf.shape)}"
    return ClosureError(
        f"the objective reads a closed-over tensor{shape} that requires a gradient, in a way that could not be "
        "followed (a branch not taken at init, a scripted or traced module, an extension). Pass it to the layer as one "
        "more theta."
    )


def _refuse_once_differentiable(function: Any) -> None:
    """Raise for a Function marked once_differentiable: torch takes its second derivative as zero."""
    if function.backward.__code__.co_filename == _ONCE.__code__.co_filename:
        raise ObjectiveError(
            f"the objective uses the autograd.Function {function.__name__}, which is once_differentiable: torch would "
            f"take its second derivative as zero in silence, and the gradient would be wrong. {PLAINLY}"
        )


_ONCE = torch.autograd.function.once_differentiable


def nodes_of(values: Sequence[torch.Tensor], most: int | None = None) -> list[Any]:
    """Every node of the graph of ``values``, once, but no more than about ``most``."""
    found: list[Any] = [value.grad_fn for value in values if value.grad_fn is not None]
    seen = set(found)
    for node in found:  # which grows
        if most is not None and len(found) > most:
            break
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)
    return found


def leaves_of(values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The leaf tensors that the graph of ``values`` reaches."""
    return ends_of(values)[0]


def ends_of(values: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], str]:
    """The leaf tensors that the graph of ``values`` reaches, and what is wrong with its third derivative."""
    leaves = [value for value in values if value.grad_fn is None and value.requires_grad]
    flaw = ""
    for node in nodes_of(values):
        kind = type(node)
        function = getattr(kind, "_forward_cls", None)
        if function is not None:
            _refuse_once_differentiable(function)
        elif kind.__name__ == "AccumulateGrad":
            leaves.append(node.variable)
        elif kind.__name__.rstrip("0123456789") in NORMALISATIONS:
            flaw = flaw or wrong_third_derivative(node)
    return leaves, flaw
