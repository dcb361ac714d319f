"""Sequential quadratic programming with exact second derivatives, for one problem with constraints or many at once."""

# Legend: B lanes, n unknowns, k constraints c = (h, g), e equations first; y their multipliers, J their gradients,
# W the Hessian of f + y'c; d the step, a its length. rho are the weights of the merit function
#     phi(x) = f(x) + sum_i rho_i v_i(x),   v = |h|, max(g, 0),
# along which d leads down where rho_i >= |y_i|: with v(c + J d) = t v (NOTE [elastic]), p'd = -d'B d - y'J d, so that
#     phi' = p'd - rho'(v - v(c + J d))  <=  -d'B d - (1 - t) (rho - |y|)'v.
#
# NOTE [curved]: near a solution a full step may raise phi by the curvature of the constraints alone (Maratos 1978). It
# is tried once more with what the constraints say at its end taken back, J r = -c(x + d) in the rows that hold.
#
# NOTE [multipliers]: those of the program belong to the linearised constraints; at the end of the step the ones of
# least squares are as accurate as x is, so they are taken where they have the right signs.
#
# NOTE [units]: unknowns may have units far apart, x = D u. What is rounding beside the largest curvature is then all
# there is of another. Where curvatures of the objective at init are that far apart, steps and errors are those of u,
# with D the inverse roots of these curvatures, as powers of two, which round nothing. (The Lagrangian's may vanish.)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import flatten, ravel, unflatten, unravel
from implicitlayer.programs._interior_point_step import norm_of, times
from implicitlayer.programs._units import units_by_curvature
from implicitlayer.solvers._descent import Limited
from implicitlayer.solvers._leaves import check_attached, check_unknowns
from implicitlayer.solvers._outcome import NOISE, StallWatch, codes_of, outcome
from implicitlayer.solvers._progress import Iteration, Report, reporting
from implicitlayer.solvers._sqp_program import FLAT, Held, Step, convex, step_of, violation

_DECREASE = 1e-4  # of the slope of phi that a step must bring
_SHORT, _SHORTEST = 0.25, 1e-3  # lengths below which the model is trusted less, and below which it is made anew
_LEAST_SHARE = 1e-3  # of the slope at init: steps along what has no curvature are at most 1000 times the size of x
_TRIES = 10  # models of one point that give no step
_FEW = 3  # derivatives up to which one after the other is cheaper than side by side
_WORDS = {
    Status.STAGNATED: "No further step improves the conditions of optimality{where}: they hold as far as rounding "
    "allows, or the constraints cannot all hold near there.",
    Status.NONFINITE: "The objective, a constraint or a derivative is not finite at init{where}.",
}


