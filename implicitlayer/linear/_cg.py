"""Conjugate gradients for symmetric positive-definite systems, one or many at a time."""

# Legend: A u = b; r residual, z = D^-1 r, p direction, alpha step length, beta = <r,z>_new / <r,z>_old.
# Hestenes & Stiefel 1952; Saad, Iterative Methods for Sparse Linear Systems, 2nd ed., Algorithm 9.1.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from implicitlayer.base._ritz import RitzValues
from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.linear._common import (
    BLOWN_UP,
    NOISE,
    SLACK,
    STEPS_BETWEEN_SYNCS,
    SUSPICIOUS_RESIDUAL,
    Keep,
    KrylovSolver,
    judge,
    lane_norm,
    zero_steps,
)
from implicitlayer.linear._operator import FlatOperator, Given, Precondition, lane_dot, lane_scale
from implicitlayer.linear._traced import AIM, FURTHER, TracedSolution, TracedSystem, conjugate_gradient

# NOTE [a small residual is no small error]: ||u - A^-1 b|| <= ||r|| / (smallest eigenvalue), and the smallest curvature
# seen estimates that eigenvalue from above, at no product. With the default tolerance a lane whose residual is small
# enough goes on while that estimate of its relative error is above a tenth of sqrt(rtol), until the residual is four
# orders below the tolerance or at rounding. Where at the end the smallest Ritz value still tells of an error above a
# tenth of u, the answer is reported. A right-hand side that hides the flat directions below its own rounding (b = A z
# at condition 1e6 in float32) hides them from the Ritz values too.
_WRONG = 0.1


