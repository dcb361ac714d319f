"""The base class of convex sets, and sets and proximal operators that users bring."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from implicitlayer.base._sharding import largest, summed_up, whole
from implicitlayer.base._tree import flatten, like_x, unflatten
from implicitlayer.sets._term import ProximalTerm, joined


class ConvexSet(ProximalTerm, abc.ABC):
    """A closed convex set, known by its projection: a subclass defines ``project``, and is then any layer's constraint.

    ``il.testing.extension_checks(il.sets.ConvexSet)`` finds the subclass and tests it on vectors of four entries (see
    :meth:`examples`). ``activity``, ``diagonal`` and ``violation`` have defaults that hold for every set; a subclass
    may say more: how far a kink is, a derivative that is diagonal, a cheaper distance.

    Example:
        >>> import torch, implicitlayer as il
        >>> class Line(il.sets.ConvexSet):  # all entries are equal
        ...     def project(self, y, lane_dims=0):
        ...         return y.mean(-1, keepdim=True).expand_as(y)
        >>> Line().project(torch.tensor([1.0, 3.0])).tolist()
        [2.0, 2.0]
    """

    @abc.abstractmethod
    def project(self, y: Any, lane_dims: int = 0) -> Any:
        """The nearest point of the set, in the structure of y: torch code whose derivative is that of the projection.

        Args:
            y: a pytree; the first ``lane_dims`` dimensions of every leaf enumerate independent problems.
        """

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """The projection, whatever the step."""
        return self.project(y, lane_dims)

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """``||x - project(x)||``, [*lanes]."""
        return norm_of(joined(x, lane_dims) - joined(self.project(x, lane_dims), lane_dims, x))


@dataclass(frozen=True, eq=False)
class _OfFunction(ProximalTerm):
    function: Callable[..., Any]
    theta: tuple[Any, ...] = ()

    def bind(self, theta: tuple[Any, ...]) -> Any:
        """The same at these thetas, unless it has some of its own."""
        return self if self.theta else replace(self, theta=whole(theta))


@dataclass(frozen=True, eq=False)
class Projection(_OfFunction, ConvexSet):
    """The set behind a projection of your own.

    Autograd's derivative of its torch code is what a layer uses: branch on values (``torch.where``), and let every
    branch be differentiable where it is taken. Kinks are looked for by differences of the function: one that shows is
    told, but the record cannot know that there is none.

    Args:
        function: ``function(y, *theta) -> the nearest point of a convex set``, in the structure of y. With
            ``batch_dims`` y has the lanes in front.

    Example:
        >>> import torch, implicitlayer as il
        >>> ordered = il.sets.Projection(lambda y: torch.where(y[0] <= y[1], y, y.mean()))  # x[0] <= x[1]
        >>> ordered.project(torch.tensor([3.0, 1.0])).tolist()
        [2.0, 2.0]
    """

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        """What the function says, checked to be like y."""
        return _checked(self.function(y, *self.theta), y, "projection")

    @classmethod
    def examples(cls, *given: Any) -> list[Projection]:
        """A half-space of each entry."""
        return [cls(lambda y, *theta: y.clamp(max=0.5))]


@dataclass(frozen=True, eq=False)
class Prox(_OfFunction):
    """A regulariser r behind a proximal operator of your own.

    Args:
        function: ``function(y, step, *theta) -> argmin_x step * r(x) + 1/2 ||x - y||^2`` in plain torch code, in the
            structure of y; ``step`` is a 0-d tensor (with ``batch_dims`` [*lanes]). As for :class:`Projection`,
            autograd's derivative is used, and kinks are looked for by differences.

    Example:
        >>> import torch, implicitlayer as il
        >>> ridge = il.Prox(lambda y, step, strength: y / (1 + step * strength)).bind((3.0,))
        >>> ridge.prox(torch.tensor([4.0]), 1.0).tolist()
        [1.0]
    """

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """What the function says, checked to be like y."""
        return _checked(self.function(y, step, *self.theta), y, "proximal operator")


def _checked(value: Any, y: Any, what: str) -> Any:
    leaves, spec = flatten(y)
    return unflatten(like_x(value, leaves, spec, f"the {what} must return the shapes it was given"), spec)


def norm_of(vector: torch.Tensor, dim: Any = -1, keepdim: bool = False) -> torch.Tensor:
    """Euclidean norm along ``dim`` whose derivative at zero is zero, not NaN; no square over- or underflows."""
    unit = unit_of(vector, dim)
    norm = norm_in_units(vector / unit, dim) * unit
    return norm if keepdim else norm.sum(dim)  # of one entry


def unit_of(vector: torch.Tensor, dim: Any = -1) -> torch.Tensor:
    """A power of two, which rounds nothing, near the largest magnitude along ``dim`` (kept): a constant."""
    size = vector.detach().abs()
    for one in dim if isinstance(dim, tuple) else (dim,):
        size = largest(size, one)
    known = (size > 0) & size.isfinite()
    return torch.where(known, torch.where(known, size, 1.0).log2().floor().exp2(), 1.0)


def norm_in_units(vector: torch.Tensor, dim: Any = -1) -> torch.Tensor:
    """The norm along ``dim`` (kept) of a vector whose largest entry is about 1."""
    squared = summed_up((vector * vector).sum(dim, keepdim=True))
    zero = squared == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