@dataclass(frozen=True)
class SQP(Limited):
    """Sequential quadratic programming for ``il.constrained_argmin``: equations and inequalities, all lanes at once.

    Each step solves a quadratic program with the Hessian of the Lagrangian, made convex in the null space of what
    holds, and the linearised constraints, which may give way where they contradict each other. A line search on the
    objective plus weighted violations, with a second-order correction, decides on its length. Near a solution with
    independent gradients and a positive definite reduced Hessian it converges quadratically. The multipliers are
    returned to the layer.

    Stops a lane when the gradient of the Lagrangian is at most ``max(atol, rtol * s)``, s the largest of its terms and
    of ||grad f|| at init, every constraint holds to ``rtol`` of the size of x as a distance, and no force is on a
    border that is farther away. Batched: every lane has its own step length, weights and active set, all are evaluated
    together, and a finished lane is frozen.

    Args:
        max_steps: limit of steps; each takes n second derivatives, so this is for up to a few hundred unknowns.
        rtol, atol: tolerances, see above.
        callback: called with an :class:`Iteration` at the start and after every step; ``gradient_norm`` is that of the
            Lagrangian.
        progress: show a bar (needs tqdm, extra ``implicitlayer[progress]``).

    Raises:
        ValueError: a negative limit or tolerance.
        ImportError: ``progress=True`` without tqdm.

    Source: Nocedal & Wright, Numerical Optimization, 2006, algorithm 18.3; Powell 1978 (the relaxed program and the
    weights). Difference to SciPy's SLSQP: second derivatives in place of a quasi-Newton matrix, many lanes.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.constrained_argmin(  # Hock and Schittkowski's problem 71
        ...     lambda x: x[0] * x[3] * x[:3].sum() + x[2],
        ...     il.solvers.SQP(),
        ...     equality=lambda x: (x**2).sum() - 40,
        ...     inequality=lambda x: torch.cat([25 - x.prod()[None], 1 - x, x - 5]),
        ... )
        >>> x = layer(torch.tensor([1.0, 5.0, 5.0, 1.0], dtype=torch.float64))
        >>> [round(v, 6) for v in x.tolist()]
        [1.0, 4.743, 3.82115, 1.379408]
    """

    max_steps: int = 200
    rtol: float = 1e-10
    _: KW_ONLY

    returns_multipliers = True

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count; of a problem with constraints the value is ``(x, (lambda, mu))``."""
        with reporting(self.callback, self.progress, self.max_steps) as report:
            return _Lanes(self, _Functions(objective, init, theta), report).run()


class _Functions:
    """f [B], c [B, k] and their derivatives in float64, at points [B, n]."""

    def __init__(self, objective: Any, init: Any, theta: tuple[Any, ...]) -> None:
        self.like, self.spec = flatten(init)
        check_unknowns(self.like)
        self.objective, self.theta = objective, theta
        self.constrained = hasattr(objective, "equality_vector")
        with torch.no_grad():
            self.lanes = objective(init, *theta).shape
        self.e: int = objective.num_equalities if self.constrained else 0
        self.n = sum(leaf.shape[len(self.lanes) :].numel() for leaf in self.like)
        self.eps = torch.finfo(self.like[0].dtype).eps
        self.start = self.flat(self.like)

    def flat(self, leaves: Any) -> torch.Tensor:
        """Leaves of all lanes as [B, n]."""
        return ravel([leaf.detach() for leaf in leaves], len(self.lanes)).reshape(-1, self.n).double()

    def tree(self, x: torch.Tensor, attached: bool = False) -> Any:
        """The inverse, in the structure of init."""
        leaves = unravel(x.reshape(*self.lanes, self.n), self.like, len(self.lanes))
        self.points = [leaf.requires_grad_() for leaf in leaves] if attached else leaves
        return unflatten(self.points, self.spec)

    def values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """f and c at x; their graph is kept for the derivatives."""
        at = self.tree(x, attached=True)
        with torch.enable_grad():
            if self.constrained:
                self.f, *parts = self.objective.values(at, *self.theta)
                self.c = torch.cat(parts, -1)
            else:
                self.f = self.objective(at, *self.theta)
                self.c = self.f.new_zeros(*self.lanes, 0)
            check_attached(self.f)
        return self.f.detach().reshape(-1).double(), self.c.detach().reshape(len(x), self.c.shape[-1]).double()

    def slopes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients [B, n] of f and [B, k, n] of c where the values were taken last."""
        p = torch.autograd.grad(self.f.sum(), self.points, retain_graph=True, materialize_grads=True)
        return self.flat(p), self._rows(self.c)

    def hessian(self, y: torch.Tensor) -> torch.Tensor:
        """Second derivatives of f + y'c there, [B, n, n]."""
        with torch.enable_grad():
            value = self.f.sum() + (y.reshape(self.c.shape).to(self.c.dtype) * self.c).sum()
            slope = torch.autograd.grad(value, self.points, create_graph=True, materialize_grads=True)
            W = self._rows(ravel(slope, len(self.lanes)))
        return (W + W.mT) / 2

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        """The derivatives of values [*lanes, j], [B, j, n]."""
        j = values.shape[-1]
        if not values.requires_grad or not j:
            return self.start.new_zeros(len(self.start), j, self.n)

        def one(unit: torch.Tensor) -> torch.Tensor:
            weights = unit.expand(values.shape)
            found = torch.autograd.grad(values, self.points, weights, retain_graph=True, materialize_grads=True)
            return ravel(found, len(self.lanes))

        units = torch.eye(j, dtype=values.dtype, device=values.device)
        try:
            rows = torch.stack([one(unit) for unit in units]) if j <= _FEW else _torch.mapped_over(one, units)
        except RuntimeError:  # a derivative that vmap cannot follow: one by one
            rows = torch.stack([one(unit) for unit in units])
        return rows.detach().reshape(j, -1, self.n).transpose(0, 1).double()


