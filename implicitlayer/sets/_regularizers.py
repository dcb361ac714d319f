"""Convex regularisers that are not smooth, each known by its proximal operator."""

# With a = |y| and t = step * strength: soft(y, t) = sign(y) (a - t)+ minimises t |x| + 1/2 (x - y)^2. A strength of
# zero is no penalty at all: the entry is free and there is no kink.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from implicitlayer.base._sharding import gathered
from implicitlayer.base._tree import check_dim, flatten, lane_reduce, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.sets._set import norm_of
from implicitlayer.sets._term import ProximalTerm, check_entries, expand_like, spread


class Regularizer(ProximalTerm):
    """A :class:`ProximalTerm` whose value is finite everywhere, with strengths that must not be negative."""

    def __post_init__(self) -> None:
        for name in self.per_entry:
            check_entries(getattr(self, name), name, "non-negative", lambda t: t >= 0)

    def value(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """r(x), tensor [*lanes]."""
        raise NotImplementedError

    def strengths(self, x: Any, lane_dims: int) -> list[Leaves]:
        """All numbers that must not be negative, as tensors that broadcast to each leaf of x."""
        return [spread(getattr(self, name), x, name) for name in self.per_entry]

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """Infinite in lanes with a negative strength, which cannot be seen before where a transform hides it."""
        bad = [
            lane_reduce(torch.where(s < 0, 1.0, torch.zeros_like(v)), lane_dims)
            for group in self.strengths(x, lane_dims)
            for s, v in zip(group, flatten(x)[0], strict=True)
        ]
        found = _total(bad)
        return torch.where(found > 0, torch.inf, torch.zeros_like(found))


@dataclass(frozen=True, eq=False)
class L1(Regularizer):
    """``r(x) = sum strength |x|``: the lasso.

    The prox is the soft threshold. At the solution the entries that are zero have no derivative, and the linear solve
    behind a gradient sees the others only.

    Args:
        strength: non-negative, in units of the objective over x: a number, a tensor that broadcasts to every leaf of
            x, or a pytree like x of these; zero for entries without penalty. A tensor gets its gradient.

    Raises:
        ValueError: a negative or NaN strength, a shape that does not broadcast to x.

    Example:
        >>> import torch, implicitlayer as il
        >>> il.L1(1.0).prox(torch.tensor([-3.0, 0.5, 2.0]), 0.5).tolist()
        [-2.5, 0.0, 1.5]
    """

    per_entry: ClassVar[tuple[str, ...]] = ("strength",)
    in_parts: ClassVar[bool] = True

    strength: Any

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """The soft threshold, in the structure of y."""
        return unflatten([_soft(v, t) for v, t in self._thresholds(y, step)], flatten(y)[1])

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """Entries at zero, and how far y is from the threshold."""
        pairs, spec = self._thresholds(y, step), flatten(y)[1]
        held = [(v.abs() <= t) & (t > 0) for v, t in pairs]
        margins = [torch.where(t > 0, (v.abs() - t).abs(), torch.inf) for v, t in pairs]
        return unflatten(held, spec), unflatten(margins, spec)

    def diagonal(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """0 at and within the threshold, else 1; see NOTE [NaN stays]."""
        free = [(~((v.abs() <= t) & (t > 0))).to(v.dtype) for v, t in self._thresholds(y, step)]
        return unflatten(free, flatten(y)[1])

    def value(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """``sum strength |x|``, [*lanes]."""
        pairs = zip(spread(self.strength, x, "strength"), flatten(x)[0], strict=True)
        return _total([lane_reduce(s * v.abs(), lane_dims) for s, v in pairs])

    def _thresholds(self, y: Any, step: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Leaves with the thresholds of their entries."""
        strengths = spread(self.strength, y, "strength")
        return [(v, expand_like(step, v) * s) for s, v in zip(strengths, flatten(y)[0], strict=True)]


@dataclass(frozen=True, eq=False)
class ElasticNet(Regularizer):
    """``r(x) = sum l1 |x| + l2/2 x^2``.

    Args:
        l1, l2: non-negative strengths, each as in :class:`L1`.

    Raises:
        ValueError: a negative or NaN strength, a shape that does not broadcast to x.

    Source: H. Zou and T. Hastie, J. R. Stat. Soc. B 67 (2005). scikit-learn's ``ElasticNet(alpha, l1_ratio)`` is
    ``l1 = alpha * l1_ratio``, ``l2 = alpha * (1 - l1_ratio)`` on the mean squared error over two.

    Example:
        >>> import torch, implicitlayer as il
        >>> il.ElasticNet(1.0, 1.0).prox(torch.tensor([-3.0, 0.5]), 1.0).tolist()
        [-1.0, 0.0]
    """

    per_entry: ClassVar[tuple[str, ...]] = ("l1", "l2")
    in_parts: ClassVar[bool] = True

    l1: Any
    l2: Any

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """The soft threshold, shrunk by ``1 + step * l2``."""
        return self._shrunk(L1(self.l1).prox(y, step, lane_dims), y, step)

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """Entries at zero, and how far y is from the threshold."""
        return L1(self.l1).activity(y, step, lane_dims)

    def diagonal(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """That of the soft threshold, shrunk by ``1 + step * l2``."""
        return self._shrunk(L1(self.l1).diagonal(y, step, lane_dims), y, step)

    def _shrunk(self, soft: Any, y: Any, step: Any) -> Any:
        leaves, spec = flatten(soft)
        shrink = spread(self.l2, y, "l2")
        return unflatten([v / (1 + expand_like(step, v) * s) for v, s in zip(leaves, shrink, strict=True)], spec)

    def value(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """``sum l1 |x| + l2/2 x^2``, [*lanes]."""
        pairs = zip(spread(self.l2, x, "l2"), flatten(x)[0], strict=True)
        squares = _total([lane_reduce(0.5 * s * v * v, lane_dims) for s, v in pairs])
        return L1(self.l1).value(x, lane_dims) + squares


@dataclass(frozen=True, eq=False)
class GroupL1(Regularizer):
    """``r(x) = sum over groups of strength * ||x_group||_2``: groups are zero as a whole or not at all.

    Args:
        strength: non-negative: a number, a tensor that broadcasts to the norms of the groups (with ``dim`` kept as a
            dimension of size 1), or a pytree like x of these. A tensor gets its gradient.
        dim: None: every leaf of x is one group. A negative integer: every slice along that dimension is one
            (``dim=-1``: the rows of a matrix).

    Raises:
        ValueError: a negative or NaN strength, a ``dim`` that is not negative.

    Source: M. Yuan and Y. Lin, J. R. Stat. Soc. B 68 (2006).

    Example:
        >>> import torch, implicitlayer as il
        >>> il.GroupL1(1.0, dim=-1).prox(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 2.5).tolist()
        [[1.5, 2.0], [0.0, 0.0]]
    """

    in_parts: ClassVar[bool] = True

    strength: Any
    dim: int | None = None

    def __post_init__(self) -> None:
        check_entries(self.strength, "strength", "non-negative", lambda t: t >= 0)
        check_dim(self.dim)

    def _norms(self, y: Any, lane_dims: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Leaf, norms of its groups with kept dimensions, and their strengths."""
        check_dim(self.dim, y, lane_dims)
        norms = []
        for leaf in flatten(y)[0]:
            # torch would sum over everything for ()
            dims = tuple(range(lane_dims, leaf.ndim)) if self.dim is None else (self.dim,)
            norms.append(norm_of(leaf, dims, keepdim=True) if dims else norm_of(leaf.unsqueeze(-1)))
        strengths = spread(self.strength, unflatten(norms, flatten(y)[1]), "strength")
        return list(zip(flatten(y)[0], norms, strengths, strict=True))

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """Each group shortened by ``step * strength``, in the structure of y."""
        leaves = []
        for v, norm, s in self._norms(y, lane_dims):
            t = expand_like(step, v) * s
            held = (norm <= t) & (t > 0)
            factor = torch.where(held, 0.0, 1 - t / torch.where(held | (norm == 0), 1.0, norm))
            leaves.append(factor * v)
        return unflatten(leaves, flatten(y)[1])

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """Entries of groups at zero, and how far the group is from the threshold."""
        held, margins = [], []
        for v, norm, s in self._norms(y, lane_dims):
            t = expand_like(step, v) * s
            held.append((norm <= t) & (t > 0) & torch.ones_like(v, dtype=torch.bool))
            margins.append(torch.where(t > 0, (norm - t).abs(), torch.inf) * torch.ones_like(v))
        spec = flatten(y)[1]
        return unflatten(held, spec), unflatten(margins, spec)

    def value(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """The sum over groups, [*lanes]."""
        return _total([lane_reduce(s * norm, lane_dims) for _, norm, s in self._norms(x, lane_dims)])

    def strengths(self, x: Any, lane_dims: int) -> list[Leaves]:
        """One per group."""
        return [[s for _, _, s in self._norms(x, lane_dims)]]


def _soft(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The soft threshold; entries with t = 0 pass as they are.

    What is taken off is y clamped to [-t, t], with a derivative in y of 1 on the border: zero would be that of an entry
    at zero that has no penalty. torch's clamp gives the lower bound no derivative where the two are equal.
    """
    inside = torch.where((y == 0) & (t == 0) | t.isnan(), 0 * t, y)
    return y - torch.where(y > t, t, torch.where(y < -t, -t, inside))


def _total(parts: Leaves) -> torch.Tensor:
    return torch.stack(list(map(gathered, parts))).sum(0)
