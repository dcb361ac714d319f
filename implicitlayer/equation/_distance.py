"""How far an answer is from the solution, by one gradient and one product, and by the solves behind its derivatives."""

# With F(x) = 0 wanted and delta = x - x*, to first order F = J delta, so that
#     ||F||^2 = <F, J delta> = <J'F, delta> <= ||J'F|| ||delta||,   i.e.   ||delta|| >= ||F||^2 / ||J'F||:
# a lower bound (no false alarm), sharp when F lies along one singular direction of J, as it does after an iteration
# that has only its slowest direction left.
#
# NOTE [a changed objective]: a backward may run it again, and tensors that it closes over are watched, but not
# Python numbers, NumPy arrays or a random state. F(x) comes for free with the linearisation. If it has grown, and the
# point is now further from a solution than the call allowed (by the same lower bound: no false alarm), the objective is
# not that of the call.
#
# NOTE [two sides]: with delta = x - x* and F = J delta to first order, the forward pass knows ||delta|| from below, by
# one product. The solve of a derivative, J'u = v, knows the other side at no product:
#     ||delta|| = ||J^-1 F|| <= ||F|| / s,    s the smallest singular value of J.
# Conjugate gradients estimate s by their smallest Ritz value (of M^-1 J with a metric M: ||F|| is then multiplied with
# ||M^-1||). Other solvers show ||J^-1|| >= ||u|| / ||v||; a v of no special direction has a part of 1 / sqrt(n) along
# the worst one, so sqrt(n) ||u|| / ||v|| stands for it. Neither is a bound, but they err on the other side than the
# forward pass does. Where both agree that the answer is near enough, nothing more is done. Where they do not, the
# Newton step J^-1 F itself, made once, decides: it is delta to first order.
#
# With constraints the unknowns are (x, multipliers), in different units, and J is symmetric: u = J^-1 (v, 0) has the
# parts u_x = (J^-1)_xx v and u_c = (J^-1)_xc' v, and delta_x = (J^-1)_xx F_x + (J^-1)_xc F_c. So each part of F goes
# with the same part of u, ||F_x|| ||u_x|| + ||F_c|| ||u_c||, and no unit is mixed with another.
#
# NOTE [pieces]: with a set or a regulariser F has pieces, one for each choice of entries that are held, and x* may be
# on another one than x. If so, the Newton step leads out of the piece of x (a solution of the equation of that piece
# inside of it would be x*, which is the only one). So the distance that matters is that from the nearest kink, too.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer._errors import ClosureError, NonFiniteError
from implicitlayer.base._failures import refuse
from implicitlayer.base._records import AnswerDistance
from implicitlayer.base._sharding import layout_of, recut
from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._tree import name_lanes, ravel, unravel
from implicitlayer.base._types import Leaves, OnFailure
from implicitlayer.equation._jacobian import Jacobian, OperatorFamily
from implicitlayer.equation._residual import Attached, Residual
from implicitlayer.linear._common import lane_norm
from implicitlayer.linear._operator import FlatOperator, lane_dot, lane_scale, wrap_value
from implicitlayer.linear._warm_start import WarmStart

# Below this many eps (times the square root of n) a distance is rounding, even where x and init are both zero.
NOISE = 1e3


@dataclass(frozen=True, eq=False)
class Stationarity:
    """F(x) and J'F [*lanes, n]; per lane the norm of F, the estimated distance to the solution, its ratio to the size,
    the size."""

    gradient: torch.Tensor
    product: torch.Tensor
    norm: torch.Tensor
    distance: torch.Tensor
    relative: torch.Tensor
    size: torch.Tensor


# NOTE [rounding of F]: at a solution F is a sum of terms that cancel, and what is left of them is rounding: a few eps
# of the size of the terms. Changing every entry of theta by a relative h of random sign changes F by h times that size.
# So a norm below a few eps of it is no sign of a distance: the answer is exact for data that differ by rounding.
_ROUNDINGS = 16.0
_DRAWS = 4


