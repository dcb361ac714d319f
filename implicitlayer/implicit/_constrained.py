"""Layers over simple sets and with non-smooth regularisers: the equation behind them, and what is told about them."""

# x* = argmin f(x, theta) + r(x), with r convex (infinite outside of a set), if and only if
#     x* = prox_{eta r}(x* - eta grad f(x*, theta))    for any step eta > 0.
# So the layer is a root layer of F(x, theta) = x - prox_{eta r}(x - eta grad_x f(x, theta)). With P the derivative of
# the prox, dF/dx = I - P (I - eta H): the identity where the prox holds an entry, eta H where it lets it go, so the
# linear solve works on the free entries only. x*(theta) does not depend on eta, hence neither does any derivative of
# it: eta is a constant to them. The conditioning does depend on it; eta = 1 / (curvature) makes eta H of the size of I.
#
# NOTE [second-order condition]: the equation holds at maxima and saddles too, and the linear solve, not symmetric, has
# no sign to look at. On the range of P the curvature of r is (P^+ - I) / eta, so that along p = P w that of f + r is
#     p' H p + (w'P w - p'p) / eta = p' (w - p + eta H p) / eta,
# never negative at a minimum. One w is tried, of mixed signs: a negative number proves that x is no minimum; a positive
# one proves nothing, where few of many directions bend down.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer._active_set import ActiveSet
from implicitlayer._capture import ClosedOver, call_with
from implicitlayer._errors import (
    IndefiniteError,
    InfeasibleError,
    KinkError,
    KinkWarning,
    ObjectiveError,
    StationarityWarning,
)
from implicitlayer._flat import Signature, flat_function
from implicitlayer._surroundings import out_of_inference, outside_compiled_code, plain_surroundings
from implicitlayer._tree import TreeSpec, flatten, name_lanes, ravel, tree_map, unflatten
from implicitlayer._types import FlatFunction, Leaves, OnFailure
from implicitlayer._warn import warn
from implicitlayer.implicit._forward import Constraints
from implicitlayer.implicit._layer import ImplicitLayer, without_aux
from implicitlayer.linear._cg import ConjugateGradient
from implicitlayer.linear._minres import Minres
from implicitlayer.linear._residual import Residual, check_value, pullback
from implicitlayer.sets._term import ProximalTerm, expand_like, largest_of, resolve

__all__ = ["ProxLayer"]

_NEAR = 1e-3  # ||F|| over the size of x and eta grad f, above which an answer is no solution
# A solution may be zero, and an answer near it as far outside as its solver's rounding: the distance from the set is
# then compared with this power of eps times the size of x - eta grad f (6e-6 of it in float64).
_FLOOR = 1 / 3
_ROUNDINGS = 4  # of x - eta grad f (the data, a product, a sum), in units of eps of its largest entry


@dataclass(frozen=True, eq=False)
class _Found(ActiveSet):
    """An active set, and the cosine [*lanes] between p and w - p + eta H p; see NOTE [second-order condition]."""

    bend: torch.Tensor


