"""Active sets of many strictly convex quadratic programs at once, from a cold start."""

# Legend: B lanes, n unknowns, c rows J of all constraints, equations first, scaled to length one, Q to a largest entry
# of one; a [B, c] is one for a row that is held as an equation.
#
# With L L' = Q, V = L^-1 J' and f = -L^-1 p, the minimum with the rows a held is x = L^-T (f - V w), where
#     w = a (V'V)_a^-1 a t,   t = V'f - g,   and   J x - g = t - V'V w,
# with (V'V)_a the rows and columns of a. So a round of the search (NOTE [cold start] in ``_qp_single``) needs nothing
# of size n: one factorisation of the size of what is held. What it finds is a guess for ``exact``, which proves it or
# goes on from there.

from __future__ import annotations

import math

import torch

from implicitlayer.programs._interior_point import Data, ProgramStatus, QuadraticSolution, interior_point
from implicitlayer.programs._interior_point_step import INDEPENDENT
from implicitlayer.programs._qp_exact import Start, violation
from implicitlayer.programs._qp_schur import SchurFactors

__all__ = ["answers"]

_ROUNDS = 15
_GOOD = 1e-6  # conditions that hold to this are the search's; rounding in V'V may leave more where Q is nearly singular
_NOISE = 1e-10  # of the largest length: a border that is crossed, or pulls, by less is not said to
_DEFINITE = 1e-5  # smallest pivot of Q, relative to the largest, for which V'V keeps half of the digits


def answers(data: Data, rtol: float) -> tuple[QuadraticSolution, Start | None]:
    """Approximate solutions, of a cold start or else the interior point, and what to go on from (or None)."""
    system = _System(data)
    w, held, solved, steps = system.search()
    answer = system.solution(w, steps)
    solved = solved & (violation(data, answer).flatten() <= _GOOD)
    if bool(solved.all()):
        return answer, system.start(held)
    rest = ~solved.reshape(data[1].shape[:-1])
    other = interior_point(tuple(t[rest] for t in data), rtol)  # type: ignore[arg-type]
    for name in QuadraticSolution.__dataclass_fields__:
        getattr(answer, name)[rest] = getattr(other, name)
    return answer, None


