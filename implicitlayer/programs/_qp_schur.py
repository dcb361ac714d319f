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
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from implicitlayer.base._status import Status
from implicitlayer.programs._interior_point_single import Array, product, triangular_solves
from implicitlayer.programs._interior_point_step import INDEPENDENT

__all__ = ["SchurFactors", "SchurRows", "SchurSet"]

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


class SchurRows:
    """L and V of one program: Q [n, n] with its largest entry, A [e, n] and G [m, n] with the lengths of their rows."""

    def __init__(self, Q: Array, largest: float, A: Array, G: Array, lengths: Array) -> None:
        self.n, self.e, self.largest = len(Q), len(A), largest
        self.lengths = np.where(lengths > 0, lengths, 1.0)
        self.Q = Q / largest
        self.rows = np.concatenate([A, G]) / self.lengths[:, None]
        factor, info = torch.linalg.cholesky_ex(torch.from_numpy(self.Q))
        pivots = factor.numpy().diagonal()
        self.definite = not info.item() and bool(pivots.min() > _DEFINITE * pivots.max())
        if self.definite:
            self.factor = factor
            self.down, self.up = triangular_solves(factor)
            self.V = torch.linalg.solve_triangular(factor, torch.from_numpy(self.rows).mT, upper=False).numpy()

    def hold(self, held: npt.NDArray[np.bool_]) -> SchurSet | None:
        """The equations and the inequalities ``held`` [m]; None where they are not independent."""
        keep = np.concatenate([np.arange(self.e), self.e + held.nonzero()[0]])
        if len(keep) > self.n:
            return None
        V = torch.from_numpy(self.V[:, keep])
        schur, info = torch.linalg.cholesky_ex(V.mT @ V)
        pivots = schur.numpy().diagonal()
        if info.item() or (len(keep) and not pivots.min() > INDEPENDENT * pivots.max()):
            return None
        return SchurSet(self, keep, V, schur)


@dataclass(frozen=True, eq=False)
class SchurSet:
    """The factor of S for the rows ``keep`` [K] of one program."""

    of: SchurRows
    keep: npt.NDArray[np.int64]
    V: torch.Tensor
    schur: torch.Tensor

    def point(self, f: Array, g: Array, corrections: int) -> tuple[Array, Array]:
        """x [n] and w [K] for f [n] and g [K], in scaled units, after that many solves for what is left."""
        V, Vt = product(self.V.numpy()), product(self.V.numpy().T)
        down, up = triangular_solves(self.schur)

        def step(f: Array, g: Array) -> tuple[Array, Array]:
            f = self.of.down(f)
            w = up(down(Vt(f) - g)) if len(g) else g
            return self.of.up(f - V(w)), w

        x, w = step(f, g)
        rows = self.of.rows[self.keep]
        Q, J, Jt = product(self.of.Q), product(rows), product(rows.T)
        for _ in range(corrections):
            dx, dw = step(f - Q(x) - Jt(w), g - J(x))
            x, w = x + dx, w + dw
        return x, w

    def factors(self, lanes: torch.Size) -> SchurFactors:
        """For solves with all of K; ``lanes`` is a shape with one lane."""
        held = torch.zeros(1, len(self.of.lengths), dtype=torch.bool)
        held[:, self.keep] = True
        size = torch.full((1,), self.of.largest, dtype=self.V.dtype)
        lengths, index = (torch.from_numpy(array)[None] for array in (self.of.lengths, self.keep))
        return SchurFactors(lanes, size, lengths, self.of.factor[None], self.V[None], self.schur[None], index, held)
