"""The nearest point of the exponential cone, and its derivatives."""

# The cone K is the closure of {(x, y, z): y > 0, y exp(x / y) <= z}; its dual is that of {(u, v, q): u < 0,
# -u exp(v / u) <= e q}. The nearest point P(w) of w = (r, s, t) is
#     w  in K;      0  where -w is in the dual cone;      (r, 0, max(t, 0))  where r <= 0 and s <= 0;
# else w is the sum of a point of the curved border and of a normal there, which is orthogonal to it,
#     w = a (k, 1, e^k) + m (1, 1 - k, -e^-k),   a, m > 0,   k the ratio x / y.
# The first two lines give  a = ((k - 1) r + s) / q  and  m = (r - k s) / q  with q = k^2 - k + 1, the third is
#     h(k) = a e^k - m e^-k - t = 0,
# and h increases where a and m are positive: for k above 1 - s / r if r > 0, and below r / s if s > 0 (H. A. Friberg,
# Projection onto the exponential cone: a univariate root-finding problem, Optim. Methods Softw. 38, 2023). Newton's
# method that falls back on halving this interval finds k. Times e^-|k| nothing overflows.
#
# The derivatives are those of k(w): Newton's steps with the slope at w held fixed leave the number as it is, and have
# its derivatives up to order n after n of them.

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from implicitlayer.base._tree import positive

Parts = tuple[torch.Tensor, ...]

_STEPS = 100  # Newton's method takes about 8; halving alone 60


def nearest(w: torch.Tensor, num_orders: int) -> torch.Tensor:
    """P(w) [..., 3]; derivatives are exact up to ``num_orders``."""
    inside, polar, edge = _regions(w.detach())
    r, s, t = _apart(w, inside | polar | edge)
    start = _Ratio.apply(r.detach(), s.detach(), t.detach())
    k, scale = start, start.abs()
    slope = _equation(start, scale, r.detach(), s.detach(), t.detach())[1]
    for _ in range(num_orders):
        left = _equation(k, scale, r, s, t)[0]
        k = k - (left - left.detach()) / slope
    down = start.clamp(min=0)
    v = torch.stack([k * (-down).exp(), (-down).exp(), (k - down).exp()], -1)
    on_border = ((torch.stack([r, s, t], -1) * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True)) * v
    at_edge = torch.stack([w[..., 0], torch.zeros_like(w[..., 0]), w[..., 2].clamp(min=0)], -1)
    others = torch.where(polar.unsqueeze(-1), torch.zeros_like(w), torch.where(edge.unsqueeze(-1), at_edge, on_border))
    return torch.where(inside.unsqueeze(-1), w, others)


def distance_to_kinks(
    w: torch.Tensor, at: torch.Tensor, of_s: torch.Tensor | float = 1.0, of_z: torch.Tensor | float = 1.0
) -> torch.Tensor:
    """About how far w is from where P has no derivative, [...]; ``at`` is P(w).

    Relative to ``of_s`` for what is in the cone, to ``of_z`` for what is in the polar one.
    """
    (r, s, t), (inside, polar, edge) = w.unbind(-1), _regions(w)
    length = torch.linalg.vector_norm
    between = torch.minimum(length(at, dim=-1) / of_s, length(at - w, dim=-1) / of_z)
    # inside of either cone: what is left of its inequality over the length of its slope, and the way to its edge
    k = torch.where(inside & (s > 0), r / s, 0.0)
    within = (t - s * k.exp()) / torch.stack([k.exp(), (1 - k) * k.exp(), torch.ones_like(k)], -1).norm(dim=-1)
    k = torch.where(polar & (r > 0), s / r, 0.0)
    slope = torch.stack([k.exp(), (1 - k) * k.exp(), torch.full_like(k, math.e)], -1)
    beyond = (-math.e * t - r * k.exp()) / slope.norm(dim=-1)
    on_edge = torch.minimum(torch.minimum(-r / of_s, -s / of_z), torch.where(t > 0, t / of_s, -t / of_z))
    within, beyond = torch.minimum(within, s) / of_s, torch.minimum(beyond, r) / of_z
    return torch.where(inside, within, torch.where(polar, beyond, torch.where(edge, on_edge, between)))


