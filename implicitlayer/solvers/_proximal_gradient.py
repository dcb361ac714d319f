"""Proximal gradient steps for smooth objectives plus a simple set or regulariser, one problem or many at once."""

# Legend: z extrapolated points (gradients are taken there), L step 1/L, t and m the momentum, per lane.
#     x_{k+1} = prox_{r/L}(z_k - grad f(z_k) / L)          z_{k+1} = x_{k+1} + m (x_{k+1} - x_k)
# z - prox(z - g/L) vanishes at solutions only; times L it is the gradient where r is zero.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from implicitlayer import _torch
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._tree import flatten, ravel
from implicitlayer.equation._traced import TracedProblem
from implicitlayer.sets._term import resolve
from implicitlayer.solvers._descent import kept, restored, rounds_between_syncs
from implicitlayer.solvers._leaves import Momentum, Problem, check_num_steps
from implicitlayer.solvers._outcome import StallWatch, codes_of, contradiction, outcome, relative_move
from implicitlayer.solvers._progress import Iteration, Report, Settings, reporting

_MAX_DOUBLINGS = 200
_NOISE = 16  # rounding errors of a sum, in units of eps
_DROWNED = 100  # a change of the objective below this many rounding errors is not tested by values

Prox = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (y [*lanes, n], step [*lanes]) -> [*lanes, n]


@dataclass(frozen=True)
class ProximalGradient(Settings):
    """FISTA with restarts and backtracking: minimises ``objective(x) + r(x)``, or objective over a set.

    Stops a lane when ``L ||z - x_new||_2 <= max(atol, rtol * scale)`` (that is the norm of the gradient where r is
    zero), with ``scale`` the larger of this number and the gradient's norm at the start. Without a tolerance it goes on
    until ``max_steps``, or a step of zero; with one, a lane that only rounding errors move any more stops, status
    ``STAGNATED``. In a layer with ``constraint=`` or ``regularizer=`` it takes that of the layer, and all lanes of a
    batch step together; with a term of its own, any other layer calls it lane by lane.

    Args:
        regularizer: a set or regulariser (``il.sets``, ``il.L1``, ...), a pytree of them, or a function of theta that
            returns one; None takes that of the layer.
        accelerated: Nesterov's momentum, restarted whenever it points uphill; False for plain steps.
        step_size: 1/L, positive, in units of 1 / curvature; None finds it by backtracking.
        max_steps: limit of steps; without a tolerance, their number.
        rtol, atol: tolerances, see above; both 0 means none.
        callback: called with an :class:`Iteration` after every step; ``value`` is the smooth objective at z and
            ``gradient_norm`` the number of the stopping test.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: no term at all, a step size that is not positive, a negative limit or tolerance.
        TypeError: unknowns that are no floating tensors, a limit of steps that is no integer.
        ObjectiveError: an objective whose gradient autograd cannot see.

    Source: A. Beck and M. Teboulle, SIAM J. Imaging Sci. 2 (2009); restarts: O'Donoghue & Candes 2015
    (arXiv:1204.3982), the gradient scheme. Difference: where a decrease drowns in rounding, L is tested by gradients.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.ProximalGradient(il.L1(1.0), rtol=1e-12)
        >>> y = torch.tensor([3.0, 0.5], dtype=torch.float64)
        >>> solver(lambda x: 0.5 * ((x - y) ** 2).sum(), torch.zeros(2, dtype=torch.float64)).tolist()
        [2.0, 0.0]
    """

    regularizer: Any = None
    _: KW_ONLY
    accelerated: bool = True
    step_size: float | None = None

    batched: ClassVar[Any] = property(lambda self: self.regularizer is None)  # a term of the layer, which knows lanes
    in_parts: ClassVar[Any] = batched

    def __post_init__(self) -> None:
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size={self.step_size} must be positive and finite. Leave it out to have it found.")
        super().__post_init__()
        check_num_steps(self.max_steps)
        if self.regularizer is not None and not callable(self.regularizer):
            resolve(self.regularizer, (), "regularizer")

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        prox = self._prox(objective, theta)
        problem = Problem(objective, init, theta)
        with reporting(self.callback, self.progress, self.max_steps) as report:
            steps = _Steps(self, problem, partial(_on_vectors, prox, problem), _curvature(self, problem), report)
            return steps.run()

    def traced(self, problem: TracedProblem) -> tuple[torch.Tensor, torch.Tensor]:
        """The same rounds for a compiler; see :func:`implicitlayer.compile`."""
        prox, curvature = problem.prox, _curvature(self, problem)
        assert prox is not None

        def steps(state: tuple[torch.Tensor, ...] = ()) -> _Steps:
            made = _Steps(self, problem, prox, curvature, None)
            made.on_host = False
            return restored(made, list(state)) if state else made

        def one_more(*state: torch.Tensor) -> tuple[torch.Tensor, ...]:
            here = steps(state)
            here.round()
            return kept(here)

        last = steps(_torch.while_loop(lambda running, *_: running.any(), one_more, kept(steps())))
        return last.x, last.codes

    def _prox(self, objective: Callable[..., Any], theta: tuple[Any, ...]) -> Callable[[Any, torch.Tensor], Any]:
        """The layer's own operator where the term is the layer's: it knows lanes and closed-over tensors."""
        of_layer = getattr(objective, "terms", None)
        if of_layer is not None and (self.regularizer is None or self.regularizer is of_layer):
            return lambda y, step: objective.prox(y, step, *theta)  # type: ignore[attr-defined]
        if self.regularizer is not None:
            term = resolve(self.regularizer, theta, "regularizer")
            return lambda y, step: term.prox(y, step, step.ndim)
        raise ValueError(
            f"{type(self).__name__}() without a set or regulariser takes that of the layer that calls it, and "
            "there is none. Give it one, or use il.solvers.AcceleratedGradient."
        )


