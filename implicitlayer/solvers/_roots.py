"""Newton's and Broyden's methods for roots, one problem or many at once, and what the solvers of roots share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal

import torch

from implicitlayer._errors import ObjectiveError
from implicitlayer.base._solution import LinearSolution, SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import flatten, like_x, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._jacobian import Jacobian
from implicitlayer.equation._residual import Residual
from implicitlayer.equation._traced import Vectors
from implicitlayer.linear._dense import Dense, materialise
from implicitlayer.linear._operator import FlatOperator, lane_dot
from implicitlayer.programs._interior_point_step import times
from implicitlayer.solvers._outcome import codes_of, outcome
from implicitlayer.solvers._progress import Iteration, Report, Settings, reporting

_WORDS = {
    Status.STAGNATED: "No step lowers the residual further{where}: it is as small as rounding errors allow, or this is "
    "a minimum of its norm that is no root.",
    Status.NONFINITE: "The residual is not finite{where}.",
}


class RootProblem(Vectors):
    """``function(x, *theta)`` on vectors; lanes as the layer says, or ``batch_dims`` where no layer is involved."""

    def __init__(self, function: Callable[..., Any], init: Any, theta: tuple[Any, ...], batch_dims: int) -> None:
        leaves, self._spec = flatten(init)
        self._like = [leaf.detach() for leaf in leaves]
        self._function, self._theta = function, theta
        self.lane_dims = getattr(function, "lane_dims", batch_dims)
        lanes = self._like[0].shape[: self.lane_dims]
        if any(leaf.shape[: self.lane_dims] != lanes or leaf.ndim < self.lane_dims for leaf in self._like):
            raise ObjectiveError(
                f"with batch_dims={self.lane_dims} every leaf of init needs the same {self.lane_dims} leading "
                f"dimensions, got shapes {[tuple(leaf.shape) for leaf in self._like]}."
            )
        self.start = ravel(self._like, self.lane_dims).clone()
        self._takes_derivatives = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The function's value, detached, [*lanes, n]."""
        points = unravel(x, self._like, self.lane_dims)
        if self._takes_derivatives:
            points = [leaf.detach().requires_grad_() for leaf in points]
        try:
            with torch.enable_grad():
                leaves = self._leaves(points, [])
        except RuntimeError as error:  # of torch.autograd.grad in x, which needs a graph that reaches it
            if self._takes_derivatives or "does not require grad" not in str(error):
                raise
            self._takes_derivatives = True
            return self(x)
        return ravel([leaf.detach() for leaf in leaves], self.lane_dims)

    def _leaves(self, x: Leaves, _: Leaves) -> Leaves:
        return like_x(self._function(unflatten(x, self._spec), *self._theta), x, self._spec)

    def jacobian(self, x: torch.Tensor) -> FlatOperator:
        """The derivative at x as an operator on [*lanes, n]."""
        residual = Residual(self._leaves, is_gradient=False, lane_dims_of_function=self.lane_dims)
        at = unravel(x, self._like, self.lane_dims)
        return Jacobian(residual, len(at), transposed=False).linearize(at)

    def tell(self, report: Report | None, step: int, norm: torch.Tensor, x: torch.Tensor) -> None:
        if report is not None:
            report(Iteration(step, norm, norm, self.tree(x.clone())))

    def result(
        self, x: torch.Tensor, norm: torch.Tensor, reached: torch.Tensor, gave_up: torch.Tensor, steps: int
    ) -> SolverResult:
        """The answer, with the status of the worst lane; ``gave_up``: bool [*lanes]."""
        finite, stalled = norm.isfinite(), gave_up & ~reached
        return outcome(self.tree(x), steps, codes_of(True, reached, finite, stalled), _WORDS)


