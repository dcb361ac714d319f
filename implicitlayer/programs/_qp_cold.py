"""Active sets of many strictly convex quadratic programs at once, from a cold start."""

# Legend: B lanes, n unknowns, c rows J of all constraints, equations first, scaled to length one, Q to a largest entry
# of one; a [B, c] is one for a row that is held as an equation.
#
# With L L' = Q, V = L^-1 J' and f = -L^-1 p, the minimum with the rows a held is x = L^-T (f - V w), where
#     w = a (V'V)_a^-1 a t,   t = V'f - g,   and   J x - g = t - V'V w,
# with (V'V)_a the rows and columns of a. So a round of the search (NOTE [cold start] in ``_qp_single``) needs nothing
# of size n: one factorisation of the size of what is held. What it finds is a guess; made exact and judged by the
# conditions of the program itself, it is proved or is not.
#
# NOTE [first guess]: the multipliers w of the solution minimise 1/2 w'V'V w - t'w, those of inequalities over w >= 0.
# With D = diag(V'V)^-1/2 and s above the largest eigenvalue of D V'V D, accelerated projected gradients for u = D^-1 w
# are one small product each: u <- max(0, y + (D t - D V'V D y) / s) with y ahead of u (Y. Nesterov, Soviet Math. Dokl.
# 27, 1983). The rounds begin with what is largest after a few; half as many do then. For more than FEW rows these steps
# cost as much as the rounds they save.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from implicitlayer.base._tree import positive
from implicitlayer.programs._interior_point import ProgramStatus, QuadraticSolution
from implicitlayer.programs._interior_point_step import INDEPENDENT, Data, flat_lanes, norm_of, times
from implicitlayer.programs._kkt_active import FEW, ActiveConstraints, Conditions, held_first
from implicitlayer.programs._qp_exact import (
    CORRECTIONS,
    EXACT,
    TIGHT,
    Exact,
    active_by_force,
    conditions,
    left_of,
    violation,
    wrong_sides,
)
from implicitlayer.programs._qp_schur import SchurFactors
from implicitlayer.programs._qp_single import REPAIRS, ROUNDED

_ROUNDS = 15
_MOMENTA = tuple(k / (k + 3) for k in range(20))  # of the steps of NOTE [first guess]
_NOISE = 1e-10  # of the largest length: a border that is crossed, or pulls, by less is not said to
_DEFINITE = 1e-5  # smallest pivot of Q, relative to the largest, for which V'V keeps half of the digits


def cold_lanes(data: Data, dtype: torch.dtype, start: torch.Tensor | None = None) -> LanesProof | None:
    """What a cold start finds of every lane, None where that is nothing; ``dtype`` is that of the data.

    ``start``: inequalities to begin with, bool [*lanes, m]; none by default.
    """
    system = _System(data)
    if len(system.solvable) and not bool(system.solvable.any()):
        return None
    system.whole()
    return _made_exact(system, dtype, *system.search(start), "active set")


def guessed_lanes(data: Data, dtype: torch.dtype, answer: QuadraticSolution, found_by: str) -> LanesProof | None:
    """The same at an answer, or with its active set where that is not enough."""
    system = _System(data)
    if len(system.solvable) and not bool(system.solvable.any()):
        return None
    where = conditions(data, answer.x, dtype)
    held = active_by_force(answer.inequality, where)
    at = replace(answer, inequality=torch.where(held, answer.inequality, 0.0))
    error = violation(data, at, where)
    right = (error <= EXACT) & ~wrong_sides(at.inequality, held, where).any(-1)
    right = right & system.solvable.reshape(right.shape)
    rows = system.with_equations(held)
    if bool(right.all()):
        make = lambda: system.solution(rows, system.solvable, at.codes.flatten())[1]  # noqa: E731
        return LanesProof(data, at, where, error, held, right, make, found_by)
    answered = (at.codes == int(ProgramStatus.SOLVED)).flatten()
    return _made_exact(system, dtype, rows, system.solvable & answered, at.steps.flatten(), found_by)


