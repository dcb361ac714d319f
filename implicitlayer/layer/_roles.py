"""Which argument of a layer is the function and which the solver: mix-ups are told where the layer is made."""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicitlayer._errors import ImplicitLayerError
from implicitlayer.base._solution import RecordingSolver
from implicitlayer.base._tree import flatten, flatten_with_names, is_data

_WANTED = {"argmin": "minimum", "root": "root", "fixed_point": "fixed point"}
_FINDERS = {
    "minimum": "il.solvers.LBFGS(), NewtonCG() or GradientDescent()",
    "root": "il.solvers.Newton() or Broyden()",
    "fixed point": "il.solvers.AndersonAcceleration(), Newton() or Broyden()",
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
    # a root of x - map(x) is a fixed point, and the layer hands that to the solver
    if wanted in _FINDERS and finds in _FINDERS and finds != wanted and (finds, wanted) != ("root", "fixed point"):
        raise TypeError(
            f"solver={type(solver).__name__}(...) looks for a {finds}, and il.{layer} needs a {wanted}. Pass "
            f"{_FINDERS[wanted]}, or a solver of your own."
        )


def tell_arguments(error: Exception, function: Callable[..., Any], init: Any, theta: tuple[Any, ...]) -> None:
    """Add a note to an error of the user's own function: what it was called with, and what that may be a sign of.

    Python 3.10 has no notes; there the error stays as it is.
    """
    if isinstance(error, ImplicitLayerError) or not hasattr(error, "add_note"):
        return
    init = getattr(function, "unknowns", lambda x: x)(init)  # DTensors of one vector
    names = ["x", *(f"theta[{i}]" for i in range(len(theta)))]
    shown = "; ".join(f"{name} {_shown(value)}" for name, value in zip(names, (init, *theta), strict=True))
    note = (
        f"The layer called its function as f({', '.join(names)}): {shown}. The unknowns come first, in the structure "
        "of init, then what the layer is called with after init: layer(init, *theta) runs f(x, *theta)."
    )
    dtypes = {leaf.dtype for leaf in flatten((init, *theta))[0] if is_data(leaf) and leaf.is_floating_point()}
    if len(dtypes) > 1:
        note += (
            f" Their dtypes differ ({', '.join(sorted(map(str, dtypes)))}), which most products of torch refuse: the "
            "unknowns have the dtype of init, so give init that of the data (init.to(data.dtype))."
        )
    if not _takes(function, 1 + len(theta)):
        note += (
            f" It does not take {1 + len(theta)} arguments. Is it the solver, f(objective, init, *theta)? That is the "
            "second argument of a layer."
        )
    frames = traceback.walk_tb(error.__traceback__)
    if any(str(frame.f_globals.get("__name__", "")).startswith("numpy") for frame, _ in frames):
        note += (
            " The error comes from NumPy, which has no derivatives: write the function in torch operations (torch has "
            "most of NumPy's). Only the solver may use NumPy."
        )
    if _from_fsdp(error):
        note += (
            " It calls a module under fully_shard (FSDP2), which puts its own weights into the place of the unknowns. "
            "Leave out fully_shard: cut the weights by distribute_tensor or parallelize_module, and pass them as init."
        )
    error.add_note(note)


def tell_solver(error: TypeError, solver: Callable[..., Any], num_theta: int) -> None:
    """Add a note to an error of a solver that does not take what the layer calls it with."""
    if not hasattr(error, "add_note") or _takes(solver, 2 + num_theta):
        return
    names = ", ".join(["objective", "init", *(f"theta[{i}]" for i in range(num_theta))])
    error.add_note(
        f"The layer called its solver as solver({names}), and it does not take {2 + num_theta} arguments. Write it as "
        "solver(objective, init, *theta), also where it needs none of theta."
    )


def check_settings(layer: Any, functions: Sequence[str], optional: Sequence[str], numbers: Sequence[str]) -> None:
    """Raise for what cannot be called, for a linear solver that is a class, and for a negative number, by name."""
    for name in (*functions, *optional):
        value, or_none = getattr(layer, name), name in optional
        if not (callable(value) or (or_none and value is None)):
            raise TypeError(f"{name} must be callable{' or None' * or_none}, got {type(value).__name__}.")
    solver = layer.linear_solver
    if inspect.isclass(solver):
        raise TypeError(f"linear_solver={solver.__name__} is a class. Pass an instance: il.{solver.__name__}(...).")
    for name in numbers:
        if not getattr(layer, name) >= 0:
            raise ValueError(f"{name}={getattr(layer, name)} must be non-negative.")


def _shown(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    names = flatten_with_names(value, "")[1]
    inside = f" with {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" if names != [""] else ""
    return f"a {type(value).__name__}{inside}"


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Whether ``function`` may be called with so many arguments, as far as its signature tells."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # built-in functions may have none
        return True
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _from_fsdp(error: Exception) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")
    frames = () if fsdp is None else traceback.walk_tb(error.__traceback__)
    return any(isinstance(frame.f_locals.get("self"), getattr(fsdp, "FSDPModule", ())) for frame, _ in frames)


def _instead(value: type) -> str:
    if issubclass(value, torch.optim.Optimizer):
        made = f"il.solvers.TorchOptimizer(torch.optim.{value.__name__}, max_steps=..., lr=...)"
        return f"Pass {made}, which makes the optimizer anew for every solve."
    own = value.__module__.startswith("implicitlayer.solvers")
    return f"Pass an instance: {'il.solvers.' if own else ''}{value.__name__}(...)."
