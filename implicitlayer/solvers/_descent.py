"""What the line-search solvers share: limits, and one loop in which every lane is searched and moved on its own."""

# x_{k+1} = x_k + a_k d_k: a method says d_k, the line search finds a_k. One round of the loop evaluates the objective
# once, for all lanes: a lane whose trial was accepted gets its next direction, the others get their next trial. No lane
# waits for another, so all of them make the trials that they would make alone.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch

from implicitlayer.base._solution import RecordingSolver, SolverResult
from implicitlayer.base._status import Status
from implicitlayer.linear._common import STEPS_BETWEEN_SYNCS
from implicitlayer.linear._operator import lane_dot
from implicitlayer.solvers._inputs import check_limits
from implicitlayer.solvers._line_search import LineSearch
from implicitlayer.solvers._outcome import PATIENCE, StallWatch, outcome
from implicitlayer.solvers._problem import Problem
from implicitlayer.solvers._progress import Iteration, Report, reporting

__all__: list[str] = []

_LONG_SEARCH = 10  # trials of a search after which a step without gain counts for more, by NOTE [rounding]


def rounds_between_syncs(x: torch.Tensor) -> int:
    """How often to ask whether any lane is still running: on an accelerator the answer is a host synchronisation."""
    return 1 if x.device.type == "cpu" else STEPS_BETWEEN_SYNCS


_WORDS = {
    Status.STAGNATED: "The line search found no lower point{where}: the gradient does not belong to the values there, "
    "or is as small as their rounding errors allow.",
    Status.NONFINITE: "The objective or its gradient is not finite at init{where}.",
}


class Method(Protocol):
    """How to choose directions. Masks are bool [*lanes]; what is returned for the other lanes is not read."""

    conjugate: bool  # with exact line searches, n steps solve a quadratic of n unknowns

    def direction(
        self, lanes: torch.Tensor, gradient: torch.Tensor, norm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A direction [*lanes, n] and the first trial step float64 [*lanes]."""

    def moved(self, lanes: torch.Tensor, step: torch.Tensor, change: torch.Tensor, search: LineSearch) -> None:
        """These lanes made a step; ``change`` is that of the gradient."""

    def forget(self, lanes: torch.Tensor) -> torch.Tensor:
        """These lanes found no acceptable step: drop what led there. Returns the lanes that can try another way."""


@dataclass(frozen=True)
class Limited(RecordingSolver):
    """Settings that the own solvers have in common; see their docstrings."""

    max_steps: int = 1000
    rtol: float = 0.0
    atol: float = 0.0
    _: KW_ONLY
    callback: Callable[[Iteration], None] | None = None
    progress: bool = False

    finds: ClassVar[Literal["minimum"]] = "minimum"
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_limits(self)

    @property
    def has_tolerance(self) -> bool:
        """Whether there is a test besides the number of steps."""
        return self.rtol > 0 or self.atol > 0


def descend(settings: Any, problem: Problem, method: Method, curvature: float) -> SolverResult:
    """Minimise with the directions of ``method``, to the tolerances of ``settings`` (:class:`Limited`)."""
    with reporting(settings.callback, settings.progress, settings.max_steps) as report:
        return _Descent(settings, problem, method, curvature, report).run()


class _Descent:
    def __init__(
        self, settings: Any, problem: Problem, method: Method, curvature: float, report: Report | None
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
        self.watch = StallWatch(self.norm, self.value, eps)
        self.search = LineSearch(self.norm, eps, curvature, exact_on_quadratics=exact)
        self.direction = torch.zeros_like(self.x)
        self.on_host = rounds_between_syncs(self.x) == 1
        self.best = self.x, self.value, self.norm  # at the last gain: after it came rounding errors only

    @property
    def running(self) -> torch.Tensor:
        """bool [*lanes]."""
        unfinished: torch.Tensor = (self.norm > self.tolerance) & (self.steps < self.settings.max_steps)
        return unfinished & self.finite & ~self.stalled

    def run(self) -> SolverResult:
        every = rounds_between_syncs(self.x)
        self._tell()
        running = self.running
        turning: torch.Tensor | None = running
        rounds = 0
        while rounds % every or bool(running.any()):
            rounds += 1
            if turning is not None:
                self._turn(turning)
            length = torch.where(running, self.search.step, 0.0).unsqueeze(-1).to(self.x.dtype)
            trial = self._chosen(running, torch.addcmul(self.x, length, self.direction), self.x)
            value, gradient = self.problem(trial)
            accepted, failed = self.search.advance(value, lane_dot(gradient, self.direction))
            accepted, failed = accepted & running, failed & running
            turning = None
            if every == 1 and not bool((accepted | failed).any()):
                continue
            self.method.moved(accepted, trial - self.x, gradient - self.gradient, self.search)
            self.x = self._chosen(accepted, trial, self.x)
            self.gradient = self._chosen(accepted, gradient, self.gradient)
            self.value = torch.where(accepted, value, self.value)
            self.norm = torch.where(accepted, self.problem.norm(gradient), self.norm)
            self.steps = self.steps + accepted
            retrying = self.method.forget(failed) & failed if every > 1 or bool(failed.any()) else failed
            stalled = (failed & ~retrying) | self._idle(accepted)
            if every > 1 or bool(stalled.any()):
                self.stalled, (x, value, norm) = self.stalled | stalled, self.best
                self.x = torch.where(stalled.unsqueeze(-1), x, self.x)
                self.value, self.norm = torch.where(stalled, value, self.value), torch.where(stalled, norm, self.norm)
            running = self.running
            if self.report is not None and bool(accepted.any()):
                self._tell()
            turning = (accepted | retrying) & running
        return self._result()

    def _chosen(self, lanes: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        """``new`` [*lanes, n] in some lanes, ``old`` in the others; no copy where one of them is the answer."""
        if self.on_host and bool(lanes.all()):
            return new
        return torch.where(lanes.unsqueeze(-1), new, old)

    def _idle(self, accepted: torch.Tensor) -> torch.Tensor:
        """Lanes that only move by rounding errors; see NOTE [rounding]. A long search counts for more."""
        weight = lambda: torch.where(self.search.trials >= _LONG_SEARCH, PATIENCE / 4, 1.0).double()  # noqa: E731
        move = lambda: torch.full_like(self.norm, torch.inf)  # noqa: E731  # accepted values do not grow
        stalled = self.watch.look(accepted, self.norm, self.value, weight, move, self.on_host)
        gained, (x, value, norm) = self.watch.gained, self.best
        self.best = (
            self._chosen(gained, self.x, x),
            torch.where(gained, self.value, value),
            torch.where(gained, self.norm, norm),
        )
        return stalled

    def _turn(self, lanes: torch.Tensor) -> None:
        """New directions and searches in these lanes: the method's, or the steepest one where that leads uphill."""
        direction, step = self.method.direction(lanes, self.gradient, self.norm)
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
        self.report(Iteration(step, value, self.norm * unit, self.problem.tree(self.x)))

    def _result(self) -> SolverResult:
        num_steps = int(self.steps.max()) if self.steps.numel() else 0
        return outcome(
            self.problem.tree(self.x),
            num_steps,
            wanted=self.settings.has_tolerance,
            reached=self.norm <= self.tolerance,
            finite=self.finite,
            stalled=self.stalled,
            words=_WORDS,
        )
