"""What a solver checks before its first step, and objectives, steps and momentum on lists of leaves [*lanes, ...]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer._errors import ObjectiveError
from implicitlayer.base._failures import over_lanes
from implicitlayer.base._tree import flatten, lane_reduce, leaves_norm, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.equation._residual import no_graph, not_floating


def check_unknowns(leaves: Sequence[Any]) -> None:
    """Raise TypeError unless every leaf of init is a real floating tensor."""
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise TypeError(f"init holds {kind}; the unknowns must be real floating tensors. Use torch.as_tensor(...).")


def check_num_steps(max_steps: Any) -> None:
    """Raise TypeError unless ``max_steps`` is a whole number; its sign is for the caller."""
    if isinstance(max_steps, bool) or not isinstance(max_steps, int):
        raise TypeError(f"max_steps={max_steps!r} must be an integer: it counts steps.")


def check_limits(solver: Any) -> None:
    """Raise ValueError for a negative limit or tolerance among those that the solver has."""
    for name in ("max_steps", "rtol", "atol", "batch_dims"):
        if not getattr(solver, name, 0) >= 0:
            raise ValueError(f"{name}={getattr(solver, name)} must be non-negative.")


def check_attached(value: Any, single: bool = False) -> None:
    """Raise ObjectiveError unless autograd can see how ``value`` depends on x (``single``: and it is one number)."""
    if not isinstance(value, torch.Tensor):
        raise not_floating(value)
    if not value.requires_grad:
        raise no_graph()
    if single and value.ndim:
        raise ObjectiveError(
            f"the objective must return a 0-d tensor: this solver sees one problem at a time, and got values of shape "
            f"{tuple(value.shape)}. Sum or average over the data, or let a layer with batch_dims call it lane by lane."
        )


def value_and_gradient(
    objective: Callable[..., Any], x: Leaves, spec: Any, theta: Any, create_graph: bool = False
) -> tuple[torch.Tensor, Leaves]:
    """Value per lane, and gradient of the sum over lanes (lanes are independent).

    An objective that knows its gradient is asked for it: ``objective.value_and_gradient(x, *theta)``, or None.
    """
    if not create_graph and hasattr(objective, "value_and_gradient"):
        known = objective.value_and_gradient(unflatten(x, spec), *theta)
        if known is not None:
            return known[0], flatten(known[1])[0]
    with torch.enable_grad():
        points = x if create_graph else [leaf.detach().requires_grad_() for leaf in x]
        value = objective(unflatten(points, spec), *theta)
        check_attached(value)
        total = value.sum() if value.ndim else value
        gradient = torch.autograd.grad(total, points, create_graph=create_graph, materialize_grads=True)
    return value.detach(), list(gradient)


def lanes_as(per_lane: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """[*lanes] as [*lanes, 1, ...] in the leaf's dtype, to be multiplied with it."""
    return over_lanes(per_lane, leaf).to(leaf.dtype)


def minus(a: Leaves, b: Leaves) -> Leaves:
    return list(_torch.foreach_sub(a, b))


def add(x: Leaves, direction: Leaves, factor: float | torch.Tensor) -> Leaves:
    """x + factor * direction, with one factor for all or one per lane."""
    if isinstance(factor, torch.Tensor):
        return [torch.addcmul(a, lanes_as(factor, a), b) for a, b in zip(x, direction, strict=True)]
    return list(_torch.foreach_add(x, direction, alpha=factor))


def choose(mask: torch.Tensor | None, new: Leaves, old: Leaves) -> Leaves:
    """The new leaves in the lanes of ``mask``, the old ones in all others; all are new where there is no mask."""
    if mask is None:
        return new
    return [torch.where(over_lanes(mask, a), a, b) for a, b in zip(new, old, strict=True)]


class Momentum:
    """The factor m of each step: constant with mu, else Nesterov's sequence with restarts, per lane."""

    STATE = ("t",)

    def __init__(self, strong_convexity: float | None, t: torch.Tensor | None = None) -> None:
        self.mu, self.t = strong_convexity, t  # None: ones

    def next(
        self, uphill: Callable[[], torch.Tensor], curvature: float | torch.Tensor, made: torch.Tensor | None = None
    ) -> float | torch.Tensor:
        """The factor of the step that has been made, in the lanes of ``made`` (None: in all).

        ``uphill()``: lanes, bool, where it led against its gradient.
        """
        if self.mu is not None:
            root = (curvature / self.mu) ** 0.5
            return (root - 1) / (root + 1)
        back = uphill()
        t = torch.ones_like(back, dtype=torch.float64) if self.t is None else self.t
        t_next = (1 + (1 + 4 * t * t).sqrt()) / 2
        after = torch.where(back, 1.0, t_next)
        self.t = after if made is None else torch.where(made, after, t)
        return torch.where(back, 0.0, (t - 1) / t_next)


def cosine(a: Leaves, b: Leaves, sizes: tuple[torch.Tensor, torch.Tensor], lane_dims: int) -> torch.Tensor:
    """Inner product, float64 [*lanes], of leaves over their sizes [*lanes]: it neither overflows nor underflows."""
    found = torch.zeros_like(sizes[0])
    for x, y in zip(a, b, strict=True):
        found = found + lane_reduce(((x / lanes_as(sizes[0], x)) * (y / lanes_as(sizes[1], y))).double(), lane_dims)
    return found


def leads_uphill(gradient: Leaves, change: Leaves, lane_dims: int) -> torch.Tensor:
    """Lanes, bool [*lanes], where the inner product is positive."""
    sizes = leaves_norm(gradient, lane_dims), leaves_norm(change, lane_dims)
    return cosine(gradient, change, sizes, lane_dims) > 0
