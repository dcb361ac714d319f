"""Projections and proximal operators that users bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from implicitlayer.base._tree import flatten, unflatten
from implicitlayer.sets._set import ConvexSet, kink_distances
from implicitlayer.sets._term import ProximalTerm, leaves_like

__all__ = ["Projection", "Prox"]


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
