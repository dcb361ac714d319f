"""The exact solution of convex quadratic programs near an approximate one, by a search for the active inequalities."""

# NOTE [active set]: an interior point gives for each inequality a force z and a distance s with s z almost zero, but
# not always one that is much smaller than the other: where the curvature is small, x may be far from a border that
# pushes with a tiny force. So the guess "active where the force is larger than the distance" is only where the search
# begins. With the inequalities of the guess as equations one linear solve gives the point; if a held border pulls
# (z < 0) or another one is crossed, the guess is wrong, and these change sides. The search ends where none does: then
# the conditions of the program itself hold, which for a convex program proves the solution. It mostly takes one or two
# solves. Changing all at once may run in a circle, so after _BOLD rounds one changes at a time, that of lowest index
# (Murty's rule, which ends for strictly convex programs with independent rows).
#
# NOTE [at rest]: conditions are judged relative to the terms of the gradient. Where a minimum of the objective alone
# satisfies the constraints, as in least squares that interpolate (||r||^2 under A x - r = b with A invertible), all
# multipliers are zero, and Q x + p may have nothing but rounding for terms, of which a force of rounding is a large
# part. So of an answer that fails, or has such terms, the minimum of the objective next to it, x - Q^+ (Q x + p), moved
# within the null space of Q to the equations, is looked at: where each row holds there to the rounding of its own
# terms, it is a solution of a program whose data differ by rounding, with multipliers that are zero.
#
# Sources: M. Hintermueller, K. Ito and K. Kunisch, SIAM J. Optim. 13 (2002), for the primal-dual active set step;
# K. G. Murty, Opsearch 11 (1974), for the rule against circles.

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import itemgetter

import torch

from implicitlayer.base._tree import positive
from implicitlayer.programs._interior_point import QuadraticSolution
from implicitlayer.programs._interior_point_step import Data, flat_lanes, of_each, times
from implicitlayer.programs._kkt_active import NOISE, Conditions, length_of_step
from implicitlayer.programs._kkt_linear import Factors, KktFactors, KktMatrices

TIGHT = 1e-11  # conditions that hold to this hold: rounding of a few solves
ENOUGH = 1e-6  # an answer whose conditions hold to this is one
EXACT = 1e-14  # conditions that hold to this are not improved
CORRECTIONS = 2  # solves with the factors of the active set: the second repairs the rounding of the first
_BOLD = 8  # rounds in which every wrong inequality changes sides
_CAREFUL = 40  # rounds in which one does
ROUNDING = 64  # signs of numbers below this many eps of everything are not known


@dataclass(frozen=True, eq=False)
class Exact:
    """Solutions, and what is known of their active sets.

    Attributes:
        solution: nearer to the conditions of optimality than the answer was, or the answer itself.
        error: [*lanes], of :func:`violation`.
        held: bool [*lanes, m], the inequalities held as equations.
        factors: of the matrix with these; None where it was not needed.
    """

    solution: QuadraticSolution
    error: torch.Tensor
    held: torch.Tensor
    factors: Factors | None


def conditions(program: Data, x: torch.Tensor, dtype: torch.dtype) -> Conditions:
    """The terms of the optimality conditions at x; ``dtype`` is that of the data."""
    Q, p, A, b, G, h = program
    Qx = times(Q, x)
    largest_q, largest_p = Q.abs().flatten(-2).amax(-1), p.abs().amax(-1)
    pull = torch.where(largest_q > 0, largest_p / positive(largest_q), 0.0)
    pull = torch.where(pull.isfinite(), pull, 0.0)
    eps = torch.finfo(dtype).eps
    return Conditions(x, x, Qx + p, Qx, times(A, x) - b, A, times(G, x) - h, G, eps, pull, sides=(b, h))


