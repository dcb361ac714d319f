"""Gradient descent with fixed or searched step sizes, for one problem or many at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from implicitlayer import _torch
from implicitlayer.base._failures import over_lanes
from implicitlayer.base._solution import RecordingSolver, SolverResult
from implicitlayer.base._tree import flatten, leaves_norm, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.equation._traced import TracedProblem
from implicitlayer.linear._operator import lane_dot
from implicitlayer.solvers._descent import Method, descend, kept, restored, rounds_between_syncs, traced_descent
from implicitlayer.solvers._leaves import (
    Problem,
    StepSize,
    check_limits,
    check_step_size,
    moves,
    present,
    value_and_gradient,
)
from implicitlayer.solvers._line_search import LineSearch, Pair
from implicitlayer.solvers._outcome import StallWatch, codes_of, finite_leaves, outcome, relative_move
from implicitlayer.solvers._progress import Iteration, Report, reporting


@dataclass(frozen=True)
class GradientDescent(RecordingSolver):
    """``x <- x - step_size * grad objective(x)``, a fixed number of steps and/or until the gradient is small.

    Stops a lane when ``||g||_2 <= max(atol, rtol * ||g at init||_2)``; without a tolerance it makes exactly
    ``max_steps`` steps and never looks at a number but at the end (one host synchronisation). With one, a lane that
    only rounding errors move any more (a start at the solution: no gradient is ``rtol`` times smaller there) stops,
    status ``STAGNATED``. Batched: with an objective that returns
    one value per lane, all lanes step together and a finished lane is frozen.

    With ``line_search="armijo"`` every lane has a step size of its own: it is cut back until
    ``f(x - a g) <= f(x) - 1e-4 a ||g||^2``. The next step first tries ``s's / s'y`` of the last step s and the change y
    of the gradient along it, at most the last step size, or twice that where it was accepted at once.
    A lane that finds no lower point stops, status ``STAGNATED``: with no tolerance that is where rounding errors stop
    it.

    Args:
        step_size: positive; converges for a convex objective when below 2 / (largest eigenvalue of the Hessian). Also a
            tensor that broadcasts to every leaf of x; a pytree like x, one number or tensor per leaf; an
            :class:`MatrixStrength` or :class:`OperatorStrength` that multiplies the gradient of each problem (a
            preconditioner); or a callable without arguments that returns one of these, asked at every solve. With a
            line search, a number, the first trial: any order of magnitude will do.
        max_steps: limit of steps; without a tolerance, their number.
        rtol, atol: tolerances on the norm of the gradient, see above; both 0 means none.
        line_search: ``"armijo"``, or None for the fixed step size.
        callback: called with an :class:`Iteration` at the start and after every step; without a tolerance this costs
            one more gradient, at the end.
        progress: show a bar (needs tqdm, extra ``implicitlayer[progress]``).

    Raises:
        ValueError: a step size that is not positive, a negative limit or tolerance, an unknown line search; at the
            call, a step size that requires a gradient: none passes through a solver (:class:`meta.MAML` and
            :class:`meta.iMAML` say how to learn one).
        ImportError: ``progress=True`` without tqdm.

    Source: the line search: Nocedal & Wright, Numerical Optimization, 2006, algorithm 3.1, cut back by interpolation;
    its first trial: Barzilai & Borwein 1988 (IMA J. Numer. Anal. 8).

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.GradientDescent(step_size=0.5, max_steps=100, rtol=1e-12)
        >>> x = solver(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> x.tolist()
        [3.0, 3.0]
    """

    step_size: StepSize
    max_steps: int = 1000
    rtol: float = 0.0
    atol: float = 0.0
    _: KW_ONLY
    line_search: Literal["armijo"] | None = None
    callback: Callable[[Iteration], None] | None = None
    progress: bool = False

    finds: ClassVar[Literal["minimum"]] = "minimum"
    batched: ClassVar[bool] = True
    has_tolerance: ClassVar[Any] = property(lambda self: self.rtol > 0 or self.atol > 0)
    in_parts: ClassVar[Any] = property(lambda self: isinstance(self.step_size, int | float))

    def __post_init__(self) -> None:
        check_step_size(self.step_size)
        check_limits(self)
        if self.line_search not in (None, "armijo"):
            raise ValueError(f'line_search={self.line_search!r} must be "armijo" or None, a fixed step size.')
        if self.line_search is not None and not isinstance(self.step_size, int | float):
            raise ValueError(
                f"step_size={self.step_size} must be a number with a line search: it finds one length per problem."
            )

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        if self.line_search == "armijo":
            problem = Problem(objective, init, theta)
            return descend(self, problem, _Growing(problem, self.step_size), math.inf)
        leaves, spec = flatten(init)
        x = [leaf.detach().clone() for leaf in leaves]
        with reporting(self.callback, self.progress, self.max_steps) as report:
            run = self._to_tolerance if self.has_tolerance else self._fixed_steps
            return run(objective, x, spec, theta, report)

    def traced(self, problem: TracedProblem) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a compiler; see :func:`implicitlayer.compile`."""
        if not isinstance(self.step_size, int | float):
            raise TypeError(f"step_size={type(self.step_size).__name__} is not compiled: give a number.")
        if self.line_search == "armijo":
            return traced_descent(self, problem, partial(_Growing, problem, self.step_size), math.inf)
        return _traced_steps(self, self.step_size, problem)

    def _fixed_steps(
        self, objective: Callable[..., Any], x: list[Any], spec: Any, theta: Any, report: Report | None
    ) -> SolverResult:
        step_size = present(self.step_size)
        for step in range(self.max_steps + (report is not None)):
            value, gradient = value_and_gradient(objective, x, spec, theta)
            _tell(report, step, value, gradient, x, spec)
            if step >= self.max_steps:
                break
            if isinstance(step_size, int | float):
                _torch.foreach_add_(x, gradient, alpha=-step_size)
            else:
                _torch.foreach_sub_(x, _constant(moves(step_size, gradient, spec, value.ndim)))
        finite = finite_leaves(x, value.ndim if self.max_steps else 0)
        return outcome(unflatten(x, spec), self.max_steps, codes_of(False, finite, finite))

    def _to_tolerance(
        self, objective: Callable[..., Any], x: list[Any], spec: Any, theta: Any, report: Report | None
    ) -> SolverResult:
        tolerance: torch.Tensor | None = None
        # finished lanes stand still, so asking rarely changes the count only; on an accelerator asking is a host sync
        every = rounds_between_syncs(x[0])
        step_size = present(self.step_size)
        move: Leaves | None = None
        for step in range(self.max_steps + 1):
            value, gradient = value_and_gradient(objective, x, spec, theta)
            _tell(report, step, value, gradient, x, spec)
            norm = leaves_norm(gradient, value.ndim)
            if tolerance is None:
                tolerance = torch.clamp(self.rtol * norm, min=self.atol)
                watch = StallWatch.unset(norm, x[0].dtype)
                running, stalled = torch.ones_like(norm, dtype=torch.bool), torch.zeros_like(norm, dtype=torch.bool)
            # a step that does not lead down is in doubt: below 2 / L a convex function's gradient falls at each
            weight = partial(torch.ones_like, norm)
            moved = partial(relative_move, x, move, value.ndim)
            stalled = stalled | watch.look(running, norm, value.double(), weight, moved, every == 1)
            running = (norm > tolerance) & ~stalled
            if step == self.max_steps or (step % every == 0 and not bool(running.any())):
                break
            move = _constant(moves(step_size, gradient, spec, value.ndim))
            for leaf, part in zip(x, move, strict=True):
                leaf.sub_(torch.where(over_lanes(running, leaf), part, torch.zeros_like(part)))
        assert tolerance is not None
        reached, finite = norm <= tolerance, norm.isfinite() & finite_leaves(x, value.ndim)
        return outcome(unflatten(x, spec), step, codes_of(True, reached, finite, stalled & ~reached))


def _traced_steps(
    settings: GradientDescent, step_size: float, problem: TracedProblem
) -> tuple[torch.Tensor, torch.Tensor]:
    """The steps of one size as a loop of a compiler; ``kept`` and ``restored`` carry the watch through it."""
    most, wanted = settings.max_steps, settings.has_tolerance
    first = leaves_norm([problem.gradient(problem.start)], problem.lane_dims)
    tolerance = torch.clamp(settings.rtol * first, min=settings.atol)
    fresh = partial(StallWatch.unset, first, problem.dtype)

    def body(step: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, move, norm, running, stalled, *watched = state
        gradient, value = problem.value_and_gradient(x)
        if not wanted:
            return (step + 1, x - step_size * gradient, *(part.clone() for part in state[1:]))
        norm, watch = leaves_norm([gradient], problem.lane_dims), restored(fresh(), list(watched))
        weight, moved = partial(torch.ones_like, norm), partial(relative_move, [x], [move], problem.lane_dims)
        stalled = stalled | watch.look(running, norm, value.double(), weight, moved, False)
        running = (norm > tolerance) & ~stalled
        move = torch.where((running & (step < most)).unsqueeze(-1), step_size * gradient, 0.0)
        return (step + 1, x - move, move, norm, running, stalled, *kept(watch))

    steps = most + wanted  # the last one evaluates only
    never = torch.zeros_like(first, dtype=torch.bool)
    counter = torch.zeros((), dtype=torch.int64, device=first.device)
    begun = (problem.start.clone(), torch.full_like(problem.start, torch.inf), first.clone(), ~never, never)
    state: tuple[torch.Tensor, ...] = (counter, *begun, *kept(fresh()))
    if steps:
        state = _torch.while_loop(lambda step, *state: (step < steps) & state[3].any(), body, state)
    _, x, _, norm, _, stalled, *_ = state
    reached, finite = norm <= tolerance, norm.isfinite() & x.isfinite().all(-1)
    return x, codes_of(wanted, reached, finite, stalled & ~reached)


def _constant(steps: Leaves) -> Leaves:
    if any(step.requires_grad for step in steps):
        raise ValueError(
            "step_size requires a gradient, but none passes through a solver: it would never be trained. Learn it with "
            'il.meta.MAML, or with il.meta.iMAML(..., step_size_gradient="last_step"), or pass step_size.detach().'
        )
    return steps


def _tell(report: Report | None, step: int, value: torch.Tensor, gradient: Any, x: Any, spec: Any) -> None:
    if report is not None:  # the copy may be kept: x is changed in place
        kept = unflatten([leaf.clone() for leaf in x], spec)
        report(Iteration(step, value, leaves_norm(gradient, value.ndim), kept))


# NOTE [first trial]: with s the last step and y the change of the gradient, s's / s'y is the exact step along the last
# direction where the objective is quadratic. It is tried next (the step size of Barzilai and Borwein), but no more than
# twice the last step: doubling alone tries steps that are refused every second time.


class _Growing(Method):
    """The steepest direction, first tried with a step size from the lane's last step: NOTE [first trial]."""

    STATE = ("trial",)

    def __init__(self, problem: Problem | TracedProblem, step_size: float) -> None:
        self.trial = step_size * problem.unit  # gradients are measured in this unit

    def direction(self, lanes: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor, norm: torch.Tensor) -> Pair:
        """-g and the trial."""
        return -gradient, self.trial

    def moved(self, lanes: torch.Tensor, step: torch.Tensor, change: torch.Tensor, search: LineSearch) -> None:
        """Grow again where the first trial was accepted, as far as the curvature met allows."""
        following = torch.where(search.trials == 1, 2 * search.step, search.step)
        curvature = lane_dot(step, change) / lane_dot(step, step)
        following = torch.where(curvature * following > 1, 1 / curvature, following)
        self.trial = torch.where(lanes, following, self.trial)
