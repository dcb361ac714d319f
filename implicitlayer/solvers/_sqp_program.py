"""The quadratic program of a step of sequential quadratic programming: its matrix, its relaxation, its solution."""

# Legend: B lanes, n unknowns, k constraints, equations first; J [B, k, n] their gradients, c [B, k] their values.
#
# NOTE [elastic]: where the linearised constraints J d = -c contradict each other there is no step. So every step may
# leave a part t of what is violated (Powell 1978; SLSQP does so where it has to):
#     minimise 1/2 d'B d + p'd + 1/2 tau t^2   subject to   J_h d - t h = -h,   J_g d - t max(g, 0) <= -g,
# which t = 1, d = 0 satisfies. Its multipliers y say tau t = y'(h, max(g, 0)), so that t vanishes with what is violated
# where they stay bounded, and costs no order of convergence. t is counted in units in which tau is the largest entry of
# B, so that its row does not spoil the condition. Where t is near 1, the program is solved again with one such column
# for each violated constraint, at a penalty on distances: then those that can improve do.
#
# NOTE [convex]: W, the Hessian of the Lagrangian, may bend down where the constraints let nothing move. With P the
# projection onto the span of the gradients of what holds, N = I - P, any s leaves the step on these as it is in
#     B = |N W N| + P W N + N W P + P W P + s P,
# for P d is fixed there. It is positive definite for s > |P W N|^2 / min |N W N| + |P W P| (Schur complement); a part
# more keeps it so where the guess of what holds is wrong. In the null space eigenvalues are turned around and small
# ones raised, which is exact where the second-order condition holds.

from __future__ import annotations

from dataclasses import dataclass

import torch

from implicitlayer.programs._interior_point import interior_point
from implicitlayer.programs._interior_point_step import Data, of_each, times
from implicitlayer.programs._qp_cold import cold_lanes
from implicitlayer.programs._qp_exact import exact

FLAT = 1e-8  # curvature below this share of the largest is none
_FARTHEST = 1e4  # s of NOTE [convex] over the size of W: beyond it the coupling of the two spaces is cut back
_PENALTY = 1e3  # tau over what the terms of the program can differ by
_STUCK = 0.5  # t above which constraints contradict each other, and each may give way by itself
_DEPENDENT = 1e-7  # singular values of rows of length one that are none
_RTOL = 1e-10  # of an interior point, for the lanes whose active set is not found from a cold start


@dataclass(frozen=True, eq=False)
class Held:
    """The span of the gradients of what holds: rows of length one R = U S V', those of the other constraints zero."""

    lengths: torch.Tensor
    U: torch.Tensor
    inverse: torch.Tensor
    V: torch.Tensor

    @classmethod
    def of(cls, rows: torch.Tensor, held: torch.Tensor) -> Held:
        lengths = torch.linalg.vector_norm(rows, dim=-1)
        lengths = torch.where(lengths > 0, lengths, 1.0)
        U, S, Vh = torch.linalg.svd(rows / lengths[..., None] * held[..., None], full_matrices=False)
        independent = S > _DEPENDENT
        return cls(lengths, U, torch.where(independent, 1 / S, 0.0), Vh.mT * independent[:, None, :])

    def multipliers(self, slope: torch.Tensor) -> torch.Tensor:
        """y of least ||slope + J'y||, [B, k]."""
        return -times(self.U, self.inverse * times(self.V.mT, slope)) / self.lengths

    def correction(self, c: torch.Tensor) -> torch.Tensor:
        """The shortest d with J d = -c in the rows that hold, [B, n]."""
        return -times(self.V, self.inverse * times(self.U.mT, c / self.lengths))