def is_rounding(
    value: torch.Tensor, norm: torch.Tensor, residual: Residual, x: Leaves, theta: Leaves, eps: float = 0.0
) -> torch.Tensor:
    """Lanes, bool [*lanes], whose F(x), ``value`` of norm ``norm``, is rounding error only; a few more gradients.

    ``eps``: that of the dtype which F works in, where it is shorter than the one of its value.
    """
    eps = max(eps, torch.finfo(value.dtype).eps)
    h = eps**0.5

    def changed(leaf: torch.Tensor, draw: int) -> torch.Tensor:
        if not leaf.is_floating_point() or not leaf.numel():
            return leaf
        # the golden angle gives signs without a period, and leaves the random state alone
        phase = torch.arange(leaf.numel(), device=leaf.device, dtype=torch.float64) * 2.399963
        signs = torch.where(torch.cos((1 + draw) * phase + draw) >= 0, 1.0, -1.0).reshape(leaf.shape)
        turned: torch.Tensor = leaf.detach() * recut(1 + h * signs.to(leaf.dtype), layout_of(leaf))
        return turned

    size, free = torch.zeros_like(norm), len(theta) - residual.num_fixed
    for draw in range(_DRAWS):  # one choice of signs may cancel by chance
        flat = _value_at(residual, x, [*(changed(t, draw) for t in theta[:free]), *theta[free:]])
        size = torch.maximum(size, lane_norm(flat - value) / h)
    rounding: torch.Tensor = norm <= _ROUNDINGS * eps * size
    return rounding


def is_random(value: torch.Tensor, residual: Residual, x: Leaves, theta: Leaves) -> torch.Tensor:
    """Lanes, bool [*lanes], where one of a few more evaluations of F(x) is not ``value``, by more than rounding.

    Sums on a GPU may add in another order each time, which is rounding. The steps h of NOTE [rounding of F] turn a
    random change D of F into a size of D / h, and 16 eps D / h = 16 sqrt(eps) D stays below D in every dtype.
    """
    changes = [lane_norm(_value_at(residual, x, theta) - value) for _ in range(_DRAWS)]
    change = torch.stack(changes).amax(0)
    random: torch.Tensor = change > 0
    return random & ~is_rounding(value, change, residual, x, theta) if bool(random.any()) else random


def _value_at(residual: Residual, x: Leaves, theta: Leaves) -> torch.Tensor:
    """F(x), flat [*lanes, n]."""
    with torch.enable_grad():
        found = residual.kept_graph_gradient([t.detach().requires_grad_() for t in x], theta)
    return ravel([leaf.detach() for leaf in found], residual.lane_dims)


def stationarity(
    residual: Residual, x: Leaves, theta: Leaves, init: Leaves, at: Attached | None = None
) -> Stationarity:
    """The stationarity of x; ``at``: the function's run there, where there is one."""
    lane_dims = residual.lane_dims
    with torch.enable_grad():
        found = residual.attached(x, theta) if at is None else at
        gradient = ravel([leaf.detach() for leaf in found.value], lane_dims)
        finite = gradient.isfinite().all(-1)
        if not bool(finite.all()):
            what = "gradient of the objective" if residual.is_gradient else "residual"
            error = NonFiniteError(
                f"the {what} holds NaN or Inf at the solver's answer{name_lanes(~finite)}. Check theta for NaN, and "
                "that the objective is differentiable there (norms and square roots at zero are not)."
            )
            refuse(~finite, error)
            gradient = torch.where(finite[..., None], gradient, 0.0)
        scale = lane_scale(gradient)
        unit = gradient / scale
        product = found.flat_pull(lane_dims)(unit)
    squared = lane_dot(unit, unit)
    none = torch.zeros_like(squared)  # a Python number costs torch.where a copy
    distance = torch.where(squared > 0, squared / lane_norm(product) * scale[..., 0], none)
    here, start = ravel(x, lane_dims), ravel(init, lane_dims)
    size = torch.maximum(lane_norm(here), lane_norm(here - start))
    least = found.least_size()
    if least is None:
        least = torch.full_like(size, NOISE * torch.finfo(here.dtype).eps * max(here.shape[-1], 1) ** 0.5)
    size = torch.maximum(size, least.to(size.dtype))
    # an answer that has run away so far that its size is no number is no solution
    relative = torch.where(distance == 0, none, (distance / size).nan_to_num(torch.inf, torch.inf))
    return Stationarity(gradient, product * scale, squared.sqrt() * scale[..., 0], distance, relative, size)


