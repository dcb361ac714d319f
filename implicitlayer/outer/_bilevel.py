"""``il.bilevel``: an outer optimizer around a layer, both solves as accurate as the outer gradient needs them."""

# Outer loss L(theta) = outer(x*(theta), theta), g its gradient as computed with both solves at a tolerance tau, g* the
# exact one. A step along -g goes downhill as long as ||g - g*|| < ||g||, so a fixed tight tau wastes steps of the
# solvers while g is large (Pedregosa 2016 lets tau fall by a schedule; here the error itself is measured).
#
# LOOK. From the solver's answer x one Newton step leads to x~, whose error is the square of that of x; there a linear
# solve at tau/100 makes g~. To first order ||g - g~|| is the error of g: of x in the cotangent, in outer's own
# derivative in theta, in the Hessian and in the mixed derivative, and of the linear solve, all in one difference. The
# step is made with g~. What remains in g~ itself is the record's own estimate, asked for where it decides to stop:
#     ||g*|| <= ||g~|| + ||g~ - g*|| <= max(atol, rtol ||g_0||).
# With s the larger of ||F(x)|| / ||F(init)|| and the relative residual of the linear solve, as they came out, the look
# knows C = ||g - g~|| / s, and the next solves get tau = ETA/2 ||g|| / C: an error of ETA/2 of the gradient, where they
# are just as good as asked for. A look comes when ||g|| has halved since the last, at the latest after _SELDOM
# gradients, and at once after one that found more than ETA.

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from implicitlayer._errors import NonFiniteError, ObjectiveError
from implicitlayer.base._records import BackwardRecord, ForwardRecord, diagnostics
from implicitlayer.base._status import Status
from implicitlayer.base._tree import flatten, flatten_with_names, leaves_norm, tree_map, unflatten
from implicitlayer.layer._layer import ImplicitLayer
from implicitlayer.linear._warm_start import WarmStart
from implicitlayer.outer._result import BilevelResult
from implicitlayer.solvers._progress import Iteration, reporting

_ETA = 0.1  # error of a gradient over its norm
_FIRST = 1e-2  # the tolerance to begin with, relative to the gradient at init and to the cotangent
_LOOSEST = 0.1
_SELDOM = 10
_NEWTON_STEPS = 5  # at most, after a solver whose accuracy is its own
_ADAM = partial(torch.optim.Adam, lr=0.05)
_LOOK = 1e-2  # the linear solve of a look, relative to the others


