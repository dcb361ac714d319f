"""The Euclidean ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from implicitlayer.base._tree import flatten, unflatten
from implicitlayer.sets._set import ConvexSet
from implicitlayer.sets._term import (
    check_entries,
    joined,
    norm_in_units,
    norm_of,
    parted,
    per_lane,
    spread,
    unit_of,
)

__all__ = ["Ball"]


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

    radius: Any = 1.0
    center: Any = 0.0

    def __post_init__(self) -> None:
        check_entries(self.radius, "radius", "non-negative", lambda t: t >= 0)
        check_entries(self.center, "center", "finite", torch.isfinite)

    def _offset(self, x: Any, lane_dims: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Center and x - center [*lanes, n], the norm of the latter and the radius [*lanes, 1]."""
        leaves = flatten(x)[0]
        center = joined(
            [c.expand(v.shape) for c, v in zip(spread(self.center, x, "center"), leaves, strict=True)], lane_dims
        )
        offset = joined(x, lane_dims) - center
        radius = per_lane(self.radius, offset, lane_dims, "radius")
        return center, offset, norm_of(offset, keepdim=True), radius.unsqueeze(-1)

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        """The nearest point of the ball, in the structure of y."""
        center, offset, norm, radius = self._offset(y, lane_dims)
        inside = norm < radius
        # The direction is made of numbers near 1: the norm itself may overflow. The untaken branch must not divide by
        # zero: its NaN would reach the gradient through torch.where.
        unit = unit_of(offset)
        length = norm_in_units(offset / unit)
        direction = offset / unit / torch.where(inside | (length == 0), 1.0, length)
        return parted(torch.where(inside, offset + center, center + radius * direction), y, lane_dims)

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """All entries of a problem on the sphere, and the distance of y from it. A ball of radius 0 has no kink."""
        _, offset, norm, radius = self._offset(y, lane_dims)
        margin = torch.where(radius > 0, (norm - radius).abs(), torch.inf)
        spec = flatten(y)[1]
        held = parted((norm >= radius).to(offset.dtype).expand(offset.shape), y, lane_dims)
        held = unflatten([leaf > 0 for leaf in flatten(held)[0]], spec)
        return held, parted(margin.expand(offset.shape), y, lane_dims)

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """Distance from the ball, [*lanes]."""
        _, _, norm, radius = self._offset(x, lane_dims)
        return torch.relu(norm - radius)[..., 0]