def far_at_other_draws(residual: Residual, x: Leaves, theta: Leaves, allowed: torch.Tensor) -> torch.Tensor:
    """Lanes, bool [*lanes], whose x is further than ``allowed`` from the solution for other draws of a random function.

    The draw of the check may be one where all of F is dropped, which looks like a solution.
    """
    distances = [stationarity(residual, x, theta, x).distance for _ in range(_DRAWS)]
    far: torch.Tensor = torch.stack(distances).amax(0) > allowed
    return far


def has_random_curvature(residual: Residual, x: Leaves, theta: Leaves, rtol: float) -> torch.Tensor:
    """Lanes, bool [*lanes], where products with dF/dx differ between draws of a random function by more than rtol.

    F itself may be zero at x in all draws: where a random number multiplies the whole objective, for one.
    """
    products = []
    for _ in range(_DRAWS):
        pull = residual.attached(x, theta).flat_pull(residual.lane_dims)
        products.append(pull(torch.ones_like(ravel(x, residual.lane_dims))))
    spread = torch.stack([lane_norm(product - products[0]) for product in products[1:]]).amax(0)
    random: torch.Tensor = spread > rtol * torch.stack([lane_norm(product) for product in products]).amax(0)
    return random


# NOTE [a Hessian that changes]: a gradient u = H(x)^-1 v errs by the relative change of H between x and x*, whatever
# the size of x: near the border of a log barrier H changes over a tiny part of x. With a step d along F,
#     F(x - d) = F - H d + 1/2 (H' d) d + ...,   so that   2 ||F(x - d) - F + H d|| / ||H d||
# is the relative change of H along d. d has the length of the lower bound of the distance; H d comes with it.
# Of a J that is not symmetric J'F comes with it: with d = s J'F, s = ||F||^2 / ||J'F||^2, of that same length,
#     <F, J d> = ||F||^2,   so that   2 |<F, F(x - d)>| / ||F||^2   is the change of J along d, as F sees it.
TIGHT = 0.5  # this power of eps, over the size of x, is near enough: nothing is looked at
CLEAR = 100.0  # F must be this much above its rounding, of which the change is made otherwise


def hessian_change(residual: Residual, x: Leaves, theta: Leaves, at: Stationarity) -> torch.Tensor:
    """Relative change [*lanes] of dF/dx from x to the solution, as far as one step tells; one evaluation of F.

    Zero where the answer is near enough that it cannot matter.
    """
    none = torch.zeros_like(at.norm)
    # leaves of two dtypes make one vector of the longer: what moves is known to the rounding of the shorter
    far = at.distance > max([torch.finfo(leaf.dtype).eps for leaf in x]) ** TIGHT * at.size
    if not bool(far.any()):
        return none
    here = ravel(x, residual.lane_dims)

    def value_at(there: torch.Tensor) -> torch.Tensor:
        return _value_at(residual, unravel(there, x, residual.lane_dims), theta)

    if residual.is_gradient:
        return torch.where(far, change_along(at, here, value_at), none)
    part = torch.where(far, at.distance / lane_norm(at.product), none).to(here.dtype).unsqueeze(-1)
    scale = lane_scale(at.gradient)
    unit = at.gradient / scale
    change = 2 * lane_dot(unit, value_at(here - part * at.product) / scale).abs() / lane_dot(unit, unit)
    return torch.where(far, change.nan_to_num(torch.inf), none)


