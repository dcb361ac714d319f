"""Objectives and steps on lists of leaves [*lanes, ...], and momentum: what the first-order solvers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer.base._tree import flatten, lane_reduce, leaves_norm, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.solvers._inputs import check_attached


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


def lanes_like(per_lane: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """[*lanes] as [*lanes, 1, ...], to be combined with a leaf."""
    return per_lane.reshape((*per_lane.shape, *[1] * (leaf.ndim - per_lane.ndim)))


def lanes_as(per_lane: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """The same in the leaf's dtype, to be multiplied with it."""
    return lanes_like(per_lane, leaf).to(leaf.dtype)


def minus(a: Leaves, b: Leaves) -> Leaves:
    """a - b."""
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
    return [torch.where(lanes_like(mask, a), a, b) for a, b in zip(new, old, strict=True)]


class Momentum:
    """The factor m of each step: constant with mu, else Nesterov's sequence with restarts, per lane."""

    def __init__(self, strong_convexity: float | None) -> None:
        self.mu = strong_convexity
        self.t: torch.Tensor | None = None

    def next(self, uphill: Callable[[], torch.Tensor], curvature: float | torch.Tensor) -> float | torch.Tensor:
        """The factor of the step that has been made; ``uphill()``: lanes, bool, where it led against its gradient."""
        if self.mu is not None:
            root = (curvature / self.mu) ** 0.5
            return (root - 1) / (root + 1)
        back = uphill()
        t = torch.ones_like(back, dtype=torch.float64) if self.t is None else self.t
        t_next = (1 + (1 + 4 * t * t).sqrt()) / 2
        self.t = torch.where(back, 1.0, t_next)
        return torch.where(back, 0.0, (t - 1) / t_next)


def leads_uphill(gradient: Leaves, change: Leaves, lane_dims: int) -> torch.Tensor:
    """Lanes, bool [*lanes], where the inner product is positive; of cosines, which neither overflow nor underflow."""
    sizes = leaves_norm(gradient, lane_dims), leaves_norm(change, lane_dims)
    cosine = torch.zeros_like(sizes[0])
    for g, d in zip(gradient, change, strict=True):
        cosine = cosine + lane_reduce((g / lanes_as(sizes[0], g)) * (d / lanes_as(sizes[1], d)), lane_dims)
    return cosine > 0
