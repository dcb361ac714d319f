"""Nesterov's momentum, with restarts: O'Donoghue & Candes 2015 (arXiv:1204.3982), the gradient scheme."""

from __future__ import annotations

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

    def next(
        self, gradient: Leaves, change: Leaves, curvature: float | torch.Tensor, lane_dims: int
    ) -> float | torch.Tensor:
        """The factor of the step that has gone by ``change``; ``gradient`` at the point where it began.

        Where steps are proximal, ``gradient`` is L times the step, whose direction is all that counts.
        """
        if self.mu is not None:
            root = (curvature / self.mu) ** 0.5
            return (root - 1) / (root + 1)
        # cosines: their sign is that of the inner product, and they neither overflow nor underflow
        sizes = leaves_norm(gradient, lane_dims), leaves_norm(change, lane_dims)
        cosine = torch.zeros_like(sizes[0])
        for g, d in zip(gradient, change, strict=True):
            cosine = cosine + lane_reduce((g / lanes_as(sizes[0], g)) * (d / lanes_as(sizes[1], d)), lane_dims)
        uphill = cosine > 0
        t = torch.ones_like(cosine) if self.t is None else self.t
        t_next = (1 + (1 + 4 * t * t).sqrt()) / 2
        self.t = torch.where(uphill, torch.ones_like(t), t_next)
        return torch.where(uphill, torch.zeros_like(t), (t - 1) / t_next)
