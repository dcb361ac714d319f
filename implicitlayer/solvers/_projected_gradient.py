"""Projected gradient steps over a simple set."""

from __future__ import annotations

from typing import Any

from implicitlayer.solvers._proximal_gradient import ProximalGradient

__all__ = ["ProjectedGradient"]


class ProjectedGradient(ProximalGradient):
    """Minimise a smooth objective over a set: :class:`ProximalGradient`, whose prox is the projection.

    Args:
        constraint: a set (``il.sets``), a pytree of sets, or a function of theta that returns one; None takes that of
            the layer.
        settings: as in :class:`ProximalGradient`.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.ProjectedGradient(il.sets.Box(0.0, 1.0), rtol=1e-12)
        >>> solver(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2, dtype=torch.float64)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, constraint: Any = None, **settings: Any) -> None:
        super().__init__(constraint, **settings)
