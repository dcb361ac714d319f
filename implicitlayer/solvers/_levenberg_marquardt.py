"""The Levenberg-Marquardt method for nonlinear least squares, for one problem or many at once."""

# Legend: f residuals [*lanes, k], J = df/dx [*lanes, k, n], D the largest column norms of J so far, s = D p a scaled
# step, Delta the radius. With [J D^-1, f] = Q [R, q; 0, .] a step is
#     s(par) = argmin ||R s + q||^2 + par ||s||^2,
# with par = 0 where that has ||s|| <= 1.1 Delta, and else such that ||s|| is Delta to a tenth.
# With T'T = R'R + par I the length has the slope d||s|| / d par = -||s|| ||w||^2, w = T^-T s / ||s||, so that Newton's
# method for 1 / ||s(par)|| = 1 / Delta adds (||s|| - Delta) / (Delta ||w||^2) to par.
# In the linear model ||f||^2 falls by ||R s||^2 + 2 par ||s||^2.
#
# NOTE [rank]: singular values of R below (n + 16) eps of the largest are rounding, and a step that trusts them goes as
# far as the radius allows along what changes nothing. They are set to zero: s is the shortest minimiser.
#
# NOTE [falls too small to see]: where the model's fall is below the rounding errors of ||f||^2, a trial counts as good
# if the gradient is smaller there. Three that are not, one after the other, end the lane.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.linalg import vector_norm

from implicitlayer._errors import ObjectiveError
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import flatten, name_lanes, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._residual import pull_back, pushed
from implicitlayer.equation._traced import Vectors
from implicitlayer.linear._common import NOISE as NOISE_OF_RANK
from implicitlayer.linear._operator import lane_scale
from implicitlayer.solvers._descent import Limited
from implicitlayer.solvers._leaves import check_attached, check_unknowns, composite_of
from implicitlayer.solvers._outcome import NOISE, codes_of, outcome
from implicitlayer.solvers._progress import Iteration, Report, reporting

_FIRST_RADIUS = 100.0  # in units of ||D x||, as MINPACK has it
_LEAST, _POOR, _GOOD = 1e-4, 0.25, 0.75  # shares of the promised fall: to be taken; for a smaller; for a larger radius
_TENTH = 0.1  # least factor of the radius, and what a residual that grows tenfold gets
_NEAR = 0.1  # of the radius, how far ||s|| may be from it
_MAX_PARS = 10  # trials for par; one or two do
_IDLE = 3  # see NOTE [falls too small to see]
_SUSPICIOUS = 1e4  # a pivot below so many times the noise makes the singular values be computed

_WORDS = {
    Status.STAGNATED: "No step lowers the sum of squares or its gradient{where}: both are as small as rounding errors "
    "allow, or the residuals are not smooth there.",
    Status.NONFINITE: "The residuals or their derivatives are not finite at init{where}.",
}


