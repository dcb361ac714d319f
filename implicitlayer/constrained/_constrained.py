"""Layers over simple sets and with non-smooth regularisers: the equation behind them, and what is told about them."""

# NOTE [second-order condition]: the equation holds at maxima and saddles too, and the linear solve, not symmetric, has
# no sign to look at. On the range of P the curvature of r is (P^+ - I) / eta, so that along p = P w that of f + r is
#     p' H p + (w'P w - p'p) / eta = p' (w - p + eta H p) / eta,
# never negative at a minimum. One w is tried, of mixed signs: a negative number proves that x is no minimum; a positive
# one proves nothing, where few of many directions bend down.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from implicitlayer._errors import IndefiniteError, InfeasibleError, StationarityWarning, tell_kink, warn
from implicitlayer.base._failures import failed_lanes, marking, refuse, replaced, standing
from implicitlayer.base._parts import Parts
from implicitlayer.base._records import ForwardRecord
from implicitlayer.base._sharding import Sharding, mesh_of
from implicitlayer.base._solution import ActiveSet
from implicitlayer.base._surroundings import out_of_inference, outside_compiled_code, plain_surroundings
from implicitlayer.base._tree import TreeSpec, flatten, name_lanes, positive, ravel, tree_map, unflatten, unravel
from implicitlayer.base._types import FlatFunction, Leaves, OnFailure
from implicitlayer.constrained._prox_equation import At, ProxProblem, ProxResidual, refuse_detached
from implicitlayer.equation._capture import ClosedOver
from implicitlayer.equation._flat import Reading, Signature, call_with, flat_function
from implicitlayer.equation._residual import Attached, Residual
from implicitlayer.layer._forward import Constraints
from implicitlayer.layer._layer import ImplicitLayer, without_aux
from implicitlayer.linear._dense import materialise
from implicitlayer.linear._operator import FlatOperator, is_for_symmetric
from implicitlayer.sets._term import expand_like, largest_of, resolve, seen_by, signs

_NEAR = 1e-3  # ||F|| over the size of x and eta grad f, above which an answer is no solution
ROUNDINGS = 4  # of x - eta grad f (the data, a product, a sum), in units of eps of its largest entry


