"""The residuals of a least-squares objective as a function of one tensor [*lanes, n], with their Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from implicitlayer._errors import ObjectiveError
from implicitlayer.base._tree import flatten, name_lanes, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.solvers._inputs import check_attached, check_unknowns
from implicitlayer.solvers._outcome import NOISE
from implicitlayer.solvers._problem import composite_of, pulled, pushed

__all__: list[str] = []

_WORDS = "il.solvers.LevenbergMarquardt", "il.solvers.LBFGS() or, under a constraint, il.solvers.ProjectedGradient()"


class Residuals:
    """Residuals f, float64 [*lanes, k], in units of their size at init: squares neither overflow nor vanish.

    Args:
        objective: a model, and a loss that is half the sum of squares of its outputs: every evaluation checks that.
        init, theta: as a solver gets them.
    """

    def __init__(self, objective: Callable[..., Any], init: Any, theta: tuple[Any, ...]) -> None:
        leaves, self._spec = flatten(init)
        check_unknowns(leaves)
        self._composite, self._theta = composite_of(objective, *_WORDS), theta
        self._like = [leaf.detach() for leaf in leaves]
        value, first = self._evaluate(self._like)
        check_attached(next((leaf for leaf in self._outputs if leaf.requires_grad), self._outputs[0]))
        self.lane_dims, self.dtype = value.ndim, value.dtype
        self.start = ravel(self._like, self.lane_dims).clone()
        largest = first.abs().amax(-1) if first.shape[-1] else torch.ones_like(value.double())
        usable = (largest > 0) & largest.isfinite()
        self.unit = torch.where(usable, largest, 1.0).log2().floor().exp2()  # [*lanes], a power of 2: rounds nothing
        self.first = first / self.unit.unsqueeze(-1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The residuals at x."""
        return self._evaluate(unravel(x, self._like, self.lane_dims))[1] / self.unit.unsqueeze(-1)

    def triangle(self, f: torch.Tensor) -> torch.Tensor:
        """The triangle of the QR factors of [J, f], J = df / dx at the point evaluated last; [*lanes, n + 1, n + 1].

        J is made by its rows or by its columns, the fewer.
        """
        lanes, (k, n) = self.start.shape[:-1], (self.first.shape[-1], self.start.shape[-1])
        with torch.enable_grad():
            make, like = (pulled, self._outputs) if k < n else (pushed, self._points)
            times = make(self._outputs, self._points)
            units = torch.eye(min(k, n), dtype=self.start.dtype, device=self.start.device)
            trees = [unravel(unit.expand(*lanes, -1), like, self.lane_dims) for unit in units.unbind()]
            parts = [ravel(times(tree), self.lane_dims).double() / self.unit.unsqueeze(-1) for tree in trees]
        if k < n:
            parts = list(torch.stack(parts, -1).unbind(-2)) if k else [f.new_zeros(*lanes, 0)] * n
        columns = torch.stack([*parts, f], -2)
        if k < n + 1:
            columns = torch.nn.functional.pad(columns, (0, n + 1 - k))
        whole: torch.Tensor = torch.linalg.qr(columns.mT, mode="r").R
        return whole

    def tree(self, x: torch.Tensor) -> Any:
        """x in the structure of ``init``."""
        return unflatten(unravel(x, self._like, self.lane_dims), self._spec)

    def _evaluate(self, leaves: Leaves) -> tuple[torch.Tensor, torch.Tensor]:
        """The objective's value [*lanes] and the residuals."""
        with torch.enable_grad():
            self._points = [leaf.detach().requires_grad_() for leaf in leaves]
            tree, spec = flatten(self._composite.model(unflatten(self._points, self._spec), *self._theta))
            self._outputs, cut = list(tree), [leaf.detach() for leaf in tree]
            value = self._composite.loss(unflatten(cut, spec), *self._theta).detach()
        f = ravel(cut, value.ndim).double()
        half = 0.5 * torch.linalg.vector_norm(f, dim=-1) ** 2
        rounding = NOISE * math.sqrt(f.shape[-1] + 1) * torch.finfo(value.dtype).eps * half
        wrong = value.isfinite() & half.isfinite() & ((value - half).abs() > rounding)
        if bool(wrong.any()):
            raise ObjectiveError(
                "il.solvers.LevenbergMarquardt minimises half the sum of squares of what the model returns, which is "
                f"{float(half[wrong][0]):.6g}{name_lanes(wrong)}, where the objective is {float(value[wrong][0]):.6g}. "
                "Make it by il.least_squares(residuals), with the roots of weights inside of the residuals; a proximal "
                "term is one more of them, sqrt(strength) * (x - theta)."
            )
        return value, f