def _made_exact(
    system: _System, dtype: torch.dtype, held: torch.Tensor, solved: torch.Tensor, steps: torch.Tensor, found_by: str
) -> LanesProof:
    """The points with these rows [B, c], and which of the lanes that are solved are proved there."""
    data = system.data
    at, factors, solved = system.solution(held, solved, steps)
    where, held = conditions(data, at.x, dtype), held[:, system.e :].reshape(at.inequality.shape)
    error, n, e = violation(data, at, where), data[1].shape[-1], data[3].shape[-1]
    for _ in range(CORRECTIONS):
        if not bool((solved & (error > EXACT).flatten()).any()):
            break
        left = left_of(data, at.equality, at.inequality, where), where.h, torch.where(held, where.g, 0.0)
        step = factors.solve(torch.cat(left, -1)[..., None])[..., 0]
        parts = at.x - step[..., :n], at.equality - step[..., n : n + e], at.inequality - step[..., n + e :]
        new = violation(data, moved := replace(at, x=parts[0], equality=parts[1], inequality=parts[2]))
        better = new < error
        if not bool(better.any()):
            break
        at, error = at.filled(better, moved.lanes(better)), torch.where(better, new, error)
        where = conditions(data, at.x, dtype)
    right = ~wrong_sides(at.inequality, held, where).any(-1)
    proved = solved.reshape(error.shape) & right & (error <= TIGHT)
    return LanesProof(data, at, where, error, held, proved, lambda: factors, found_by)


