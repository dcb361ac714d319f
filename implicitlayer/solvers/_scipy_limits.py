"""Bounds and constraints around SciPy: from the layer to SciPy; refused where SciPy alone knows them."""

# NOTE [limits behind a layer's back]: on the border of a set the gradient of the objective is not zero at the solution,
# but -(multipliers) * (normals). A layer that knows nothing of the set would take that for a bad solve, polish it out
# of the set, or differentiate an unconstrained problem. Whether it rests on a limit can be seen from the answer.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from implicitlayer._errors import StationarityError
from implicitlayer.base._tree import TreeSpec, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.sets._box import ends_of_box, is_box
from implicitlayer.sets._term import resolve

WITH_BOUNDS = ("L-BFGS-B", "TNC", "SLSQP", "Nelder-Mead", "Powell", "trust-constr", "COBYLA", "COBYQA")
WITH_CONSTRAINTS = ("SLSQP", "trust-constr", "COBYLA", "COBYQA")
# This near to a limit, in units of its size (1 for a limit at 0), an answer rests on it. trust-constr ends inside, at
# barrier parameter over multiplier; its defaults leave a barrier parameter of 3e-5.
_AT_A_LIMIT, _INSIDE = 1e-6, 1e-3


def bounds_of_layer(objective: Any, method: str, init: Any, theta: tuple[Any, ...]) -> np.ndarray | None:
    """The box of the layer that calls, [n, 2], or None where it has no constraint.

    Raises:
        TypeError: a constraint that is no box.
        ValueError: a method of SciPy that has no bounds.
    """
    terms = getattr(objective, "terms", None)
    if terms is None:
        return None
    term = resolve(terms, theta)
    if not is_box(term):
        raise TypeError(
            f"SciPyMinimize can pass on il.sets.Box and il.sets.NonNegative only, got {type(term).__name__}. Use "
            "il.solvers.ProjectedGradient(), or a solver of your own that knows the set."
        )
    if method.lower() not in (name.lower() for name in WITH_BOUNDS):
        raise ValueError(
            f"method={method!r} of SciPy has no bounds, and the layer has a box. Use one of {WITH_BOUNDS}."
        )
    ends = ends_of_box(lambda y, step: objective.prox(y, step, *theta), init)
    return np.stack([ravel([leaf.double() for leaf in leaves], 0).cpu().numpy() for leaves in ends], axis=1)


def constraints_of_layer(problem: Any, method: str, points: FlatPoints, theta: tuple[Any, ...]) -> list[Any]:
    """The equations and inequalities h = 0, g <= 0 of ``il.constrained_argmin`` as SciPy's dicts; empty without any.

    Raises:
        ValueError: a method of SciPy that has no constraints.
    """
    found = []
    # SciPy's inequalities are >= 0
    for kind, vector, sign in (("eq", "equality_vector", 1.0), ("ineq", "inequality_vector", -1.0)):
        size = getattr(problem, "num_equalities" if kind == "eq" else "num_inequalities", 0)
        if size:
            values = _Values(getattr(problem, vector), points, theta, sign)
            found.append({"type": kind, "fun": values.at, "jac": values.jacobian})
    if found and method.lower() not in (name.lower() for name in WITH_CONSTRAINTS):
        raise ValueError(
            f"method={method!r} of SciPy has no constraints, and the layer has some. Use one of {WITH_CONSTRAINTS}."
        )
    return found


class FlatPoints:
    """The unknowns as SciPy has them, one float64 vector on the CPU, and as torch has them."""

    def __init__(self, like: Leaves, spec: TreeSpec) -> None:
        self.like, self.spec = like, spec

    def vectors(self, flat: np.ndarray) -> Leaves:
        """The leaves of a flat vector."""
        return unravel(torch.from_numpy(np.array(flat, dtype=np.float64)).to(self.like[0].device), self.like, 0)

    def at(self, flat: np.ndarray) -> Leaves:
        """The same as points of a graph."""
        return [leaf.detach().requires_grad_() for leaf in self.vectors(flat)]

    def flat(self, leaves: Sequence[torch.Tensor]) -> np.ndarray:
        """The flat vector of leaves."""
        return ravel([leaf.detach().double() for leaf in leaves], 0).cpu().numpy()


