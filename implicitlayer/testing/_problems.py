"""Problems with known answers: objective, exact solution, constants, and the implicit gradient by dense algebra."""

# n: unknowns. Answers are computed in float64 from the very entries that the problem holds, also
# for float32 problems. Nothing here calls the derivative code of the package: a reference shares no code with its test.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Theta = tuple[torch.Tensor, ...]


@dataclass(frozen=True, eq=False, repr=False)
class _Problem:
    """What both kinds of problems hold, for :attr:`objective` or :attr:`residual` as ``function``."""

    function: Callable[..., torch.Tensor]
    init: torch.Tensor
    theta: Theta
    solution: Callable[..., torch.Tensor]
    recipe: str

    def __repr__(self) -> str:
        return self.recipe

    def solver(self, function: Callable[..., Any], init: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
        """The exact solution as a solver: ``solver(objective, init, *theta) -> x``, in the dtype of ``init``."""
        return self.solution(*theta).to(init.dtype)

    def stationarity(self, x: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
        """The function whose zero is the solution, [n]; with a graph in x and theta."""
        raise NotImplementedError

    def dense_jacobian(self) -> torch.Tensor:
        """Derivative of :meth:`stationarity` in x at the solution, [n, n], in float64; symmetric for an objective."""
        theta = [t.detach().double() for t in self.theta]
        x = self.solution(*theta).requires_grad_()
        value = self.stationarity(x, *theta)
        return torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in value])

    def dense_gradient(self, cotangent: torch.Tensor) -> list[torch.Tensor]:
        """The implicit gradient ``-(dF/dtheta)' u`` with ``(dF/dx)' u = cotangent`` [n] by a dense solve."""
        jacobian = self.dense_jacobian()
        # one power of two for all entries: no overflow inside the factorisation, no rounding
        unit = 2.0 ** math.floor(math.log2(float(jacobian.abs().max())))
        u = dense_solve(jacobian.T / unit, cotangent.detach().double()) / unit
        theta = [t.detach().double().requires_grad_() for t in self.theta]
        value = self.stationarity(self.solution(*[t.detach() for t in theta]).requires_grad_(), *theta)
        return [-g for g in torch.autograd.grad(value, theta, u, materialize_grads=True)]


@dataclass(frozen=True, eq=False, repr=False)
class ArgminProblem(_Problem):
    """An objective with its exact minimiser.

    Attributes:
        objective: ``objective(x, *theta) -> 0-d tensor``, plain torch code.
        init: tensor [n], a starting point; never the solution.
        theta: floating leaf tensors that require grad.
        solution: ``solution(*theta) -> x``, exact to rounding, in float64; a plain function, no derivative rules.
        mu: strong convexity, a lower bound of all eigenvalues of the Hessian at every x; None where there is none.
        beta: smoothness, an upper bound of them.
        rho: Lipschitz constant of the Hessian, ``||H(x) - H(y)||_2 <= rho ||x - y||_2``.
        saddle: another stationary point, where the Hessian has a negative eigenvalue; None where there is none.
        recipe: the call that makes this problem again; also its repr.

    Example:
        >>> import implicitlayer as il, torch
        >>> problem = il.testing.quadratic_problem(3, log10_cond=1)
        >>> x = il.argmin(problem.objective, problem.solver)(problem.init, *problem.theta)
        >>> v = torch.ones(3, dtype=torch.float64)
        >>> for got, right in zip(torch.autograd.grad(x, problem.theta, v), problem.dense_gradient(v)):
        ...     assert torch.allclose(got, right, rtol=1e-7)
    """

    mu: float | None = None
    beta: float | None = None
    rho: float | None = None
    saddle: torch.Tensor | None = None

    @property
    def objective(self) -> Callable[..., torch.Tensor]:
        """``objective(x, *theta) -> 0-d tensor``."""
        return self.function

    def stationarity(self, x: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
        """The gradient of the objective in x, [n]; with a graph."""
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(self.function(x, *theta), x, create_graph=True)[0]


@dataclass(frozen=True, eq=False, repr=False)
class RootProblem(_Problem):
    """A residual ``residual(x, *theta) -> [n]`` with its exact zero; all else is as in :class:`ArgminProblem`.

    The Jacobian is not symmetric where n > 1.
    """

    @property
    def residual(self) -> Callable[..., torch.Tensor]:
        """``residual(x, *theta) -> [n]``."""
        return self.function

    def stationarity(self, x: torch.Tensor, *theta: torch.Tensor) -> torch.Tensor:
        """The residual itself."""
        return self.function(x, *theta)


def dense_solve(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """``torch.linalg.solve``, with its type."""
    answer: torch.Tensor = torch.linalg.solve(matrix, rhs)
    return answer