@dataclass(frozen=True)
class LevenbergMarquardt(Limited):
    """Nonlinear least squares: the solver for an objective made by ``il.least_squares(residuals)``.

    A step minimises the sum of squares of the linearised residuals within ``||D p|| <= Delta``, where D are the largest
    column norms of the Jacobian so far; the damping is what makes the step as long. Delta falls after a step that keeps
    less than a quarter of what the linear model promised and grows after one that keeps three quarters. A Jacobian
    without full rank gets the shortest such step.

    Stops a lane when ``||J'f||_2 <= max(atol, rtol * ||J'f at init||_2)``, or where no step lowers the sum of squares
    by more than its rounding errors, nor its gradient, status ``STAGNATED``: with no tolerance that is where it ends.
    Batched: every lane has its own radius, all are evaluated together, and a finished lane is frozen. The Jacobian
    takes as many backward passes as there are unknowns or residuals (the fewer): for up to some hundred unknowns.

    Args:
        max_steps: limit of steps; each takes one evaluation of the residuals, at times more, and one Jacobian.
        rtol, atol: tolerances on the norm of the gradient, see above; both 0 means none.
        callback: called with an :class:`Iteration` at the start and after every step.
        progress: show a bar (needs tqdm, extra ``implicitlayer[progress]``).

    Raises:
        ValueError: a negative limit or tolerance.
        ObjectiveError: an objective that does not tell its residuals, or is not half the sum of their squares.
        ImportError: ``progress=True`` without tqdm.

    Source: J. J. More, The Levenberg-Marquardt algorithm: implementation and theory, Lecture Notes in Mathematics 630,
    1978, with the constants of MINPACK's lmder, which is SciPy's ``least_squares(method="lm")``. Differences: the rank
    is told by singular values, and a trial whose fall is lost in rounding by its gradient.

    Example:
        >>> import torch, implicitlayer as il
        >>> time = torch.arange(5, dtype=torch.float64)
        >>> fit = il.least_squares(lambda x, y: x[0] * torch.exp(-x[1] * time) - y)
        >>> layer = il.argmin(fit, il.solvers.LevenbergMarquardt(rtol=1e-10))
        >>> y = (2 * torch.exp(-0.5 * time)).requires_grad_()
        >>> x = layer(torch.ones(2, dtype=torch.float64), y)
        >>> [round(v, 8) for v in x.tolist()]
        [2.0, 0.5]
    """

    max_steps: int = 200

    @classmethod
    def examples(cls, *given: Any) -> Sequence[Any]:
        """None: the objectives of the checks do not tell residuals."""
        return []

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        problem = Residuals(objective, init, theta)
        with reporting(self.callback, self.progress, self.max_steps) as report:
            return _Search(self, problem, report).run()


