"""What the linear solvers share: normalised right-hand side, refinement, statuses. Each file holds one recurrence."""

# Shapes: lanes: leading batch dimensions of independent systems; n: unknowns of one system, counted in elements.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch

from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.linear._operator import (
    FlatOperator,
    Given,
    LinearSolver,
    Precondition,
    Preconditioner,
    default_rtol,
    lane_dot,
    lane_scale,
)

# Code of a round that ended without an answer (a full cycle, a breakdown): go on from the true residual.
CONTINUE = -1
# A number below this many eps of the size of what it was computed from is rounding noise.
NOISE = 16
# The recursive residual drifts from the true one: up to ten times the tolerance counts as reached. Half of that here,
# because the product that recomputes the residual rounds too.
SLACK = 5.0
# A round that lowers the residual by less than this has stalled: one digit more would take 2300 such rounds.
_LEAST_FALL = 1e-3
# On a positive-definite matrix the residual grows by sqrt(cond) at most: beyond this a truncated solve is no choice but
# a step along an almost flat direction, and its value has no digit of the solution.
BLOWN_UP = 1e3
# A residual above this share of (smallest curvature seen) * ||u|| may hide a large error of u.
SUSPICIOUS_RESIDUAL = 1e-3
# A float64 norm from here to its inverse has lost no square to overflow, nor one of weight to underflow.
_SMALL = 1e-140
# On an accelerator the test "is any lane still running" is a host synchronisation: make it this rarely.
STEPS_BETWEEN_SYNCS = 8