def _regions(w: torch.Tensor) -> Parts:
    """Whether w is in K; else whether -w is in the dual cone; else whether P(w) is on the edge y = 0."""
    r, s, t = w.unbind(-1)
    inside = torch.where(s > 0, s * (r / positive(s)).exp() <= t, (s == 0) & (r <= 0) & (t >= 0))
    below = r * (s / positive(r)).exp() <= -math.e * t
    polar = ~inside & torch.where(r > 0, below, (r == 0) & (s <= 0) & (t <= 0))
    return inside, polar, ~inside & ~polar & (r <= 0) & (s <= 0)


def _apart(w: torch.Tensor, known: torch.Tensor) -> Parts:
    """r, s, t; where P is known, those of a point whose nearest one is on the curved border."""
    return tuple(torch.where(known, other, part) for part, other in zip(w.unbind(-1), (1.0, 1.0, 0.0), strict=True))


def _equation(
    k: Any, scale: Any, r: Any, s: Any, t: Any, exp: Callable[[Any], Any] = torch.exp
) -> tuple[Any, Any, Any]:
    """e^-scale times h(k), times its slope, and times the sum of the sizes of its terms."""
    q = k * k - k + 1
    a, m = ((k - 1) * r + s) / q, (r - k * s) / q
    bend = (2 * k - 1) / q
    up, down = exp(k - scale), exp(-k - scale)
    slope = (a + r / q - a * bend) * up + (m + s / q + m * bend) * down
    first, second, third = a * up, m * down, t * exp(-scale)
    return first - second - third, slope, abs(first) + abs(second) + abs(third)


class _Ratio(torch.autograd.Function):
    """``apply(r, s, t) -> k`` with h(k) = 0, a number without a derivative."""

    @staticmethod
    def forward(*parts: torch.Tensor) -> torch.Tensor:
        r, s, t = (part.double().cpu().numpy() for part in parts)
        with np.errstate(all="ignore"):
            return torch.as_tensor(_root(r, s, t)).to(parts[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: torch.Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None, None]:
        return None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *parts: torch.Tensor) -> tuple[torch.Tensor, int]:
        moved = [part if dim is None else part.movedim(dim, 0) for part, dim in zip(parts, in_dims, strict=True)]
        return _Ratio.apply(*moved), 0


def _root(r: Any, s: Any, t: Any) -> Any:
    """k with h(k) = 0, NumPy arrays: a loop of small operations, on few numbers."""
    low = np.where(r > 0, 1 - s / r, -math.inf)
    high = np.where(s > 0, r / s, math.inf)
    k = np.where(np.isinf(low), high - 1, np.where(np.isinf(high), low + 1, (low + high) / 2))
    last, eps = np.full_like(k, math.inf), np.finfo(k.dtype).eps
    for _ in range(_STEPS if k.size else 0):
        value, slope, size = _equation(k, abs(k), r, s, t, np.exp)
        low, high = np.where(value < 0, k, low), np.where(value < 0, high, k)
        newton = k - value / slope
        exact = (abs(value) <= 4 * eps * size) | (abs(newton - k) <= 4 * eps * abs(k))
        fine = (newton > low) & (newton < high) & (exact | (abs(value) <= last / 2))
        # towards an end that is not known yet by steps that double
        doubled = np.where(np.isinf(low), 2 * k - high, 2 * k - low)
        halved = np.where(np.isinf(low) | np.isinf(high), doubled, (low + high) / 2)
        k, last = np.where(fine, newton, np.where(exact, k, halved)), abs(value)
        if (exact | (high - low <= eps * abs(k))).all():
            break
    return k
