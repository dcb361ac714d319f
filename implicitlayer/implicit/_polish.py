"""Newton steps after the user's solver."""

# A Newton step takes an error delta to the order of delta^2 near a solution. From further away it may lead off: then a
# half, a quarter, ... of it is tried. With a set or a regulariser F has pieces, and a Newton step that crosses into
# another one may make F larger at any length. There the step of the fixed-point iteration, F itself, goes on to the
# piece where the next Newton step is made: it never leads away from the solution of a convex problem, for a small eta.
# Of each lane the point with the smallest F is kept, the solver's own answer included.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer._errors import NonFiniteError
from implicitlayer._tree import ravel, unravel
from implicitlayer._types import Leaves
from implicitlayer.implicit._stationarity import Stationarity, newton_step, stationarity
from implicitlayer.linear._common import lane_norm, select
from implicitlayer.linear._residual import Residual

__all__ = ["Polish", "polish"]

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
    lane_dims = residual.lane_dims

    def walk(start: Point, step: torch.Tensor) -> Point | None:
        moved = unravel(ravel(start[0], lane_dims) - step, x, lane_dims)
        try:
            return moved, stationarity(residual, moved, theta, init)
        except NonFiniteError:
            return None

    def better_of(a: Point, b: Point) -> Point:
        mask = b[1].norm < a[1].norm
        if bool(mask.all()) or not bool(mask.any()):
            return b if bool(mask.all()) else a
        leaves = unravel(select(mask, ravel(b[0], lane_dims), ravel(a[0], lane_dims)), x, lane_dims)
        return leaves, stationarity(residual, leaves, theta, init)

    best, latest, kept = (x, at), (x, at), torch.zeros_like(at.norm, dtype=torch.int64)
    refused = torch.zeros_like(at.norm, dtype=torch.bool)
    for k in range(num_steps):
        if not bool((latest[1].relative > torch.finfo(x[0].dtype).eps).any()):
            break
        step = newton_step(residual, latest[0], theta, latest[1].gradient, linear_solver)
        if k == 0:
            refused = lane_norm(step) > rtol * at.size
        reached = latest
        for halving in range(_HALVINGS):
            found = walk(latest, step * 0.5**halving)
            reached = reached if found is None else better_of(reached, found)
            if bool((reached[1].norm < latest[1].norm).all()):
                break
        else:
            found = walk(latest, latest[1].gradient) if residual.is_fixed_point else None
            reached = reached if found is None else found
        if reached is latest:
            break
        latest = reached
        kept = torch.where(latest[1].norm < best[1].norm, k + 1, kept)
        best = better_of(best, latest)
    return Polish(*best, int(kept.max()) if kept.numel() else 0, refused & (kept == 0))
