"""The objective (residual, map) of a layer as its solver sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from implicitlayer.base._tree import flatten, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.equation._flat import Composite
from implicitlayer.equation._residual import Residual

if TYPE_CHECKING:
    from implicitlayer.layer._forward import Calling


class SeenFunction:
    """The objective (residual, map) as a solver sees it: lanes vectorised, closed-over values filled in.

    Attributes:
        lane_dims: leading dimensions of every leaf that the solver may treat as independent problems.
        terms: the set or regulariser of the layer, None without one.
    """

    def __init__(self, calling: Calling, residual: Residual, hidden: Leaves, batched: bool) -> None:
        self._calling, self._residual, self._hidden, self._batched = calling, residual, hidden, batched
        self._function = residual.over_lanes(calling.flat_function)
        self.lane_dims = residual.lane_dims if batched else 0
        self.terms = None if calling.constraints is None else calling.constraints.terms

    def __call__(self, x: Any, *theta: Any) -> Any:
        leaves, _ = flatten(x)
        value = self._function(leaves, self._calling.flatten_theta(theta, self._hidden))
        if not self._calling.gives_value:
            return unflatten(value, self._calling.x_spec)
        return value.sum() if not self._batched and value.ndim else value

    def as_composite(self) -> Composite | None:
        """The model and loss of an objective that tells them, on flat lists of leaves; see equation/_flat.py."""
        parts, over_lanes = self._residual.parts, self._residual.over_lanes
        if parts.model is None or parts.loss is None:
            return None
        model, loss = over_lanes(parts.model), over_lanes(parts.loss)

        def values(outputs: Any, *theta: Any) -> torch.Tensor:
            value: torch.Tensor = loss(outputs, self._calling.flatten_theta(theta, self._hidden))
            return value.sum() if not self._batched and value.ndim else value

        def outputs_of(x: Any, *theta: Any) -> Any:
            return model(flatten(x)[0], self._calling.flatten_theta(theta, self._hidden))

        return Composite(values, outputs_of, parts.squares)

    def prox(self, y: Any, step: torch.Tensor, *theta: Any) -> Any:
        """The proximal operator of the layer's set or regulariser, lane by lane; ``step`` is 0-d or [*lanes]."""
        assert self._calling.constraints is not None
        leaves, spec = flatten(y)
        steps = step.expand(leaves[0].shape[: self._residual.lane_dims])
        prox = self._residual.over_lanes(self._calling.constraints.prox)
        return unflatten(prox([*leaves, steps], self._calling.flatten_theta(theta, self._hidden)), spec)


def summed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The sum over lanes, for a solver that takes one number."""
    return lambda x, *theta: function(x, *theta).sum()