@dataclass(frozen=True)
class Limits:
    """When to stop: ``||b - A u||_2 <= max(rtol ||b||_2, atol)``, or after ``max_steps``."""

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    has_tolerance: bool = field(init=False)  # whether one was asked for; with max_steps alone, none was

    def __post_init__(self) -> None:
        object.__setattr__(self, "has_tolerance", self.rtol is not None or self.atol > 0 or self.max_steps is None)
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None and not value >= 0:
                raise ValueError(
                    f"{name}={value} must be non-negative. For a fixed number of steps pass max_steps only."
                )
        if self.max_steps is not None and self.max_steps < 0:
            raise ValueError(f"max_steps={self.max_steps} must be non-negative. Zero steps return the right-hand side.")

    def relative(self, dtype: torch.dtype) -> float | None:
        """The relative tolerance; None where only a number of steps was asked for."""
        if not self.has_tolerance:
            return None
        return self.rtol if self.rtol is not None else (0.0 if self.atol > 0 else default_rtol(dtype))

    def absolute(self, rtol: float | None, norm: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The residual norm [*lanes] to be reached, in units of ``scale`` [*lanes, 1], for a b of this norm."""
        if rtol is None:
            return torch.zeros_like(norm)
        return torch.maximum(rtol * norm, self.atol / scale[..., 0].double())

    def most_steps(self, rhs: torch.Tensor) -> int:
        """The limit of steps for systems of the size of ``rhs`` [*lanes, n]."""
        return self.max_steps if self.max_steps is not None else 10 * max(rhs.shape[-1], 1)

    @property
    def at_limit(self) -> Status:
        """The status of a lane that has made all of its steps: success where nothing else was asked for."""
        return Status.MAX_STEPS_REACHED if self.has_tolerance else Status.STEP_LIMIT


@dataclass(frozen=True, eq=False)
class Round:
    """One system ``A d = residual`` for a method to solve from d = 0.

    Attributes:
        residual: [*lanes, n], of largest magnitude 1; zero in the lanes that are not running.
        running: bool [*lanes].
        stop: [*lanes], residual norm at which a lane is finished.
        steps_left: int [*lanes]; ``max_steps``, a Python number, is never below it.
    """

    residual: torch.Tensor
    running: torch.Tensor
    stop: torch.Tensor
    steps_left: torch.Tensor
    max_steps: int


@dataclass(frozen=True, eq=False)
class Correction:
    """What a method found in one :class:`Round`; lanes that were not running are not read.

    Attributes:
        value: d, [*lanes, n].
        codes: int [*lanes]: a :class:`Status`, ``LIMIT`` or ``CONTINUE``.
        steps: int [*lanes], products used.
        norm: [*lanes], norm of ``residual - A d`` by the recurrence; None where there is none.
        curvature: [*lanes], smallest Rayleigh quotient seen; None where there is none.
        growth: [*lanes], largest ``||A v|| / ||v||`` seen (in any norm), a lower bound of the size of A.
    """

    value: torch.Tensor
    codes: torch.Tensor
    steps: torch.Tensor
    norm: torch.Tensor | None = None
    curvature: torch.Tensor | None = None
    growth: torch.Tensor | None = None


# Code of a lane that used up its steps; the front turns it into STEP_LIMIT or MAX_STEPS_REACHED.
LIMIT = int(Status.MAX_STEPS_REACHED)


def lane_norm(vector: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """``sqrt(<vector, other>)`` per lane (the 2-norm without ``other``), with no overflow or underflow of squares.

    NaN where the inner product is negative.
    """
    if other is None or other is vector:
        norm: torch.Tensor = torch.linalg.vector_norm(vector, dim=-1, dtype=torch.float64)
        seen = norm.device.type == "cpu" and norm.numel() and not torch.compiler.is_compiling()  # a look costs little
        fine = seen and norm.min().item() > _SMALL and norm.max().item() < 1 / _SMALL
        if vector.dtype is not torch.float64 or fine:  # the squares of shorter floats fit into float64
            return norm
        scale = lane_scale(vector).log2().floor().exp2()  # a power of 2 rounds nothing
        careful = torch.linalg.vector_norm(vector / scale, dim=-1) * scale[..., 0]
        return torch.where((norm > _SMALL) & (norm < 1 / _SMALL), norm, careful)  # no lane's depends on the others
    scale, scale_other = lane_scale(vector), lane_scale(other)
    dot = lane_dot(vector / scale, other / scale_other)
    return dot.sqrt() * scale[..., 0].double().sqrt() * scale_other[..., 0].double().sqrt()


def rounding_of(product: Callable[[torch.Tensor], torch.Tensor], vector: torch.Tensor) -> torch.Tensor:
    """The relative rounding [*lanes] of a linear product, by 3 A(v / 3) - A v: that of the dtype it is made in."""
    once = product(vector)
    return lane_norm(3 * product(vector / 3) - once) / lane_norm(once)


def largest(vector: torch.Tensor) -> torch.Tensor:
    """Largest magnitude per lane, in float64; vectors are not empty."""
    return vector.abs().amax(-1).double()


def any_runs(running: torch.Tensor, step: int) -> bool:
    """Whether a lane still runs; on an accelerator asked only now and then."""
    every = 1 if running.device.type == "cpu" else STEPS_BETWEEN_SYNCS
    return step % every != 0 or bool(running.any())


def times(coefficient: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """One float64 coefficient per lane times a vector per lane, in the vector's dtype."""
    return coefficient.to(vector.dtype).unsqueeze(-1) * vector


def select(mask: torch.Tensor, vector: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
    """``vector`` in the lanes of ``mask``, ``other`` (zero without it) in the rest."""
    return torch.where(mask.unsqueeze(-1), vector, torch.zeros_like(vector) if other is None else other)


def merged(old: LinearSolution, new: LinearSolution, mask: torch.Tensor, remedy: str) -> LinearSolution:
    """``new`` in the lanes of ``mask``, ``old`` elsewhere; steps add up, the smallest curvature seen stays."""
    picked: dict[str, Any] = {
        name: torch.where(mask, getattr(new, name), getattr(old, name))
        for name in ("codes", "residual_norm", "relative_residual", "smallest_curvature")
    }
    picked["smallest_curvature"] = torch.fmin(old.smallest_curvature, picked["smallest_curvature"])
    true, steps = old.residual_is_true and new.residual_is_true, old.steps + torch.where(mask, new.steps, 0)
    value = select(mask, new.value, old.value)
    return replace(old, value=value, steps=steps, residual_is_true=true, remedy=remedy, **picked)


class Keep:
    """Picks the new values of running lanes and the old ones of all others."""

    def __init__(self, running: torch.Tensor) -> None:
        # asking is free on the CPU only, where it saves a pass over everything
        self.all = running.device.type == "cpu" and bool(running.all())
        self.running = running

    def __call__(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return new if self.all else torch.where(self.running, new, old)

    def vectors(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return new if self.all else torch.where(self.running.unsqueeze(-1), new, old)


# NOTE [rounds]: a recurrence drifts from the true residual by about eps * cond. Restarting from the true one recovers
# the digits, as long as each round at least halves it; a round that made no claim (a full cycle of GMRES, a breakdown
# of Bi-CGSTAB) only has to lower it. Without a tolerance no residual is recomputed at the end.


def refine(
    operator: FlatOperator, rhs: torch.Tensor, limits: Limits, correct: Callable[[Round], Correction], method: str
) -> LinearSolution:
    """Solve ``A u = rhs`` by rounds of ``correct``, each started from the true residual of the last.

    The right-hand side, and every residual after it, is divided by its largest magnitude first, so no scale matters.
    A round that does not lower the true residual is thrown away; see NOTE [rounds].
    """
    scale = lane_scale(rhs)
    b = rhs / scale
    initial = lane_norm(b)
    rtol = limits.relative(b.dtype)
    eps = torch.finfo(b.dtype).eps
    tolerance, max_steps, limit = limits.absolute(rtol, initial, scale), limits.most_steps(b), int(limits.at_limit)

    x, residual, norm = torch.zeros_like(b), b, initial
    # a residual below eps says nothing more
    running = initial.isfinite() & (initial > torch.maximum(tolerance, eps * initial))
    codes = torch.where(initial.isfinite(), int(Status.CONVERGED), int(Status.NONFINITE))
    steps = torch.zeros_like(codes)
    curvature, growth = torch.full_like(initial, math.inf), torch.zeros_like(initial)
    is_true = settled = False  # settled: every lane has converged, and by its true residual
    while bool(running.any()):
        unit = lane_scale(residual)
        stop = torch.maximum(tolerance, eps * norm) / unit[..., 0]
        found = correct(Round(select(running, residual / unit), running, stop, max_steps - steps, max_steps))
        steps = torch.where(running, steps + found.steps, steps)
        if found.curvature is not None:
            curvature = torch.where(running, torch.minimum(curvature, found.curvature), curvature)
        if found.growth is not None:
            growth = torch.where(running, torch.maximum(growth, found.growth), growth)
        codes = torch.where(running, torch.where(found.codes == LIMIT, limit, found.codes), codes)
        candidate = select(running, x + found.value * unit, x)
        goes_on = running & (codes == CONTINUE)
        if not limits.has_tolerance and found.norm is not None and not bool(goes_on.any()):
            x, norm, is_true = candidate, torch.where(running, found.norm * unit[..., 0], norm), False
            break
        new_residual = b - operator(candidate)
        new_norm = lane_norm(new_residual)
        is_true, previous = True, norm
        better = running & (new_norm < norm)
        ended = better & (codes == int(Status.CONVERGED)) & (new_norm <= 2 * tolerance)
        if rhs.device.type == "cpu" and bool(ended.all()):
            x, norm, settled = candidate, new_norm, True
            break
        x, residual = select(better, candidate, x), select(better, new_residual, residual)
        norm = torch.where(better, new_norm, norm)
        codes = torch.where(running & ~new_norm.isfinite(), int(Status.NONFINITE), codes)
        codes, undecided = _after_round(codes, running, norm, previous, 2 * tolerance, limits)
        running = undecided & (steps < max_steps)

    relative = torch.where(initial > 0, norm / initial, torch.zeros_like(initial))
    if limits.has_tolerance and not settled:
        rounding = eps * growth * lane_norm(x) / torch.where(initial > 0, initial, 1.0)
        codes = judge(codes, norm <= SLACK * tolerance, relative, rounding, math.sqrt(eps))
    numbers = (codes, steps, norm * scale[..., 0], relative, curvature)
    return LinearSolution(x * scale, *numbers, residual_is_true=is_true, method=method, rtol=rtol)


def _after_round(
    codes: torch.Tensor,
    running: torch.Tensor,
    norm: torch.Tensor,
    previous: torch.Tensor,
    enough: torch.Tensor,
    limits: Limits,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes in the light of the true residual's norm, and the lanes that another round may bring further."""
    claims = running & (codes == int(Status.CONVERGED))
    undecided = running & (codes == CONTINUE)
    if limits.has_tolerance:
        done = running & (norm <= enough)
        codes = torch.where(done, int(Status.CONVERGED), codes)
        undecided = (claims | undecided) & ~done
    fell = norm < torch.where(claims, 0.5, 1 - _LEAST_FALL) * previous
    codes = torch.where(undecided, torch.where(fell, int(limits.at_limit), int(Status.STAGNATED)), codes)
    return codes, undecided & fell


def judge(
    codes: torch.Tensor, reached: torch.Tensor, relative: torch.Tensor, rounding: torch.Tensor, small: float
) -> torch.Tensor:
    """The statuses in the light of the true residual.

    A flat direction met after the residual has fallen below ``small`` is where rounding takes over; met
    before that, the right-hand side is outside the range. It is so too where u has grown so large that the rounding of
    A u alone, ``eps ||A|| ||u||``, is above one per cent of b: the residual then says nothing.
    """
    flat = codes == int(Status.SINGULAR)
    codes = torch.where(flat & (relative < small), int(Status.STAGNATED), codes)
    codes = torch.where((codes == int(Status.CONVERGED)) & ~reached, int(Status.STAGNATED), codes)
    soft = (codes == int(Status.STAGNATED)) | (codes == int(Status.MAX_STEPS_REACHED))
    codes = torch.where((soft | flat) & reached, int(Status.CONVERGED), codes)
    codes = torch.where(soft & ~reached & (rounding > 0.01), int(Status.SINGULAR), codes)
    return torch.where(soft & ~reached & ~(relative < 1), int(Status.DIVERGED), codes)


def refine_direct(
    operator: FlatOperator, rhs: torch.Tensor, limits: Limits, correct: Callable[[Round], Correction], method: str
) -> LinearSolution:
    """:func:`refine`, which is spared where one system on the CPU is solved by the first round; the answer is the same.

    ``correct`` may be called again for the same round: it is to keep its factors.
    """
    given = operator, rhs, limits, correct, method
    return _first_round(*given) or refine(*given)


def _first_round(
    operator: FlatOperator, rhs: torch.Tensor, limits: Limits, correct: Callable[[Round], Correction], method: str
) -> LinearSolution | None:
    """The first round of :func:`refine` with Python's numbers; None where it does not end there."""
    if rhs.device.type != "cpu" or rhs.numel() == 0 or rhs.numel() > rhs.shape[-1]:
        return None
    lanes, rtol = rhs.shape[:-1], limits.relative(rhs.dtype)
    scale = rhs.abs().max().item()
    if not 0 < scale < math.inf or rtol is None:
        return None
    b = rhs / scale
    initial = torch.linalg.vector_norm(b).item()
    tolerance = max(rtol * initial, limits.atol / scale)
    max_steps = limits.most_steps(rhs)
    runs, stop, left = (torch.full(lanes, value) for value in (True, tolerance, max_steps))
    found = correct(Round(b, runs, stop, left, max_steps))
    if found.codes.item() != int(Status.CONVERGED):
        return None
    norm = torch.linalg.vector_norm(b - operator(found.value)).item()
    if not norm <= 2 * tolerance:
        return None
    curvature = torch.full(lanes, math.inf, dtype=torch.float64) if found.curvature is None else found.curvature
    absolute, relative = (torch.full(lanes, size, dtype=torch.float64) for size in (norm * scale, norm / initial))
    numbers = (found.codes, found.steps, absolute, relative, curvature)
    return LinearSolution(found.value * scale, *numbers, residual_is_true=True, method=method, rtol=rtol)


@dataclass(frozen=True)
class KrylovSolver(LinearSolver):
    """Base class of solvers by recurrences: tolerances and preconditioner; a subclass has ``correct``."""

    rtol: float | None = None
    atol: float = 0.0
    max_steps: int | None = None
    preconditioner: Precondition | Preconditioner | None = None

    method: ClassVar[str] = ""
    in_parts: ClassVar[Any] = property(lambda self: self.preconditioner is None)  # which may look at entries

    def __post_init__(self) -> None:
        self.limits  # noqa: B018  checks the arguments

    @cached_property
    def limits(self) -> Limits:
        """The three arguments that say when to stop."""
        return Limits(self.rtol, self.atol, self.max_steps)

    def correct(self, operator: FlatOperator, precondition: Precondition, start: Round) -> Correction:
        """The recurrence, run from zero on the right-hand side ``start.residual``."""
        raise NotImplementedError

    def solve(self, operator: FlatOperator, rhs: torch.Tensor) -> LinearSolution:
        """Solve for a flat right-hand side [*lanes, n]."""

        given = None if self.preconditioner is None else Given(self, operator, rhs)
        precondition = given or operator.precondition
        if self.max_steps == 0:
            return zero_steps(rhs, precondition, self.limits, self.method)
        found = refine(operator, rhs, self.limits, partial(self.correct, operator, precondition), self.method)
        return found if given is None else given.judged(found)


def zero_steps(rhs: torch.Tensor, precondition: Precondition, limits: Limits, method: str) -> LinearSolution:
    """The preconditioned right-hand side; the status tells that nothing was solved if a tolerance was asked for."""
    scale = lane_scale(rhs)
    finite = lane_norm(rhs / scale).isfinite()
    codes = torch.where(finite, int(limits.at_limit), int(Status.NONFINITE))
    unknown = torch.full(codes.shape, math.nan, dtype=torch.float64, device=rhs.device)
    numbers = (codes, torch.zeros_like(codes), unknown, unknown, unknown + math.inf)
    value, rtol = precondition(rhs / scale) * scale, limits.relative(rhs.dtype)
    return LinearSolution(value, *numbers, residual_is_true=False, method=method, rtol=rtol)