@dataclass(frozen=True, eq=False)
class _At:
    """What is known of the points of all lanes; ``held`` bool [B, k] is the guess of what holds there."""

    x: torch.Tensor
    f: torch.Tensor
    c: torch.Tensor
    p: torch.Tensor
    J: torch.Tensor
    y: torch.Tensor
    W: torch.Tensor
    held: torch.Tensor
    span: Held

    @property
    def finite(self) -> torch.Tensor:
        parts = [t.reshape(len(t), t[0].numel() if len(t) else 0) for t in (self.f, self.c, self.p, self.J, self.W)]
        return torch.cat(parts, -1).isfinite().all(-1)


def _where(lanes: torch.Tensor, new: Any, old: Any) -> Any:
    """``new`` in these lanes, of a tensor or of every part of what holds tensors."""
    if isinstance(new, torch.Tensor):
        return torch.where(lanes.reshape(-1, *[1] * (new.ndim - 1)), new, old)
    return type(new)(*(_where(lanes, part, vars(old)[name]) for name, part in vars(new).items()))


class _Lanes:
    """The loop: one evaluation in all lanes per round; bool masks are [B]."""

    def __init__(self, settings: SQP, functions: _Functions, report: Report | None) -> None:
        self.settings, self.of, self.report = settings, functions, report
        f, c = functions.values(functions.start)
        p, J = functions.slopes()
        y, self.zero = torch.zeros_like(c), torch.zeros_like(f)
        held = (torch.arange(c.shape[-1], device=c.device) < functions.e).expand(c.shape).clone()
        W = functions.hessian(y)
        self.at = _At(functions.start, f, c, p, J, y, W, held, Held.of(J.nan_to_num(0.0, 0.0, 0.0), held))
        self.finite = self.at.finite
        if not bool(self.finite.all()):  # these lanes stay where they are, and the others see nothing of them
            parts = {name: t.nan_to_num(0.0, 0.0, 0.0) for name, t in vars(self.at).items() if name in "fcpJW"}
            self.at = replace(self.at, **parts)
        self.first, self.rho, self.unit = self.at.p, y, units_by_curvature(self.at.W.diagonal(dim1=-2, dim2=-1))
        self.steps, self.failures, self.stalled = self.zero.long(), self.zero.long(), ~self.finite
        self.least = self.zero  # of all curvatures
        self.share = self.zero + 1  # of the slope at init over the size of x, which stands for curvatures that are none
        self.step = Step(torch.zeros_like(p), y, y, held)
        self.shift, self.length, self.slope = torch.zeros_like(p), self.zero + 1, self.zero
        self.error, self.norm = self._error()
        self.watch, self.best = StallWatch(self.error, f, functions.eps), (self.at, self.error)
        self.running = self.turning = self._unfinished()

    def _unfinished(self) -> torch.Tensor:
        going: torch.Tensor = (self.error > self.settings.rtol) & (self.steps < self.settings.max_steps)
        return going & ~self.stalled

    @property
    def size(self) -> torch.Tensor:
        """max(||x||, ||x - init||, distances of what is violated), [B]."""
        return self._size(torch.ones_like(self.at.x), self.at.span.lengths)

    def _size(self, unit: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        far = violation(self.at.c, self.of.e) / lengths
        sizes = [norm_of(x / unit)[:, None] for x in (self.at.x, self.at.x - self.of.start)]
        return torch.cat([*sizes, far], -1).amax(-1)

    def _in_units(self) -> tuple[torch.Tensor, _At]:
        """The unit of every unknown [B, n], and what is known, but for x, of unknowns in these; NOTE [units]."""
        at, unit = self.at, self.unit
        if unit is None:
            return torch.ones_like(at.x), at
        J = at.J * unit[:, None, :]
        W = at.W * unit[:, None, :] * unit[:, :, None]
        return unit, replace(at, p=at.p * unit, J=J, W=W, span=Held.of(J, at.held))

    def merit(self, f: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """phi, [B]."""
        return f + (self.rho * violation(c, self.of.e)).sum(-1)

    def _error(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The largest violation of a condition of optimality, relative as the docstring says, and ||grad L||, [B]."""
        (unit, at), e, rest = self._in_units(), self.of.e, norm_of(self.at.p + times(self.at.J.mT, self.at.y))
        size, forces = self._size(unit, at.span.lengths)[:, None], at.y.abs() * at.span.lengths
        terms = torch.cat([forces, norm_of(self.first * unit)[:, None], norm_of(at.p)[:, None]], -1)
        terms, left = terms.amax(-1, keepdim=True), norm_of(at.p + times(at.J.mT, at.y))
        off, inside = (t / at.span.lengths for t in (violation(at.c, e), (-at.c).clamp(min=0)))
        still = torch.where(rest <= self.settings.atol, 0.0, left)[:, None]
        parts = [_over(still, terms), _over(off, size), torch.minimum(_over(inside, size), _over(forces, terms))[:, e:]]
        return torch.cat(parts, -1).amax(-1).nan_to_num(torch.inf), rest

    def run(self) -> SolverResult:
        self._tell()
        while bool(self.running.any()):
            self.round()
        at = _where(self.best[1] < self.error, self.best[0], self.at)
        error = torch.minimum(self.best[1], self.error)
        reached, lanes = error <= self.settings.rtol, self.of.lanes
        y = at.y.reshape(*lanes, at.y.shape[-1])
        tree = self.of.tree(at.x)
        value = (tree, (y[..., : self.of.e], y[..., self.of.e :])) if self.of.constrained else tree
        reached, finite, stalled = (t.reshape(lanes) for t in (reached, self.finite, self.stalled & ~reached))
        return outcome(value, self.steps, codes_of(True, reached, finite, stalled), _WORDS)

    def round(self) -> None:
        """One evaluation in all lanes."""
        if bool(self.turning.any()):
            self._turn()
        trial = _where(self.running, self.at.x + self.length[:, None] * self.step.d + self.shift, self.at.x)
        f, c = self.of.values(trial)
        before, after = self.merit(self.at.f, self.at.c), self.merit(f, c)
        terms = self.at.f.abs() + (self.rho * self.at.span.lengths).sum(-1) * self.size
        allowed = before + _DECREASE * self.length * self.slope + NOISE * self.of.eps * terms
        accepted = self.running & (after <= allowed)
        if bool(accepted.any()):
            accepted = self._accept(accepted, trial, f, c)
        failed = self.running & ~accepted
        if bool(failed.any()):
            self._shorten(failed, c, before, after)
        self.running = self._unfinished()
        self.turning = (accepted | (failed & (self.length < _SHORTEST))) & self.running

    def _turn(self) -> None:
        """New steps and weights in the lanes that turn."""
        unit, at = self._in_units()
        e, size, far = self.of.e, torch.linalg.matrix_norm(at.W), self._size(unit, at.span.lengths)
        flat = torch.maximum(self.share * norm_of(self.first * unit) / torch.where(far > 0, far, 1.0), FLAT * size)
        B = convex(at.W, at.span, size, torch.where(flat > 0, flat, 1.0), self.least)
        off = violation(at.c, e)
        least = norm_of(at.p) * far + size * far * far + (self.rho * off).sum(-1)
        step = step_of(B, at.p, at.c, at.J, at.held, least, e)
        self.step = _where(self.turning, replace(step, d=step.d * unit), self.step)
        d, forces = self.step.d / unit, self.step.y.abs()
        self.rho = _where(self.turning, torch.maximum(forces, (self.rho + forces) / 2), self.rho)
        down = (at.p * d).sum(-1) - (self.rho * (off - self.step.left)).sum(-1)
        self.slope = down.clamp(max=0.0)
        self.curvature = _over((d * times(B, d)).sum(-1), (d * d).sum(-1))
        self.length = _where(self.turning, self.zero + 1, self.length)
        self.shift = _where(self.turning, torch.zeros_like(d), self.shift)

    def _accept(self, lanes: torch.Tensor, trial: torch.Tensor, f: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Move these lanes, but those whose derivatives are not finite; returns the lanes that moved."""
        old, e, held, full = self.at, self.of.e, self.step.held, self.length == 1
        p, J = self.of.slopes()
        span = Held.of(J.nan_to_num(0.0, 0.0, 0.0), held)
        unit, scaled = self._in_units()
        fit = span if scaled is old else Held.of(J.nan_to_num(0.0, 0.0, 0.0) * unit[:, None, :], held)
        fitted = fit.multipliers(p * unit) * held
        good = full & (fitted[:, e:] >= 0).all(-1) & fitted.isfinite().all(-1)
        y = _where(good, fitted, old.y + self.length[:, None] * (self.step.y - old.y))
        new = _At(trial, f, c, p, J, y, self.of.hessian(y), held, span)
        lanes = lanes & new.finite
        self.at = _where(lanes, new, old)
        self.error, self.norm = self._error()
        self.steps, self.failures = self.steps + lanes, torch.where(lanes, 0, self.failures)
        short = self.length < _SHORT
        kept = torch.where(self.least > FLAT * torch.linalg.matrix_norm(self.at.W), 0.1 * self.least, 0.0)
        least = torch.where(full, kept, torch.where(short, torch.maximum(4 * self.least, self.curvature), self.least))
        share = self.share * torch.where(full, 0.1, torch.where(short, 10.0, 1.0))
        self.least = torch.where(lanes, least, self.least)
        self.share = torch.where(lanes, share, self.share).clamp(_LEAST_SHARE, 1.0)
        move, value = (lambda: _over(norm_of(self.at.x - old.x), self.size)), self.merit(self.at.f, self.at.c)
        self.stalled = self.stalled | self.watch.look(lanes, self.error, value, lambda: self.zero + 1, move, True)
        self.best = _where(self.error < self.best[1], self.at, self.best[0]), torch.minimum(self.error, self.best[1])
        self._tell()
        return lanes

    def _shorten(self, lanes: torch.Tensor, c: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """The next trial of these lanes: corrected once at full length (NOTE [curved]), then shorter."""
        first = lanes & (self.length == 1) & ~self.shift.any(-1) & c.isfinite().all(-1)
        held = self.step.held & first[:, None]
        unit, at = self._in_units()
        shift = Held.of(at.J, held).correction(torch.where(held, c, 0.0))
        worth = first & shift.any(-1) & (norm_of(shift) <= norm_of(self.step.d / unit))
        self.shift = _where(lanes, torch.where(worth[:, None], shift * unit, 0.0), self.shift)
        # the minimum of the parabola through both values and the slope
        down = self.length * self.slope
        ratio = (-down / (2 * (after - before - down))).nan_to_num(0.1).clamp(0.1, 0.5)
        self.length = torch.where(lanes & ~worth, ratio * self.length, self.length)
        lost = lanes & (self.length < _SHORTEST)
        self.failures, self.share = self.failures + lost, torch.where(lost, 1.0, self.share)
        self.least = torch.where(lost, torch.maximum(10 * self.least, self.curvature / _SHORT), self.least)
        self.stalled = self.stalled | (lost & (self.failures > _TRIES))

    def _tell(self) -> None:
        if self.report is None:
            return
        value, norm = (t.reshape(self.of.lanes) for t in (self.at.f.to(self.of.like[0].dtype), self.norm))
        step = int(self.steps.max()) if len(self.steps) else 0
        self.report(Iteration(step, value, norm, self.of.tree(self.at.x)))


def _over(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a / b of non-negative numbers; 0 / 0 is 0."""
    return torch.where(a > 0, a / b, 0.0)
