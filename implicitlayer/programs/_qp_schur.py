"""The matrix of strictly convex quadratic programs with some inequalities as equations, by Cholesky factors alone."""

# Legend: B programs (one of each in NumPy); n unknowns; c rows J, equations first, then inequalities; K of them held.
# Rows are scaled to length one and Q to a largest entry of one, so that every unknown is a length.
#
#     Q x + J'w = f,  J x = g  for the held rows.  With L L' = Q, V = L^-1 J' and S = V'V = J Q^-1 J':
#     S w = V'L^-1 f - g,   L'x = L^-1 f - V w.
#
# L and V are those of all rows and serve every set of held ones; a set costs the factor of its S, [K, K]. S loses the
# digits that the condition of Q takes, and a solve with the residual brings them back. Where Q or S is not positive
# definite beyond that, there are no factors.

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from implicitlayer.base._status import Status
from implicitlayer.programs._interior_point_single import Array, product, triangular_solves
from implicitlayer.programs._interior_point_step import INDEPENDENT
from implicitlayer.programs._qp_terms import Mask, SingleProgram

_FEW = 32  # rows held up to which NumPy's inverse is cheaper than calls of torch, and uses one thread
_DEFINITE = 1e-7  # smallest pivot of L relative to the largest: the condition of Q is then above 1e14


class SchurFactors:
    """Solves with K of ``_kkt_linear`` in the lanes of B programs, [*lanes] of them.

    Args:
        lanes: their shape.
        size, lengths: [B] and [B, c], what Q and the rows were divided by.
        factor: L [B, n, n].
        V, schur: [B, n, K] and the Cholesky factor [B, K, K] of V'V, of the held rows; where a lane holds fewer,
            columns of zeros and rows of the identity fill up.
        index: int [B, K], the held rows, in any order; what fills up is not held.
        held: bool [B, c].
    """

    def __init__(
        self,
        lanes: torch.Size,
        size: torch.Tensor,
        lengths: torch.Tensor,
        factor: torch.Tensor,
        V: torch.Tensor,
        schur: torch.Tensor,
        index: torch.Tensor,
        held: torch.Tensor,
    ) -> None:
        self.size, self.lengths = size[:, None, None], lengths[..., None]
        self.factor, self.V, self.schur, self.index, self.held = factor, V, schur, index[..., None], held[..., None]
        rows = torch.where(held, size[:, None].sqrt() / lengths, 1.0)
        units = torch.cat([size[:, None].rsqrt().expand(-1, factor.shape[-1]), rows], -1)
        self.units = units.reshape((*lanes, units.shape[-1]))
        self.codes = torch.full(lanes, int(Status.CONVERGED), device=V.device)
        self.flat = torch.zeros(lanes, dtype=torch.bool, device=V.device)
        self.curvature = torch.full(lanes, math.inf, dtype=V.dtype, device=V.device)

    def solve(self, rhs: torch.Tensor) -> torch.Tensor:
        """K^-1 rhs for [*lanes, n + c, columns]; a row that is not held stands for -u = b."""
        n, flat = self.factor.shape[-1], rhs.reshape(len(self.factor), *rhs.shape[-2:])
        f = torch.linalg.solve_triangular(self.factor, flat[:, :n] / self.size, upper=False)
        rows, rest = self.index.expand(-1, -1, flat.shape[-1]), -flat[:, n:]
        if rows.shape[1]:
            g = (flat[:, n:] * self.held / self.lengths).gather(1, rows)
            w = torch.cholesky_solve(self.V.mT @ f - g, self.schur)
            f = f - self.V @ w
            rest = torch.where(self.held, torch.zeros_like(rest).scatter(1, rows, w) * self.size / self.lengths, rest)
        x = torch.linalg.solve_triangular(self.factor.mT, f, upper=True)
        return torch.cat([x, rest], 1).reshape(rhs.shape)


class Guess(NamedTuple):
    """A minimum with some rows held: their w [K], L'x [n], and J x - g of all rows [c], in scaled units.

    ``system`` is what solves with these rows.
    """

    system: SchurSet
    w: Array
    half: Array
    beyond: Array


