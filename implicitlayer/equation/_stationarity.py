"""How far a returned point is from the solution, from one gradient and one product."""

# With F(x) = 0 wanted and delta = x - x*, to first order F = J delta, so that
#     ||F||^2 = <F, J delta> = <J'F, delta> <= ||J'F|| ||delta||,   i.e.   ||delta|| >= ||F||^2 / ||J'F||:
# a lower bound (no false alarm), sharp when F lies along one singular direction of J, as it does after an iteration
# that has only its slowest direction left.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer._errors import NonFiniteError
from implicitlayer.base._failures import refuse
from implicitlayer.base._sharding import placed_like
from implicitlayer.base._tree import finite_lanes, name_lanes, ravel, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._jacobian import Jacobian
from implicitlayer.equation._residual import Attached, Residual
from implicitlayer.linear._common import lane_norm
from implicitlayer.linear._operator import lane_dot, lane_scale, wrap_value
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


def is_rounding(value: torch.Tensor, norm: torch.Tensor, residual: Residual, x: Leaves, theta: Leaves) -> torch.Tensor:
    """Lanes, bool [*lanes], whose F(x), ``value`` of norm ``norm``, is rounding error only; a few more gradients."""
    eps = torch.finfo(value.dtype).eps
    h = eps**0.5

    def changed(leaf: torch.Tensor, draw: int) -> torch.Tensor:
        if not leaf.is_floating_point() or not leaf.numel():
            return leaf
        # the golden angle gives signs without a period, and leaves the random state alone
        phase = torch.arange(leaf.numel(), device=leaf.device, dtype=torch.float64) * 2.399963
        signs = torch.where(torch.cos((1 + draw) * phase + draw) >= 0, 1.0, -1.0).reshape(leaf.shape)
        turned: torch.Tensor = leaf.detach() * placed_like(1 + h * signs.to(leaf.dtype), leaf)
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
        finite = finite_lanes(gradient)
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
        product = ravel(found.pull(unravel(unit, x, lane_dims)), lane_dims)
    squared = lane_dot(unit, unit)
    distance = torch.where(squared > 0, squared / lane_norm(product) * scale[..., 0], 0.0)
    here, start = ravel(x, lane_dims), ravel(init, lane_dims)
    size = torch.maximum(lane_norm(here), lane_norm(here - start))
    least = found.least_size()
    if least is None:
        least = torch.full_like(size, NOISE * torch.finfo(here.dtype).eps * max(here.shape[-1], 1) ** 0.5)
    size = torch.maximum(size, least.to(size.dtype))
    relative = torch.where(distance == 0, 0.0, distance / size)
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
        at = residual.attached(x, theta)
        with torch.enable_grad():
            pulled = at.pull([torch.ones_like(leaf) for leaf in at.value])
        products.append(ravel([leaf.detach() for leaf in pulled], residual.lane_dims))
    spread = torch.stack([lane_norm(product - products[0]) for product in products[1:]]).amax(0)
    random: torch.Tensor = spread > rtol * torch.stack([lane_norm(product) for product in products]).amax(0)
    return random


# NOTE [a Hessian that changes]: a gradient u = H(x)^-1 v errs by the relative change of H between x and x*, whatever
# the size of x: near the border of a log barrier H changes over a tiny part of x. With a step d along F,
#     F(x - d) = F - H d + 1/2 (H' d) d + ...,   so that   2 ||F(x - d) - F + H d|| / ||H d||
# is the relative change of H along d. d has the length of the lower bound of the distance; H d comes with it.
TIGHT = 0.5  # this power of eps, over the size of x, is near enough: nothing is looked at
CLEAR = 100.0  # F must be this much above its rounding, of which the change is made otherwise


def hessian_change(residual: Residual, x: Leaves, theta: Leaves, at: Stationarity) -> torch.Tensor:
    """Relative change [*lanes] of the Hessian from x to the solution, as far as a step along F tells; one gradient.

    Zero where the answer is near enough that it cannot matter, or where F is not clear of its rounding.
    """
    none = torch.zeros_like(at.norm)
    eps = torch.finfo(at.gradient.dtype).eps
    if not residual.is_gradient or not bool((at.distance > eps**TIGHT * at.size).any()):
        return none
    lane_dims = residual.lane_dims
    change = change_along(
        at, ravel(x, lane_dims), lambda there: _value_at(residual, unravel(there, x, lane_dims), theta)
    )
    return torch.where(at.distance > eps**TIGHT * at.size, change, none)


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
