"""Bounds on every entry, affine sets, balls and simplices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from implicitlayer import _torch
from implicitlayer.base._parts import Parts
from implicitlayer.base._sharding import anywhere, is_sharded, largest, summed_up
from implicitlayer.base._tree import check_dim, flatten, positive, tree_map, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.sets._set import ConvexSet, norm_in_units, norm_of, unit_of
from implicitlayer.sets._term import (
    Free,
    PerPart,
    ProximalTerm,
    check_entries,
    expand_like,
    is_plain,
    joined,
    number_like,
    parted,
    per_lane,
    spread,
)


@dataclass(frozen=True, eq=False)
class Box(ConvexSet):
    """``lower <= x <= upper``, entry by entry.

    The projection clamps; its derivative is 1 in x at a free entry, and 1 in the bound at an entry on that bound.

    Args:
        lower, upper: numbers, tensors that broadcast to every leaf of x, or pytrees like x of these, in units of x;
            infinite where there is no bound. Equal bounds fix an entry. Tensors that require a gradient get one.

    Raises:
        ValueError: NaN, a lower bound above its upper one, a shape that does not broadcast to x.

    Example:
        >>> import torch, implicitlayer as il
        >>> il.sets.Box(0.0, 1.0).project(torch.tensor([-1.0, 0.5, 3.0])).tolist()
        [0.0, 0.5, 1.0]
    """

    per_entry: ClassVar[tuple[str, ...]] = ("lower", "upper")
    in_parts: ClassVar[bool] = True

    lower: Any = -math.inf
    upper: Any = math.inf

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            check_entries(
                getattr(self, name), name, "a number. Use infinity where there is no bound", lambda t: ~t.isnan()
            )
        below, above = flatten(self.lower)[0], flatten(self.upper)[0]
        if len(below) == len(above):
            for a, b in zip(below, above, strict=True):
                if is_plain(a) and is_plain(b) and anywhere(torch.as_tensor(a) > torch.as_tensor(b)):
                    raise ValueError(f"lower={a} must not be above upper={b}: the box is empty.")

    @classmethod
    def examples(cls, *given: Any) -> list[Box]:
        """Finite and infinite bounds, and a fixed entry."""
        lower, upper = torch.tensor([-0.5, -1.0, 0.2, -math.inf]), torch.tensor([0.5, math.inf, 0.2, 0.1])
        return [cls(-0.5, 0.5), cls(lower, upper)]

    def _bounds(self, x: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        lower, upper = spread(self.lower, x, "lower"), spread(self.upper, x, "upper")
        return list(zip(flatten(x)[0], lower, upper, strict=True))

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        """The nearest point of the box, in the structure of y."""
        leaves = [
            torch.where(lo.isnan() | hi.isnan(), torch.nan, torch.where(v <= lo, lo, torch.where(v >= hi, hi, v)))
            for v, lo, hi in self._bounds(y)
        ]
        return unflatten(leaves, flatten(y)[1])

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """Entries on a bound, and how far y is from changing sides; fixed entries have no kink."""
        bounds, spec = self._bounds(y), flatten(y)[1]
        held = [(v <= lo) | (v >= hi) for v, lo, hi in bounds]
        nearest = [torch.minimum((v - lo).abs(), (v - hi).abs()) for v, lo, hi in bounds]
        margins = [torch.where(lo == hi, torch.inf, near) for near, (_, lo, hi) in zip(nearest, bounds, strict=True)]
        return unflatten(held, spec), unflatten(margins, spec)

    def diagonal(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """0 on a bound and outside, else 1; see NOTE [NaN stays]."""
        return unflatten([(~((v <= lo) | (v >= hi))).to(v.dtype) for v, lo, hi in self._bounds(y)], flatten(y)[1])

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """Euclidean distance from the box, [*lanes]."""
        over = [torch.relu(lo - v) + torch.relu(v - hi) for v, lo, hi in self._bounds(x)]
        return norm_of(joined(over, lane_dims))


class NonNegative(Box):
    """``x >= 0``, entry by entry.

    Example:
        >>> import torch, implicitlayer as il
        >>> il.sets.NonNegative().project(torch.tensor([-1.0, 0.5])).tolist()
        [0.0, 0.5]
    """

    def __init__(self) -> None:
        super().__init__(0.0, math.inf)

    @classmethod
    def examples(cls, *given: Any) -> list[Box]:
        """The only one."""
        return [cls()]


def require_box(term: ProximalTerm | None, who: str) -> None:
    """Raise TypeError for a term that ``who`` cannot keep to."""
    terms = term.terms if isinstance(term, PerPart) else (term,)
    if not all(t is None or isinstance(t, Box | Free) for t in terms):
        raise TypeError(
            f"{who} il.sets.Box and il.sets.NonNegative only, got {type(term).__name__}. Use "
            "il.solvers.ProximalGradient(), or a solver of your own that knows the set."
        )


def ends_of_box(project: Callable[[Any, torch.Tensor], Any], like: Any) -> tuple[Leaves, Leaves]:
    """The leaves of the lower and the upper bounds of a box, from ``project(y, step)``, in the shapes of ``like``."""
    leaves, spec = flatten(like)
    step = torch.ones((), dtype=leaves[0].dtype, device=leaves[0].device)

    def end(value: float) -> Leaves:  # the projection of a point at infinity is the bound on that side
        with torch.no_grad():
            return list(flatten(project(unflatten([torch.full_like(t, value) for t in leaves], spec), step))[0])

    return end(-torch.inf), end(torch.inf)


# The projection of y on {A x = b} is y - A^+ (A y - b) with A^+ the pseudo-inverse, so redundant equations do no harm.
# torch differentiates A^+ by closed formulas (G. Golub & V. Pereyra 1973), right to every order and under every
# transform as long as the rank does not change; its linear solves are not (vmap of forward mode).


@dataclass(frozen=True, eq=False)
class Affine(ConvexSet):
    """``A x = b``, for the entries of x as one vector (of a pytree: all its leaves in order).

    Args:
        A: matrix [m, n] with n entries of x, or one per lane [*lanes, m, n].
        b: right-hand sides [m] or [*lanes, m]. Tensors that require a gradient get one; that of A is right where the
            rank of A does not change nearby (full rank).

    Raises:
        ValueError: shapes that do not fit, entries that are not finite.

    Example:
        >>> import torch, implicitlayer as il
        >>> plane = il.sets.Affine(torch.ones(1, 3).double(), torch.tensor([6.0]).double())
        >>> [round(v, 12) for v in plane.project(torch.tensor([0.0, 1.0, 2.0]).double()).tolist()]
        [1.0, 2.0, 3.0]
    """

    A: Any
    b: Any

    def __post_init__(self) -> None:
        a, b = torch.as_tensor(self.A), torch.as_tensor(self.b)
        if a.ndim < 2 or b.ndim < 1 or a.shape[-2] != b.shape[-1]:
            raise ValueError(
                f"A [m, n] and b [m] must fit: got shapes {tuple(a.shape)} and {tuple(b.shape)}. One equation is a "
                "matrix of one row."
            )
        for name in ("A", "b"):
            check_entries(getattr(self, name), name, "finite", torch.isfinite)

    def _data(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = number_like(self.A, x), number_like(self.b, x)
        if a.shape[-1] != x.shape[-1]:
            raise ValueError(f"A of shape {tuple(a.shape)} needs {a.shape[-1]} unknowns; x has {x.shape[-1]} entries.")
        return a, b

    @classmethod
    def examples(cls, *given: Any) -> list[Affine]:
        """A plane."""
        return [cls(torch.tensor([[1.0, 2.0, 0.0, -1.0]]), torch.tensor([0.5]))]

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        """The nearest solution of A x = b, in the structure of y."""
        flat = joined(y, lane_dims)
        a, b = self._data(flat)
        missing = (a @ flat.unsqueeze(-1))[..., 0] - b
        # torch refuses NaN in a pseudo-inverse, of every lane; behind a transform it is ``missing`` that carries it on
        known = a.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
        inverse = torch.linalg.pinv(torch.where(known, a, 0.0))
        return parted(flat - (inverse @ missing.unsqueeze(-1))[..., 0], y, lane_dims)

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """No entry is held alone (the equations always are), and there is no kink."""
        return Free().activity(y)

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """``||A x - b|| / ||A||_F``, below the distance from the solutions, [*lanes]; not zero where there are none."""
        flat = joined(x, lane_dims)
        a, b = self._data(flat)
        size = norm_of(a.flatten(-2))
        return norm_of((a @ flat.unsqueeze(-1))[..., 0] - b) / positive(size)


@dataclass(frozen=True, eq=False)
class Ball(ConvexSet):
    """``||x - center||_2 <= radius``, over all entries (of a pytree: of all its leaves together).

    Args:
        radius: non-negative, in units of x: a number or 0-d tensor, or one per lane.
        center: a number, a tensor that broadcasts to every leaf of x, or a pytree like x; default 0.
            Tensors that require a gradient get one.

    Raises:
        ValueError: a negative or NaN radius; a center that is not finite or does not broadcast to x.

    Example:
        >>> import torch, implicitlayer as il
        >>> il.sets.Ball(5.0).project(torch.tensor([6.0, 8.0])).tolist()
        [3.0, 4.0]
    """

    per_entry: ClassVar[tuple[str, ...]] = ("center",)
    in_parts: ClassVar[bool] = True

    radius: Any = 1.0
    center: Any = 0.0

    def __post_init__(self) -> None:
        check_entries(self.radius, "radius", "non-negative", lambda t: t >= 0)
        check_entries(self.center, "center", "finite", torch.isfinite)

    def _offset(self, x: Any, lane_dims: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x - center [*lanes, n], the norm of it and the radius [*lanes, 1]."""
        leaves = flatten(x)[0]
        moved = [v - c for c, v in zip(spread(self.center, x, "center"), leaves, strict=True)]
        offset = joined(moved, lane_dims, x)
        radius = per_lane(self.radius, offset, lane_dims, "radius")
        return offset, norm_of(offset, keepdim=True), radius.unsqueeze(-1)

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        """The nearest point of the ball, in the structure of y."""
        offset, norm, radius = self._offset(y, lane_dims)
        inside = norm < radius
        # The direction is made of numbers near 1: the norm itself may overflow. The untaken branch must not divide by
        # zero: its NaN would reach the gradient through torch.where.
        unit = unit_of(offset)
        length = norm_in_units(offset / unit)
        direction = offset / unit / torch.where(inside | (length == 0), 1.0, length)
        near, spec = flatten(parted(torch.where(inside, offset, radius * direction), y, lane_dims))
        return unflatten([c + v for c, v in zip(spread(self.center, y, "center"), near, strict=True)], spec)

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """All entries of a problem on the sphere, and the distance of y from it. A ball of radius 0 has no kink."""
        offset, norm, radius = self._offset(y, lane_dims)
        margin = torch.where(radius > 0, (norm - radius).abs(), torch.inf)
        held = parted((norm >= radius) & torch.ones_like(offset, dtype=torch.bool), y, lane_dims)
        return held, parted(margin * torch.ones_like(offset), y, lane_dims)

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """Distance from the ball, [*lanes]."""
        _, norm, radius = self._offset(x, lane_dims)
        return torch.relu(norm - radius)[..., 0]