@dataclass(frozen=True, eq=False)
class LanesProof:
    """Solutions that satisfy all conditions of optimality to TIGHT in the lanes ``proved``; guesses in the others.

    Attributes:
        data: the programs. at: x and multipliers. where: the terms of the conditions there.
        error: [*lanes], the violation. held: bool [*lanes, m], what holds as an equation.
        make: makes ``factors``, with these in the lanes that are proved. found_by: the search.
    """

    data: Data
    at: QuadraticSolution
    where: Conditions
    error: torch.Tensor
    held: torch.Tensor
    proved: torch.Tensor
    make: Callable[[], SchurFactors]
    found_by: str

    @cached_property
    def factors(self) -> SchurFactors:
        return self.make()

    def active_set(self, active_rtol: float, hold_kinks: bool) -> tuple[ActiveConstraints, torch.Tensor]:
        return self.where.active_set(self.at.equality, self.solution()[2], active_rtol, hold_kinks)

    def settled(self, eps: float, active_rtol: float, rtol: float) -> bool:
        """Whether all lanes are proved, and what is held is all there is to say of them; see :class:`Terms`."""
        fine = self.proved & self.where.settled(self.held, self.at.inequality, active_rtol, rtol)
        return bool(fine.all())

    def solution(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, the multipliers of either kind, and what is held, [*lanes, ...]."""
        return self.at.x, self.at.equality, torch.where(self.held, self.at.inequality, 0.0), self.held

    def adjoint(self, v: Sequence[torch.Tensor | None], rtol: float) -> tuple[torch.Tensor, torch.Tensor] | None:
        """u_x [*lanes, n] and u_w [*lanes, c] with K u = v in every lane; see :meth:`SingleProof.adjoint`."""
        n, rows = self.at.x.shape[-1], torch.cat([self.data[2], self.data[4]], -2)
        mask = torch.cat([torch.ones_like(self.data[3]), self.held.double()], -1)
        parts = self.at.x, self.at.equality, self.at.inequality
        filled = [torch.zeros_like(like) if part is None else part for part, like in zip(v, parts, strict=True)]
        b = torch.cat([filled[0], mask * torch.cat(filled[1:], -1)], -1)
        largest = b.abs().amax(-1, keepdim=True)
        b = b / positive(largest)
        lengths = self.factors.lengths.reshape(*b.shape[:-1], -1)
        u, D = self.factors.solve(b[..., None])[..., 0], self.factors.units.reshape(b.shape)
        force, sizes = norm_of(torch.cat(parts[1:], -1) * lengths), norm_of(D * b)
        for left_solves in range(REPAIRS, -1, -1):  # NOTE [repairs] in ``_qp_single``
            x, w = u[..., :n], mask * u[..., n:]
            rest = b - torch.cat([times(self.data[0], x) + times(rows.mT, w), mask * times(rows, x)], -1)
            residual, span = norm_of(D * rest), norm_of(x)
            reach = torch.minimum(torch.where(force > 0, self.where.size * norm_of(w * lengths) / force, span), span)
            near = lengths * torch.maximum(EXACT * reach, ROUNDED * span)[..., None] + EXACT * b[..., n:].abs()
            if not left_solves or bool(((rest[..., n:].abs() <= near).all(-1) & (residual <= EXACT * sizes)).all()):
                break
            u = u + self.factors.solve(rest[..., None])[..., 0]
        if not bool((residual <= 2 * rtol * sizes).all()):
            return None
        return x * largest, w * largest

    def exact(self) -> Exact:
        """As the long way puts it; factors where all lanes are proved."""
        x, y, z, held = self.solution()
        solution = QuadraticSolution(x, y, z, self.at.codes, self.at.steps, self.error)
        return Exact(solution, self.error, held, self.factors if bool(self.proved.all()) else None)


class _System:
    """The programs in scaled units; after :meth:`whole` what serves every set of held rows."""

    V: torch.Tensor | None = None

    def __init__(self, data: Data) -> None:
        self.data, self.lanes = data, data[1].shape[:-1]
        Q, p, A, b, G, h = flat_lanes(data)
        self.n, self.e = p.shape[-1], b.shape[-1]
        rows, g = torch.cat([A, G], -2), torch.cat([b, h], -1)
        size, lengths = Q.abs().flatten(1).amax(-1), torch.linalg.vector_norm(rows, dim=-1)
        self.size, self.lengths = positive(size), positive(lengths)
        self.rows, self.g = rows / self.lengths[..., None], g / self.lengths
        L, info = torch.linalg.cholesky_ex(Q / self.size[:, None, None])
        pivots = L.diagonal(dim1=-2, dim2=-1)
        finite = (self.g.abs().sum(-1) + p.abs().sum(-1) + lengths.sum(-1)).isfinite()
        self.solvable = (info == 0) & (pivots.amin(-1) > _DEFINITE * pivots.amax(-1)) & finite
        if not bool(self.solvable.all()):
            L = torch.where(self.solvable[:, None, None], L, torch.eye(self.n, dtype=L.dtype, device=L.device))
        self.L = L
        self.f = torch.linalg.solve_triangular(L, (p / -self.size[:, None])[..., None], upper=False)

    def whole(self) -> None:
        """V and what a search wants of it."""
        self.V = torch.linalg.solve_triangular(self.L, self.rows.mT, upper=False)
        self.at_minimum = (self.V.mT @ self.f)[..., 0]
        self.t, self.gram = self.at_minimum - self.g, self.V.mT @ self.V

    def with_equations(self, held: torch.Tensor) -> torch.Tensor:
        """The mask [B, c] of these inequalities [*lanes, m] and all equations."""
        flat = held.reshape(self.lanes.numel(), held.shape[-1])
        return torch.cat([flat.new_ones(len(flat), self.e), flat], -1)

    def search(self, start: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The mask [B, c] of what is held, that of the lanes that are solved, and their rounds."""
        t, gram, lanes = self.t, self.gram, self.solvable.nonzero()[:, 0]
        none = self.with_equations(torch.zeros_like(self.data[5], dtype=torch.bool))
        held = self._first_guess(none) if start is None else self.with_equations(start)
        noise = torch.where(none, math.inf, self._noise(none))  # an equation is never on the wrong side
        kept, all_solved = torch.zeros_like(held), torch.zeros_like(self.solvable)
        rounds = torch.zeros(len(t), dtype=torch.int64, device=t.device)
        if len(lanes) < len(t):
            t, gram, noise, held, none = t[lanes], gram[lanes], noise[lanes], held[lanes], none[lanes]
        going = torch.ones_like(lanes, dtype=torch.bool)
        solved, steps = ~going, torch.zeros_like(lanes)
        for step in range(1, _ROUNDS + 1):
            if not len(lanes):
                break
            found, good = _multipliers(gram, t, held)
            beyond = t - times(gram, found)
            wrong = torch.where(held, -found, beyond) > noise
            good, steps = good & going, steps + going
            going = good & wrong.any(-1)
            solved = solved | (good ^ going)
            following = self._next(held, wrong, beyond)
            if step == 1:  # rows that depend on each other are no start
                following, going = torch.where(good[:, None], following, none), ~solved
            few = 2 * int(going.sum()) <= len(lanes)
            if few or step == _ROUNDS:
                kept[lanes], all_solved[lanes], rounds[lanes] = held, solved, steps
            held = torch.where(going[:, None], following, held)
            if few:
                lanes, t, gram, noise, held = lanes[going], t[going], gram[going], noise[going], held[going]
                solved, steps, going = solved[going], steps[going], going[going]
        return kept, all_solved, rounds

    def _noise(self, equations: torch.Tensor) -> torch.Tensor:
        """What is rounding of J x - g, [B, c]: of its own side, or of the lengths that x has; far borders are none."""
        if not equations.shape[-1]:
            return equations.double()
        lengths = torch.maximum(self.at_minimum.abs(), torch.where(equations, self.g.abs(), self.t))
        noise: torch.Tensor = _NOISE * torch.maximum(self.g.abs(), lengths.amax(-1, keepdim=True))
        return noise

    def _first_guess(self, held: torch.Tensor) -> torch.Tensor:
        """The mask [B, c] that a search begins with, given that of the equations; see NOTE [first guess]."""
        if not 0 < held.shape[-1] <= FEW:
            return held
        over = self.gram.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(self.t.dtype).tiny).rsqrt()
        scaled = self.gram * over[:, :, None] * over[:, None, :]
        size = torch.linalg.matrix_norm(scaled)[:, None, None]
        unit = torch.eye(held.shape[-1], dtype=scaled.dtype, device=scaled.device)
        step, pull = unit - scaled / size, (self.t * over)[..., None] / size
        lowest = torch.where(held, -math.inf, 0.0)[..., None]
        w = ahead = torch.zeros_like(pull)
        for momentum in _MOMENTA:
            new = torch.maximum(torch.baddbmm(pull, step, ahead), lowest)
            w, ahead = new, torch.lerp(w, new, 1 + momentum)
        w = w[..., 0]
        return self._next(held, (w > 0) & ~held, w, 0.75)

    def _next(self, held: torch.Tensor, wrong: torch.Tensor, beyond: torch.Tensor, part: float = 0.5) -> torch.Tensor:
        """Rows of the next round: without those that pull, with the worst crossed ones in this part of the room."""
        crossed = wrong & ~held
        room = (part * (self.n - held.sum(-1) + (held & wrong).sum(-1))).floor().clamp(min=1)
        if bool((crossed.sum(-1) > room).any()):
            rank = torch.where(crossed, -beyond, math.inf).argsort(-1).argsort(-1)
            crossed &= rank < room[:, None]
        return (held & ~wrong) | crossed

    def solution(
        self, held: torch.Tensor, solved: torch.Tensor, steps: torch.Tensor
    ) -> tuple[QuadraticSolution, SchurFactors, torch.Tensor]:
        """The points with these rows in the lanes that are solved, the factors, and where these can be relied on."""
        held = held & solved[:, None]
        if self.V is not None:
            some, real, gram, t = _of_held(self.gram, self.t, held)
            index = torch.arange(held.shape[-1], device=held.device).expand_as(held) if some is None else some
            V = self.V if some is None else self.V.gather(-1, index[:, None, :].expand(-1, self.n, -1))
            V = V * real[:, None, :]
        else:
            index = held_first(held)
            real = held.gather(-1, index).double()
            rows = self.rows.gather(1, index[:, :, None].expand(-1, -1, self.n)).mul_(real[:, :, None])
            V = torch.linalg.solve_triangular(self.L, rows.mT, upper=False)
            gram, t = V.mT @ V + torch.diag_embed(1 - real), (V.mT @ self.f)[..., 0] - self.g.gather(-1, index)
        schur, info = torch.linalg.cholesky_ex(gram)
        pivots = schur.diagonal(dim1=-2, dim2=-1)
        if pivots.shape[-1]:
            solved = solved & (info == 0) & (pivots.amin(-1) > INDEPENDENT * pivots.amax(-1))
        w = torch.cholesky_solve((real * t)[..., None], schur)
        x = torch.linalg.solve_triangular(self.L.mT, self.f - V @ w, upper=True)[..., 0]
        multipliers = torch.zeros_like(self.g).scatter(-1, index, w[..., 0] * real) * self.size[:, None] / self.lengths
        codes = torch.full_like(steps, int(ProgramStatus.SOLVED))
        parts = (x, multipliers[:, : self.e], multipliers[:, self.e :], codes, steps, torch.zeros_like(self.size))
        at = QuadraticSolution(*parts).reshaped(1, self.lanes)
        return at, SchurFactors(self.lanes, self.size, self.lengths, self.L, V, schur, index, held), solved


def _multipliers(gram: torch.Tensor, t: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [B, c] with the rows held, zero in the others, and the lanes in which they are independent."""
    index, real, part, at = _of_held(gram, t, held)
    factors, info = torch.linalg.cholesky_ex(part)
    w = torch.cholesky_solve((real * at)[..., None], factors)[..., 0]
    return w if index is None else torch.zeros_like(t).scatter(-1, index, w * real), info == 0


def _of_held(
    gram: torch.Tensor, t: torch.Tensor, held: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which rows, int [B, K], None for all; of these 1 where held, else 0; their matrix and their t.

    The matrix has rows and columns of the identity in the place of what is not held.
    """
    if t.shape[-1] <= FEW:
        index, real, part = None, held.double(), gram.clone()
    else:
        index = held_first(held)
        real, t = held.gather(-1, index).double(), t.gather(-1, index)
        where = index[:, :, None] * gram.shape[-1] + index[:, None, :]
        part = gram.flatten(1).gather(1, where.flatten(1)).reshape(where.shape)
    part.mul_(real[:, :, None]).mul_(real[:, None, :]).diagonal(dim1=-2, dim2=-1).add_(1 - real)
    return index, real, part, t
