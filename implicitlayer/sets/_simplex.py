"""Non-negative entries with a given sum."""

# The projection of y is (y - tau)+ with tau such that the entries add up to the total. With S the support and k its
# size, tau = (sum_S y - total) / k: on S, dx = dy - mean_S(dy) + dtotal / k, elsewhere dx = 0. S is found by sorting:
# the k largest entries belong to it while y_(k) > (y_(1) + ... + y_(k) - total) / k. A number added to all entries of y
# changes nothing, so the largest is taken off first: the sums then hold the total and not the offset.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer.base._tree import flatten, tree_map
from implicitlayer.sets._set import ConvexSet
from implicitlayer.sets._term import check_entries, joined, norm_of, parted, per_lane

__all__ = ["Simplex"]


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

    total: Any = 1.0
    dim: int | None = None

    def __post_init__(self) -> None:
        check_entries(self.total, "total", "positive and finite", lambda t: (t > 0) & t.isfinite())
        if self.dim is not None and self.dim >= 0:
            raise ValueError(f"dim={self.dim} must be negative (counted from the last dimension), or None for all.")

    def _shifted(self, y: torch.Tensor, lane_dims: int) -> torch.Tensor:
        """y - tau along the last dimension."""
        total = per_lane(self.total, y, lane_dims, "total")
        total = total.reshape((*total.shape, *[1] * (y.ndim - total.ndim)))
        if y.shape[-1]:
            y = y - y.detach().amax(-1, keepdim=True)
        with torch.no_grad():
            ordered = y.sort(-1, descending=True).values
            count = torch.arange(1, y.shape[-1] + 1, device=y.device, dtype=y.dtype)
            inside = ordered * count > ordered.cumsum(-1) - total
            size = inside.sum(-1, keepdim=True).clamp_min(1)
            support = y >= ordered.gather(-1, size - 1)
            size = support.sum(-1, keepdim=True)
        tau = (torch.where(support, y, 0.0).sum(-1, keepdim=True) - total) / size
        return torch.where(support, y - tau, torch.clamp_max(y - tau, 0.0))

    def _along(self, y: Any, lane_dims: int, function: Any) -> Any:
        """``function`` of vectors along the last dimension, in the structure of y."""
        if self.dim is None:
            return parted(function(joined(y, lane_dims)), y, lane_dims)
        dim = self.dim
        for leaf in flatten(y)[0]:
            if leaf.ndim - lane_dims < -dim:
                raise ValueError(f"dim={dim} is out of range for a leaf of shape {tuple(leaf.shape[lane_dims:])}.")
        return tree_map(lambda leaf: function(leaf.movedim(dim, -1)).movedim(-1, dim), y)

    def project(self, y: Any, lane_dims: int = 0) -> Any:
        """The nearest point of the simplex, in the structure of y."""

        def nearest(v: torch.Tensor) -> torch.Tensor:
            z = self._shifted(v, lane_dims)
            return torch.where(z <= 0, 0.0, z)

        return self._along(y, lane_dims, nearest)

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """Entries at zero (the sum is always active), and how far each is from joining or leaving them."""
        held = self._along(y, lane_dims, lambda v: self._shifted(v, lane_dims).to(v.dtype) <= 0)
        return held, self._along(y, lane_dims, lambda v: self._shifted(v, lane_dims).abs())

    def magnitude(self, y: Any, lane_dims: int = 0) -> torch.Tensor:
        """Without what is common to all entries, which has no effect."""
        shifted = self._along(y, lane_dims, lambda v: self._shifted(v, lane_dims))
        return super().magnitude(shifted, lane_dims)

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """Norm of the negative part together with the error of the sum spread over the entries, [*lanes]."""

        def parts(v: torch.Tensor) -> torch.Tensor:
            total = per_lane(self.total, v, lane_dims, "total")
            total = total.reshape((*total.shape, *[1] * (v.ndim - total.ndim)))
            return torch.relu(-v) + ((v.sum(-1, keepdim=True) - total) / v.shape[-1]).abs() + torch.relu(-total)

        return norm_of(joined(self._along(x, lane_dims, parts), lane_dims))