# The projection of y is (y - tau)+ with tau such that the entries add up to the total. With S the support and k its
# size, tau = (sum_S y - total) / k: on S, dx = dy - mean_S(dy) + dtotal / k, elsewhere dx = 0. S is found by sorting:
# the k largest entries belong to it while y_(k) > (y_(1) + ... + y_(k) - total) / k. A number added to all entries of y
# changes nothing, so the largest is taken off first: the sums then hold the total and not the offset.
#
# A vector in parts is not sorted (C. Michelot, J. Optim. Theory Appl. 50, 1986). Of a set T that holds S, tau_T is at
# most tau, as the entries of T outside of S are: those at or below tau_T are not in S. They are left out until there
# are none, in at most n rounds of two sums. The largest entry, 0, stays: tau_T is a mean without positive numbers, less
# total / k.


@dataclass(frozen=True, eq=False)
class Simplex(ConvexSet):
    """``x >= 0`` and ``sum x = total``: probabilities, for total 1.

    Args:
        total: the sum, positive, in units of x: a number or 0-d tensor, or one per lane; a tensor gets its gradient.
        dim: None: all entries of x (of a pytree: of all its leaves) are one simplex. A negative integer: every slice
            along that dimension of every leaf is a simplex of its own.

    Raises:
        ValueError: a total that is not positive and finite, a ``dim`` that is not negative.

    Source: J. Duchi et al., ICML 2008, fig. 1.

    Example:
        >>> import torch, implicitlayer as il
        >>> il.sets.Simplex(1.0).project(torch.tensor([1.0, 0.5, -1.0])).tolist()
        [0.75, 0.25, 0.0]
    """

    in_parts: ClassVar[bool] = True

    total: Any = 1.0
    dim: int | None = None

    def __post_init__(self) -> None:
        check_entries(self.total, "total", "positive and finite", lambda t: (t > 0) & t.isfinite())
        check_dim(self.dim)

    def _shifted(self, y: torch.Tensor, lane_dims: int) -> torch.Tensor:
        """y - tau along the last dimension."""
        total = expand_like(per_lane(self.total, y, lane_dims, "total"), y)
        y = y - largest(y.detach(), -1)
        with torch.no_grad():
            support = _support(y, total)
        tau = _threshold(y, support, total)
        return torch.where(support, y - tau, torch.clamp_max(y - tau, 0.0))

    def _along(self, y: Any, lane_dims: int, function: Any) -> Any:
        """``function`` of vectors along the last dimension, in the structure of y."""
        if self.dim is None:
            return parted(function(joined(y, lane_dims)), y, lane_dims)
        dim = check_dim(self.dim, y, lane_dims)
        return tree_map(lambda leaf: function(leaf.movedim(dim, -1)).movedim(-1, dim), y)

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        """The nearest point of the simplex, in the structure of y."""
        shifted = self._along(y, lane_dims, lambda v: self._shifted(v, lane_dims))
        return tree_map(lambda z: torch.where(z <= 0, 0.0, z), shifted)

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """Entries at zero (the sum is always active), and how far each is from joining or leaving them."""
        shifted = self._along(y, lane_dims, lambda v: self._shifted(v, lane_dims))
        return tree_map(lambda z: z <= 0, shifted), tree_map(torch.abs, shifted)

    def magnitude(self, y: Any, lane_dims: int = 0) -> torch.Tensor:
        """Without what is common to all entries, which has no effect."""
        shifted = self._along(y, lane_dims, lambda v: self._shifted(v, lane_dims))
        return super().magnitude(shifted, lane_dims)

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """Norm of the negative part together with the error of the sum spread over the entries, [*lanes]."""

        def parts(v: torch.Tensor) -> torch.Tensor:
            total = expand_like(per_lane(self.total, v, lane_dims, "total"), v)
            return torch.relu(-v) + ((v.sum(-1, keepdim=True) - total) / v.shape[-1]).abs() + torch.relu(-total)

        return norm_of(joined(self._along(x, lane_dims, parts), lane_dims))


def _threshold(y: torch.Tensor, support: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return (summed_up(torch.where(support, y, 0.0).sum(-1, keepdim=True)) - total) / support.sum(-1, keepdim=True)


def _support(y: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Which entries of y, the largest of which is 0, stay positive along the last dimension."""
    if isinstance(_torch.innermost(y), Parts) or is_sharded(y):
        support, kept = y.isnan(), torch.ones_like(y, dtype=torch.bool)
        while anywhere(kept != support):
            support = kept
            kept = support & (y > _threshold(y, support, total))
        return kept
    ordered = y.sort(-1, descending=True).values
    count = torch.arange(1, y.shape[-1] + 1, device=y.device, dtype=y.dtype)
    inside = ordered * count > ordered.cumsum(-1) - total
    return y >= ordered.gather(-1, inside.sum(-1, keepdim=True).clamp_min(1) - 1)