class _Values:
    """Constraints as functions of a flat NumPy x: [k], and their gradients, [k, n]."""

    def __init__(
        self, function: Callable[..., torch.Tensor], points: FlatPoints, theta: tuple[Any, ...], sign: float
    ) -> None:
        self.function, self.points, self.theta, self.sign = function, points, theta, sign

    def _of(self, flat: np.ndarray) -> tuple[Leaves, torch.Tensor]:
        x = self.points.at(flat)
        with torch.enable_grad():
            return x, self.function(unflatten(x, self.points.spec), *self.theta)

    def at(self, flat: np.ndarray) -> Any:
        return self.sign * self._of(flat)[1].detach().double().cpu().numpy()

    def jacobian(self, flat: np.ndarray) -> Any:
        x, values = self._of(flat)
        rows = [torch.autograd.grad(v, x, retain_graph=True, materialize_grads=True) for v in values]
        return self.sign * np.stack([self.points.flat(row) for row in rows])


def refuse_hidden_limits(x: np.ndarray, settings: dict[str, Any], method: str) -> None:
    """Raise StationarityError where x rests on ``bounds`` or ``constraints`` that the layer does not know of."""
    held: list[str] = []
    near = _INSIDE if method.lower() == "trust-constr" else _AT_A_LIMIT
    if settings.get("bounds") is not None:
        lower, upper = _bounds(settings["bounds"], x.size)
        entries = np.flatnonzero(_reached(x, lower, near) | _reached(x, upper, near))
        if entries.size:
            held.append(f"bounds= (entries {entries[:6].tolist()}{', ...' if entries.size > 6 else ''})")
    constraints = settings.get("constraints")
    constraints = [constraints] if isinstance(constraints, dict) or hasattr(constraints, "lb") else constraints
    if any(_is_binding(c, x, near) for c in constraints or ()):
        held.append("constraints=")
    if held:
        raise StationarityError(
            f"the answer of SciPyMinimize rests on its {' and '.join(held)}, of which the layer knows nothing: the "
            "gradient of the objective is not zero there, and the derivative would be that of another problem. For "
            "bounds leave them out here and pass constraint=il.sets.Box(lower, upper) to il.argmin: the solver takes "
            "them from there. For others see il.sets, or il.constrained_argmin."
        )


def _bounds(bounds: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper, [n] each, of SciPy's two ways to say them."""
    if hasattr(bounds, "lb"):
        return np.broadcast_to(bounds.lb, n), np.broadcast_to(bounds.ub, n)
    pairs: Iterable[tuple[Any, Any]] = bounds
    both = [(-np.inf if lo is None else lo, np.inf if hi is None else hi) for lo, hi in pairs]
    lower, upper = np.array(both, dtype=np.float64).reshape(-1, 2).T
    return lower, upper


def _reached(value: np.ndarray, limit: np.ndarray, near: float) -> Any:
    """Mask of the entries of ``value`` that are at ``limit``."""
    finite = np.isfinite(limit)
    size = np.where(finite & (limit != 0), np.abs(np.where(finite, limit, 1.0)), 1.0)
    return finite & (np.abs(value - np.where(finite, limit, 0.0)) <= near * size)


def _is_binding(constraint: Any, x: np.ndarray, near: float) -> bool:
    """Whether x sits on a constraint in one of SciPy's forms: a dict, or an object with lb and ub."""
    if isinstance(constraint, dict):
        function: Callable[..., Any] = constraint["fun"]
        value = np.atleast_1d(function(x, *constraint.get("args", ())))
        return bool(constraint["type"] == "eq" or _reached(value, np.zeros_like(value), near).any())
    value = np.atleast_1d(constraint.A @ x if hasattr(constraint, "A") else constraint.fun(x))
    lower, upper = np.broadcast_to(constraint.lb, value.shape), np.broadcast_to(constraint.ub, value.shape)
    return bool((_reached(value, lower, near) | _reached(value, upper, near)).any())
