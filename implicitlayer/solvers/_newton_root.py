"""Newton's and Broyden's methods for roots, one problem or many at once."""

# Legend: F(x) = 0, J = dF/dx, B an approximation of J^-1 per lane, s = x_new - x, y = F_new - F.
# Newton: J d = -F. Broyden's good update keeps B y = s and changes B least (in the norm of its inverse):
#     B_new = B + (s - B y) (s' B) / (s' B y).

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch

from implicitlayer.base._solution import LinearSolution, SolverResult
from implicitlayer.linear._dense import Dense, materialise
from implicitlayer.linear._operator import FlatOperator, lane_dot
from implicitlayer.solvers._progress import reporting
from implicitlayer.solvers._root_problem import RootProblem, RootSolver, line_search

_MAX_HALVINGS = 30  # a step below 1e-9 of Newton's is none
_FEW_HALVINGS = 4  # with an old matrix: a new Jacobian is the better cure


@dataclass(frozen=True)
class Newton(RootSolver):
    """Newton's method for ``residual(x) = 0``, with a backtracking line search on the norm of the residual.

    Stops a lane when ``||F(x)||_2 <= max(atol, rtol * ||F(init)||_2)``, after ``max_steps`` steps, or where no step
    lowers the residual (status STAGNATED: a minimum of the norm that is no root, or rounding). Batched.

    Args:
        linear_solver: for ``J d = -F``: :class:`Dense` (default) materialises J, n products per step; a Krylov solver
            such as :class:`Gmres` makes an inexact Newton method for many unknowns.
        max_steps: limit of steps.
        rtol, atol: tolerances on the norm of the residual; both 0 run until it cannot be lowered. An rtol below four
            eps of the dtype counts as that.
        batch_dims: leading dimensions of init that enumerate independent problems; a layer knows them by itself.
        callback: called with an :class:`Iteration` at the start and after every step; ``value`` and ``gradient_norm``
            are the norm of the residual.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: a negative limit or tolerance.
        TypeError: a linear solver that cannot be called.

    Source: C. T. Kelley, Iterative Methods for Linear and Nonlinear Equations, SIAM 1995, chapter 8.

    Example:
        >>> import torch, implicitlayer as il
        >>> x = il.solvers.Newton()(lambda x: x**2 - 2, torch.ones(1, dtype=torch.float64))
        >>> round(x.item(), 12)
        1.414213562373
    """

    _: KW_ONLY
    linear_solver: Callable[[FlatOperator, torch.Tensor], LinearSolution] = field(default_factory=Dense)
    max_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.linear_solver):
            raise TypeError(f"linear_solver must be callable, got {type(self.linear_solver).__name__}.")

    def run(self, residual: Callable[..., Any], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        problem = RootProblem(residual, init, theta, self.batch_dims)
        x = problem.start
        value = problem(x)
        norm = problem.norm(value)
        tolerance = self.tolerance(norm, x.dtype)
        gave_up = torch.zeros_like(norm, dtype=torch.bool)
        limit = torch.full_like(norm, _MAX_HALVINGS)
        step = 0
        with reporting(self.callback, self.progress, self.max_steps) as report:
            problem.tell(report, 0, norm, x)
            while bool((running := (norm > tolerance) & norm.isfinite() & ~gave_up).any()) and step < self.max_steps:
                rhs = torch.where(running.unsqueeze(-1), -value, 0.0)
                direction = self.linear_solver(problem.jacobian(x), rhs).value
                usable = running & direction.isfinite().all(-1)
                direction = torch.where(usable.unsqueeze(-1), direction, 0.0)
                x, value, found = line_search(problem, x, value, direction, usable, limit)
                gave_up = gave_up | (running & ~found)
                norm = problem.norm(value)
                step += 1
                problem.tell(report, step, norm, x)
        return problem.result(x, norm, norm <= tolerance, gave_up, step)


@dataclass(frozen=True)
class Broyden(RootSolver):
    """Broyden's good method for ``residual(x) = 0``: one Jacobian at the start, rank-one updates from then on.

    Stops as :class:`Newton`. Where a step does not lower the residual, the lane gets a new Jacobian; where that does
    not help either, it ends (status STAGNATED). Keeps an n x n matrix per lane.

    Args:
        max_steps: limit of steps.
        rtol, atol, batch_dims, callback, progress: as in :class:`Newton`.

    Raises:
        ValueError: a negative limit or tolerance.

    Source: C. G. Broyden, Math. Comp. 19 (1965), method 1, in inverse form by Sherman and Morrison.

    Example:
        >>> import torch, implicitlayer as il
        >>> x = il.solvers.Broyden()(lambda x: x**2 - 2, torch.ones(1, dtype=torch.float64))
        >>> round(x.item(), 12)
        1.414213562373
    """

    def run(self, residual: Callable[..., Any], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        problem = RootProblem(residual, init, theta, self.batch_dims)
        x = problem.start
        value = problem(x)
        norm = problem.norm(value)
        tolerance = self.tolerance(norm, x.dtype)
        gave_up = torch.zeros_like(norm, dtype=torch.bool)
        fresh = torch.ones_like(gave_up)
        inverse: torch.Tensor | None = None
        step = 0
        with reporting(self.callback, self.progress, self.max_steps) as report:
            problem.tell(report, 0, norm, x)
            while bool((running := (norm > tolerance) & norm.isfinite() & ~gave_up).any()) and step < self.max_steps:
                if inverse is None:
                    inverse = _inverse_jacobian(problem, x)
                direction = -_times(inverse, value)
                usable = running & direction.isfinite().all(-1)
                direction = torch.where(usable.unsqueeze(-1), direction, 0.0)
                before_x, before = x, value
                limit = torch.where(fresh, _MAX_HALVINGS, _FEW_HALVINGS)
                x, value, found = line_search(problem, x, value, direction, usable, limit)
                stuck = running & ~found
                gave_up = gave_up | (stuck & fresh)
                inverse = _update(inverse, x - before_x, value - before, running & found)
                renew = stuck & ~fresh
                if bool(renew.any()):
                    inverse = torch.where(renew[..., None, None], _inverse_jacobian(problem, x), inverse)
                fresh = renew
                norm = problem.norm(value)
                step += 1
                problem.tell(report, step, norm, x)
        return problem.result(x, norm, norm <= tolerance, gave_up, step)


def _inverse_jacobian(problem: RootProblem, x: torch.Tensor) -> torch.Tensor:
    """J^-1 [*lanes, n, n], NaN where it is singular."""
    inverse, info = torch.linalg.inv_ex(materialise(problem.jacobian(x), x))
    return torch.where((info == 0)[..., None, None], inverse, torch.nan).to(x.dtype)


def _update(inverse: torch.Tensor, s: torch.Tensor, y: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Broyden's good update in the lanes ``where``, left out where its denominator is lost in rounding."""
    moved = _times(inverse, y)
    denominator = lane_dot(s, moved)
    eps = torch.finfo(s.dtype).eps
    safe = where & (denominator.abs() > eps * s.norm(dim=-1) * moved.norm(dim=-1)) & moved.isfinite().all(-1)
    left = (s - moved) / torch.where(safe, denominator, 1.0).to(s.dtype).unsqueeze(-1)
    right = (s.unsqueeze(-2) @ inverse)[..., 0, :]
    change = left.unsqueeze(-1) * right.unsqueeze(-2)
    return torch.where(safe[..., None, None], inverse + change, inverse)


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector.unsqueeze(-1))[..., 0]
