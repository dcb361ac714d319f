"""Which argument of a layer is the function and which the solver: mix-ups are told where the layer is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from implicitlayer._solution import RecordingSolver

_WANTED = {"argmin": "minimum", "root": "root", "fixed_point": "root"}
_FINDERS = {
    "minimum": "il.solvers.LBFGS(), NewtonCG() or GradientDescent()",
    "root": "il.solvers.Newton(), Broyden() or AndersonAcceleration()",
}


def check_roles(layer: str, function: Callable[..., Any], solver: Callable[..., Any], name: str) -> None:
    """Raise TypeError where function and solver are swapped, are classes, or where the solver solves another problem.

    ``layer``: the name in ``il`` of what is being made; ``name``: that of its function.
    """
    call = f"il.{layer}({name}, solver)"
    if isinstance(function, RecordingSolver):
        raise TypeError(
            f"{name}={type(function).__name__}(...) is a solver. The {name} comes first, the solver second: {call}."
        )
    for role, value in ((name, function), ("solver", solver)):
        if inspect.isclass(value):
            raise TypeError(f"{role}={value.__name__} is a class, and {call} calls what it is given. {_instead(value)}")
    if isinstance(solver, torch.optim.Optimizer):
        raise TypeError(f"solver={type(solver).__name__}(...) was made for one run. {_instead(type(solver))}")
    wanted, finds = _WANTED.get(layer), getattr(solver, "finds", None)
    if wanted in _FINDERS and finds in _FINDERS and finds != wanted:
        raise TypeError(
            f"solver={type(solver).__name__}(...) looks for a {finds}, and il.{layer} needs a {wanted}. Pass "
            f"{_FINDERS[wanted]}, or a solver of your own."
        )


def _instead(value: type) -> str:
    if issubclass(value, torch.optim.Optimizer):
        made = f"il.solvers.TorchOptimizer(torch.optim.{value.__name__}, max_steps=..., lr=...)"
        return f"Pass {made}, which makes the optimizer anew for every solve."
    own = value.__module__.startswith("implicitlayer.solvers")
    return f"Pass an instance: {'il.solvers.' if own else ''}{value.__name__}(...)."
