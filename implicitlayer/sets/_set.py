"""The base class of convex sets: a subclass says how to project, the rest follows."""

# NOTE [kinks of a black box]: with D+- = (prox(y +- h d) - prox(y)) / (+-h), a smooth prox of curvature c (over the
# size of y) has |D+ - D-| = c h, and one whose derivative jumps between y - h d and y + h d has a difference of the
# size of the jump for this h and for every larger one. An iteration that is good to e makes a difference of 2 e / h,
# which falls with h. So a kink at h shows as a difference above _JUMP at h and at _FAR. d has no two entries alike and
# none small: it crosses a kink in any position. Nothing is said where nothing shows: d may pass along an edge.

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch

from implicitlayer.base._tree import flatten, unflatten
from implicitlayer.sets._term import ProximalTerm, expand_like, joined, largest_of, norm_of

__all__ = ["ConvexSet"]

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