def exact(program: Data, answer: QuadraticSolution, near: torch.Tensor) -> Exact:
    """The solution next to the answer in the lanes of the mask ``near``; see NOTE [active set]."""
    where = conditions(program, answer.x, answer.x.dtype)
    first = active_by_force(answer.inequality, where)
    factors = factorised(program, first)
    error = violation(program, answer, where)
    shape, lanes = near.shape, near.flatten().nonzero()[:, 0]
    program, held = flat_lanes(program), first.reshape(shape.numel(), first.shape[-1])[lanes]
    error, near_by = error.flatten(), answer.reshaped(len(shape), (shape.numel(),))
    best = near_by.lanes(torch.ones_like(error, dtype=torch.bool))
    known: Factors | None = factors if len(lanes) == len(error) else None
    for attempt in range(_BOLD + _CAREFUL):
        if not len(lanes):
            break
        here = of_each(itemgetter(lanes), program)
        moved, wrong = _solve(here, near_by.lanes(lanes), held, known, shape)
        known = None
        new = violation(here, moved)
        better = new <= error[lanes]
        error[lanes[better]] = new[better]
        for name in ("x", "equality", "inequality"):
            getattr(best, name)[lanes[better]] = getattr(moved, name)[better]
        if attempt >= _BOLD:
            wrong = wrong & (wrong.cumsum(-1) == 1)
        go = wrong.any(-1)
        lanes, held = lanes[go], (held ^ wrong)[go]
    return Exact(best.reshaped(1, shape), error.reshape(shape), first, factors)


def _solve(
    program: Data, start: QuadraticSolution, held: torch.Tensor, known: Factors | None, shape: torch.Size
) -> tuple[QuadraticSolution, torch.Tensor]:
    """The stationary point with the held inequalities as equations, and the mask of those that contradict it.

    ``known``: the factors for these, in lanes of this shape.
    """
    Q, p, A, b, G, h = program
    force = held.to(p.dtype)
    factors: Factors = factorised(program, held) if known is None else known
    x, y, z = start.x, start.equality, start.inequality * force
    for _ in range(CORRECTIONS):
        slope = times(Q, x) + p + times(A.mT, y) + times(G.mT, z)
        off = torch.cat([slope, times(A, x) - b, force * (times(G, x) - h)], -1)
        rhs = off[..., None] if known is None else off.reshape(*shape, -1, 1)
        step = factors.solve(rhs).reshape(off.shape)
        dx, dy, dz = step.split([p.shape[-1], b.shape[-1], h.shape[-1]], -1)
        x, y, z = x - dx, y - dy, z - dz
    wrong = wrong_sides(z, held, conditions(program, x, x.dtype))
    return replace(start, x=x, equality=y, inequality=torch.where(held, z, 0.0)), wrong


def violation(program: Data, at: QuadraticSolution, where: Conditions | None = None) -> torch.Tensor:
    """The largest violation of a condition of optimality, each relative to the size of its terms, [*lanes].

    ``where``: the conditions at its x, where they are known.
    """
    where = conditions(program, at.x, at.x.dtype) if where is None else where
    force, distance = _sides(at.inequality.clamp(min=0), where)
    slope = left_of(program, at.equality, at.inequality.clamp(min=0), where)
    norms = where.norms_h
    equations = (where.h / positive(norms)).abs() / _length(where)[..., None]
    slack = torch.minimum(force, distance.clamp(min=0))  # complementarity: one of the two is zero
    still = torch.linalg.vector_norm(slope, dim=-1) / positive(where.scale)
    parts = [still[..., None], equations, (-distance).clamp(min=0), slack]
    return torch.cat(parts, -1).amax(-1).nan_to_num(torch.inf)


def at_rest(program: Data, found: Exact, farthest: float) -> Exact:
    """The same with minima of the objectives where these are solutions: NOTE [at rest].

    Of those at most ``farthest`` away, relative to the size of x.
    """
    x, rounding = found.solution.x, NOISE * torch.finfo(program[1].dtype).eps
    Qx = times(program[0], x)
    terms = torch.linalg.vector_norm(Qx, dim=-1) + torch.linalg.vector_norm(Qx + program[1], dim=-1)
    rough = ~(found.error <= TIGHT) | (terms <= rounding * _largest_terms(program, x))
    if bool(rough.any()):
        for t in (x, *program):
            rough = rough & t.isfinite().flatten(rough.ndim).all(-1)
    if not bool(rough.any()):
        return found
    some = of_each(itemgetter(rough), program)
    Q, p, A, b, G, h = some
    x = x[rough]
    values, vectors = torch.linalg.eigh(Q)
    curved = values > rounding * values[:, -1:].abs()
    along = times(vectors.mT, times(Q, x) + p) / torch.where(curved, values, 1.0)
    lengths = torch.linalg.vector_norm(A, dim=-1)
    over = torch.where(lengths > 0, 1 / lengths, 0.0)
    # moves that keep Q x, and what they do to the equations
    free = (over[..., None] * A) @ (vectors * ~curved[:, None])
    step = times(vectors, torch.where(curved, along, 0.0))
    step = step + times(vectors, times(torch.linalg.pinv(free), over * (times(A, x - step) - b)))
    still = torch.linalg.vector_norm(step, dim=-1) <= farthest * torch.linalg.vector_norm(x, dim=-1)
    x = x - step
    still &= terms_at_rest(some, x) > 0
    for rows, sides, off in ((A, b, (times(A, x) - b).abs()), (G, h, times(G, x) - h)):
        still &= (off <= rounding * (times(rows.abs(), x.abs()) + sides.abs())).all(-1)
    old, error = found.solution.lanes(rough), found.error.clone()
    at = replace(old, x=x, equality=torch.zeros_like(old.equality), inequality=torch.zeros_like(old.inequality))
    moved = old.filled(still, at.lanes(still))
    error[rough] = torch.where(still, 0.0, error[rough])
    return replace(found, solution=found.solution.filled(rough, moved), error=error)