class _Search:
    """All lanes, one trial each per round; numbers per lane are float64 [*lanes]."""

    def __init__(self, settings: LevenbergMarquardt, problem: Residuals, report: Report | None) -> None:
        self.settings, self.problem, self.report = settings, problem, report
        self.eps = torch.finfo(problem.dtype).eps
        self.x, self.both = problem.start, problem.triangle(problem.first)
        self.gradient, lengths = _gradient(self.both), vector_norm(self.both[..., :-1], dim=-2)
        self.size, self.norm = vector_norm(problem.first, dim=-1), vector_norm(self.gradient, dim=-1)
        self.finite = self.size.isfinite() & self.norm.isfinite()
        self.tolerance = torch.clamp(settings.rtol * self.norm, min=settings.atol / problem.unit / problem.unit)
        self.metric = torch.where((lengths > 0) & lengths.isfinite(), lengths, 1.0)
        long = vector_norm(self.metric * self.x, dim=-1)
        self.radius = _FIRST_RADIUS * torch.where((long > 0) & long.isfinite(), long, 1.0)
        self.par, self.steps = torch.zeros_like(self.norm), torch.zeros_like(self.norm, dtype=torch.int64)
        self.idle, self.stalled = torch.zeros_like(self.steps), torch.zeros_like(self.finite)

    @property
    def running(self) -> torch.Tensor:
        """bool [*lanes]."""
        unfinished = (self.norm > self.tolerance) & (self.steps < self.settings.max_steps)
        running: torch.Tensor = unfinished & self.finite & ~self.stalled
        return running

    def run(self) -> SolverResult:
        self._tell()
        model: _Model | None = None
        while bool((running := self.running).any()):
            if model is None:
                model = _Model(self.both, self.metric, self.eps, running)
            s, self.par = model.step(self.radius, self.par)
            length = vector_norm(s, dim=-1)
            self.radius = torch.where(self.steps == 0, torch.minimum(self.radius, length), self.radius)
            step = torch.where(running.unsqueeze(-1), s / self.metric, 0.0)
            trial = self.x + step.to(self.x.dtype)
            accepted = self._judged(trial, running, length, model.fall(s))
            if bool(accepted.any()):
                model = None
                self._tell()
        codes = codes_of(self.settings.has_tolerance, self.norm <= self.tolerance, self.finite, self.stalled)
        return outcome(self.problem.tree(self.x), self.steps, codes, _WORDS)

    def _judged(
        self, trial: torch.Tensor, running: torch.Tensor, length: torch.Tensor, fall: torch.Tensor
    ) -> torch.Tensor:
        """Evaluate, move the lanes whose trial is good, and set their next radius; the lanes that moved."""
        f = self.problem(trial)
        size, noise = vector_norm(f, dim=-1), NOISE * self.eps
        # as shares of ||f||^2: what was gained, what was promised, and the slope along the step
        tame, square = _TENTH * size < self.size, self.size**2
        gained = torch.where(tame, 1 - (size / self.size) ** 2, -1.0)
        fall, damped = fall / square, self.par * (length / self.size) ** 2
        promised, slope = fall + 2 * damped, -(fall + damped)
        hidden = promised <= noise
        ratio = torch.where(hidden | ~promised.isfinite(), 0.0, gained / promised)
        accepted = running & torch.where(hidden, gained >= -noise, ratio >= _LEAST)
        if bool(accepted.any()):
            both = self.problem.triangle(f)
            gradient = _gradient(both)
            scaled = vector_norm(gradient / self.metric, dim=-1)
            lower = scaled < vector_norm(self.gradient / self.metric, dim=-1)
            accepted = accepted & scaled.isfinite() & (~hidden | lower)
            here = accepted.unsqueeze(-1)
            self.x, self.gradient = torch.where(here, trial, self.x), torch.where(here, gradient, self.gradient)
            self.both = torch.where(here.unsqueeze(-1), both, self.both)
            self.norm = torch.where(accepted, vector_norm(gradient, dim=-1), self.norm)
            lengths = vector_norm(both[..., :-1], dim=-2)
            self.metric = torch.where(here, torch.maximum(self.metric, lengths), self.metric)
        ratio = torch.where(hidden & accepted, 1.0, torch.where(accepted, ratio, 0.0))
        self.idle = torch.where(accepted, 0, self.idle + (running & hidden))
        self.stalled = self.stalled | (self.idle >= _IDLE)
        shorter = torch.where(gained >= 0, 0.5, 0.5 * slope / (slope + 0.5 * gained))
        shorter = torch.where(tame & (shorter > _TENTH), shorter, _TENTH)
        small, large = ratio <= _POOR, (ratio >= _GOOD) | (self.par == 0)
        radius = torch.where(large, 2 * length, self.radius)
        self.radius = torch.where(small, shorter * torch.minimum(self.radius, length / _TENTH), radius)
        self.par = torch.where(small, self.par / shorter, torch.where(large, self.par / 2, self.par))
        self.size, self.steps = torch.where(accepted, size, self.size), self.steps + accepted
        return accepted

    def _tell(self) -> None:
        if self.report is None:
            return
        unit = self.problem.unit
        step = int(self.steps.max()) if self.steps.numel() else 0
        value = (0.5 * (self.size * unit) ** 2).to(self.problem.dtype)
        self.report(Iteration(step, value, self.norm * unit * unit, self.problem.tree(self.x.clone())))


def _gradient(both: torch.Tensor) -> torch.Tensor:
    """J'f, from the triangle of [J, f]."""
    return (both[..., :-1].mT @ both[..., -1:])[..., 0]


