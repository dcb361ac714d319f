"""Linear equations."""

# The projection of y on {A x = b} is y - A^+ (A y - b) with A^+ the pseudo-inverse, so redundant equations do no harm.
# torch differentiates A^+ by closed formulas (G. Golub & V. Pereyra 1973), right to every order and under every
# transform as long as the rank does not change; its linear solves are not (vmap of forward mode).

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer.base._tree import flatten, tree_map, unflatten
from implicitlayer.sets._set import ConvexSet
from implicitlayer.sets._term import check_entries, joined, norm_of, number_like, parted

__all__ = ["Affine"]


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
        leaves, spec = flatten(y)
        return (
            unflatten([torch.zeros_like(leaf, dtype=torch.bool) for leaf in leaves], spec),
            tree_map(lambda leaf: torch.full_like(leaf, torch.inf), y),
        )

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """``||A x - b|| / ||A||_F``, below the distance from the solutions, [*lanes]; not zero where there are none."""
        flat = joined(x, lane_dims)
        a, b = self._data(flat)
        size = norm_of(a.flatten(-2))
        return norm_of((a @ flat.unsqueeze(-1))[..., 0] - b) / torch.where(size > 0, size, 1.0)
