"""The base class of convex sets, and sets and proximal operators that users bring."""

# NOTE [kinks of a black box]: with D+- = (prox(y +- h d) - prox(y)) / (+-h), a smooth prox of curvature c (over the
# size of y) has |D+ - D-| = c h, and one whose derivative jumps between y - h d and y + h d has a difference of the
# size of the jump for this h and for every larger one. An iteration that is good to e makes a difference of 2 e / h,
# which falls with h. So a kink at h shows as a difference above _JUMP at h and at _FAR. d has no two entries alike and
# none small: it crosses a kink in any position. Nothing is said where nothing shows: d may pass along an edge.

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from implicitlayer.base._tree import flatten, unflatten
from implicitlayer.sets._term import ProximalTerm, expand_like, joined, largest_of, leaves_like, norm_of

_JUMP = 0.1  # of the derivative, whose eigenvalues lie between 0 and 1
_FAR = 1e-4  # over the size of y; the nearer step is sqrt(eps)


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

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """As for every term, with distances from kinks that show: NOTE [kinks of a black box]."""
        return super().activity(y, step, lane_dims)[0], kink_distances(
            lambda at: self.project(at, lane_dims), y, lane_dims
        )

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """``||x - project(x)||``, [*lanes]."""
        return norm_of(joined(x, lane_dims) - joined(self.project(x, lane_dims), lane_dims))


def kink_distances(prox: Callable[[Any], Any], y: Any, lane_dims: int) -> Any:
    """How far the nearest kink is, entry by entry: 0 within sqrt(eps) of the size of y, _FAR of it; NaN if unknown."""
    leaves, spec = flatten(y)
    here = flatten(prox(y))[0]
    size = largest_of(joined(y, lane_dims))
    size = torch.where(size > 0, size, 1.0)

    def jumps(part: float) -> list[torch.Tensor]:
        h = [expand_like(part * size, leaf) for leaf in leaves]
        ahead, behind = (
            flatten(
                prox(unflatten([v + sign * w * _direction(v, lane_dims) for v, w in zip(leaves, h, strict=True)], spec))
            )[0]
            for sign in (1.0, -1.0)
        )
        return [((a - c) - (c - b)).abs() / w > _JUMP for a, b, c, w in zip(ahead, behind, here, h, strict=True)]

    near, far = jumps(torch.finfo(leaves[0].dtype).eps ** 0.5), jumps(_FAR)
    margins = []
    for n, f, leaf in zip(near, far, leaves, strict=True):
        at = torch.where(n & f, expand_like(0.0 * size, leaf), expand_like(_FAR * size, leaf))
        margins.append(torch.where(f, at, torch.nan))
    return unflatten(margins, spec)


def _direction(like: torch.Tensor, lane_dims: int) -> torch.Tensor:
    """Entries between 1.25 and 2 of both signs, without a period; the same in every lane."""
    shape = like.shape[lane_dims:]
    count = torch.arange(shape.numel(), device=like.device, dtype=torch.float64)
    signs = torch.where(torch.cos(2.399963 * count**2) >= 0, 1.0, -1.0)
    entries: torch.Tensor = (signs * (1.25 + 0.75 * ((0.618034 * count) % 1))).to(like.dtype).reshape(shape)
    return entries


@dataclass(frozen=True, eq=False)
class Projection(ConvexSet):
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

    function: Callable[..., Any]
    theta: tuple[Any, ...] = ()

    def bind(self, theta: tuple[Any, ...]) -> Projection:
        """The set at these thetas."""
        return replace(self, theta=theta)

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        """What the function says, checked to be like y."""
        return _checked(self.function(y, *self.theta), y, "projection")

    @classmethod
    def examples(cls, *given: Any) -> list[Projection]:
        """A half-space of each entry."""
        return [cls(lambda y, *theta: y.clamp(max=0.5))]


@dataclass(frozen=True, eq=False)
class Prox(ProximalTerm):
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

    function: Callable[..., Any]
    theta: tuple[Any, ...] = ()

    def bind(self, theta: tuple[Any, ...]) -> Prox:
        """The regulariser at these thetas."""
        return replace(self, theta=theta)

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """What the function says, checked to be like y."""
        return _checked(self.function(y, step, *self.theta), y, "proximal operator")

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """As for every term, with distances from kinks that show: NOTE [kinks of a black box]."""
        return super().activity(y, step, lane_dims)[0], kink_distances(
            lambda at: self.prox(at, step, lane_dims), y, lane_dims
        )


def _checked(value: Any, y: Any, what: str) -> Any:
    leaves, spec = flatten(y)
    result = leaves_like(value, y, f"what the {what} returns")
    shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in result]
    if shapes != [tuple(leaf.shape) for leaf in leaves]:
        raise ValueError(
            f"the {what} must return the shapes it was given: expected {[tuple(leaf.shape) for leaf in leaves]}, got "
            f"{shapes}."
        )
    return unflatten(result, spec)