class _Model:
    """The linear model in scaled steps: the triangle R and q, and the step with par = 0; for the ``running`` lanes."""

    def __init__(self, both: torch.Tensor, metric: torch.Tensor, eps: float, running: torch.Tensor) -> None:
        n, self.running = both.shape[-1] - 1, running
        self.R, self.q = both[..., :n, :n] / metric.unsqueeze(-2), both[..., :n, n]
        self.slope = vector_norm((self.R.mT @ self.q.unsqueeze(-1))[..., 0], dim=-1)
        self.triangle = self.R
        self.longest = torch.linalg.solve_triangular(self.R, -self.q.unsqueeze(-1), upper=True)[..., 0]
        self._cut_rank((n + NOISE_OF_RANK) * eps)

    def _cut_rank(self, noise: float) -> None:
        """Singular values that are rounding become zero; see NOTE [rank]."""
        pivots = self.R.diagonal(dim1=-2, dim2=-1).abs()
        bad = self.running & (pivots.amin(-1) <= _SUSPICIOUS * noise * pivots.amax(-1))
        if not bool(bad.any()):
            return
        left, values, right = torch.linalg.svd(self.R[bad])
        kept = (values > noise * values[..., :1]).unsqueeze(-1)
        self.R, self.q, self.triangle = self.R.clone(), self.q.clone(), self.R.clone()
        self.R[bad] = R = torch.where(kept, values.unsqueeze(-1) * right, 0.0)
        self.q[bad] = q = torch.where(kept, left.mT @ self.q[bad].unsqueeze(-1), 0.0)[..., 0]
        # a par far below all singular values that are left stands for none
        tiny = torch.finfo(R.dtype).eps * vector_norm(R.flatten(-2), dim=-1)
        self.longest[bad], self.triangle[bad] = _solved(R, q, tiny * tiny)

    def fall(self, s: torch.Tensor) -> torch.Tensor:
        """||R s||^2."""
        return (self.R @ s.unsqueeze(-1)).square().sum((-2, -1))

    def step(self, radius: torch.Tensor, par: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """s [*lanes, n] and its par, from the par of the step before."""
        s, found = self.longest, torch.zeros_like(par)
        long = self.running & (vector_norm(s, dim=-1) > (1 + _NEAR) * radius)
        if bool(long.any()):
            s = s.clone()
            s[long], found[long] = self._damped(long, radius[long], par[long])
        return s, found

    def _damped(self, long: torch.Tensor, radius: torch.Tensor, par: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in the lanes [*lanes] whose step with par = 0 is too long; theirs are all numbers here, [B, ...]."""
        R, q, s, triangle, slope = (t[long] for t in (self.R, self.q, self.longest, self.triangle, self.slope))
        lower, upper = _newton(s, triangle, radius), slope / radius
        par = torch.minimum(torch.maximum(par, lower), upper)
        par = torch.where(par > 0, par, slope / vector_norm(s, dim=-1))
        todo = torch.ones_like(par, dtype=torch.bool)
        for _ in range(_MAX_PARS):
            other, triangle = _solved(R, q, par)
            s = torch.where(todo.unsqueeze(-1), other, s)
            excess = vector_norm(s, dim=-1) - radius
            todo = todo & (excess.abs() > _NEAR * radius)
            if not bool(todo.any()):
                break
            lower = torch.where(excess > 0, torch.maximum(lower, par), lower)
            upper = torch.where(excess < 0, torch.minimum(upper, par), upper)
            better = torch.minimum(torch.maximum(lower, par + _newton(s, triangle, radius)), upper)
            par = torch.where(todo, better, par)
        return s, par


def _solved(R: torch.Tensor, q: torch.Tensor, par: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """s(par) and its triangle T."""
    n = R.shape[-1]
    below = torch.diag_embed(par.sqrt().unsqueeze(-1).expand(q.shape))
    right = torch.cat([-q, torch.zeros_like(q)], -1).unsqueeze(-1)
    whole = torch.linalg.qr(torch.cat([torch.cat([R, below], -2), right], -1), mode="r").R
    triangle = whole[..., :n, :n]
    return torch.linalg.solve_triangular(triangle, whole[..., :n, n:], upper=True)[..., 0], triangle


def _newton(s: torch.Tensor, triangle: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Newton's correction of par."""
    length = vector_norm(s, dim=-1)
    unit = (s / length.unsqueeze(-1)).unsqueeze(-1)
    w = torch.linalg.solve_triangular(triangle.mT, unit, upper=False)[..., 0]
    change: torch.Tensor = (length - radius) / radius / (w * w).sum(-1)
    return change


_WHO = "il.solvers.LevenbergMarquardt", "il.solvers.LBFGS() or, under a constraint, il.solvers.ProjectedGradient()"


class Residuals(Vectors):
    """Residuals f, float64 [*lanes, k], in units of their size at init: squares neither overflow nor vanish.

    Args:
        objective: a model, and a loss that is half the sum of squares of its outputs: every evaluation checks that,
            or only the first where ``Composite.squares`` says so.
        init, theta: as a solver gets them.
    """

    def __init__(self, objective: Callable[..., Any], init: Any, theta: tuple[Any, ...]) -> None:
        leaves, self._spec = flatten(init)
        check_unknowns(leaves)
        self._composite, self._theta = composite_of(objective, *_WHO), theta
        self._like = [leaf.detach() for leaf in leaves]
        first = self._evaluate(self._like, checked=True)
        check_attached(next((leaf for leaf in self._outputs if leaf.requires_grad), self._outputs[0]))
        self.start = ravel(self._like, self.lane_dims).clone()
        self.unit = lane_scale(first)[..., 0].log2().floor().exp2()  # [*lanes], a power of 2: rounds nothing
        self.first = first / self.unit.unsqueeze(-1)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The residuals at x."""
        leaves = unravel(x, self._like, self.lane_dims)
        return self._evaluate(leaves, checked=not self._composite.squares) / self.unit.unsqueeze(-1)

    def triangle(self, f: torch.Tensor) -> torch.Tensor:
        """The triangle of the QR factors of [J, f], J = df / dx at the point evaluated last; [*lanes, n + 1, n + 1].

        J is made by its rows or by its columns, the fewer.
        """
        lanes, (k, n) = self.start.shape[:-1], (self.first.shape[-1], self.start.shape[-1])
        whole = f.new_zeros(*lanes, n + 1, max(k, n + 1))  # its transpose is [J, f], above rows of zeros where k <= n
        columns, whole[..., n, :k], unit_of_f = whole[..., :n, :k], f, self.unit.unsqueeze(-1)
        with torch.enable_grad():
            if k < n:
                like, times = self._outputs, lambda u: pull_back(self._outputs, self._points, u)
            else:
                like, times = self._points, pushed(self._outputs, self._points)
            units = torch.eye(min(k, n), dtype=self.start.dtype, device=self.start.device)
            for unit, part in zip(units.unbind(), (columns.mT if k < n else columns).unbind(-2), strict=True):
                found = times(unravel(unit.expand(*lanes, -1), like, self.lane_dims))
                torch.div(ravel(found, self.lane_dims), unit_of_f, out=part)
        triangle: torch.Tensor = torch.linalg.qr(whole.mT, mode="r").R
        return triangle

    def _evaluate(self, leaves: Leaves, *, checked: bool) -> torch.Tensor:
        """The residuals; ``checked``: against the objective's value, which also tells the lanes."""
        with torch.enable_grad():
            self._points = [leaf.detach().requires_grad_() for leaf in leaves]
            tree, spec = flatten(self._composite.model(unflatten(self._points, self._spec), *self._theta))
            self._outputs, cut = list(tree), [leaf.detach() for leaf in tree]
            if checked:
                value = self._composite.loss(unflatten(cut, spec), *self._theta).detach()
                self.lane_dims, self.dtype = value.ndim, value.dtype
        f = ravel(cut, self.lane_dims).double()
        if not checked:
            return f
        half = 0.5 * vector_norm(f, dim=-1) ** 2
        rounding = NOISE * math.sqrt(f.shape[-1] + 1) * torch.finfo(value.dtype).eps * half
        wrong = value.isfinite() & half.isfinite() & ((value - half).abs() > rounding)
        if bool(wrong.any()):
            raise ObjectiveError(
                "il.solvers.LevenbergMarquardt minimises half the sum of squares of what the model returns, which is "
                f"{float(half[wrong][0]):.6g}{name_lanes(wrong)}, where the objective is {float(value[wrong][0]):.6g}. "
                "Make it by il.least_squares(residuals), with the roots of weights inside of the residuals; a proximal "
                "term is one more of them, sqrt(strength) * (x - theta)."
            )
        return f
