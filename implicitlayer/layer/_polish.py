"""The objective as the user's solver sees it, and Newton steps after the solver."""

# A Newton step takes an error delta to the order of delta^2 near a solution. From further away it may lead off. With a
# set or a regulariser F has pieces, and a step that crosses into another one may make F larger, although the next step
# from there arrives. So a step that does not lower F is looked at after one step more (the watchdog technique); if that
# does not help, a half, a quarter, ... of the first is tried, and then, with a set, the step of the fixed-point
# iteration, F itself: for a small eta it never leads away from the solution of a convex problem. Of each lane the point
# with the smallest F is kept, the solver's own answer included.
#
# Source: R. M. Chamberlain, M. J. D. Powell, C. Lemarechal and H. C. Pedersen, Math. Programming Study 16 (1982).

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from implicitlayer._errors import NonFiniteError
from implicitlayer.base._tree import flatten, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._distance import Stationarity, newton_step, stationarity
from implicitlayer.equation._flat import Composite
from implicitlayer.equation._residual import Residual
from implicitlayer.linear._common import lane_norm, select

_HALVINGS = 8  # of a Newton step, at most

Point = tuple[Leaves, Stationarity]


@dataclass(frozen=True, eq=False)
class Polish:
    """What Newton steps made of an answer.

    Attributes:
        x, at: the point that was kept in each lane, and how far it is.
        kept: Newton steps that led to it; of a batch, of the lane that took most.
        refused: bool [*lanes], where no step was kept although the first was longer than the layer allows.
    """

    x: Leaves
    at: Stationarity
    kept: int
    refused: torch.Tensor


def polish(
    residual: Residual,
    x: Leaves,
    theta: Leaves,
    init: Leaves,
    at: Stationarity,
    linear_solver: Callable[..., Any],
    num_steps: int,
    rtol: float,
) -> Polish:
    """The best of up to ``num_steps`` Newton steps on F from x, and x itself."""
    walk = _Walk(residual, x, theta, init, linear_solver)
    best = latest = x, at
    kept = torch.zeros_like(at.norm, dtype=torch.int64)
    refused = torch.zeros_like(at.norm, dtype=torch.bool)
    for k in range(num_steps):
        if not bool((latest[1].relative > torch.finfo(x[0].dtype).eps).any()):
            break
        step = walk.newton(latest)
        if k == 0:
            refused = lane_norm(step) > rtol * at.size
        reached = walk.onward(latest, step)
        if reached is latest:
            break
        latest = reached
        kept = torch.where(latest[1].norm < best[1].norm, k + 1, kept)
        best = walk.better(best, latest)
    return Polish(*best, int(kept.max()) if kept.numel() else 0, refused & (kept == 0))


@dataclass(frozen=True, eq=False)
class _Walk:
    """Points of one problem, and steps between them."""

    residual: Residual
    like: Leaves
    theta: Leaves
    init: Leaves
    linear_solver: Callable[..., Any]

    def newton(self, start: Point) -> torch.Tensor:
        return newton_step(self.residual, start[0], self.theta, start[1].gradient, self.linear_solver)

    def to(self, start: Point, step: torch.Tensor) -> Point:
        """start - step; start itself where nothing is finite there."""
        moved = self.leaves(ravel(start[0], self.residual.lane_dims) - step)
        try:
            return moved, stationarity(self.residual, moved, self.theta, self.init)
        except NonFiniteError:
            return start

    def leaves(self, flat: torch.Tensor) -> Leaves:
        return unravel(flat, self.like, self.residual.lane_dims)

    def better(self, a: Point, b: Point) -> Point:
        """Of each lane the one with the smaller F."""
        mask = b[1].norm < a[1].norm
        if bool(mask.all()) or not bool(mask.any()):
            return b if bool(mask.all()) else a
        flat = [ravel(point[0], self.residual.lane_dims) for point in (b, a)]
        leaves = self.leaves(select(mask, *flat))
        return leaves, stationarity(self.residual, leaves, self.theta, self.init)

    def onward(self, latest: Point, step: torch.Tensor) -> Point:
        """Where to go on from ``latest``; itself if nothing helps."""
        full = self.to(latest, step)
        reached = self.better(latest, full)
        if bool((full[1].norm < latest[1].norm).all()) or full is latest:
            return reached
        reached = self.better(reached, self.to(full, self.newton(full)))
        for halving in range(1, _HALVINGS):
            if bool((reached[1].norm < latest[1].norm).all()):
                return reached
            reached = self.better(reached, self.to(latest, step * 0.5**halving))
        if reached is latest and self.residual.is_fixed_point:
            return self.to(latest, latest[1].gradient)
        return reached


if TYPE_CHECKING:
    from implicitlayer.layer._forward import Calling


class SeenFunction:
    """The objective (residual, map) as a solver sees it: lanes vectorised, closed-over values filled in.

    Attributes:
        lane_dims: leading dimensions of every leaf that the solver may treat as independent problems.
        terms: the set or regulariser of the layer, None without one.
    """

    def __init__(self, calling: Calling, residual: Residual, hidden: Leaves, batched: bool) -> None:
        self._calling, self._residual, self._hidden, self._batched = calling, residual, hidden, batched
        self._function = residual.over_lanes(calling.flat_function)
        self.lane_dims = residual.lane_dims if batched else 0
        self.terms = None if calling.constraints is None else calling.constraints.terms

    def __call__(self, x: Any, *theta: Any) -> Any:
        leaves, _ = flatten(x)
        value = self._function(leaves, self._calling.flatten_theta(theta, self._hidden))
        if not self._calling.gives_value:
            return unflatten(value, self._calling.x_spec)
        return value.sum() if not self._batched and value.ndim else value

    def as_composite(self) -> Composite | None:
        """The model and loss of an objective that tells them, on flat lists of leaves; see equation/_flat.py."""
        parts, over_lanes = self._residual.parts, self._residual.over_lanes
        if parts.model is None or parts.loss is None:
            return None
        model, loss = over_lanes(parts.model), over_lanes(parts.loss)

        def values(outputs: Any, *theta: Any) -> torch.Tensor:
            value: torch.Tensor = loss(outputs, self._calling.flatten_theta(theta, self._hidden))
            return value.sum() if not self._batched and value.ndim else value

        def outputs_of(x: Any, *theta: Any) -> Any:
            return model(flatten(x)[0], self._calling.flatten_theta(theta, self._hidden))

        return Composite(values, outputs_of, parts.squares)

    def prox(self, y: Any, step: torch.Tensor, *theta: Any) -> Any:
        """The proximal operator of the layer's set or regulariser, lane by lane; ``step`` is 0-d or [*lanes]."""
        assert self._calling.constraints is not None
        leaves, spec = flatten(y)
        steps = step.expand(leaves[0].shape[: self._residual.lane_dims])
        prox = self._residual.over_lanes(self._calling.constraints.prox)
        return unflatten(prox([*leaves, steps], self._calling.flatten_theta(theta, self._hidden)), spec)


def summed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The sum over lanes, for a solver that takes one number."""
    return lambda x, *theta: function(x, *theta).sum()