def _on_vectors(
    prox: Callable[[Any, torch.Tensor], Any], problem: Problem, y: torch.Tensor, step: torch.Tensor
) -> torch.Tensor:
    """The prox of a vector [*lanes, n] that stands for a tree."""
    with torch.no_grad():
        return ravel(flatten(prox(problem.tree(y), step))[0], problem.lane_dims)


def _curvature(settings: ProximalGradient, problem: Problem | TracedProblem) -> torch.Tensor:
    """The first L, float64 [*lanes]: 1/step_size, or ``||H g|| / ||g||``, never too large; 1 where that is nothing."""
    if settings.step_size is not None:
        return torch.full_like(problem.unit, 1 / settings.step_size)
    slope = problem.first_gradient
    size = problem.norm(slope)
    unit = slope / torch.where(size > 0, size, 1.0).unsqueeze(-1).to(slope.dtype)
    curvature = problem.norm(problem.curvature(problem.start, unit))
    return torch.where((curvature > 0) & curvature.isfinite(), curvature, 1.0)


class _Steps:
    """The loop: in one round every lane makes a step, or a trial of one that was too long.

    Attributes:
        x, z: [*lanes, n]; ``value``, ``slope``: of the smooth objective at z.
        curvature: L, float64 [*lanes]; ``trials``: how often it was doubled for this step.
        norm: ``L ||z - x||`` of the last step; ``tolerance``: what it is to reach, known after the first step.
        steps: how many, int64 [*lanes].
        before: z and the slope there, one step ago.
        beginning: whether a lane may have no step yet; ``whole``: whether all lanes are known to have made this one.
    """

    STATE: tuple[str, ...] = (
        *("running", "reached", "stalled", "x", "z", "value", "slope", "curvature", "trials", "norm", "tolerance"),
        *("steps", "before", "momentum", "watch"),
    )

    def __init__(
        self,
        settings: ProximalGradient,
        problem: Problem | TracedProblem,
        prox: Prox,
        curvature: torch.Tensor,
        report: Report | None,
    ) -> None:
        self.settings, self.problem, self.prox, self.report = settings, problem, prox, report
        self.x = self.z = problem.start
        self.value, self.slope = problem.first_value.double(), problem.first_gradient * problem.scale
        self.curvature = curvature
        self.trials = self.steps = torch.zeros_like(curvature, dtype=torch.int64)
        self.norm = self.tolerance = torch.full_like(curvature, math.inf)
        self.reached = self.stalled = torch.zeros_like(curvature, dtype=torch.bool)
        self.before = self.z, self.slope
        self.momentum = Momentum(None, torch.ones_like(curvature))
        self.watch = StallWatch.unset(curvature, problem.dtype)
        self.on_host, self.beginning, self.whole = rounds_between_syncs(self.x) == 1, True, False
        self.running = torch.full_like(self.reached, settings.max_steps > 0)

    def run(self) -> SolverResult:
        assert isinstance(self.problem, Problem)
        every, rounds = rounds_between_syncs(self.x), 0
        while rounds % every or bool(self.running.any()):
            rounds += 1
            self.round()
        return outcome(self.problem.tree(self.x), self.steps, self.codes)

    @property
    def codes(self) -> torch.Tensor:
        """How every lane has ended."""
        finite = self.x.isfinite().all(-1) & (self.norm.isfinite() | (self.steps == 0))
        return codes_of(self.settings.has_tolerance, self.reached, finite, self.stalled & ~self.reached)

    def round(self) -> None:
        """A step, or a trial, in every lane that runs."""
        new = self.prox(self.z - self.slope / _column(self.curvature, self.z), (1 / self.curvature).to(self.z.dtype))
        made, there = self.running, None
        if self.settings.step_size is None:
            slope, value = there = self.problem.value_and_gradient(new)
            short = self._too_long(new, value.double(), slope)
            self.curvature = torch.where(short, 2 * self.curvature, self.curvature)
            self.trials = torch.where(short, self.trials + 1, 0)
            made = made & ~short
            if self.on_host and not bool(made.any()):
                return
        self._step(made, new)
        if self.on_host and not bool(self.running.any()):
            return
        if self.settings.accelerated or there is None:  # else z is the point of the trial
            there = self.problem.value_and_gradient(self.z)
        self.slope = self._chosen(made, there[0], self.slope)
        self.value = there[1].double() if self.whole else torch.where(made, there[1].double(), self.value)

    def _step(self, made: torch.Tensor, new: torch.Tensor) -> None:
        """These lanes go to ``new``."""
        z, slope, dims = self.z, self.slope, self.problem.lane_dims
        self.whole = self.on_host and bool(made.all())
        self.norm = torch.where(made, self.curvature * self.problem.norm(z - new), self.norm)
        if self.beginning:
            scale = torch.maximum(self.norm, self.problem.norm(slope))
            first = torch.clamp(self.settings.rtol * scale, min=self.settings.atol)
            self.tolerance = torch.where(made & (self.steps == 0), first, self.tolerance)
        self.steps = self.steps + made
        self.beginning = not (self.on_host and (self.whole or bool(self.steps.all())))
        if self.settings.has_tolerance:
            at, g = self.before
            doubt = lambda: contradiction([z], [slope], ([at], [g]), self.curvature, dims)  # noqa: E731
            move = partial(relative_move, [z], [z - at], dims)
            self.stalled = self.stalled | self.watch.look(made, self.norm, self.value, doubt, move, self.on_host)
            self.before = self._chosen(made, z, at), self._chosen(made, slope, g)
        change, ahead = new - self.x, new
        if self.settings.accelerated:
            factor = self.momentum.next(lambda: _dot(z - new, change) > 0, self.curvature, made)
            assert isinstance(factor, torch.Tensor)
            ahead = torch.addcmul(new, _column(factor, new), change)
        self.x = self._chosen(made, new, self.x)
        self.z = self._chosen(made, ahead, z)
        self.reached = self.reached | (made & (self.norm <= self.tolerance))
        self.running = self.running & ~self.reached & ~self.stalled & (self.steps < self.settings.max_steps)
        if self.report is not None:
            assert isinstance(self.problem, Problem)
            value = self.value.to(self.problem.dtype)
            self.report(Iteration(int(self.steps.max()), value, self.norm, self.problem.tree(self.x)))

    def _too_long(self, new: torch.Tensor, value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Running lanes without ``f(new) <= f(z) + <g, d> + L/2 ||d||^2``, d = new - z, whose L is to be doubled.

        Near a solution this drowns in the rounding of f, and a step that is too long would go unseen: there
        ``<g(new) - g, d> <= L ||d||^2`` takes its place, which is the same for a quadratic.
        """
        eps, norm, change = torch.finfo(new.dtype).eps, self.problem.norm(self.slope), new - self.z
        # z itself is rounded: that alone changes f by ||g|| eps ||z||, which is more than eps f where f is nearly 0
        slack = _NOISE * eps * (self.value.abs() + norm * self.problem.norm(self.z))
        size = self.problem.norm(change)
        bend = self.curvature * size * size
        by_value = value - self.value - _dot(self.slope, change) <= bend / 2
        turned = _dot(slope - self.slope, change)
        enough = torch.where(bend > _DROWNED * slack, by_value, turned <= bend + _NOISE * eps * norm * size)
        return self.running & ~enough & self.value.isfinite() & (size > 0) & (self.trials < _MAX_DOUBLINGS)

    def _chosen(self, lanes: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return new if self.whole else torch.where(lanes.unsqueeze(-1), new, old)


def _column(per_lane: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return per_lane.unsqueeze(-1).to(like.dtype)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).double().sum(-1)


class ProjectedGradient(ProximalGradient):
    """Minimise a smooth objective over a set: :class:`ProximalGradient`, whose prox is the projection.

    Args:
        constraint: a set (``il.sets``), a pytree of sets, or a function of theta that returns one; None takes that of
            the layer.
        settings: as in :class:`ProximalGradient`.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.ProjectedGradient(il.sets.Box(0.0, 1.0), rtol=1e-12)
        >>> solver(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2, dtype=torch.float64)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, constraint: Any = None, **settings: Any) -> None:
        super().__init__(constraint, **settings)
