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
from implicitlayer._tree import finite_lanes, name_lanes, ravel, unravel
from implicitlayer._types import Leaves
from implicitlayer.linear._common import lane_norm
from implicitlayer.linear._jacobian import Jacobian, Watch
from implicitlayer.linear._operator import lane_dot, lane_scale
from implicitlayer.linear._residual import Residual

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
        if self.norm.numel() == 0:
            return lambda residual, x, theta, value: None
        norm, allowed = float(self.norm.max()), float(torch.maximum(rtol * self.size, 2 * self.distance).max())

        def watch(residual: Residual, x: Leaves, theta: Leaves, value: torch.Tensor) -> None:
            if value.numel() == 0 or float(lane_norm(value).max()) <= _GROWN * norm:
                return
            now = stationarity(residual, x, theta, x)
            if float(now.distance.max()) > allowed:
                raise ClosureError(
                    "since the layer was called, the objective has changed: at the solution its gradient (the "
                    f"residual) had norm {norm:.3g}, and now has {float(now.norm.max()):.3g}. The gradient would be "
                    "that of another problem. A number or array that the objective closes over has changed (pass it "
                    "to the layer as one more theta), or the objective is random (dropout: call .eval(), or draw the "
                    "mask once and pass it as a theta)."
                )

        return watch


def stationarity(residual: Residual, x: Leaves, theta: Leaves, init: Leaves) -> Stationarity:
    lane_dims = residual.lane_dims
    with torch.enable_grad():
        points = [t.detach().requires_grad_() for t in x]
        leaves = residual.kept_graph_gradient(points, theta)
        gradient = ravel([leaf.detach() for leaf in leaves], lane_dims)
        finite = finite_lanes(gradient)
        if not bool(finite.all()):
            what = "gradient of the objective" if residual.is_gradient else "residual"
            raise NonFiniteError(
                f"the {what} holds NaN or Inf at the solver's answer{name_lanes(~finite)}. Check theta for NaN, and "
                "that the objective is differentiable there (norms and square roots at zero are not)."
            )
        scale = lane_scale(gradient)
        unit = gradient / scale
        attached = [i for i, leaf in enumerate(leaves) if leaf.requires_grad]
        product = torch.zeros_like(unit)
        if attached:
            directions = unravel(unit, x, lane_dims)
            pulled = torch.autograd.grad(
                [leaves[i] for i in attached], points, [directions[i] for i in attached], materialize_grads=True
            )
            product = ravel(pulled, lane_dims)
    squared = lane_dot(unit, unit)
    distance = torch.where(squared > 0, squared / lane_norm(product) * scale[..., 0], 0.0)
    at, start = ravel(x, lane_dims), ravel(init, lane_dims)
    size = torch.maximum(lane_norm(at), lane_norm(at - start))
    noise = _NOISE * torch.finfo(at.dtype).eps * max(at.shape[-1], 1) ** 0.5
    size = size.clamp_min(noise)
    return Stationarity(gradient, squared.sqrt() * scale[..., 0], distance, distance / size, size)


def newton_step(
    residual: Residual, x: Leaves, theta: Leaves, gradient: torch.Tensor, linear_solver: Callable[..., Any]
) -> torch.Tensor:
    """J^-1 F, flat [*lanes, n]: one Newton step takes an error delta to the order of delta^2."""
    operator = Jacobian(residual, len(x), transposed=False).linearize([*x, *theta])
    value: torch.Tensor = linear_solver(operator, gradient).value
    return value
