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

from implicitlayer._errors import ClosureError, NonFiniteError
from implicitlayer._failures import refuse
from implicitlayer._tree import finite_lanes, name_lanes, ravel, unravel
from implicitlayer._types import Leaves
from implicitlayer.linear._common import lane_norm
from implicitlayer.linear._jacobian import Jacobian, Watch
from implicitlayer.linear._operator import lane_dot, lane_scale
from implicitlayer.linear._residual import Attached, Residual

# NOTE [a changed objective]: a backward runs the objective again, and tensors that it closes over are watched, but not
# Python numbers, NumPy arrays or a random state. F(x) comes for free with the linearisation. If it has grown, and the
# point is now further from a solution than the call allowed (by the same lower bound: no false alarm), the objective is
# not that of the call.

# Below this many eps (times the square root of n) a distance is rounding, even where x and init are both zero.
_NOISE = 1e3


# The gradient must have grown by this factor between call and backward before it is looked at more closely.
_GROWN = 10.0


@dataclass(frozen=True, eq=False)
class Stationarity:
    """F(x) [*lanes, n]; per lane its norm, the estimated distance to the solution, its ratio to the size, the size."""

    gradient: torch.Tensor
    norm: torch.Tensor
    distance: torch.Tensor
    relative: torch.Tensor
    size: torch.Tensor

    def watch(self, rtol: float) -> Watch:
        """What refuses a backward whose F(x) is no longer that of the call; see NOTE [a changed objective]."""
        norm, allowed = self.norm, torch.maximum(rtol * self.size, 2 * self.distance)

        def watch(residual: Residual, x: Leaves, theta: Leaves, value: torch.Tensor) -> None:
            found = lane_norm(value) if value.shape[-1] else value.new_zeros(value.shape[:-1])
            if found.shape[found.ndim - norm.ndim :] != norm.shape or not bool((found > _GROWN * norm).any()):
                return  # levels of a transform come first, so that the call's lanes are the last ones
            now = stationarity(residual, x, theta, x)
            moved = (now.distance > allowed) & (now.norm > _GROWN * norm)
            if not bool(moved.any()) or not bool((moved & ~is_rounding(now, residual, x, theta)).any()):
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

        return watch


# NOTE [rounding of F]: at a solution F is a sum of terms that cancel, and what is left of them is rounding: a few eps
# of the size of the terms. Changing every entry of theta by a relative h of random sign changes F by h times that size.
# So a norm below a few eps of it is no sign of a distance: the answer is exact for data that differ by rounding.
_ROUNDINGS = 16.0
_DRAWS = 4


def is_rounding(at: Stationarity, residual: Residual, x: Leaves, theta: Leaves) -> torch.Tensor:
    """Lanes, bool [*lanes], whose F(x) is rounding error only; a few more gradients."""
    eps = torch.finfo(at.gradient.dtype).eps
    h = eps**0.5

    def changed(leaf: torch.Tensor, draw: int) -> torch.Tensor:
        if not leaf.is_floating_point() or not leaf.numel():
            return leaf
        # the golden angle gives signs without a period, and leaves the random state alone
        phase = torch.arange(leaf.numel(), device=leaf.device, dtype=torch.float64) * 2.399963
        signs = torch.where(torch.cos((1 + draw) * phase + draw) >= 0, 1.0, -1.0).reshape(leaf.shape)
        turned: torch.Tensor = leaf.detach() * (1 + h * signs.to(leaf.dtype))
        return turned

    size = torch.zeros_like(at.norm)
    for draw in range(_DRAWS):  # one choice of signs may cancel by chance
        with torch.enable_grad():
            points = [t.detach().requires_grad_() for t in x]
            moved = residual.kept_graph_gradient(points, [changed(t, draw) for t in theta])
            flat = ravel([leaf.detach() for leaf in moved], residual.lane_dims)
        size = torch.maximum(size, lane_norm(flat - at.gradient) / h)
    rounding: torch.Tensor = at.norm <= _ROUNDINGS * eps * size
    return rounding


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
        least = torch.full_like(size, _NOISE * torch.finfo(here.dtype).eps * max(here.shape[-1], 1) ** 0.5)
    size = torch.maximum(size, least.to(size.dtype))
    relative = torch.where(distance == 0, 0.0, distance / size)
    return Stationarity(gradient, squared.sqrt() * scale[..., 0], distance, relative, size)


def newton_step(
    residual: Residual, x: Leaves, theta: Leaves, gradient: torch.Tensor, linear_solver: Callable[..., Any]
) -> torch.Tensor:
    """J^-1 F, flat [*lanes, n]: one Newton step takes an error delta to the order of delta^2."""
    operator = Jacobian(residual, len(x), transposed=False).linearize([*x, *theta])
    value: torch.Tensor = linear_solver(operator, gradient).value
    return value
