"""The matrix of a strictly convex quadratic program with some inequalities as equations, by Cholesky factors alone."""

# Legend: n unknowns; c rows J, equations first, then inequalities; k of them held; one program, on the CPU. Rows are
# scaled to length one and Q to a largest entry of one, so that every unknown is a length.
#
#     Q x + J'w = f,  J x = g  for the held rows.  With L L' = Q, V = L^-1 J' and S = V'V = J Q^-1 J':
#     S w = V'L^-1 f - g,   L'x = L^-1 f - V w.
#
# L and V are those of all rows and serve every set of held ones; a set costs the factor of its S, [k, k]. S loses the
# digits that the condition of Q takes, and a solve with the residual brings them back. Where Q or S is not positive
# definite beyond that, there are no factors.

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from implicitlayer._interior_point_single import Array, product, triangular_solves
from implicitlayer._interior_point_step import INDEPENDENT
from implicitlayer._status import Status

__all__ = ["SchurFactors", "SchurRows"]

_DEFINITE = 1e-7  # smallest pivot of L relative to the largest: the condition of Q is then above 1e14


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

    def factors(self, held: npt.NDArray[np.bool_]) -> SchurFactors | None:
        """Factors with the equations and the inequalities ``held`` [m]; None where they are not independent."""
        keep = np.concatenate([np.arange(self.e), self.e + held.nonzero()[0]])
        if len(keep) > self.n:
            return None
        V = torch.from_numpy(self.V[:, keep])
        schur, info = torch.linalg.cholesky_ex(V.mT @ V)
        pivots = schur.numpy().diagonal()
        if info.item() or (len(keep) and not pivots.min() > INDEPENDENT * pivots.max()):
            return None
        return SchurFactors(self, keep, V, schur)


class SchurFactors:
    """Solves with K of ``_kkt_linear`` for one program.

    Attributes:
        codes, curvature: 0-d, as those of ``KktFactors``.
    """

    def __init__(self, of: SchurRows, keep: npt.NDArray[np.int64], V: torch.Tensor, schur: torch.Tensor) -> None:
        self.of, self.keep, self.V, self.schur = of, keep, V, schur
        self.codes, self.curvature = torch.tensor(int(Status.CONVERGED)), torch.tensor(math.inf, dtype=V.dtype)

    def point(self, f: Array, g: Array, corrections: int) -> tuple[Array, Array]:
        """x [n] and w [k] for f [n] and g [k], in scaled units, after that many solves for what is left."""
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

    def solve(self, rhs: torch.Tensor) -> torch.Tensor:
        """K^-1 rhs for [*lanes, n + c, columns], one lane; a row that is not held stands for -u = b."""
        of, flat = self.of, rhs.reshape(rhs.shape[-2:])
        lengths = torch.from_numpy(of.lengths[self.keep])[:, None]
        rows = torch.from_numpy(self.keep + of.n)
        f = torch.linalg.solve_triangular(of.factor, flat[: of.n] / of.largest, upper=False)
        w = flat[rows] / lengths
        if len(self.keep):
            w = torch.cholesky_solve(self.V.mT @ f - w, self.schur)
        found = -flat
        found[: of.n] = torch.linalg.solve_triangular(of.factor.mT, f - self.V @ w, upper=True)
        found[rows] = w * of.largest / lengths
        return found.reshape(rhs.shape)