@dataclass(frozen=True)
class ConjugateGradient(KrylovSolver):
    """Solve ``A u = b`` for symmetric positive-definite A from products ``A v`` alone.

    Stops a lane when ``||b - A u||_2 <= max(rtol ||b||_2, atol)``. The right-hand side is normalised first and the
    answer scaled back, so the scale of b does not matter. When the recursive residual says "reached", the true one is
    computed with one more product; if it is above the tolerance the iteration is restarted from there until that
    stops helping. With only ``max_steps`` given, that many steps are made (fewer only if the residual falls below eps)
    and reaching it is success: truncated conjugate gradients are a choice; the residual reported is then the recursive
    one. Zero steps return ``b`` itself (through the operator's diagonal metric, if it has one): in iMAML, first-order
    MAML.

    Args:
        rtol: relative tolerance; default 1e-10 (float64), 1e-5 (float32), if ``max_steps`` is not given alone. With
            the default a solve goes on below it while the curvatures seen tell of a large error in u.
        atol: absolute tolerance, in units of b.
        max_steps: limit of steps; default ten times the number of unknowns (in elements) of one lane.
        preconditioner: ``v -> approximately A^-1 v``, symmetric positive definite, on flat vectors [*lanes, n]; or a
            :class:`Jacobi` or :class:`Nystrom`, built from the operator. Default: the operator's diagonal metric.

    Raises:
        ValueError: a negative tolerance or step limit.

    Difference from ``scipy.sparse.linalg.cg``: lanes, a curvature check at every step (p'Ap <= 0 ends the lane with
    status INDEFINITE), the true residual at the end, and no dependence on the scale of b.

    Example:
        >>> import torch, implicitlayer as il
        >>> matrix = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
        >>> solution = il.ConjugateGradient(rtol=1e-12)(matrix, torch.ones(2, dtype=torch.float64))
        >>> solution.value.tolist(), solution.status.name, solution.num_steps
        ([1.0, 0.25], 'CONVERGED', 2)
    """

    method: ClassVar[str] = "Conjugate gradient"
    systems = "positive definite"

    def traced(self, system: TracedSystem) -> TracedSolution:
        """The same for a compiler; see :func:`implicitlayer.compile`."""
        return conjugate_gradient(system, self.limits)

    def solve(self, operator: FlatOperator, rhs: torch.Tensor) -> LinearSolution:
        given = None if self.preconditioner is None else Given(self, operator, rhs)
        plain = operator.metric_factor is None and operator.inverse_metric is None
        precondition = given or (None if plain else operator.precondition)
        asked = self.limits.has_tolerance
        scale = lane_scale(rhs)
        b = rhs / scale
        norm = lane_dot(b, b).sqrt()
        rtol = self.limits.relative(rhs.dtype)
        tolerance = self.limits.absolute(rtol, norm, scale)
        if self.max_steps == 0:
            return zero_steps(rhs, precondition or (lambda vector: vector), self.limits, self.method)
        # one system on the CPU: Python numbers cost a fraction of 0-d tensors
        alone = norm.numel() == 1 and rhs.device.type == "cpu"
        iterate = _iterate_single if alone else _iterate_lanes
        # a recursive residual below eps says nothing more, and its square soon underflows
        stop = torch.maximum(tolerance, torch.finfo(b.dtype).eps * norm)

        steps, codes = torch.zeros_like(norm, dtype=torch.int64), torch.full_like(norm, -1, dtype=torch.int64)
        run = _Run(torch.zeros_like(b), b, steps, codes, norm, stop, self.limits.most_steps(b), self.limits.at_limit)
        unit = self._unit(operator)
        if unit is not None and rtol is not None and self.rtol is None and self.atol == 0:
            run.aim = AIM * math.sqrt(rtol) * unit * torch.ones_like(norm)
            run.floor = torch.maximum(FURTHER * tolerance, 4 * torch.finfo(b.dtype).eps * norm)
        previous = norm * math.inf
        running = (norm > stop) & norm.isfinite()
        going = touched = bool(running.any())
        if not touched or not (alone or bool(running.all())):
            ended = torch.where(norm.isfinite(), int(Status.CONVERGED), int(Status.NONFINITE))
            run.codes = torch.where(running, run.codes, ended)
        while going:
            iterate(operator, precondition, run, running)
            if not asked:
                break
            run.residual = b - operator(run.value)
            true_norm = lane_dot(run.residual, run.residual).sqrt()
            run.residual_norm = torch.where(running, true_norm, run.residual_norm)
            # as in NOTE [rounds] of ``_common``
            running = running & (run.codes == int(Status.CONVERGED)) & (run.residual_norm > 2 * tolerance)
            if not bool(running.any()):
                break
            running = running & (run.residual_norm < 0.5 * previous) & (run.steps < run.max_steps)
            previous, going = run.residual_norm, bool(running.any())
        if touched and asked:
            run.codes = self._ill_conditioned(run, unit, norm)
        start = lambda: b if precondition is None else (given.function if given else precondition)(b)  # noqa: E731
        found = self._finish(run, start, norm, scale, tolerance, rtol, touched)
        return found if given is None else given.judged(found)

    def _unit(self, operator: FlatOperator) -> float | torch.Tensor | None:
        """What curvatures p'Ap / p'Mp are to be multiplied with to be those of A; None where M is no number."""
        if self.preconditioner is not None or operator.metric_factor is not None:
            return None
        inverse = operator.inverse_metric
        if inverse is None:
            return 1.0
        return 1 / inverse[..., 0].double() if inverse.shape[-1] == 1 else None

    def _ill_conditioned(self, run: _Run, unit: float | torch.Tensor | None, norm: torch.Tensor) -> torch.Tensor:
        """The codes; see NOTE [a small residual is no small error]."""
        if unit is None or run.smallest is None:
            return run.codes
        residual, size = run.residual_norm / unit, lane_norm(run.value)
        suspicious = (run.codes == int(Status.CONVERGED)) & (residual > SUSPICIOUS_RESIDUAL * run.smallest * size)
        if not bool(suspicious.any()):
            return run.codes
        low, high = run.ritz.extremes(norm)
        wrong = suspicious & (residual > _WRONG * low * size)
        # a loose tolerance of the user's own is a choice, up to rounding's part
        if self.rtol is not None or self.atol > 0:
            wrong = wrong & (torch.finfo(run.value.dtype).eps * high > 0.01 * low)
        return torch.where(wrong, int(Status.ILL_CONDITIONED), run.codes)

    def _finish(
        self,
        run: _Run,
        zero_steps: Callable[[], torch.Tensor],
        norm: torch.Tensor,
        scale: torch.Tensor,
        tolerance: torch.Tensor,
        rtol: float | None,
        touched: bool,
    ) -> LinearSolution:
        residual, codes = run.residual_norm, run.codes
        relative = torch.where(norm > 0, residual / norm, torch.zeros_like(norm))
        asked, reached = self.limits.has_tolerance, residual <= SLACK * tolerance
        if not asked:
            codes = torch.where((codes == int(Status.STEP_LIMIT)) & (relative > BLOWN_UP), int(Status.DIVERGED), codes)
        elif not bool((reached & (codes == int(Status.CONVERGED))).all()):
            codes = torch.where((codes == int(Status.ILL_CONDITIONED)) & ~reached, int(Status.STAGNATED), codes)
            codes = judge(codes, reached, relative, torch.zeros_like(relative), 0.1)
        fruitless = (codes > int(Status.STAGNATED)) & ~(relative < 1)
        value = torch.where(fruitless.unsqueeze(-1), zero_steps(), run.value) if bool(fruitless.any()) else run.value
        smallest = run.smallest if run.smallest is not None else torch.full_like(norm, math.inf)
        numbers = (codes, run.steps, residual * scale[..., 0], relative, smallest, asked and touched)
        return LinearSolution(value * scale, *numbers, method=self.method, rtol=rtol, ritz=run.ritz)