class SchurRows:
    """L of one program, f = -L^-1 p, and after :meth:`whole` V of all rows and t = V'f - g for the sides g."""

    V: Array | None = None  # [c, n], one row of J each

    def __init__(self, program: SingleProgram) -> None:
        self.of, self.over, self.equations = program, program.over, np.arange(program.e)
        factor, info = torch.linalg.cholesky_ex(torch.from_numpy(program.Q / program.curved))
        pivots = factor.numpy().diagonal()
        self.definite = not info.item() and bool(pivots.min() > _DEFINITE * pivots.max())
        if self.definite:
            self.factor = factor
            self.down, self.up = triangular_solves(factor)

    def whole(self) -> None:
        """V and t, which a search wants."""
        program = self.of
        self.V = self._solved(program.rows / self.over[:, None])
        self.times, self.sides = product(self.V), program.sides / self.over
        self.f = self.down(program.p / -program.curved)
        self.t = self.times(self.f) - self.sides
        size = np.abs(self.t)  # where a side is infinite, nothing else is to be measured by it
        self.size = float(np.where(size < math.inf, size, 0.0).max()) if len(size) else 0.0

    def _solved(self, rows: Array) -> Array:
        solved = torch.linalg.solve_triangular(self.factor.mT, torch.from_numpy(rows), upper=True, left=False)
        array: Array = solved.numpy()
        return array

    def guess(self, held: Mask) -> Guess | None:
        """The minimum with what is held."""
        system = None if self.V is None else self._of(held)
        if system is None:
            return None
        w = system.weights(self.t[system.keep])
        half = self.f - system.back(w)
        return Guess(system, w, half, self.times(half) - self.sides)

    def point(self, guess: Guess) -> tuple[Array, Array]:
        """x [n] and the multipliers of all rows [c], in the units of the program."""
        w = np.zeros(len(self.over))
        keep = guess.system.keep
        w[keep] = guess.w * self.of.curved / self.over[keep]
        return self.up(guess.half), w

    def hold(self, held: Mask) -> SchurSet | None:
        """What solves with these rows; None where they are not independent."""
        system = self._of(held)
        return system if system is not None and system.independent() else None

    def _of(self, held: Mask) -> SchurSet | None:
        """The same, None where they are more than there are unknowns or S has no inverse."""
        keep = np.concatenate([self.equations, self.of.e + held.nonzero()[0]])
        if len(keep) > self.of.n:
            return None
        V = self._solved(self.of.rows[keep] / self.over[keep, None]) if self.V is None else self.V[keep]
        try:
            return SchurSet(self, keep, V)
        except np.linalg.LinAlgError:
            return None


class SchurSet:
    """Solves with S = V V' for the rows ``keep`` [K] of one program, and so with the whole matrix.

    Raises:
        LinAlgError: S has no inverse.
    """

    # The inverse of a small S costs less than two triangular solves, and one over its diagonal are the squared
    # distances of the columns of V' from the span of the others: the smallest pivots there are in any order.

    def __init__(self, of: SchurRows, keep: npt.NDArray[np.int64], V: Array) -> None:
        self.of, self.keep, self.V, self.back = of, keep, V, product(V.T)
        self.inverse: Array | None = None
        if len(keep) <= _FEW:
            self.S = V.dot(V.T)
            self.inverse = np.linalg.inv(self.S)
        elif self.schur[1].item():
            raise np.linalg.LinAlgError

    def independent(self) -> bool:
        """Whether the rows are far from being dependent."""
        if self.inverse is None:
            pivots = self.schur[0].numpy().diagonal()
            return bool(pivots.min() > INDEPENDENT * pivots.max())
        farthest, nearest = self.S.diagonal(), self.inverse.diagonal()
        return not len(self.keep) or bool(0 < nearest.max() * farthest.max() < INDEPENDENT**-2)

    @cached_property
    def schur(self) -> Any:
        """The Cholesky factor of S, and whether there is none."""
        V = torch.from_numpy(self.V)
        return torch.linalg.cholesky_ex(torch.mm(V, V.mT))

    def weights(self, t: Array) -> Array:
        """S^-1 t."""
        if self.inverse is not None:
            found: Array = self.inverse.dot(t)
            return found
        half = torch.linalg.solve_triangular(self.schur[0], torch.from_numpy(t)[:, None], upper=False)
        solved: Array = torch.linalg.solve_triangular(self.schur[0].mT, half, upper=True).numpy()[:, 0]
        return solved

    def solve(self, f: Array, g: Array) -> tuple[Array, Array]:
        """u_x [n] and u_w [c] with Q u_x + J'u_w = f, J u_x = g for the held rows of g [c], and u_w zero elsewhere."""
        over, size = self.of.over[self.keep], self.of.of.curved
        f = self.of.down(f / size)
        w = self.weights(self.V.dot(f) - g[self.keep] / over)
        all_w = np.zeros_like(g)
        all_w[self.keep] = w * size / over
        return self.of.up(f - self.back(w)), all_w

    def factors(self, lanes: torch.Size) -> SchurFactors:
        """For solves with all of K; ``lanes`` is a shape with one lane."""
        held = torch.zeros(1, len(self.of.over), dtype=torch.bool)
        held[:, self.keep] = True
        size = torch.full((1,), self.of.of.curved, dtype=torch.float64)
        lengths, index = (torch.from_numpy(array)[None] for array in (self.of.over, self.keep))
        V, schur = torch.from_numpy(self.V).mT[None], self.schur[0][None]
        return SchurFactors(lanes, size, lengths, self.of.factor[None], V, schur, index, held)