def bilevel(
    outer: Callable[[Any, Any], torch.Tensor],
    layer: ImplicitLayer,
    theta: Any,
    *,
    init: Any,
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | torch.optim.Optimizer = _ADAM,
    max_steps: int = 500,
    rtol: float = 1e-3,
    atol: float = 0.0,
    callback: Callable[[Iteration], None] | None = None,
    progress: bool = False,
) -> BilevelResult:
    """Minimise ``outer(x, theta)`` over theta, where ``x = layer(init, theta)``, until the outer gradient is small.

    Both solves begin at their last answer, and are as accurate as the outer gradient needs them: their tolerance falls
    with it, by an estimate of the gradient's error. Ends where ``||g|| + error of g <= max(atol, rtol ||g_0||)``, g_0
    the first gradient. A solver without ``rtol`` and ``atol`` (SciPy, your own) runs as it is; a Newton step then makes
    its answers better where they are not good enough.

    Args:
        outer: ``outer(x, theta) -> 0-d tensor``, plain torch code.
        layer: made by :func:`argmin`, :func:`root` or :func:`fixed_point`; its function gets theta as one argument.
        theta: pytree of floating tensors, where to begin. They are not changed, unless ``optimizer`` is an optimizer.
        init: pytree, where the first inner solve begins.
        optimizer: what makes a ``torch.optim`` optimizer of a list of tensors (``torch.optim.Adam``, a
            ``functools.partial`` of it); or an optimizer over the leaves of theta, which are then changed in place. A
            search along lines compares values, which are as inexact as the gradients: it may find no lower one.
        max_steps: limit of outer steps, at least 0.
        rtol, atol: tolerances on the norm of the outer gradient, see above; non-negative.
        callback: called with an :class:`il.solvers.Iteration` at every step; its ``x`` is theta.
        progress: show a bar (needs tqdm).

    Raises:
        TypeError, ValueError: misuse; the message says which.
        NonFiniteError: the outer loss or its gradient is not finite.
        StationarityError, LinearSolveError: as the layer's ``on_failure`` says of the linear solves. Whether x is
            stationary is judged here.

    Source: Pedregosa 2016 (arXiv:1602.02355), inexact gradients with a falling tolerance; here the tolerance follows an
    error estimate, not a schedule, and any optimizer makes the steps.

    Example:
        >>> import torch, implicitlayer as il
        >>> target = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> layer = il.argmin(lambda x, t: ((x - t) ** 2).sum() + (x**2).sum(), il.solvers.LBFGS())  # x = t / 2
        >>> result = il.bilevel(lambda x, t: ((x - target) ** 2).sum(), layer, torch.zeros_like(target),
        ...                     init=torch.zeros_like(target), optimizer=torch.optim.LBFGS, rtol=1e-6)
        >>> result.status.name, [round(v, 4) for v in result.theta.tolist()]
        ('CONVERGED', [2.0, 4.0])
    """
    _check(layer, max_steps, rtol, atol)
    theta, leaves, made = _begin(theta, optimizer)
    gradients = _Gradients(outer, layer, init, theta, leaves)
    goal = lambda first: max(atol, rtol * first)  # noqa: E731
    before: list[torch.Tensor] | None = None
    with reporting(callback, progress, max_steps) as report:
        for step in range(max_steps + 1):
            still = before is not None and all(map(torch.equal, before, leaves))  # the optimizer has nothing to add
            last = still or step == max_steps
            point, error, status = gradients.at(step, goal, last)
            if report is not None:
                value, norm = (torch.tensor(number, dtype=torch.float64) for number in (point.value, point.norm))
                report(Iteration(step, value, norm, tree_map(lambda leaf: leaf.detach().clone(), theta)))
            if still and status is Status.MAX_STEPS_REACHED:
                status = Status.STAGNATED
            if last or status is not Status.MAX_STEPS_REACHED:
                break
            before = [leaf.detach().clone() for leaf in leaves]
            waiting = [point]

            def closure(step: int = step, waiting: list[_Point] = waiting) -> float:
                """The gradient at theta as it is now; the first call has it already."""
                now = waiting.pop() if waiting else gradients.at(step, goal, last=False)[0]
                for leaf, gradient in zip(leaves, now.gradient, strict=True):
                    leaf.grad = gradient.clone()
                return now.value

            made.step(closure)
    return BilevelResult(
        theta=tree_map(lambda leaf: leaf.detach().clone(), theta),
        x=gradients.x,
        value=point.value,
        gradient_norm=point.norm,
        gradient_error=error,
        tolerance=goal(gradients.first),
        status=status,
        num_steps=step,
        history=gradients.history,
    )


def _check(layer: Any, max_steps: int, rtol: float, atol: float) -> None:
    if not isinstance(layer, ImplicitLayer):
        raise TypeError(
            f"layer must be made by il.argmin, il.root or il.fixed_point, got {type(layer).__name__}: its solver and "
            "linear solver are run at changing tolerances. Around anything else write the loop by hand: "
            "outer(layer(init, theta), theta).backward(); optimizer.step()."
        )
    if layer.on_failure == "mask":
        raise ValueError(
            'il.bilevel has no use for a layer with on_failure="mask": it begins every solve at the last answer, and a '
            'lane without a solution would go on running. Leave it out, or pass "raise" to hear of it at once.'
        )
    for name, value in (("max_steps", max_steps), ("rtol", rtol), ("atol", atol)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value} must be non-negative and finite.")
    if int(max_steps) != max_steps:
        raise ValueError(f"max_steps={max_steps} must be a whole number.")


