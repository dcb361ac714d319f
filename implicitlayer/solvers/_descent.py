"""What the line-search solvers share: limits, and one loop in which every lane is searched and moved on its own."""

# x_{k+1} = x_k + a_k d_k: a method says d_k, the line search finds a_k. One round of the loop evaluates the objective
# once, for all lanes: a lane whose trial was accepted gets its next direction, the others get their next trial. No lane
# waits for another, so all of them make the trials that they would make alone.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.equation._traced import TracedProblem
from implicitlayer.linear._common import STEPS_BETWEEN_SYNCS
from implicitlayer.linear._operator import lane_dot
from implicitlayer.solvers._leaves import Problem
from implicitlayer.solvers._line_search import LineSearch, Pair
from implicitlayer.solvers._outcome import PATIENCE, StallWatch, codes_of, outcome
from implicitlayer.solvers._progress import Iteration, Report, Settings, reporting

_LEAST = 1e-10  # y's below this share of |s'g| is rounding: the Wolfe conditions alone give 0.1
_LONG_SEARCH = 10  # trials of a search after which a step without gain counts for more, by NOTE [rounding]


def rounds_between_syncs(x: torch.Tensor) -> int:
    """How often to ask whether any lane is still running: on an accelerator the answer is a host synchronisation."""
    return 1 if x.device.type == "cpu" else STEPS_BETWEEN_SYNCS


_WORDS = {
    Status.STAGNATED: "The line search found no lower point{where}: the gradient does not belong to the values there, "
    "or is as small as their rounding errors allow.",
    Status.NONFINITE: "The objective or its gradient is not finite at init{where}.",
}


class Method:
    """How to choose directions. Masks are bool [*lanes]; what is returned for the other lanes is not read."""

    STATE: tuple[str, ...] = ()  # names of the attributes that change
    conjugate: bool = False  # with exact line searches, n steps solve a quadratic of n unknowns
    halving: bool = False  # near a minimum every step at least halves the gradient

    def direction(self, lanes: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor, norm: torch.Tensor) -> Pair:
        """At x a direction [*lanes, n] and the first trial step float64 [*lanes]."""
        raise NotImplementedError

    def moved(self, lanes: torch.Tensor, step: torch.Tensor, change: torch.Tensor, search: LineSearch) -> None:
        """These lanes made a step; ``change`` is that of the gradient."""

    def forget(self, lanes: torch.Tensor) -> torch.Tensor:
        """These lanes found no acceptable step: drop what led there. Returns the lanes that can try another way."""
        return torch.zeros_like(lanes)


@dataclass(frozen=True)
class Limited(Settings):
    """The same; the limits may be given without their names."""

    max_steps: int = 1000
    rtol: float = 0.0
    atol: float = 0.0


def descend(
    settings: Any, problem: Problem, method: Method, curvature: float, loop: type[Descent] | None = None
) -> SolverResult:
    """Minimise with the directions of ``method``, to the tolerances of ``settings`` (:class:`Limited`)."""
    with reporting(settings.callback, settings.progress, settings.max_steps) as report:
        return (loop or Descent)(settings, problem, method, curvature, report).run()