def terms_at_rest(program: Data, x: torch.Tensor) -> torch.Tensor:
    """||Q|| ||x|| where each entry of Q x + p is the rounding of its own terms, [*lanes]; else zero."""
    Q, p = program[:2]
    rounding = NOISE * torch.finfo(x.dtype).eps * (times(Q.abs(), x.abs()) + p.abs())
    still = ((times(Q, x) + p).abs() <= rounding).all(-1)
    return torch.where(still, _largest_terms(program, x), 0.0)


def _largest_terms(program: Data, x: torch.Tensor) -> torch.Tensor:
    terms: torch.Tensor = torch.linalg.matrix_norm(program[0]) * torch.linalg.vector_norm(x, dim=-1)
    return terms


def error_of_x(program: Data, at: QuadraticSolution) -> torch.Tensor:
    """How far x is from the solution as far as the remaining gradient tells, [*lanes]; ``at.error`` is its violation.

    Zero where that gradient is rounding, and where the answer is no solution: of that one another warning speaks.
    """
    slope = left_of(program, at.equality, at.inequality, conditions(program, at.x, at.x.dtype))
    return torch.where((at.error > TIGHT) & (at.error <= ENOUGH), length_of_step(slope, times(program[0], slope)), 0.0)


def undecided(program: Data, at: QuadraticSolution) -> torch.Tensor:
    """Inequalities [*lanes, m] whose force and distance both differ from zero: either may be meant."""
    force, distance = _sides(at.inequality, conditions(program, at.x, at.x.dtype))
    return torch.minimum(force, distance) > TIGHT


def wrong_sides(z: torch.Tensor, held: torch.Tensor, where: Conditions) -> torch.Tensor:
    """Held borders that pull, and others that are crossed, bool [*lanes, m]."""
    force, distance = _sides(z, where)
    n, m = where.x.shape[-1], z.shape[-1]
    wrong: torch.Tensor = torch.where(held, force, distance) < -ROUNDING * torch.finfo(z.dtype).eps * (n + m) ** 0.5
    return wrong


def active_by_force(z: torch.Tensor, where: Conditions) -> torch.Tensor:
    """Inequalities [*lanes, m] whose force is larger than their distance, both relative: NOTE [active set]."""
    force, distance = _sides(z, where)
    return force > distance


def left_of(program: Data, y: torch.Tensor, z: torch.Tensor, where: Conditions) -> torch.Tensor:
    """What is left of the gradient of the Lagrangian, [*lanes, n]."""
    _, _, A, _, G, _ = program
    return where.gradient + times(A.mT, y) + times(G.mT, z)


def _sides(z: torch.Tensor, where: Conditions) -> tuple[torch.Tensor, torch.Tensor]:
    """Forces relative to the terms of the gradient, and signed distances relative to a length of the program."""
    force = z * where.norms_g / positive(where.scale)[..., None]
    return force, where.border_distance / _length(where)[..., None]


def _length(where: Conditions) -> torch.Tensor:
    return torch.maximum(where.size, where.reach)


def factorised(program: Data, held: torch.Tensor) -> KktFactors:
    """The factors of the program's matrix with the inequalities ``held`` [*lanes, m] as equations."""
    Q, p, A, b, G, _ = program
    mask = torch.cat([torch.ones_like(b), held.to(p.dtype)], -1)
    return KktFactors(KktMatrices(Q, torch.cat([A, G], -2), mask), torch.finfo(p.dtype).eps)
