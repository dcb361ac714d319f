"""Objectives that are a loss of a model's outputs: what Gauss-Newton curvature needs to know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from implicitlayer.base._copying import CopiesFunctions
from implicitlayer.base._tree import flatten, lane_reduce


@dataclass(frozen=True, eq=False)
class Composite(CopiesFunctions):
    """``objective(x, *theta) = loss(model(x, *theta), *theta)``; made by :func:`composite`, :func:`least_squares`."""

    loss: Callable[..., torch.Tensor]
    model: Callable[..., Any]
    squares: bool = False  # whether the loss is half the sum of squares of the outputs, by construction

    def __call__(self, x: Any, *theta: Any) -> torch.Tensor:
        return self.loss(self.model(x, *theta), *theta)

    def as_composite(self) -> Composite:
        """Itself: see NOTE [objectives with parts]."""
        return self


def composite(loss: Callable[..., torch.Tensor], model: Callable[..., Any]) -> Composite:
    """The objective ``loss(model(x, *theta), *theta)``, with its parts known.

    In a layer with ``curvature="gauss_newton"`` the linear solve behind a gradient uses J' (d^2 loss / d outputs^2) J
    with J = d model / dx: positive semidefinite for a convex loss, whatever the model. The gradient is then exact only
    where the neglected term, (d loss / d outputs) times the curvature of the model, vanishes: for linear models, and
    at solutions that fit their data.

    Args:
        loss: ``loss(outputs, *theta) -> 0-d tensor`` (or one value per lane).
        model: ``model(x, *theta) -> outputs``, a pytree of tensors.

    Source: N. N. Schraudolph, Neural Computation 14 (2002); J. Martens, ICML 2010, section 3.

    Example:
        >>> import torch, implicitlayer as il
        >>> objective = il.composite(lambda y, t: ((y - t) ** 2).sum(), lambda x, t: 3 * x)
        >>> layer = il.argmin(objective, lambda f, x, t: t / 3, curvature="gauss_newton")
        >>> t = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> layer(torch.zeros(2, dtype=torch.float64), t).sum().backward()
        >>> [round(v, 12) for v in t.grad.tolist()]
        [0.333333333333, 0.333333333333]
    """
    return Composite(loss, model)


def least_squares(residuals: Callable[..., Any], *, batch_dims: int = 0) -> Composite:
    """The objective ``1/2 sum of squares of residuals(x, *theta)``, with its parts known: see :func:`composite`.

    Args:
        residuals: ``residuals(x, *theta) -> pytree of tensors`` of any shapes.
        batch_dims: leading dimensions of the residuals that enumerate problems: one sum for each. A layer that is
            given the objective itself takes its own ``batch_dims``; inside of another one, such as
            :func:`proximal`, say it here.

    Example:
        >>> import torch, implicitlayer as il
        >>> il.least_squares(lambda x: {"a": x, "b": 2 * x})(torch.tensor([1.0, 2.0])).item()
        12.5
    """
    return Composite(partial(_half_squares, batch_dims), residuals, squares=True)


def _half_squares(lane_dims: int, outputs: Any, *theta: Any) -> torch.Tensor:
    return torch.stack([0.5 * lane_reduce(leaf * leaf, lane_dims) for leaf in flatten(outputs)[0]]).sum(0)