def traced_descent(settings: Any, problem: TracedProblem, method: Callable[[], Method], curvature: float) -> Pair:
    """The same rounds as a loop of a compiler: the point [*lanes, n] and a :class:`Status` per lane.

    ``method`` makes one in its first state: a loop holds tensors only, and every round begins with objects made anew.
    """

    def descent(state: tuple[torch.Tensor, ...] = ()) -> Descent:
        made = Descent(settings, problem, method(), curvature, None)
        made.on_host = False
        return restored(made, list(state)) if state else made

    def one_more(*state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        before = descent(state)
        found = before.method.direction(before.turning, before.x, before.gradient, before.norm)
        # a loop in the direction makes torch's tracer (2.13) forget what is then written to objects made before it
        here = descent(state)
        here.round(found=found)
        return kept(here)

    last = descent(_torch.while_loop(lambda running, *_: running.any(), one_more, kept(descent())))
    return last.x, last.codes


def kept(value: Any) -> tuple[torch.Tensor, ...]:
    """Copies of the tensors of what changes in a loop: the attributes that ``STATE`` names, and theirs."""
    if isinstance(value, torch.Tensor):
        return (value.clone(memory_format=torch.contiguous_format),)
    parts = value if isinstance(value, tuple | list) else [getattr(value, name) for name in value.STATE]
    return tuple([tensor for part in parts for tensor in kept(part)])


def restored(value: Any, tensors: list[torch.Tensor]) -> Any:
    """The inverse: ``value`` with the tensors that are its, from the front of the list."""
    if isinstance(value, torch.Tensor):
        return tensors.pop(0)
    if isinstance(value, tuple | list):
        return type(value)([restored(part, tensors) for part in value])
    for name in value.STATE:
        setattr(value, name, restored(getattr(value, name), tensors))
    return value


class Descent:
    """The loop: one evaluation in all lanes per round."""

    STATE: tuple[str, ...] = (
        *("running", "turning", "x", "gradient", "value", "norm", "steps", "stalled", "direction", "best"),
        *("watch", "search", "method"),
    )

    def __init__(
        self, settings: Any, problem: Problem | TracedProblem, method: Method, curvature: float, report: Report | None
    ) -> None:
        self.settings, self.problem, self.method, self.report = settings, problem, method, report
        self.x, self.gradient = problem.start, problem.first_gradient
        self.value = problem.first_value.double() / problem.unit
        self.norm = problem.norm(self.gradient)
        self.tolerance = torch.clamp(settings.rtol * self.norm, min=settings.atol / problem.unit)
        self.steps = torch.zeros_like(self.norm, dtype=torch.int64)
        self.finite = self.norm.isfinite() & self.value.isfinite()
        self.stalled = torch.zeros_like(self.finite)
        eps, exact = torch.finfo(problem.dtype).eps, method.conjugate
        self.watch = StallWatch(self.norm, self.value, eps, method.halving)
        self.search = LineSearch(self.norm, eps, curvature, exact_on_quadratics=exact)
        self.direction = torch.zeros_like(self.x)
        self.on_host = rounds_between_syncs(self.x) == 1
        self.best = self.x, self.value, self.norm  # at the last gain: after it came rounding errors only
        self.running = self.turning = self._unfinished()  # bool [*lanes]: not done; to get a new direction

    def _unfinished(self) -> torch.Tensor:
        """bool [*lanes]."""
        unfinished: torch.Tensor = (self.norm > self.tolerance) & (self.steps < self.settings.max_steps)
        return unfinished & self.finite & ~self.stalled

    def run(self) -> SolverResult:
        every = rounds_between_syncs(self.x)
        self._tell()
        rounds = 0
        turns = True
        while rounds % every or bool(self.running.any()):
            rounds += 1
            turns = self.round(turns)
        return outcome(self._tree(), self.steps, self.codes, _WORDS)

    def round(self, turns: bool = True, found: Pair | None = None) -> bool:
        """One evaluation in all lanes. Returns whether some may need a direction in the next round.

        ``turns``: the same of this round; ``found``: what the method says, where it has been asked.
        """
        running, on_host = self.running, self.on_host
        if turns:
            self.turn(self.turning, found)
        length = torch.where(running, self.search.step, 0.0).unsqueeze(-1).to(self.x.dtype)
        trial = self._chosen(running, self.trial(length), self.x)
        value, gradient = self.problem(trial)
        accepted, failed = self.search.advance(value, lane_dot(gradient, self.direction))
        accepted, failed = accepted & running, failed & running
        if on_host and not bool((accepted | failed).any()):
            return False
        self.method.moved(accepted, trial - self.x, gradient - self.gradient, self.search)
        self.x = self._chosen(accepted, trial, self.x)
        self.gradient = self._chosen(accepted, gradient, self.gradient)
        self.value = torch.where(accepted, value, self.value)
        self.norm = torch.where(accepted, self.problem.norm(gradient), self.norm)
        self.steps = self.steps + accepted
        retrying = self.method.forget(failed) & failed if not on_host or bool(failed.any()) else failed
        stalled = (failed & ~retrying) | self._idle(accepted)
        if not on_host or bool(stalled.any()):
            self.stalled, (x, value, norm) = self.stalled | stalled, self.best
            self.x = torch.where(stalled.unsqueeze(-1), x, self.x)
            self.value, self.norm = torch.where(stalled, value, self.value), torch.where(stalled, norm, self.norm)
        self.running = self._unfinished()
        if self.report is not None and bool(accepted.any()):
            self._tell()
        self.turning = (accepted | retrying) & self.running
        return True

    def trial(self, length: torch.Tensor) -> torch.Tensor:
        """The points [*lanes, n] at these lengths [*lanes, 1] along the directions."""
        return torch.addcmul(self.x, length, self.direction)

    def _chosen(self, lanes: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """``new`` [*lanes, n] in some lanes, ``old`` in the others; no copy where one of them is the answer."""
        return new if self.on_host and bool(lanes.all()) else torch.where(lanes.unsqueeze(-1), new, old)

    def _idle(self, accepted: torch.Tensor) -> torch.Tensor:
        """Lanes that only move by rounding errors; see NOTE [rounding]. A long search counts for more."""
        weight = lambda: torch.where(self.search.trials >= _LONG_SEARCH, PATIENCE / 4, 1.0).double()  # noqa: E731
        move = lambda: torch.full_like(self.norm, torch.inf)  # noqa: E731  # accepted values do not grow
        stalled = self.watch.look(accepted, self.norm, self.value, weight, move, self.on_host)
        gained, (x, value, norm) = self.watch.gained, self.best
        value, norm = torch.where(gained, self.value, value), torch.where(gained, self.norm, norm)
        self.best = self._chosen(gained, self.x, x), value, norm
        return stalled

    def turn(self, lanes: torch.Tensor, found: Pair | None) -> None:
        """New directions and searches in these lanes: the method's, or the steepest one where that leads uphill."""
        direction, step = found or self.method.direction(lanes, self.x, self.gradient, self.norm)
        slope = lane_dot(self.gradient, direction)
        downhill = (slope < 0) & slope.isfinite()
        direction = self._chosen(downhill, direction, -self.gradient)
        slope = torch.where(downhill, slope, -self.norm * self.norm)
        step = torch.where(downhill, step, 1 / self.norm)
        self.direction = self._chosen(lanes, direction, self.direction)
        self.search.start(lanes, self.value, slope, step)

    def _tell(self) -> None:
        if self.report is None:
            return
        unit = self.problem.unit
        step = int(self.steps.max()) if self.steps.numel() else 0
        value = (self.value * unit).to(self.problem.dtype)
        self.report(Iteration(step, value, self.norm * unit, self._tree()))

    def _tree(self) -> Any:
        assert isinstance(self.problem, Problem)
        return self.problem.tree(self.x)

    @property
    def codes(self) -> torch.Tensor:
        """How every lane has ended."""
        return codes_of(self.settings.has_tolerance, self.norm <= self.tolerance, self.finite, self.stalled)


def pair_scales(
    lanes: torch.Tensor, step: torch.Tensor, change: torch.Tensor, search: LineSearch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rho = 1 / y's, gamma = y's / y'y, and the lanes whose pair is to be kept: its curvature is positive."""
    curvature, square = lane_dot(step, change), lane_dot(change, change)
    rho, gamma = 1 / curvature, curvature / square
    good = lanes & (curvature > _LEAST * (search.step * search.slope).abs()) & rho.isfinite() & gamma.isfinite()
    return rho, gamma, good