def convex(W: torch.Tensor, held: Held, size: torch.Tensor, flat: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """B of NOTE [convex]: curvatures of the null space that are negative or none become ``flat`` [B] at least, and all
    become ``least`` [B] at least; ``size`` [B], that of W."""
    definite = torch.linalg.eigvalsh(W)[:, 0] > torch.maximum(FLAT * size, least)
    if bool(definite.all()):
        return W
    P = held.V @ held.V.mT
    PW = P @ W
    PWP = PW @ P
    PWN = PW - PWP
    apart = size + flat + least  # of the eigenvalues of P, kept out of the way
    NWN = W - PWP - PWN - PWN.mT
    values, vectors = torch.linalg.eigh((NWN + NWN.mT) / 2 + apart[:, None, None] * P)
    raised = torch.where(values > (FLAT * apart)[:, None], values, torch.maximum(values.abs(), flat[:, None]))
    raised = torch.maximum(raised, least[:, None])
    lowest, most = raised.amin(-1), _FARTHEST * apart
    inner, coupling = torch.linalg.matrix_norm(PWP), torch.linalg.matrix_norm(PWN)
    wanted = 2 * coupling**2 / lowest + inner + torch.maximum(flat, least)
    share = ((most - inner) * lowest / 2).sqrt() / torch.where(coupling > 0, coupling, 1.0)
    share = torch.where(wanted > most, share, 1.0)[:, None, None]
    s = (torch.minimum(wanted, most) - apart)[:, None, None]
    B = (vectors * raised[:, None, :]) @ vectors.mT + share * (PWN + PWN.mT) + PWP + s * P
    return torch.where(definite[:, None, None], W, (B + B.mT) / 2)


@dataclass(frozen=True, eq=False)
class Step:
    """d [B, n], multipliers y [B, k], violations of the linearised constraints [B, k], and what holds there."""

    d: torch.Tensor
    y: torch.Tensor
    left: torch.Tensor
    held: torch.Tensor


def violation(c: torch.Tensor, e: int) -> torch.Tensor:
    """|h| of the first e entries, max(g, 0) of the others."""
    return torch.cat([c[:, :e].abs(), c[:, e:].clamp(min=0)], -1)


def step_of(
    B: torch.Tensor, p: torch.Tensor, c: torch.Tensor, J: torch.Tensor, guess: torch.Tensor, least: torch.Tensor, e: int
) -> Step:
    """The step of NOTE [elastic], the first e constraints equations, from the guess bool [B, k] of what holds.

    ``least`` [B]: what tau is at least, over the penalty, in units of the objective.
    """
    n = p.shape[-1]
    beyond = torch.cat([c[:, :e], c[:, e:].clamp(min=0)], -1)  # violation(c) with the signs of h
    largest = B.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    unit = (largest / (_PENALTY * torch.where(least > 0, least, 1.0))).sqrt()
    program = B, p, c, J, guess
    at, held = _solved(program, -unit[:, None, None] * beyond[..., None], e)
    stuck = (unit * at[:, n] > _STUCK) & ((beyond != 0).sum(-1) > 1)
    at = torch.cat([at[:, :n], at[:, n + 1 :]], -1)
    if bool(stuck.any()):
        lengths = torch.linalg.vector_norm(J[stuck], dim=-1)
        columns = torch.diag_embed(-(_PENALTY**-0.5) * torch.where(lengths > 0, lengths, 1.0) * (beyond[stuck] != 0))
        found, held[stuck] = _solved(tuple(t[stuck] for t in program), columns, e)
        at[stuck] = torch.cat([found[:, :n], found[:, n + columns.shape[-1] :]], -1)
    d, y = at[:, :n], at[:, n:]
    return Step(d, y, violation(c + times(J, d), e), held)


def _solved(program: tuple[torch.Tensor, ...], columns: torch.Tensor, e: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The solution with these columns for what is left, d, these and y, [B, n + j + k]; and what holds there."""
    B, p, c, J, guess = program
    j, largest = columns.shape[-1], B.diagonal(dim1=-2, dim2=-1).abs().amax(-1)
    Q = torch.nn.functional.pad(B, (0, j, 0, j)).clone()
    Q.diagonal(dim1=-2, dim2=-1)[:, -j:] = largest[:, None]
    rows = torch.cat([J, columns], -1)
    data: Data = (Q, torch.nn.functional.pad(p, (0, j)), rows[:, :e], -c[:, :e], rows[:, e:], -c[:, e:])
    proof = cold_lanes(data, torch.float64, guess[:, e:])
    at = interior_point(data, _RTOL) if proof is None else proof.at
    rest = torch.ones_like(at.error, dtype=torch.bool) if proof is None else ~proof.proved
    if bool(rest.any()):
        some = of_each(lambda t: t[rest], data)
        near = at.lanes(rest) if proof is None else interior_point(some, _RTOL)
        at = at.filled(rest, exact(some, near, torch.ones_like(near.error, dtype=torch.bool)).solution)
    held = torch.cat([torch.ones_like(guess[:, :e]), at.inequality > 0], -1)
    return torch.cat([at.x, at.equality, at.inequality], -1), held