def change_along(
    at: Stationarity, here: torch.Tensor, gradient_at: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The change [*lanes] of NOTE [a Hessian that changes] at x, flat [*lanes, n]; zero where there is no step."""
    part = torch.where(at.norm > 0, at.distance / torch.where(at.norm > 0, at.norm, 1.0), 0.0)
    part = part.to(at.gradient.dtype).unsqueeze(-1)
    linear = part * at.product
    size = lane_norm(linear)
    change = 2 * lane_norm(gradient_at(here - part * at.gradient) - at.gradient + linear)
    change = (change / torch.where(size > 0, size, 1.0)).nan_to_num(torch.inf)
    return torch.where(size > 0, change, 0.0)


def newton_step(
    residual: Residual, x: Leaves, theta: Leaves, gradient: torch.Tensor, linear_solver: Callable[..., Any]
) -> torch.Tensor:
    """J^-1 F, flat [*lanes, n]: one Newton step takes an error delta to the order of delta^2."""
    operator = Jacobian(residual, len(x), transposed=False).linearize([*x, *theta])
    # the warm starts of a solver are for cotangents
    solver = linear_solver.solver if isinstance(linear_solver, WarmStart) else linear_solver
    value: torch.Tensor = wrap_value(operator, gradient, solver(operator, gradient), type(solver).__name__).value
    return value


# The gradient must have grown by this factor between call and backward before it is looked at more closely.
GROWN = 10.0
# A kink nearer than this many times the estimate of the error is looked at: y = x - eta grad f moves by a few times
# as much as x.
NEAR = 10.0

Seen = list[tuple[torch.Tensor, torch.Tensor]]  # F(x) [*lanes, n] and its norm, once the solve has linearised


@dataclass(eq=False)
class AnswerCheck:
    """What a forward pass leaves for the solves behind its derivatives.

    Attributes:
        norm, distance, size: [*lanes], of F(x), from x to a solution (from below), of x.
        rtol, on_failure, linear_solver: of the layer.
        nearest: [*lanes], distance of the nearest kink; None where there is none to be crossed without a word.
        done: whether nothing is left to find out: the distance is rounding, or was told, or has been decided.
        num_x: how many entries of the unknowns, from the first, the distance is of; None for all.
    """

    norm: torch.Tensor
    distance: torch.Tensor
    size: torch.Tensor
    rtol: float
    on_failure: OnFailure
    linear_solver: Any
    nearest: torch.Tensor | None
    done: bool
    num_x: int | None = None

    @classmethod
    def of(
        cls, at: Stationarity, rtol: float, on_failure: OnFailure, linear_solver: Any, nearest: torch.Tensor | None
    ) -> AnswerCheck:
        """The check of an answer that the forward pass has measured."""
        near = at.distance <= torch.finfo(at.gradient.dtype).eps * at.size
        told = at.relative > rtol
        done = on_failure == "ignore" or bool(near.all()) or bool(told.any())
        return cls(at.norm, at.distance, at.size, rtol, on_failure, linear_solver, nearest, done)

    def see(self, seen: Seen, residual: Residual, x: Leaves, theta: Leaves, value: torch.Tensor) -> None:
        """F(x) as a solve meets it; refused where it is that of another objective: NOTE [a changed objective]."""
        norm = self.norm
        found = lane_norm(value) if value.shape[-1] else value.new_zeros(value.shape[:-1])
        if found.shape[found.ndim - norm.ndim :] != norm.shape:
            return  # levels of a transform come first, so that the call's lanes are the last ones
        seen[:] = [] if self.done else [(value, found)]
        if not bool((found > GROWN * norm).any()):
            return
        now = stationarity(residual, x, theta, x)
        moved = (now.distance > torch.maximum(self.rtol * self.size, 2 * self.distance)) & (now.norm > GROWN * norm)
        if not bool(moved.any()):
            return
        if not bool((moved & ~is_rounding(now.gradient, now.norm, residual, x, theta)).any()):
            return
        pick = tuple(moved.nonzero()[0].tolist())
        before = norm.expand(now.norm.shape)[pick].item()
        raise ClosureError(
            f"since the layer was called, the objective has changed{name_lanes(moved)}: at the solution its "
            f"gradient (the residual) had norm {before:.3g}, and now has {now.norm[pick].item():.3g}. The gradient "
            "would be that of another problem. A number or array that the objective closes over has changed (pass "
            "it to the layer as one more theta), or the objective is random (dropout: call .eval(), or draw the "
            "mask once and pass it as a theta)."
        )

    def judge(
        self,
        seen: Seen,
        family: OperatorFamily,
        tensors: Leaves,
        operator: FlatOperator,
        rhs: torch.Tensor,
        solution: LinearSolution,
    ) -> AnswerDistance | None:
        """How far the answer is, in the light of a solve behind a derivative: NOTE [two sides]; None if not seen."""
        if not seen:
            return None
        value, norm = seen.pop()
        if self.done or solution.remedy or not solution.status.usable:
            return None
        assert isinstance(family, Jacobian)
        allowed = self.rtol * self.size
        if self.nearest is not None:
            allowed = torch.minimum(allowed, self.nearest / NEAR)
        metric = operator.inverse_metric_norm()
        pull = norm * metric
        suspicious = (norm > 0) & (
            solution.ritz.any_below(pull / allowed.to(pull.dtype))
            if solution.ritz is not None and not solution.preconditioned
            else metric * self._reach(value, solution, rhs) > allowed
        )
        found = AnswerDistance(pull / self.size)
        if not bool(suspicious.any()):
            return found
        self.done = True
        x, theta = tensors[: family.num_x], tensors[family.num_x :]
        suspicious = suspicious & ~is_rounding(value, norm, family.residual, x, theta)
        if not bool(suspicious.any()):
            return found
        step = newton_step(family.residual, x, theta, value, self.linear_solver)
        relative = torch.where(suspicious, lane_norm(step[..., : self.num_x]) / self.size, self.distance / self.size)
        elsewhere = torch.zeros_like(suspicious)
        if self.nearest is not None:
            elsewhere = suspicious & family.residual.leaves_piece(x, theta, unravel(step, x, family.lane_dims))
        far = suspicious & (relative > self.rtol)
        found.newton, lost = relative, far if bool(far.any()) else elsewhere
        if not bool(lost.any()):
            return found
        pick, found.lost = tuple(lost.nonzero()[0].tolist()), lost
        if lost is far:
            found.message = (
                f"the solver's answer is not stationary{name_lanes(far)}: a Newton step from it is "
                f"{relative[pick].item():.1e} of its size long (allowed {self.rtol:.1e}), although the gradient there "
                "is small: the problem is ill-conditioned. The implicit gradient carries an error of that order. Solve "
                "the inner problem more tightly, pass polish=1 for a Newton step after the solver, or "
                "stationarity_rtol=None if an early stop is intended."
            )
        else:
            found.message = (
                f"the solver's answer is too rough to tell its active set{name_lanes(elsewhere)}: a Newton step from "
                f"it, {relative[pick].item():.1e} of its size long, changes which entries are held (at a bound, at "
                "zero). The implicit gradient is that of another active set than the solution's. Solve the inner "
                "problem more tightly, pass polish=5 for Newton steps after the solver, or stationarity_rtol=None if "
                "an early stop is intended."
            )
        return found

    def _reach(self, value: torch.Tensor, solution: LinearSolution, rhs: torch.Tensor) -> torch.Tensor:
        """How far the answer may be, [*lanes], by a solve without Ritz values: NOTE [two sides]."""
        kept = getattr(self.linear_solver, "by_kept_factors", None)
        step = None if kept is None else kept(value)
        if step is not None:  # factors make the Newton step itself at no product
            return lane_norm(step)
        n = rhs.shape[-1]
        k = n if self.num_x is None else self.num_x
        v, u, F = rhs.abs().amax(-1).double(), solution.value.abs().double(), value.double()
        parts = [lane_norm(F[..., part]) * u[..., part].amax(-1) for part in (slice(k), slice(k, n))[: 1 + (k < n)]]
        reach: torch.Tensor = math.sqrt(k) * sum(parts) / torch.where(v > 0, v, torch.inf)
        return reach


@dataclass(frozen=True, eq=False)
class Found:
    """What a forward pass has found out, for the derivatives of its answer.

    Attributes:
        answer: the check of the answer; None where nothing is to be checked.
        flaw: why second derivatives would be wrong; empty where they are right.
        graph: F at the answer with a graph, for the first plain backward; None where none may be kept.
        aux: what the solver returned beside its answer, one entry per run.
    """

    answer: AnswerCheck | None = None
    flaw: str = ""
    graph: Attached | None = None
    aux: tuple[Any, ...] = ()


NOTHING_FOUND = Found()