def _begin(theta: Any, optimizer: Any) -> tuple[Any, list[torch.Tensor], torch.optim.Optimizer]:
    """Theta as leaves that require gradients, and the optimizer over them."""
    leaves, names = flatten_with_names(theta, "theta")
    for leaf, name in zip(leaves, names, strict=True):
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            what = f"of dtype {leaf.dtype}" if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise TypeError(
                f"{name} is {what}; all of theta is optimised, so it must be floating tensors. Let the functions close "
                "over what stays as it is (data, sizes)."
            )
    if not leaves:
        raise ValueError("theta has no leaves: pass a tensor or a pytree of tensors.")
    if isinstance(optimizer, torch.optim.Optimizer):
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if held != {id(leaf) for leaf in leaves} or not all(leaf.is_leaf and leaf.requires_grad for leaf in leaves):
            raise ValueError(
                "optimizer holds other tensors than theta's leaves (or these do not require a gradient). Give what "
                "makes it, such as functools.partial(torch.optim.Adam, lr=0.1), or make it over the leaves of theta."
            )
        return theta, leaves, optimizer
    copies = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    made = optimizer(copies)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer made {type(made).__name__} of a list of tensors, where a torch.optim.Optimizer is needed. Give "
            "a class such as torch.optim.Adam, or functools.partial of it with its settings."
        )
    return unflatten(copies, flatten(theta)[1]), copies, made


@dataclass(frozen=True, eq=False)
class _Point:
    """Value and gradient at one theta.

    ``record``: of the linear solve, None where outer does not depend on x; ``pull``: ||F(x)||, largest of the lanes.
    """

    value: float
    gradient: list[torch.Tensor]
    norm: float
    record: BackwardRecord | None
    inner_steps: int | None
    pull: float

    @property
    def linear_steps(self) -> int:
        return 0 if self.record is None else self.record.solution.num_steps