@dataclass(eq=False)
class ProxLayer(ImplicitLayer):
    """A layer ``(init, *theta) -> argmin_x objective(x, *theta) + r(x)``; made by :func:`argmin`.

    Attributes:
        terms: the set or regulariser r: a term, a pytree of terms, or a function of theta that returns one.
        terms_name: what the user called it: ``constraint`` or ``regularizer``.
        step_size: eta of the fixed-point equation, in units of 1 / curvature; None estimates it with one product.
    """

    terms: Any = None
    terms_name: str = "constraint"
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature != "hessian" or self.damping or self.negative_curvature != "raise":
            raise ValueError(
                f"curvature, damping and negative_curvature do not apply to a layer with a {self.terms_name}: its "
                "linear system is not symmetric. Leave them out."
            )
        if self.assumptions is not None:
            raise ValueError(
                f"assumptions are those of a lemma without constraints; it does not hold for a layer with a "
                f"{self.terms_name}. Leave them out: record.gradient_error is then an estimate."
            )
        if isinstance(self.linear_solver, ConjugateGradient | Minres):
            raise ValueError(
                f"linear_solver={type(self.linear_solver).__name__}() is for symmetric systems; that of a layer with a "
                f"{self.terms_name} is not. Leave it out (il.Gmres), or use il.Bicgstab or il.Dense."
            )
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size={self.step_size} must be positive and finite, or None to have it estimated.")
        if not callable(self.terms):
            resolve(self.terms, (), self.terms_name)

    @outside_compiled_code
    def __call__(self, init: Any, *theta: Any) -> Any:
        """As for every layer; the answer must be in the set even where nothing needs a gradient."""
        solution = super().__call__(init, *theta)
        if getattr(self.records[0], "active_set", None) is None:
            self._judge_distance(solution[0] if self.solver_has_aux else solution, theta)
        return solution

    def _judge_distance(self, x: Any, theta: tuple[Any, ...]) -> None:
        """Without a gradient nothing is differentiated for checks: one projection, and more where that looks bad."""
        if self.stationarity_rtol is None or self.on_failure == "ignore":
            return
        with torch.inference_mode(False), plain_surroundings(flatten(x)[0]), torch.no_grad():
            x, theta = tree_map(_plain, (x, theta))
            term, leaves = resolve(self.terms, theta, self.terms_name), flatten(x)[0]
            size = largest_of(ravel(leaves, self.batch_dims))
            if bool((term.violation(x, self.batch_dims) <= self.stationarity_rtol * size).all()):
                return
            value_of = without_aux(self.function) if self.objective_has_aux else self.function
            problem = _Problem(value_of, self.terms, self.terms_name, self.batch_dims, self.step_size)
            found = _active_set(problem.report(x, *theta), leaves, flatten(x)[1], self.batch_dims)
        self._refuse_outside(found)

    def as_root(self, function: Callable[..., Any]) -> ImplicitLayer:
        """The layer of the equation that is differentiated, for the objective ``function`` as the user wrote it."""
        value_of = without_aux(function) if self.objective_has_aux else function
        # a fixed step: nothing is detached on the way that an explanation would have to explain
        problem = _Problem(value_of, self.terms, self.terms_name, self.batch_dims, self.step_size or 1.0)
        return ImplicitLayer(
            problem.residual, self.solver, self.linear_solver, "root", False, False, "ignore", None, 0, self.batch_dims
        )

    def _equation(
        self, function: Callable[..., Any], x_spec: TreeSpec, signature: Signature, hidden: ClosedOver
    ) -> tuple[FlatFunction, Residual, Constraints]:
        problem = _Problem(function, self.terms, self.terms_name, self.batch_dims, self.step_size)
        slots = signature.without_tensors()  # what outlives the call must not keep its data alive

        def call(what: Callable[..., Any], x: Leaves, theta: Leaves) -> Any:
            values = theta[len(theta) - len(hidden) :]
            return call_with(what, hidden, values, (unflatten(x, x_spec), *slots.rebuild(theta)))

        def values(x: Leaves, theta: Leaves) -> torch.Tensor:
            value: torch.Tensor = call(problem.value, x, theta)
            return value

        residual = Residual(flat_function(problem.residual, x_spec, signature, hidden, False), False, self.batch_dims)

        def prox(x_and_step: Leaves, theta: Leaves) -> Leaves:
            *x, step = x_and_step

            def apply(y: Any, *args: Any) -> Any:
                return resolve(self.terms, args, self.terms_name).prox(y, step, self.batch_dims)

            return flatten(call(apply, x, theta))[0]

        def report(x: Leaves, theta: Leaves) -> Leaves:
            return list(call(problem.report, x, theta))

        def examine(lifted: Residual, x: Leaves, theta: Leaves) -> ActiveSet:
            _refuse_detached(lifted.over_lanes(values), x, theta)
            return _active_set(lifted.over_lanes(report)(x, theta), x, x_spec, lifted.lane_dims)

        return values, residual, Constraints(self.terms, prox, examine, self._judge)

    def _read(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What the finder of closed-over tensors runs: the objective, and the data of the constraint."""

        def read(x: Any, *theta: Any) -> Any:
            value = function(x, *theta)
            resolve(self.terms, theta, self.terms_name).prox(x, 1.0, self.batch_dims)
            return value

        return read

    def _judge(self, found: ActiveSet, on_failure: OnFailure) -> None:
        """An answer outside of the set is an error; one at a kink, or with the wrong curvature, a warning."""
        if on_failure == "ignore":
            return
        self._refuse_outside(found)
        if self.stationarity_rtol is not None and isinstance(found, _Found):
            self._judge_curvature(found, on_failure)
        self._judge_kinks(found, on_failure)

    def _refuse_outside(self, found: ActiveSet) -> None:
        allowed = self.stationarity_rtol
        outside = ~(found.relative_violation <= allowed) if allowed is not None else found.violation.isnan()
        if bool(outside.any()):
            pick = tuple(outside.nonzero()[0].tolist())
            raise InfeasibleError(
                f"the solver's answer does not satisfy the {self.terms_name}{name_lanes(outside)}: its distance is "
                f"{found.violation[pick].item():.3g} ({found.relative_violation[pick].item():.1e} of its size, allowed "
                f"{allowed or 0:.1e}). Does the solver know the {self.terms_name}? A layer tells it to "
                "il.solvers.ProjectedGradient(), and bounds to SciPyMinimize; any other solver must know it by itself. "
                "Or the set is empty, or a strength negative."
            )

    def _judge_curvature(self, found: _Found, on_failure: OnFailure) -> None:
        down = found.bend < -(torch.finfo(found.bend.dtype).eps ** 0.5)
        if not bool(down.any()):
            return
        message = (
            f"the solver's answer is stationary, but no minimum{name_lanes(down)}: the objective bends down along a "
            f"direction that the {self.terms_name} leaves free (cosine with its image {found.bend.min().item():.2g}). "
            "The gradient would be that of a maximum or saddle. Start elsewhere, or use a solver that leaves saddles; "
            "if it is meant, pass on_failure='ignore'."
        )
        if on_failure == "raise":
            raise IndefiniteError(message)
        warn(message, StationarityWarning)

    def _judge_kinks(self, found: ActiveSet, on_failure: OnFailure) -> None:
        bent = found.num_kinks > 0
        if bool(bent.any()):
            message = (
                f"the solution sits at a kink{name_lanes(bent)}: {int(found.num_kinks.max())} of its entries are at a "
                f"border of the {self.terms_name} with a multiplier of zero (within "
                f"{float(found.tolerance.max()):.1e}). The solution bends there, and its derivative is that of one "
                "side. See record.active_set.kinks."
            )
            if on_failure == "raise":
                raise KinkError(message)
            warn(message, KinkWarning)


@dataclass(frozen=True, eq=False)
class _Problem:
    """Objective and term on the user's structures, for one lane of every vmap level."""

    function: Callable[..., Any]
    terms: Any
    name: str
    lane_dims: int
    step_size: float | None

    def value(self, x: Any, *theta: Any) -> torch.Tensor:
        value = self.function(x, *theta)
        check_value(value, flatten(x)[0][0].shape[: self.lane_dims], self.lane_dims > 0)
        result: torch.Tensor = value
        return result

    def gradient(self, spec: TreeSpec, theta: tuple[Any, ...]) -> Callable[[Leaves], Leaves]:
        """x leaves -> grad f leaves (of the sum over lanes, which are independent)."""
        return lambda x: list(torch.func.grad(lambda p: self.value(unflatten(p, spec), *theta).sum())(x))

    def moved(self, x: Any, theta: tuple[Any, ...]) -> tuple[Any, torch.Tensor]:
        """x - eta grad f(x), and eta [*lanes]."""
        leaves, spec = flatten(x)
        gradient = self.gradient(spec, theta)
        slope = gradient(leaves)
        step = self.step(gradient, leaves, slope)
        return unflatten([v - expand_like(step, v) * g for v, g in zip(leaves, slope, strict=True)], spec), step

    def step(self, gradient: Callable[[Leaves], Leaves], x: Leaves, slope: Leaves) -> torch.Tensor:
        """eta, a constant: 1 / (||H d|| / ||d||) for a direction d of signs, which mixes all eigenvectors.

        Where the objective is linear along d, any eta will do: the size of x over that of the gradient.
        """
        lanes = x[0].shape[: self.lane_dims]
        if self.step_size is not None:
            return x[0].new_full(lanes, self.step_size)
        here = [v.detach() for v in x]
        product = ravel(pullback(gradient, here, _signs(here)), self.lane_dims).detach()
        curvature = product.norm(dim=-1) / max(product.shape[-1], 1) ** 0.5
        flat, pull = ravel(here, self.lane_dims), ravel([g.detach() for g in slope], self.lane_dims)
        sizes = flat.norm(dim=-1), pull.norm(dim=-1)
        fallback = torch.where(
            (sizes[0] > 0) & (sizes[1] > 0), sizes[0] / torch.where(sizes[1] > 0, sizes[1], 1.0), 1.0
        )
        bent = (curvature > 0) & curvature.isfinite()
        return torch.where(bent, 1 / torch.where(bent, curvature, 1.0), fallback).detach()

    def residual(self, x: Any, *theta: Any) -> Any:
        """x - prox(x - eta grad f(x))."""
        y, step = self.moved(x, theta)
        leaves, spec = flatten(x)
        near = flatten(resolve(self.terms, theta, self.name).prox(y, step, self.lane_dims))[0]
        return unflatten([v - p for v, p in zip(leaves, near, strict=True)], spec)

    def report(self, x: Any, *theta: Any) -> Leaves:
        """Masks of active entries, distances from kinks, and per lane: see :func:`_active_set`."""
        term = resolve(self.terms, theta, self.name)
        y, step = self.moved(x, theta)
        held, margins = term.activity(y, step, self.lane_dims)
        near = term.prox(y, step, self.lane_dims)
        flat = [ravel(flatten(tree)[0], self.lane_dims) for tree in (x, y, near)]
        error = (flat[0] - flat[2]).norm(dim=-1)
        violation = term.violation(x, self.lane_dims)
        size = torch.maximum(largest_of(flat[0]), term.magnitude(y, self.lane_dims))
        bend = self.bend(x, y, step, term, theta)
        return [*flatten(held)[0], *flatten(margins)[0], error, size, largest_of(flat[1]), violation, bend]

    def bend(self, x: Any, y: Any, step: torch.Tensor, term: ProximalTerm, theta: tuple[Any, ...]) -> torch.Tensor:
        """Cosine [*lanes] between p = P w and w - p + eta H p; see NOTE [second-order condition]. One product."""
        leaves, spec = flatten(x)

        def prox(points: Leaves) -> Leaves:
            return list(flatten(term.prox(unflatten(points, spec), step, self.lane_dims))[0])

        w = _signs(leaves)
        p = pullback(prox, flatten(y)[0], w)  # P is symmetric
        curved = pullback(self.gradient(spec, theta), leaves, p)
        image = [a - b + expand_like(step, c) * c for a, b, c in zip(w, p, curved, strict=True)]
        flat = [ravel(part, self.lane_dims) for part in (p, image)]
        flat = [part / _positive(largest_of(part)).unsqueeze(-1) for part in flat]
        return (flat[0] * flat[1]).sum(-1) / _positive(flat[0].norm(dim=-1) * flat[1].norm(dim=-1))


def _active_set(found: Leaves, x: Leaves, x_spec: TreeSpec, lane_dims: int) -> ActiveSet:
    k = len(x)
    # per lane: ||F||, the size of x and of the part of y that matters, that of all of y, the distance from the set, the
    # sign of the curvature
    held, margins, (error, size, far, violation, bend) = found[:k], found[k : 2 * k], found[2 * k :]
    # An entry that is nearer to a kink than the answer is to the solution may be on either side. Far from a solution,
    # which the stationarity check tells, kinks mean nothing.
    eps = torch.finfo(x[0].dtype).eps
    rounding = _ROUNDINGS * eps * far
    near = error <= _NEAR * size + rounding
    least = torch.maximum(eps**0.5 * size, rounding)
    tolerance = torch.where(near, torch.maximum(least, 2 * error), least)
    kinks = [m <= expand_like(tolerance, m) for m in margins]

    def count(masks: Leaves) -> torch.Tensor:
        return ravel([mask.to(torch.int64) for mask in masks], lane_dims).sum(-1)

    scale = _positive(torch.maximum(largest_of(ravel(x, lane_dims)), eps**_FLOOR * size))
    return _Found(
        active=unflatten(held, x_spec),
        kinks=unflatten(kinks, x_spec),
        num_active=count(held),
        num_kinks=count(kinks),
        kinks_known=not any(bool(m.isnan().any()) for m in margins),
        tolerance=tolerance,
        violation=violation,
        relative_violation=violation / scale,
        bend=torch.where(near, bend, 1.0),
    )


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, 1.0)


def _signs(like: Leaves) -> Leaves:
    """A direction of signs; the golden angle spreads them without a period, so that it mixes all eigenvectors."""
    signs = [torch.cos(2.399963 * torch.arange(v.numel(), device=v.device, dtype=v.dtype) ** 2) for v in like]
    return [torch.where(s >= 0, 1.0, -1.0).to(v.dtype).reshape(v.shape) for s, v in zip(signs, like, strict=True)]


def _plain(leaf: Any) -> Any:
    return out_of_inference([leaf])[0].detach() if isinstance(leaf, torch.Tensor) else leaf


def _refuse_detached(values: FlatFunction, x: Leaves, theta: Leaves) -> None:
    """A gradient that autograd cannot see would make every point of the set a solution."""
    with torch.enable_grad():
        value = values([v.detach().requires_grad_() for v in x], theta)
    if not value.requires_grad:
        raise ObjectiveError(
            "the objective does not depend on x in a way autograd can see: its value has no graph. Build it from torch "
            "operations on x, without .detach(), .item(), .numpy() or torch.no_grad()."
        )
