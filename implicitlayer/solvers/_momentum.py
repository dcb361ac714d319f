"""Nesterov's momentum, with restarts: O'Donoghue & Candes 2015 (arXiv:1204.3982), the gradient scheme."""

from __future__ import annotations

from collections.abc import Callable

import torch

from implicitlayer.base._tree import lane_reduce, leaves_norm
from implicitlayer.base._types import Leaves
from implicitlayer.solvers._leaves import lanes_as

__all__: list[str] = []


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
