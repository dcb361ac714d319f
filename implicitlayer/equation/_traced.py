"""An objective as a pure function of one tensor, in code that a compiler can follow: no host reads a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from implicitlayer.base._tree import TreeSpec, leaves_norm, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._residual import vjp
from implicitlayer.linear._operator import lane_scale


class Vectors:
    """Points as vectors [*lanes, n] that stand for trees; a subclass says of what structure, and like which leaves."""

    lane_dims: int
    _like: Leaves
    _spec: TreeSpec

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """Euclidean norm per lane, float64; infinite where there is a NaN."""
        return leaves_norm([x], self.lane_dims)

    def tree(self, x: torch.Tensor) -> Any:
        """x in the structure of ``init``."""
        return unflatten(unravel(x, self._like, self.lane_dims), self._spec)


class TracedProblem(Vectors):
    """Values, gradients and products per lane, in the units of :class:`solvers._problem.Problem`.

    Args:
        function: ``x leaves -> value per lane, [*lanes]``.
        init: leaves of the start, [*lanes, ...].
        lane_dims: number of dimensions of lanes.
        prox: of a layer over a set or with a regulariser, ``(y [*lanes, n], step [*lanes]) -> [*lanes, n]``.
    """

    prox: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def __init__(
        self, function: Callable[[Leaves], torch.Tensor], init: Leaves, lane_dims: int, prox: Any = None
    ) -> None:
        self.function, self.like, self.lane_dims, self.prox = function, init, lane_dims, prox
        self.start = ravel(init, lane_dims)
        self.dtype = self.start.dtype
        gradient, self.first_value = self.value_and_gradient(self.start)
        self.scale = lane_scale(gradient).log2().floor().exp2()
        self.first_gradient = gradient / self.scale

    @property
    def unit(self) -> torch.Tensor:
        """[*lanes]: what values and gradients are divided by."""
        return self.scale.squeeze(-1).double()

    def value_and_gradient(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient [*lanes, n] and value [*lanes], without a unit; differentiable."""

        def total(flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values = self.function(unravel(flat, self.like, self.lane_dims))
            return values.sum(), values

        gradient, values = torch.func.grad(total, has_aux=True)(x)
        return gradient, values

    def gradient(self, x: torch.Tensor) -> torch.Tensor:
        """[*lanes, n], without a unit."""
        return self.value_and_gradient(x)[0]

    def curvature(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """The Hessian at x times a vector, both [*lanes, n], without a unit."""
        _, pull = vjp(self.gradient, x)
        product: torch.Tensor = pull(vector)[0]
        return product

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Value, float64 [*lanes], and gradient [*lanes, n], both in units of :attr:`unit`."""
        gradient, value = self.value_and_gradient(x)
        return value.double() / self.unit, gradient / self.scale