class _Gradients:
    """Outer gradients one after another: solves that start at the last answers, at the tolerance that is needed."""

    def __init__(
        self, outer: Callable[..., Any], layer: ImplicitLayer, init: Any, theta: Any, leaves: list[torch.Tensor]
    ) -> None:
        self.outer, self.layer, self.x, self.theta, self.leaves = outer, layer, init, theta, leaves
        self.history: list[dict[str, Any]] = []
        self.tau, self.rate, self.first = _FIRST, 0.0, math.nan
        self.least = 10 * max(torch.finfo(leaf.dtype).eps for leaf in leaves)
        self.looked_at, self.since = math.inf, 0
        self.scale = 0.0  # ||F(init)||: the gradient at a warm start is no measure of what is small
        given = layer.linear_solver
        self.linear = given.solver if isinstance(given, WarmStart) else given
        self.adjoints = WarmStart(self.linear) if _has_tolerance(self.linear) else None

    def at(self, step: int, goal: Callable[[float], float], last: bool) -> tuple[_Point, float, Status]:
        """The gradient at theta as it is now; its error where it is small enough to stop (or the last), and whether."""
        started = time.perf_counter()
        if self.scale == 0.0:
            self.scale = self._pull()
        rough = point = self._take(self._tuned())
        self.since += 1
        record: dict[str, Any] = {"step": step, "value": 0.0, "gradient_norm": 0.0, "gradient_error": None}
        record |= {"solve_tolerance": self.tau, "inner_steps": rough.inner_steps, "linear_steps": rough.linear_steps}
        error, status = math.inf, Status.MAX_STEPS_REACHED
        near = rough.norm <= max(0.5 * self.looked_at, goal(self.first))
        if near or last or self.since > _SELDOM or math.isnan(self.first):
            point = self._look()
            record["linear_steps"] += point.linear_steps
            off = [a - b for a, b in zip(rough.gradient, point.gradient, strict=True)]
            record["gradient_error"] = float(leaves_norm(off, 0))
            self.first = point.norm if math.isnan(self.first) else self.first
            self._learn(rough, record["gradient_error"], point.norm)
            if last or point.norm <= goal(self.first):
                error = 0.0 if point.record is None else float(point.record.gradient_error)
                status = self._verdict(point.norm + error, error, goal(self.first))
        self.tau = min(max(0.5 * _ETA * point.norm / self.rate, self.least), _LOOSEST) if self.rate else _FIRST
        record |= {"value": point.value, "gradient_norm": point.norm, "seconds": time.perf_counter() - started}
        self.history.append(record)
        return point, error, status

    def _verdict(self, total: float, error: float, goal: float) -> Status:
        if total <= goal:
            return Status.CONVERGED
        if error > goal and self.tau <= self.least:
            return Status.STAGNATED
        if error > 0.5 * goal:
            self.rate /= _LOOK
        return Status.MAX_STEPS_REACHED

    def _learn(self, rough: _Point, error: float, norm: float) -> None:
        """What a look tells of the solves before it, and when to look next."""
        pull = rough.pull / self.scale if self.scale else 0.0
        reached = max(pull, float(rough.record.solution.relative_residual.max()) if rough.record else 0.0)
        if reached > 0:
            self.rate = max(error, self.least * norm) / reached
        self.looked_at, self.since = (math.inf if error > _ETA * norm else norm), 0

    def _tuned(self) -> ImplicitLayer:
        solver, linear = self.layer.solver, self.linear
        if _has_tolerance(solver):
            solver = _with(solver, rtol=0.0 if self.scale else self.tau, atol=self.tau * self.scale)
        if self.adjoints is not None:
            warm = WarmStart(_with(linear, rtol=self.tau))
            warm._kept.update(self.adjoints._kept)
            linear = self.adjoints = warm
        return self._quiet(solver, linear)

    def _look(self) -> _Point:
        """The gradient at the point of a Newton step from x, by a linear solve that is tighter."""
        steps = 1 if _has_tolerance(self.layer.solver) else _NEWTON_STEPS
        linear = self.linear
        if _has_tolerance(linear):
            linear = _with(linear, rtol=max(self.tau * _LOOK, self.least))
        point = self._take(replace(self._quiet(self._stay, linear), polish=steps))
        if point.record is not None and not point.record.status.usable:
            point.record.solution.enforce(self.layer.on_failure, "The solve of a gradient of il.bilevel: ")
        return point

    def _quiet(self, solver: Any, linear: Any) -> ImplicitLayer:
        """What the layer says of loose solves is expected here; the errors are judged by the looks."""
        return replace(
            self.layer, solver=solver, linear_solver=linear, stationarity_rtol=None, on_failure="ignore", polish=0
        )

    def _stay(self, function: Any, init: Any, *theta: Any) -> Any:
        return (init, None) if self.layer.solver_has_aux else init

    def _pull(self) -> float:
        """||F|| at the x that the next solve begins with."""
        layer = self._quiet(self._stay, self.linear)
        with diagnostics():
            layer(self.x, self.theta)
        return _told(layer).pull

    def _take(self, layer: ImplicitLayer) -> _Point:
        """One gradient by this layer, from the last x to the next."""
        with torch.enable_grad(), diagnostics():
            x = layer(self.x, self.theta)
            x = x[0] if self.layer.solver_has_aux else x
            value = self.outer(x, self.theta)
            if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
                raise ObjectiveError(
                    "outer(x, theta) must return a 0-d tensor that depends on x or theta, got "
                    f"{f'shape {tuple(value.shape)}' if isinstance(value, torch.Tensor) else type(value).__name__}. "
                    "Sum or average it, and compute it in torch."
                )
            gradient = list(torch.autograd.grad(value, self.leaves, materialize_grads=True))
        self.x = tree_map(lambda leaf: leaf.detach(), x)
        norm, loss = float(leaves_norm(gradient, 0)), float(value.detach())
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(
                f"the outer loss is {loss} and its gradient has norm {norm} after {len(self.history)} "
                "gradients: the outer steps may be too long. Lower the learning rate, or optimise the logarithm of "
                "what must be positive."
            )
        return replace(_told(layer), value=loss, gradient=gradient, norm=norm)


def _told(layer: ImplicitLayer) -> _Point:
    forward = layer.records[0]
    assert isinstance(forward, ForwardRecord)
    solves = [r for r in layer.records if isinstance(r, BackwardRecord) and r.kind == "backward"]
    norm = forward.stationarity_norm
    pull = 0.0 if norm is None or not norm.numel() else float(norm.max())
    return _Point(math.nan, [], math.nan, solves[-1] if solves else None, forward.num_steps, pull)


def _has_tolerance(solver: Any) -> bool:
    return hasattr(solver, "rtol") and hasattr(solver, "atol") and hasattr(solver, "max_steps")


def _with(solver: Any, **settings: float) -> Any:
    """A copy with other settings; solvers are frozen dataclasses, or objects with attributes."""
    changed = copy.copy(solver)
    for name, value in settings.items():
        object.__setattr__(changed, name, value)
    return changed
