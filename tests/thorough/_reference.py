"""Dense answers that share no code with the package: H, B, condition, gradients, tangents, second derivatives."""

# n: unknowns, m: entries of all thetas together. F(x, theta) = 0 is the stationarity or the residual.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.references import rows
from tests.thorough._trial import residual_allowed

Tensor = torch.Tensor
F64 = torch.float64


@dataclass(frozen=True, eq=False)
class Dense:
    """The implicit function theorem with matrices, in float64: ``J = dF/dx``, ``B = dF/dtheta``, ``dx = -J^-1 B dt``.

    Attributes:
        jacobian: [n, n]. mixed: [n, m]. shapes: of the thetas. condition: of the Jacobian, 2-norm.
    """

    jacobian: Tensor
    mixed: Tensor
    shapes: tuple[torch.Size, ...]
    condition: float

    @staticmethod
    def of(problem: Any, wanted: Sequence[int] | None = None) -> Dense:
        """Of a problem of ``il.testing``, at its exact solution; ``wanted``: which thetas (all of them without it)."""
        theta = [t.detach().double() for t in problem.theta]
        x = problem.solution(*theta).requires_grad_()
        chosen = [theta[i].requires_grad_() for i in (range(len(theta)) if wanted is None else wanted)]
        value = problem.stationarity(x, *theta)
        jacobian, *mixed = rows(value, [x, *chosen])
        values = torch.linalg.svdvals(jacobian / jacobian.abs().max())
        return Dense(jacobian, torch.cat(mixed, -1), tuple(t.shape for t in chosen), float(values[0] / values[-1]))

    def split(self, flat: Tensor) -> list[Tensor]:
        """One tensor per theta from all entries."""
        sizes = [shape.numel() for shape in self.shapes]
        return [part.reshape(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]

    def adjoint(self, v: Tensor) -> Tensor:
        """u with J'u = v."""
        unit = float(self.jacobian.abs().max())
        u: Tensor = torch.linalg.solve(self.jacobian.T / unit, v.detach().double()) / unit
        return u

    def vjp(self, v: Tensor) -> list[Tensor]:
        """The gradient for the cotangent v."""
        return self.split(-(self.mixed.T @ self.adjoint(v)))

    def jvp(self, tangents: Sequence[Tensor]) -> Tensor:
        """The tangent of x."""
        unit = float(self.jacobian.abs().max())
        moved = self.mixed @ torch.cat([t.detach().double().reshape(-1) for t in tangents])
        dx: Tensor = -torch.linalg.solve(self.jacobian / unit, moved) / unit
        return dx

    def allowed_vjp(self, v: Tensor, dtype: torch.dtype, rtol: float | None = None) -> float:
        """Relative error that the gradient may have.

        A relative residual rho leaves ``||du|| <= condition rho ||u||``, since ``||du|| <= ||J^-1|| rho ||v||`` and
        ``||v|| <= ||J|| ||u||``; the gradient -B'u then errs by ``||B|| ||du||``. The norm of the gradient itself may
        be far below ``||B|| ||u||``: that ratio is the second factor.
        """
        u, mixed = of_size_one(self.adjoint(v)), of_size_one(self.mixed)
        gradient = mixed.T @ u
        spread = float(torch.linalg.matrix_norm(mixed, 2) * u.norm() / gradient.norm())
        return self.condition * spread * residual_allowed(dtype, len(u), rtol)

    def allowed_jvp(self, tangents: Sequence[Tensor], dtype: torch.dtype, rtol: float | None = None) -> float:
        """Relative error that the tangent may have: the right-hand side B dt itself is rounded where it cancels."""
        flat = torch.cat([t.detach().double().reshape(-1) for t in tangents])
        mixed = of_size_one(self.mixed)
        moved = mixed @ flat
        cancelled = float(torch.linalg.matrix_norm(mixed, 2) * flat.norm() / moved.norm())
        eps = torch.finfo(dtype).eps
        return self.condition * (residual_allowed(dtype, len(moved), rtol) + 8 * len(moved) * eps * cancelled)


def of_size_one(tensor: Tensor) -> Tensor:
    """Divided by its largest magnitude: squares of 1e200 are no numbers."""
    return tensor / float(tensor.abs().max())


def newton_traced(stationarity: Callable[..., Tensor], x: Tensor, theta: Sequence[Tensor], steps: int = 2) -> Tensor:
    """The exact solution x as a differentiable function of theta: dense Newton steps from x, traced by autograd.

    A Newton step squares the distance. From x exact at theta, the first step is right to first order in a change of
    theta, the second to third order: two steps have the right first and second (and third) derivatives at theta.
    """
    for _ in range(steps):
        x = x if x.requires_grad else x.detach().requires_grad_()
        value = stationarity(x, *theta)
        x = x - torch.linalg.solve(rows(value, [x], create_graph=True)[0], value)
    return x
