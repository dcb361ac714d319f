"""Bounds on every entry."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from implicitlayer.base._sharding import anywhere
from implicitlayer.base._tree import flatten, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.sets._set import ConvexSet
from implicitlayer.sets._term import Free, PerPart, ProximalTerm, check_entries, is_plain, joined, norm_of, spread


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