def line_search(
    problem: RootProblem,
    x: torch.Tensor,
    value: torch.Tensor,
    direction: torch.Tensor,
    running: torch.Tensor,
    max_halvings: torch.Tensor | int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, F(x) and whether ``||F(x + t d)|| <= (1 - 1e-4 t) ||F(x)||`` was met by a t = 1, 1/2, 1/4, ...

    ``max_halvings``: of each lane, int [*lanes], or of all. No step is made along what is not finite.
    """
    before = problem.norm(value)
    t = torch.ones_like(before)
    searching, found = running & direction.isfinite().all(-1), torch.zeros_like(running)
    direction = torch.where(searching.unsqueeze(-1), direction, 0.0)
    halvings = 0
    while bool(searching.any()):
        trial = x + torch.where(searching, t, 0.0).to(x.dtype).unsqueeze(-1) * direction
        trial = torch.where(searching.unsqueeze(-1), trial, x)
        after = problem(trial)
        better = searching & (problem.norm(after) <= (1 - 1e-4 * t) * before)
        x = torch.where(better.unsqueeze(-1), trial, x)
        value = torch.where(better.unsqueeze(-1), after, value)
        found, searching = found | better, searching & ~better & (halvings < max_halvings)
        halvings += 1
        t = torch.where(searching, t / 2, t)
    return x, value, found


@dataclass(frozen=True)
class RootSolver(Settings):
    """Settings that the solvers of roots and fixed points have in common; see their docstrings."""

    _: KW_ONLY
    max_steps: int = 200
    rtol: float = 1e-12
    batch_dims: int = 0

    finds: ClassVar[Literal["root", "fixed point"]] = "root"

    def tolerance(self, norm: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the norm per lane is to fall to, from that at init; an rtol below rounding counts as four eps."""
        rtol = max(self.rtol, 4 * torch.finfo(dtype).eps) if self.rtol > 0 else 0.0
        return torch.clamp(rtol * norm, min=self.atol)

    def _solve(self, problem: RootProblem, move: Callable[..., tuple[torch.Tensor, ...]]) -> SolverResult:
        """Steps ``move(x, F(x), running)`` -> x and F(x) after it, and the lanes that give up, until all have ended."""
        x = problem.start
        value = problem(x)
        norm = problem.norm(value)
        tolerance, gave_up, step = self.tolerance(norm, x.dtype), torch.zeros_like(norm, dtype=torch.bool), 0
        with reporting(self.callback, self.progress, self.max_steps) as report:
            problem.tell(report, 0, norm, x)
            while bool((running := (norm > tolerance) & norm.isfinite() & ~gave_up).any()) and step < self.max_steps:
                x, value, gives_up = move(x, value, running)
                gave_up, norm, step = gave_up | gives_up, problem.norm(value), step + 1
                problem.tell(report, step, norm, x)
        return problem.result(x, norm, norm <= tolerance, gave_up, step)


# Legend: F(x) = 0, J = dF/dx, B an approximation of J^-1 per lane, s = x_new - x, y = F_new - F.
# Newton: J d = -F. Broyden's good update keeps B y = s and changes B least (in the norm of its inverse):
#     B_new = B + (s - B y) (s' B) / (s' B y).

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

    in_parts: ClassVar[Any] = property(lambda self: getattr(self.linear_solver, "in_parts", False))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.linear_solver):
            raise TypeError(f"linear_solver must be callable, got {type(self.linear_solver).__name__}.")

    def run(self, residual: Callable[..., Any], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        problem = RootProblem(residual, init, theta, self.batch_dims)

        def move(x: torch.Tensor, value: torch.Tensor, running: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rhs = torch.where(running.unsqueeze(-1), -value, 0.0)
            direction = self.linear_solver(problem.jacobian(x), rhs).value
            x, value, found = line_search(problem, x, value, direction, running, _MAX_HALVINGS)
            return x, value, running & ~found

        return self._solve(problem, move)


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
        inverse: torch.Tensor | None = None
        fresh = torch.ones((), dtype=torch.bool)

        def move(x: torch.Tensor, value: torch.Tensor, running: torch.Tensor) -> tuple[torch.Tensor, ...]:
            nonlocal inverse, fresh
            if inverse is None:
                inverse, fresh = _inverse_jacobian(problem, x), torch.ones_like(running)
            limit = torch.where(fresh, _MAX_HALVINGS, _FEW_HALVINGS)
            x_new, value_new, found = line_search(problem, x, value, -times(inverse, value), running, limit)
            stuck = running & ~found
            gives_up, renew = stuck & fresh, stuck & ~fresh
            inverse = _update(inverse, x_new - x, value_new - value, running & found)
            if bool(renew.any()):
                inverse = torch.where(renew[..., None, None], _inverse_jacobian(problem, x_new), inverse)
            fresh = renew
            return x_new, value_new, gives_up

        return self._solve(problem, move)


def _inverse_jacobian(problem: RootProblem, x: torch.Tensor) -> torch.Tensor:
    """J^-1 [*lanes, n, n], NaN where it is singular."""
    inverse, info = torch.linalg.inv_ex(materialise(problem.jacobian(x), x))
    return torch.where((info == 0)[..., None, None], inverse, torch.nan).to(x.dtype)


def _update(inverse: torch.Tensor, s: torch.Tensor, y: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Broyden's good update in the lanes ``where``, left out where its denominator is lost in rounding."""
    moved = times(inverse, y)
    denominator = lane_dot(s, moved)
    eps = torch.finfo(s.dtype).eps
    safe = where & (denominator.abs() > eps * s.norm(dim=-1) * moved.norm(dim=-1)) & moved.isfinite().all(-1)
    left = (s - moved) / torch.where(safe, denominator, 1.0).to(s.dtype).unsqueeze(-1)
    right = (s.unsqueeze(-2) @ inverse)[..., 0, :]
    change = left.unsqueeze(-1) * right.unsqueeze(-2)
    return torch.where(safe[..., None, None], inverse + change, inverse)