class _System:
    """The programs in scaled units, and what serves every set of held rows."""

    def __init__(self, data: Data) -> None:
        self.lanes = data[1].shape[:-1]
        Q, p, A, b, G, h = (t.reshape(self.lanes.numel(), *t.shape[len(self.lanes) :]) for t in data)
        self.n, self.e = p.shape[-1], b.shape[-1]
        rows, g = torch.cat([A, G], -2), torch.cat([b, h], -1)
        size, lengths = Q.abs().flatten(1).amax(-1), torch.linalg.vector_norm(rows, dim=-1)
        self.size, self.lengths = torch.where(size > 0, size, 1.0), torch.where(lengths > 0, lengths, 1.0)
        rows, self.g = rows / self.lengths[..., None], g / self.lengths
        L, info = torch.linalg.cholesky_ex(Q / self.size[:, None, None])
        pivots = L.diagonal(dim1=-2, dim2=-1)
        finite = self.g.isfinite().all(-1) & p.isfinite().all(-1) & rows.isfinite().flatten(1).all(-1)
        self.solvable = (info == 0) & (pivots.amin(-1) > _DEFINITE * pivots.amax(-1)) & finite
        self.L = torch.where(self.solvable[:, None, None], L, torch.eye(self.n, dtype=L.dtype, device=L.device))
        self.V = torch.linalg.solve_triangular(self.L, rows.mT, upper=False)
        self.f = torch.linalg.solve_triangular(self.L, (p / -self.size[:, None])[..., None], upper=False)
        self.at_minimum = (self.V.mT @ self.f)[..., 0]

    def search(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """w [B, c], the mask [B, m] of what is held, that of the lanes that are solved, and their rounds."""
        t, gram, lanes = self.at_minimum - self.g, self.V.mT @ self.V, self.solvable.nonzero()[:, 0]
        largest = torch.maximum(self.at_minimum.abs(), self.g.abs())
        noise = _NOISE * largest.amax(-1, keepdim=True) if t.shape[-1] else t
        w, kept, solved = torch.zeros_like(t), torch.zeros_like(t, dtype=torch.bool), torch.zeros_like(self.solvable)
        steps = torch.zeros(len(t), dtype=torch.int64, device=t.device)
        if len(lanes) < len(t):
            t, gram, noise = t[lanes], gram[lanes], noise[lanes]
        held, going = torch.zeros_like(t, dtype=torch.bool), torch.ones_like(lanes, dtype=torch.bool)
        held[:, : self.e] = True
        inequality = ~held
        for step in range(1, _ROUNDS + 1):
            if not len(lanes):
                break
            found, good = _multipliers(gram, t, held)
            beyond = t - (gram @ found[..., None])[..., 0]
            crossed, pulling = ~held & (beyond > noise), held & inequality & (found < -noise)
            # rows that contradict each other pass the factorisation by rounding, and are missed by their own solution
            good = good & going & ~(held & (beyond.abs() > noise)).any(-1)
            done = good & ~(crossed | pulling).any(-1)
            ended = lanes[done]
            w[ended], kept[ended], solved[ended], steps[ended] = found[done], held[done], True, step
            stay = held & ~pulling
            room = ((self.n - stay.sum(-1)) // 2).clamp(min=1)
            rank = torch.where(crossed, -beyond, math.inf).argsort(-1).argsort(-1)
            held = stay | (crossed & (rank < room[:, None]))
            going = good & ~done
            if 2 * int(going.sum()) <= len(lanes):
                lanes, t, gram, noise = lanes[going], t[going], gram[going], noise[going]
                held, inequality, going = held[going], inequality[going], going[going]
        return w, kept[:, self.e :], solved, steps

    def solution(self, w: torch.Tensor, steps: torch.Tensor) -> QuadraticSolution:
        """The points that belong to multipliers w [B, c]."""
        x = torch.linalg.solve_triangular(self.L.mT, self.f - self.V @ w[..., None], upper=True)[..., 0]
        multipliers = w * self.size[:, None] / self.lengths
        codes = torch.full_like(steps, int(ProgramStatus.SOLVED))
        parts = (x, multipliers[:, : self.e], multipliers[:, self.e :], codes, steps, torch.zeros_like(self.size))
        return QuadraticSolution(*(t.reshape((*self.lanes, *t.shape[1:])) for t in parts))

    def start(self, held: torch.Tensor) -> Start | None:
        """Factors with these inequalities; None where some are not independent beyond rounding."""
        rows = torch.cat([held.new_ones(len(held), self.e), held], -1)
        index, real = _compressed(rows)
        V = self.V.gather(-1, index[:, None, :].expand(-1, self.n, -1)) * real[:, None, :]
        schur, info = torch.linalg.cholesky_ex(V.mT @ V + torch.diag_embed(1 - real))
        pivots = schur.diagonal(dim1=-2, dim2=-1)
        if pivots.numel() and not bool(((info == 0) & (pivots.amin(-1) > INDEPENDENT * pivots.amax(-1))).all()):
            return None
        factors = SchurFactors(self.lanes, self.size, self.lengths, self.L, V, schur, index, rows)
        return Start(held.reshape((*self.lanes, held.shape[-1])), factors)


def _multipliers(gram: torch.Tensor, t: torch.Tensor, held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """w [B, c] with the rows held, zero in the others, and the lanes in which they are independent."""
    index, real = _compressed(held)
    if not index.shape[-1]:
        return torch.zeros_like(t), torch.ones(len(t), dtype=torch.bool, device=t.device)
    lane = torch.arange(len(t), device=t.device)[:, None, None]
    some = gram[lane, index[:, :, None], index[:, None, :]] * real[:, :, None] * real[:, None, :]
    factors, info = torch.linalg.cholesky_ex(some + torch.diag_embed(1 - real))
    w = torch.cholesky_solve((real * t.gather(-1, index))[..., None], factors)[..., 0]
    return torch.zeros_like(t).scatter(-1, index, w * real), info == 0


def _compressed(held: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The held rows first, as many as the lane with most of them has, int [B, K]; and one where held, zero else."""
    most = int(held.sum(-1).max()) if held.numel() else 0
    index = held.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :most]
    return index, held.gather(-1, index).double()
