"""An objective of pytrees as a function of one tensor [*lanes, n], with gradients and curvature products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch

from implicitlayer._errors import ObjectiveError
from implicitlayer.base._tree import flatten, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._residual import gauss_newton_of, pull_back
from implicitlayer.equation._traced import TracedProblem
from implicitlayer.linear._operator import lane_scale
from implicitlayer.solvers._leaves import check_unknowns, value_and_gradient

Curvature = Literal["hessian", "gauss_newton"]
_WHO = 'curvature="gauss_newton"', 'curvature="hessian"'


class Problem(TracedProblem):
    """Values and gradients per lane, in units in which the largest entry of the first gradient is about 1.

    Squares of gradients near 1e-25 vanish in float32 and those near 1e200 overflow in float64, hence the units: a power
    of 2 per lane, which rounds nothing. Lanes are independent, so the gradient of the sum over them holds each one's.

    Args:
        objective, init, theta: as a solver gets them.
        curvature: which products :attr:`product` makes; None for none.
    """

    def __init__(
        self, objective: Callable[..., Any], init: Any, theta: tuple[Any, ...], curvature: Curvature | None = None
    ) -> None:
        leaves, self._spec = flatten(init)
        check_unknowns(leaves)
        self._objective, self.theta, self._curvature = objective, theta, curvature
        self._like = [leaf.detach() for leaf in leaves]
        self._composite = composite_of(objective, *_WHO) if curvature == "gauss_newton" else None
        self._pull: Callable[[Leaves], Leaves] | None = None  # the curvature's products, at the point evaluated last
        value, gradient = self._evaluate(self._like)
        self.lane_dims, self.dtype = value.ndim, value.dtype
        shapes = [tuple(leaf.shape) for leaf in self._like]
        if any(shape[: value.ndim] != tuple(value.shape) for shape in shapes):
            raise ObjectiveError(
                "the objective must return a 0-d tensor, or one value per lane where every leaf of init has leading "
                f"dimensions of lanes: it returned shape {tuple(value.shape)} for leaves of shapes {shapes}. Sum or "
                "average over the data inside the objective."
            )
        self.start = ravel(self._like, self.lane_dims).clone()
        self.first_value, flat = value, ravel(gradient, self.lane_dims)
        self.scale = lane_scale(flat).log2().floor().exp2()  # [*lanes, 1]
        self.first_gradient = flat / self.scale

    def value_and_gradient(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient [*lanes, n] and value [*lanes], without a unit."""
        value, gradient = self._evaluate(unravel(x, self._like, self.lane_dims))
        return ravel(gradient, self.lane_dims), value

    def curvature(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """The Hessian at x times a vector, both [*lanes, n], without a unit."""
        points = [leaf.detach().requires_grad_() for leaf in unravel(x, self._like, self.lane_dims)]
        _, gradient = value_and_gradient(self._objective, points, self._spec, self.theta, create_graph=True)
        return ravel(pull_back(gradient, points, unravel(vector, self._like, self.lane_dims)), self.lane_dims)

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """The curvature at the point evaluated last, times a vector [*lanes, n], in units of :attr:`unit`."""
        assert self._pull is not None
        with torch.enable_grad():
            return ravel(self._pull(unravel(vector, self._like, self.lane_dims)), self.lane_dims) / self.scale

    def _evaluate(self, leaves: Leaves) -> tuple[torch.Tensor, Leaves]:
        parts, theta = self._composite, self.theta
        keep = self._curvature is not None and parts is None
        points = [leaf.detach().requires_grad_(keep) for leaf in leaves]
        value, gradient = value_and_gradient(self._objective, points, self._spec, theta, create_graph=keep)
        if keep:
            self._pull = partial(pull_back, gradient, points)
        elif parts is not None:
            model, loss = lambda x: parts.model(unflatten(x, self._spec), *theta), lambda o: parts.loss(o, *theta)
            self._pull = gauss_newton_of(model, loss, points)
        return value, [g.detach() for g in gradient]


def composite_of(objective: Callable[..., Any], who: str, other: str) -> Any:
    """The loss and the model of an objective that tells them, or an error: ``who`` needs them, ``other`` does not."""
    composite = objective.as_composite() if hasattr(objective, "as_composite") else None
    if composite is None:
        raise ObjectiveError(
            f"{who} needs an objective that says what its model is: il.least_squares(residuals) or "
            f"il.composite(loss, model). With any other, use {other}."
        )
    return composite