@dataclass
class _Run:
    """State of all lanes: value and residual [*lanes, n], the rest [*lanes]. Code -1: still to be decided.

    ``stop``, ``max_steps``, ``limit``: the residual norm to be reached, the limit of steps and the status there.
    ``aim``, ``floor``: with the default tolerance, see NOTE [a small residual is no small error].
    """

    value: torch.Tensor
    residual: torch.Tensor
    steps: torch.Tensor
    codes: torch.Tensor
    residual_norm: torch.Tensor
    stop: torch.Tensor
    max_steps: int
    limit: Status
    smallest: torch.Tensor | None = None
    largest: torch.Tensor | None = None
    ritz: RitzValues = field(default_factory=RitzValues)
    aim: torch.Tensor | None = None
    floor: torch.Tensor | None = None


# NOTE [p'Dp for nothing]: directions are D-orthogonal to the new z (D: the preconditioner's matrix, z = D^-1 r), so
# p_new' D p_new = r_new' z_new + beta^2 p' D p. The curvature p'Ap / p'Dp that the checks need costs no inner product.

# NOTE [a lane that fails]: a lane that met negative curvature keeps its last iterate, if that has lowered the residual.
# If not (it failed in its first direction, or stepped far along an almost flat one), its value is the answer of zero
# steps, D^-1 b (first-order MAML in iMAML): what on_failure="ignore" then passes on is a descent direction of size b.


def _iterate_single(operator: FlatOperator, precondition: Precondition | None, run: _Run, _: torch.Tensor) -> None:
    """Conjugate gradients on one system [n] (or [1, n]), with Python numbers for the scalars."""
    x, r = run.value, run.residual.clone()
    # BLAS keeps several partial sums; in float32 those of lane_dot are more exact
    dot = torch.dot if x.ndim == 1 and x.dtype is torch.float64 else lane_dot
    product = operator.matvec
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rz = pdp = dot(r, z).item()
    tol, steps, max_steps = run.stop.item(), int(run.steps), run.max_steps
    smallest = math.inf if run.smallest is None else run.smallest.item()
    largest = 0.0 if run.largest is None else run.largest.item()
    floor = NOISE * torch.finfo(x.dtype).eps
    preconditioned = z is not r
    code = run.limit
    rnorm = run.residual_norm.item()
    pivots, betas = run.ritz.new_round()
    aim = None if run.aim is None else run.aim.item()
    low = tol if run.floor is None else run.floor.item()
    arrived = False
    while steps < max_steps:
        ap = product(p)
        pap = dot(p, ap).item()
        steps += 1
        if not math.isfinite(pap) or not rz > 0:
            code = Status.NONFINITE if not math.isfinite(pap) else Status.INDEFINITE
            break
        curvature = pap / pdp
        smallest, largest = min(smallest, curvature), max(largest, curvature)
        pivots.append(pap / rz)
        if curvature <= floor * largest:
            code = Status.SINGULAR if curvature >= -floor * largest else Status.INDEFINITE
            break
        alpha = rz / pap
        x = x.add(p, alpha=alpha)
        r.sub_(ap, alpha=alpha)
        if precondition is not None:
            z = precondition(r)
        rz_new = dot(r, z).item()
        rnorm = math.sqrt(dot(r, r).item() if preconditioned else rz_new)
        arrived = rnorm <= tol
        if arrived and (aim is None or rnorm <= max(low, aim * smallest * float(lane_norm(x)))):
            code = Status.CONVERGED
            break
        beta = rz_new / rz
        betas.append(beta)
        rz, pdp = rz_new, rz_new + beta * beta * pdp
        p.mul_(beta).add_(z)
    if arrived and code is not Status.NONFINITE:
        code = Status.CONVERGED
    run.value, run.residual = x, r
    run.steps = torch.full_like(run.steps, steps)
    run.codes = torch.full_like(run.codes, int(code))
    run.residual_norm = torch.full_like(run.residual_norm, rnorm)
    run.smallest, run.largest = torch.full_like(run.stop, smallest), torch.full_like(run.stop, largest)