@dataclass(frozen=True, eq=False)
class _Found(ActiveSet):
    """An active set, the cosine of NOTE [second-order condition], and the distance of y from the nearest kink.

    ``bend`` is the cosine between p and w - p + eta H p; ``nearest`` leaves out the kinks where the answer is, and is
    infinite where nothing is known. Both are [*lanes].
    """

    bend: torch.Tensor
    nearest: torch.Tensor


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

    reads_more: ClassVar[bool] = True
    damps: ClassVar[bool] = False

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
        if is_for_symmetric(self.linear_solver):
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
        if mesh_of(flatten(init)[0]) is not None:
            return super().__call__(init, *theta)  # which calls this layer for whole tensors
        if self.batch_dims and flatten(init)[0]:
            resolve(self.terms, theta, self.terms_name).refuse_ambiguous(init, self.batch_dims)
        solution = super().__call__(init, *theta)
        if getattr(self.records[0], "active_set", None) is None:
            x, *aux = solution if self.solver_has_aux else (solution,)
            x = self._judge_distance(x, theta)
            solution = (x, *aux) if self.solver_has_aux else x
        return solution

    def _judge_distance(self, given: Any, theta: tuple[Any, ...]) -> Any:
        """The answer, NaN where masked; without a gradient by one projection, and more where that looks bad."""
        if self.stationarity_rtol is None or self.on_failure == "ignore":
            return given
        with torch.inference_mode(False), plain_surroundings(flatten(given)[0]), torch.no_grad():
            x, theta = tree_map(_plain, (given, theta))
            term, leaves = resolve(self.terms, theta, self.terms_name), flatten(x)[0]
            size = largest_of(ravel(leaves, self.batch_dims))
            inside = term.violation(x, self.batch_dims) <= self.stationarity_rtol * size
            if self.on_failure == "mask":
                inside = inside | failed_lanes(leaves, self.batch_dims)  # by the solver
            if bool(inside.all()):
                return given
            value_of = without_aux(self.function) if self.objective_has_aux else self.function
            spec, signature = flatten(x)[1], Signature.of(theta)
            _, residual, _ = self._equation(value_of, spec, signature, ClosedOver())
            found = _examined(residual.attached(leaves, signature.tensors), spec, lambda x: x)
            with marking(self.on_failure == "mask", inside.shape, inside) as failed:
                self._refuse_outside(found)
        if failed is None:
            return given
        record = self.records[0]
        assert isinstance(record, ForwardRecord) and record.failed is not None
        record.failed.logical_or_(failed)
        return unflatten(replaced(failed, flatten(given)[0], math.nan), spec)

    def works_in_parts(self, init: Any, theta: tuple[Any, ...]) -> bool:
        """Whether the term looks at no single entries of the unknowns, and the solver asks it for its prox alone."""
        term = resolve(self.terms, theta, self.terms_name)
        term.refuse_ambiguous(init, self.batch_dims)
        return term.in_parts and getattr(self.solver, "regularizer", self.terms) is None

    def inside(self, sharding: Sharding, init: Any) -> ImplicitLayer:
        """As for every layer; the term sees thetas as they are."""
        layer = replace(self, terms=seen_by(self.terms, sharding, init, self.batch_dims))
        return ImplicitLayer.inside(layer, sharding, init)

    def with_conditions(self, value_of: Callable[..., Any], x: Any, *theta: Any) -> list[Any]:
        """The value, and proximal points of points near and far from zero, which show the data that the term reads."""
        term, (leaves, spec) = resolve(self.terms, theta, self.terms_name), flatten(x)
        eps = torch.finfo(leaves[0].dtype).eps
        points = [[scale * sign for sign in signs(leaves, self.batch_dims)] for scale in (1, -1, 1 / eps, -1 / eps)]
        return [value_of(x, *theta), *(term.prox(unflatten(y, spec), 1.0, self.batch_dims) for y in points)]

    def _equation(
        self, function: Callable[..., Any], x_spec: TreeSpec, signature: Signature, hidden: ClosedOver
    ) -> tuple[FlatFunction, ProxResidual, Constraints]:
        problem = ProxProblem(function, self.terms, self.terms_name, self.batch_dims, self.step_size)
        slots = signature.slots  # what outlives the call must not keep its data alive

        def call(
            what: Callable[..., Any], given: tuple[Any, ...], theta: Leaves, reading: Reading | None = None
        ) -> Any:
            values = theta[len(theta) - len(hidden) :]
            return call_with(what, hidden, values, (*given, *slots.rebuild(theta)), reading=reading)

        def objective(x: Leaves, theta: Leaves, reading: Reading | None = None) -> torch.Tensor:
            value: torch.Tensor = call(problem.value, (unflatten(x, x_spec),), theta, reading)
            return value

        def near(y_and_step: Leaves, theta: Leaves, reading: Reading | None = None) -> Leaves:
            *y, step = y_and_step
            leaves: Leaves = call(problem.near_and_diagonal, (unflatten(y, x_spec), step), theta, reading)
            return leaves

        def prox(y_and_step: Leaves, theta: Leaves) -> Leaves:
            *y, step = y_and_step
            return flatten(call(problem.near, (unflatten(y, x_spec), step), theta))[0]

        def report(x_y_and_step: Leaves, theta: Leaves) -> Leaves:
            *both, step = x_y_and_step
            x, y = (unflatten(part, x_spec) for part in (both[: len(both) // 2], both[len(both) // 2 :]))
            return list(call(problem.report, (x, y, step), theta))

        residual = ProxResidual(
            function=flat_function(problem.residual, x_spec, signature, hidden, False),
            is_gradient=False,
            lane_dims_of_function=self.batch_dims,
            num_fixed=len(hidden) if hidden.checkpoints else 0,
            objective=objective,
            near=near,
            report=report,
            closed=hidden,
            step_size=self.step_size,
        )

        def examine(lifted: Residual, x: Leaves, at: Attached | None) -> ActiveSet:
            assert isinstance(lifted, ProxResidual) and isinstance(at, At)
            refuse_detached(at)
            lifted.of_call.step = at.step
            return _examined(at, x_spec, getattr(self.function, "unknowns", lambda x: x))

        return objective, residual, Constraints(self.terms, prox, examine, self._judge)

    def _read(self, function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any] | None]:
        """What the finder of closed-over tensors runs: the objective, and the data of the constraint."""

        def read(x: Any, *theta: Any) -> Any:
            value = function(x, *theta)
            return [value, resolve(self.terms, theta, self.terms_name).prox(x, 1.0, self.batch_dims)]

        return read, None

    def _judge(self, found: ActiveSet, on_failure: OnFailure, limited: bool) -> None:
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
            error = InfeasibleError(
                f"the solver's answer does not satisfy the {self.terms_name}{name_lanes(outside)}: its distance is "
                f"{found.violation[pick].item():.3g} ({found.relative_violation[pick].item():.1e} of its size, allowed "
                f"{allowed or 0:.1e}). Does the solver know the {self.terms_name}? A layer tells it to "
                "il.solvers.ProjectedGradient(), and bounds to SciPyMinimize; any other solver must know it by itself. "
                "Or the set is empty, or a strength negative."
            )
            refuse(outside, error)

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
        if on_failure in ("raise", "mask"):
            return refuse(down, IndefiniteError(message))
        warn(message, StationarityWarning, "no minimum")

    def _judge_kinks(self, found: ActiveSet, on_failure: OnFailure) -> None:
        bent = standing(found.num_kinks > 0)
        if bool(bent.any()):
            message = (
                f"the solution sits at a kink{name_lanes(bent)}: {int(found.num_kinks.max())} of its entries are at a "
                f"border of the {self.terms_name} with a multiplier of zero (within "
                f"{float(found.tolerance.max()):.1e}). The solution bends there, and its derivative is that of one "
                "side. See record.active_set.kinks."
            )
            tell_kink(message, "kink", on_failure)


def _examined(at: At, x_spec: TreeSpec, shown: Callable[[Any], Any]) -> _Found:
    """What is known of the answer from its report; ``shown``: of the unknowns, as the user has them."""
    x, lane_dims, k = at.x, at.lane_dims, len(at.x)
    held, margins, violation = at.report[:k], at.report[k : 2 * k], at.report[-1]
    with torch.no_grad():
        error = ravel(at.value, lane_dims).norm(dim=-1)
        far = largest_of(ravel(at.y, lane_dims))
    # An entry that is nearer to a kink than the answer is to the solution may be on either side. Far from a solution,
    # which the stationarity check tells, kinks mean nothing.
    eps = torch.finfo(x[0].dtype).eps
    rounding = ROUNDINGS * eps * far
    near = error <= _NEAR * at.size + rounding
    least = torch.maximum(eps**0.5 * at.size, rounding)
    tolerance = torch.where(near, torch.maximum(least, 2 * error), least)
    kinks = [m <= expand_like(tolerance, m) for m in margins]
    if any(bool(mask.any()) for mask in kinks):
        clear = _clear([k & (m > expand_like(rounding, m)) for k, m in zip(kinks, margins, strict=True)], at, eps**0.5)
        kinks = [k & ~c for k, c in zip(kinks, clear, strict=True)]

    def count(masks: Leaves) -> torch.Tensor:
        return ravel([mask.to(torch.int64) for mask in masks], lane_dims).sum(-1)

    scale = positive(torch.maximum(largest_of(ravel(x, lane_dims)), at.least_size()))
    return _Found(
        active=shown(unflatten(held, x_spec)),
        kinks=shown(unflatten(kinks, x_spec)),
        num_active=count(held),
        num_kinks=count(kinks),
        kinks_known=not any(bool(m.isnan().any()) for m in margins),
        tolerance=tolerance,
        violation=violation,
        relative_violation=violation / scale,
        bend=torch.where(near, at.bend(), 1.0),
        nearest=_least([torch.where(m > expand_like(tolerance, m), m, torch.inf) for m in margins], lane_dims),
    )


# NOTE [units of their own]: unknowns may have units that are far apart, and a distance that is small beside the largest
# of them says little of one whose unit is small. In whatever units, the terms of entry i of grad f are of the size of
# T_i = sum_j |H_ij| |x_j|; what eta |force| is away from its kink, where the entry is held, is above a small part of
# eta T_i or not; and where it is free H_ii times its distance is the force that moves it there. The answer is off by
# d = J^-1 F, whose rows are those of the identity where an entry is held and of eta H where it is free: y_i then moves
# by F_i - (eta H d)_i or by d_i - F_i. It takes all of H: of more unknowns the one measure above decides.
_MOST_LOOKED_AT = 64


def _clear(kinks: Leaves, at: At, part: float) -> Leaves:
    """Those of the entries ``kinks`` that are no kinks in NOTE [units of their own]; ``part``: what is small."""
    x, lane_dims, k = at.x, at.lane_dims, len(at.x)
    flat = ravel(kinks, lane_dims)
    if at.diagonal is None or isinstance(flat, Parts) or not flat.any() or flat.shape[-1] > _MOST_LOOKED_AT:
        return [torch.zeros_like(mask) for mask in kinks]
    held, *numbers = (ravel(part, lane_dims) for part in (at.report[:k], at.report[k : 2 * k], x, at.value))
    margins, size, error = (vector.detach().double() for vector in numbers)
    curved = FlatOperator(lambda v: ravel(at.curve(unravel(v, x, lane_dims)), lane_dims).detach())
    matrix = materialise(curved, ravel(x, lane_dims).detach())  # eta H
    own = matrix.diagonal(dim1=-2, dim2=-1)
    unit = positive(own).rsqrt()
    rows = torch.where(held.unsqueeze(-1), torch.eye(own.shape[-1], dtype=own.dtype, device=own.device), matrix)
    scaled = rows * unit.unsqueeze(-2) * torch.where(held, 1 / unit, unit).unsqueeze(-1)
    step = torch.linalg.solve_ex(scaled, (error * torch.where(held, 1 / unit, unit)).unsqueeze(-1))[0][..., 0] * unit
    moves = torch.where(held, (matrix @ step.unsqueeze(-1))[..., 0].abs(), step.abs()) + error.abs()
    moves, force = (torch.where(held, 1.0, own) * part for part in (moves, margins))
    clear = flat & (force > 2 * moves + part * (matrix.abs() @ size.abs().unsqueeze(-1))[..., 0])
    return unravel(clear, kinks, lane_dims)


def _least(leaves: Leaves, lane_dims: int) -> torch.Tensor:
    flat = ravel(leaves, lane_dims)
    return flat.amin(-1) if flat.shape[-1] else flat.new_full(flat.shape[:-1], torch.inf)


def _plain(leaf: Any) -> Any:
    return out_of_inference([leaf])[0].detach() if isinstance(leaf, torch.Tensor) else leaf
