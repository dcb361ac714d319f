"""``scipy.optimize.minimize`` as an inner solver, and bounds and constraints around it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from implicitlayer._errors import StationarityError, extra
from implicitlayer.base._solution import RecordingSolver, SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import TreeSpec, flatten, leaves_norm, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._residual import pull_back
from implicitlayer.sets._shapes import ends_of_box, require_box
from implicitlayer.sets._term import resolve
from implicitlayer.solvers._leaves import check_attached, check_unknowns
from implicitlayer.solvers._progress import Iteration, reporting

_DERIVATIVE_FREE = ("nelder-mead", "powell", "cobyla", "cobyqa")
_WHOLE_HESSIAN = ("dogleg", "trust-exact")
_NEEDS_HESSIAN = ("newton-cg", "trust-ncg", "trust-krylov", "trust-constr")
# Their status 2: the line search found no lower point ("precision loss", "abnormal"); 3 of the first three: NaN.
_LINE_SEARCH = ("bfgs", "cg", "newton-cg", "l-bfgs-b")


class SciPyMinimize(RecordingSolver):
    """Minimise with ``scipy.optimize.minimize``, in float64 on the CPU, gradients from autograd.

    Derivative-free methods (Nelder-Mead, Powell, COBYLA, COBYQA) see values only. Methods that use Hessian-vector
    products (Newton-CG, trust-ncg, trust-krylov, trust-constr) get them from autograd.

    In a layer with ``constraint=il.sets.Box(lower, upper)`` (or ``NonNegative``, or one per part of x) the bounds come
    from there; in one of ``il.constrained_argmin``, the equations and inequalities (SLSQP, trust-constr, COBYQA, and
    COBYLA, which takes equations from SciPy 1.16 on), unless ``constraints`` are given here. In an unconstrained layer,
    bounds and constraints that are given here are SciPy's alone: the layer would take an answer that rests on them for
    a bad solution, so that is an error. Where none of them holds the answer, they are harmless.

    Args:
        method: as in SciPy.
        tol: as in SciPy; the meaning depends on the method.
        options: as in SciPy, such as ``{"maxiter": 100, "gtol": 1e-10}``.
        callback: called with an :class:`Iteration` at the start and with every point that SciPy reports, after each of
            its iterations (TNC and COBYLA: where they do). SciPy tells the point alone, so each call costs one more
            evaluation. Derivative-free methods use no gradient: there ``gradient_norm`` is NaN. An exception ends the
            solve and reaches the caller, ``StopIteration`` too (SciPy itself would take that for the answer).
        progress: show a bar (needs tqdm, extra ``implicitlayer[progress]``).
        settings: further keyword arguments of ``minimize`` (bounds, constraints, ...).

    Raises:
        ImportError: SciPy is missing; ``pip install "implicitlayer[scipy]"``.
        StationarityError: in a layer, an answer that rests on bounds or constraints that only this solver knows.
        TypeError, ValueError: a layer's constraint that is no box, a method without bounds or without constraints,
            bounds from both sides.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.SciPyMinimize("BFGS", tol=1e-10)
        >>> x = solver(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> [round(v, 6) for v in x.tolist()]
        [3.0, 3.0]
    """

    finds: ClassVar[Literal["minimum"]] = "minimum"

    def __init__(
        self,
        method: str = "L-BFGS-B",
        *,
        tol: float | None = None,
        options: dict[str, Any] | None = None,
        callback: Callable[[Iteration], None] | None = None,
        progress: bool = False,
        **settings: Any,
    ) -> None:
        if str(method).lower() in _WHOLE_HESSIAN and "hess" not in settings:
            raise ValueError(
                f"method={method!r} of SciPy works with the whole Hessian. Use 'trust-krylov', 'trust-ncg' or "
                "'Newton-CG', which get its products, or pass hess=, a function of SciPy's flat vector."
            )
        self.method, self.tol, self.options, self.settings = method, tol, dict(options or {}), settings
        self.callback, self.progress = callback, progress

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status, step count and SciPy's message; ``aux`` is SciPy's ``OptimizeResult``."""
        result = self._minimize(objective, init, *theta)
        if not hasattr(objective, "inequality_vector"):  # il.constrained_argmin judges the answer itself
            refuse_hidden_limits(result.aux.x, self.settings, self.method)
        return result

    def __call__(self, objective: Callable[..., Any], init: Any, *theta: Any) -> Any:
        """Outside of a layer there is nothing to differentiate, and an answer may rest on SciPy's own bounds."""
        return self._minimize(objective, init, *theta).value

    def _minimize(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        with extra("scipy", "il.solvers.SciPyMinimize needs SciPy"):
            from scipy import optimize
        leaves, spec = flatten(init)
        check_unknowns(leaves)
        if not any(leaf.numel() for leaf in leaves):
            nothing = optimize.OptimizeResult(x=np.zeros(0), message="There are no unknowns.")
            return SolverResult(init, Status.CONVERGED, 0, nothing.message, aux=nothing)
        function = _FlatObjective(objective, FlatPoints(leaves, spec), theta, self.method.lower())
        settings = self._settings_for(function, init)
        with reporting(self.callback, self.progress, self.options.get("maxiter")) as report:
            telling = _Telling(function, report)
            telling(function.points.flat(leaves))
            result = optimize.minimize(
                function,
                function.points.flat(leaves),
                jac=True if function.with_gradient else None,
                method=self.method,
                tol=self.tol,
                options=self.options,
                callback=telling if report is not None else None,
                **settings,
            )
            if telling.stopped is not None:
                raise telling.stopped
        value = unflatten([leaf.detach() for leaf in function.points.at(result.x)], spec)
        return SolverResult(
            value, self._status(result, function.first), int(result.get("nit", 0)), str(result.message), aux=result
        )

    def _settings_for(self, function: _FlatObjective, init: Any) -> dict[str, Any]:
        """What ``minimize`` is called with besides: the user's own, and what the layer knows."""
        settings = dict(self.settings)
        bounds = bounds_of_layer(function.objective, self.method, init, function.theta)
        if bounds is not None:
            if settings.get("bounds") is not None:
                raise ValueError(
                    "bounds= of SciPyMinimize beside constraint= of the layer: which one? Leave out bounds=."
                )
            settings["bounds"] = bounds
        if settings.get("constraints") is None:
            constraints = constraints_of_layer(function.objective, self.method, function.points, function.theta)
            if constraints:
                settings["constraints"] = constraints
        if function.method in _NEEDS_HESSIAN:
            settings.setdefault("hessp", function.hessian_product)
        return settings

    def _status(self, result: Any, first: list[float]) -> Status:
        """SciPy's own, but that its methods go on after NaN or Inf at the start and may call anything converged."""
        numbers = [*first, *np.atleast_1d(result.fun), *np.ravel(result.x)]
        if not np.isfinite(np.asarray(numbers, dtype=np.float64)).all():
            return Status.NONFINITE
        if result.success:
            return Status.CONVERGED
        if self.method.lower() in _LINE_SEARCH and result.status == 2:
            return Status.STAGNATED
        return Status.MAX_STEPS_REACHED


class _FlatObjective:
    """The objective as SciPy calls it: of one flat NumPy vector, its value, with the gradient where the method has it.

    Attributes:
        first: the objective at init; NaN beside it where its gradient is not finite.
    """

    def __init__(
        self, objective: Callable[..., torch.Tensor], points: FlatPoints, theta: tuple[Any, ...], method: str
    ) -> None:
        self.objective, self.points, self.theta, self.method = objective, points, theta, method
        self.with_gradient = method not in _DERIVATIVE_FREE
        self.first: list[float] = []

    def __call__(self, flat: np.ndarray) -> Any:
        return self.value_and_gradient(flat) if self.with_gradient else self.value_only(flat)

    def _at(self, x: list[torch.Tensor]) -> torch.Tensor:
        return self.objective(unflatten(x, self.points.spec), *self.theta)

    def value_and_gradient(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.enable_grad():
            x = self.points.at(flat)
            value = self._at(x)
            check_attached(value, single=True)
            gradient = torch.autograd.grad(value, x, materialize_grads=True)
        number, flat_gradient = float(value.detach()), self.points.flat(gradient)
        if not self.first:
            self.first.extend([number, 0.0 if np.isfinite(flat_gradient).all() else np.nan])
        return number, flat_gradient

    def value_only(self, flat: np.ndarray) -> float:
        with torch.no_grad():
            number = float(self._at(self.points.at(flat)))
        if not self.first:
            self.first.append(number)
        return number

    def hessian_product(self, flat: np.ndarray, direction: np.ndarray) -> np.ndarray:
        with torch.enable_grad():
            x = self.points.at(flat)
            gradient = torch.autograd.grad(self._at(x), x, create_graph=True, materialize_grads=True)
            product = pull_back(list(gradient), x, self.points.vectors(direction))
        return self.points.flat(product)


class _Telling:
    """SciPy's callback: tells a listener of an iteration, at one evaluation; ``stopped``: the listener's StopIteration,
    with which SciPy would end in success."""

    def __init__(self, function: _FlatObjective, report: Callable[[Iteration], None] | None) -> None:
        self.function, self.report = function, report
        self.stopped: StopIteration | None = None
        self.count = itertools.count()

    def __call__(self, flat: np.ndarray, *_: Any) -> None:
        if self.report is None or self.stopped is not None:
            return
        number, norm = 0.0, torch.tensor(np.nan, dtype=torch.float64)
        if self.function.with_gradient:
            number, slope = self.function.value_and_gradient(flat)
            norm = leaves_norm([torch.from_numpy(slope)], 0)
        else:
            number = self.function.value_only(flat)
        at = unflatten([leaf.detach() for leaf in self.function.points.at(flat)], self.function.points.spec)
        try:
            self.report(Iteration(next(self.count), torch.tensor(number, dtype=torch.float64), norm, at))
        except StopIteration as stop:
            self.stopped = stop
            raise


# NOTE [limits behind a layer's back]: on the border of a set the gradient of the objective is not zero at the solution,
# but -(multipliers) * (normals). A layer that knows nothing of the set would take that for a bad solve, polish it out
# of the set, or differentiate an unconstrained problem. Whether it rests on a limit can be seen from the answer.

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
    require_box(term, "SciPyMinimize can pass on")
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