def _iterate_lanes(operator: FlatOperator, precondition: Precondition | None, run: _Run, running: torch.Tensor) -> None:
    """Conjugate gradients on all running lanes at once; a finished or failed lane is frozen by ``torch.where``.

    A frozen lane keeps its direction: one product serves all lanes, and what it is there (also NaN) is never read.
    """
    x, r = run.value, run.residual.clone()
    z = r if precondition is None else precondition(r)
    p = z
    rz = pdp = lane_dot(r, z)
    tolerance = run.stop
    smallest = torch.full_like(tolerance, math.inf) if run.smallest is None else run.smallest
    largest = torch.zeros_like(tolerance) if run.largest is None else run.largest
    floor = NOISE * torch.finfo(x.dtype).eps
    preconditioned = z is not r
    ran, codes = running, torch.where(running, int(run.limit), run.codes)
    rnorm, steps = run.residual_norm, run.steps
    sync = 1 if x.device.type == "cpu" else STEPS_BETWEEN_SYNCS
    pivots, betas = run.ritz.new_round()
    arrived = torch.zeros_like(running)
    none, nan = tolerance.new_zeros(()), tolerance.new_full((), math.nan)  # Python numbers cost torch.where a copy each
    keep, first_round = Keep(running), not bool(run.steps.any())
    for step in range(run.max_steps):
        if step % sync == 0 and not (keep.all or bool(running.any())):
            break
        if not first_round:  # lanes have made different numbers of steps
            running = running & (steps < run.max_steps)
            keep = Keep(running)
        ap = operator(p)
        pap = lane_dot(p, ap)
        steps = steps + running
        curvature = pap / pdp
        fine = (curvature > floor * largest) & (curvature < math.inf) & (rz > 0)
        if keep.all and bool(fine.all()):
            pivots.append(pap / rz)
            smallest, largest = torch.minimum(smallest, curvature), torch.maximum(largest, curvature)
        else:
            seen = running & curvature.isfinite()
            pivots.append(torch.where(seen, pap / rz, nan))
            smallest = torch.where(seen, torch.minimum(smallest, curvature), smallest)
            largest = torch.where(seen, torch.maximum(largest, curvature), largest)
            codes, running = _after_curvature(codes, running, curvature, floor * largest, rz > 0, arrived)
            keep = Keep(running)
        alpha = keep(rz / pap, none).to(x.dtype).unsqueeze(-1)
        x = keep.vectors(torch.addcmul(x, alpha, p), x)
        r = torch.addcmul(r, alpha, ap, value=-1)  # of lanes that run: nobody reads the others'
        z = r if precondition is None else precondition(r)
        rz_new = lane_dot(r, z)
        rnorm = keep((lane_dot(r, r) if preconditioned else rz_new).sqrt(), rnorm)
        arrived = keep(rnorm <= tolerance, arrived)
        reached = running & arrived
        if sync > 1 or bool(reached.any()):
            if run.aim is not None and run.floor is not None:
                reached = reached & (rnorm <= torch.maximum(run.floor, run.aim * smallest * lane_norm(x)))
            running = running & ~reached
            keep = Keep(running)
        beta = keep(rz_new / rz, nan)
        betas.append(beta)
        pdp = keep(rz_new + beta * beta * pdp, pdp)
        rz = keep(rz_new, rz)
        p = keep.vectors(torch.addcmul(z, beta.to(x.dtype).unsqueeze(-1), p), p)
    codes = torch.where(ran & arrived & (codes == int(run.limit)), int(Status.CONVERGED), codes)
    run.value, run.residual, run.steps, run.codes = x, r, steps, codes
    run.residual_norm, run.smallest, run.largest = rnorm, smallest, largest


def _after_curvature(
    codes: torch.Tensor,
    running: torch.Tensor,
    curvature: torch.Tensor,
    noise: torch.Tensor,
    positive: torch.Tensor,
    arrived: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of lanes that a curvature ends, and the lanes that go on; ``positive``: whether <r, z> is."""
    finite = curvature.isfinite()
    seen = running & finite
    flat = seen & (curvature <= noise)
    down = (seen & (curvature < -noise)) | (running & ~positive)
    codes = torch.where(flat & ~arrived, int(Status.SINGULAR), codes)
    codes = torch.where(down & ~arrived, int(Status.INDEFINITE), codes)
    codes = torch.where(running & ~finite, int(Status.NONFINITE), codes)
    still = seen & ~(flat | down)
    return codes, still
