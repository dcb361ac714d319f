"""A problem of ``il.constrained_argmin`` at the answer of its solver: optimality conditions, error, a Newton step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer._errors import NonFiniteError
from implicitlayer._tree import TreeSpec, flatten, ravel, unflatten, unravel
from implicitlayer._types import Leaves
from implicitlayer.implicit._kkt_active import Conditions, length_of_step
from implicitlayer.implicit._kkt_lagrangian import ConstrainedProblem, Unknowns
from implicitlayer.implicit._kkt_linear import KktSolver
from implicitlayer.linear._jacobian import Jacobian
from implicitlayer.linear._residual import Residual

__all__ = ["PointOfProblem"]


@dataclass(frozen=True, eq=False)
class PointOfProblem:
    """One problem, to be looked at where its solver ended."""

    problem: ConstrainedProblem
    spec: TreeSpec
    theta: tuple[Any, ...]
    init: Leaves

    def conditions(self, x: Leaves) -> Conditions:
        """The terms of the optimality conditions at x."""
        points = [leaf.detach().requires_grad_() for leaf in x]
        with torch.enable_grad():
            value = self.problem(unflatten(points, self.spec), *self.theta)
            gradient = self._grad(value, points, create_graph=True)
            slope = ravel(gradient, 0)
            product = along = [torch.zeros_like(p) for p in points]
            if slope.requires_grad:
                direction = ravel([p.detach() for p in points], 0)
                product = self._grad((slope * direction).sum(), points, create_graph=False, retain_graph=True)
                along = self._grad((slope * slope.detach()).sum(), points, create_graph=False)
        h, rows_h = self.problem.rows(0, x, self.spec, self.theta)
        g, rows_g = self.problem.rows(1, x, self.spec, self.theta)
        flat, start = ravel(x, 0).double(), ravel(self.init, 0).double()
        found = Conditions(
            flat, flat - start, slope.detach().double(), ravel(product, 0).double(), h, rows_h, g, rows_g,
            torch.finfo(x[0].dtype).eps, length_of_step(slope.detach().double(), ravel(along, 0).double()),
        )  # fmt: skip
        if not all(bool(t.isfinite().all()) for t in (found.gradient, found.h, rows_h, found.g, rows_g)):
            raise NonFiniteError(
                "the objective, a constraint or one of their gradients holds NaN or Inf at the solver's answer. Check "
                "theta for NaN, and that the functions are differentiable there."
            )
        return found

    def error(self, x: Leaves, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Distance from the solution that the remaining gradient of the Lagrangian implies, [], by one product."""
        points, dtype = [leaf.detach().requires_grad_() for leaf in x], x[0].dtype
        rest = (y.to(dtype), z.to(dtype), torch.ones_like(z, dtype=dtype))
        with torch.enable_grad():
            value = self.problem.scalar(Unknowns(unflatten(points, self.spec), *rest), *self.theta)
            slope = ravel(self._grad(value, points, create_graph=True), 0)
            product = [torch.zeros_like(p) for p in points]
            if slope.requires_grad:
                product = self._grad((slope * slope.detach()).sum(), points, create_graph=False)
        return length_of_step(slope.detach().double(), ravel(product, 0).double())

    @staticmethod
    def _grad(value: torch.Tensor, points: Leaves, create_graph: bool, retain_graph: bool | None = None) -> Leaves:
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in points]
        return list(
            torch.autograd.grad(
                value, points, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
            )
        )

    def newton_step(
        self, x: Leaves, y: torch.Tensor, z: torch.Tensor, held: torch.Tensor
    ) -> tuple[Leaves, torch.Tensor, torch.Tensor] | None:
        """x and multipliers after a Newton step on the conditions with this active set; None if it is no better."""
        dtype = x[0].dtype
        at = [*x, *(t.to(dtype) for t in (y, z, held))]
        spec = flatten(Unknowns(unflatten(x, self.spec), y, z, held))[1]
        residual = Residual(lambda leaves, theta: self.problem.scalar(unflatten(leaves, spec), *self.theta), True)
        with torch.enable_grad():
            slope = ravel(residual(at, []), 0)
            operator = Jacobian(residual, len(at), transposed=False).linearize(at)
            solver = KktSolver(ravel(x, 0).numel(), y.numel(), z.numel())
            solution = solver(operator, slope)
            moved = unravel(ravel(at, 0) - solution.value, at, 0)
            after = ravel(residual(moved, []), 0)
        if not solution.status.usable or not after.norm() < slope.norm():
            return None
        k = len(x)
        return moved[:k], moved[k].double(), moved[k + 1].double()
