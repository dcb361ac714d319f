"""One quadratic program with sparse matrices: an interior point, and a proof of its active set, by sparse factors."""

# Legend as in ``_interior_point_single`` and ``_qp_terms``: rows J = [A; G] with sides, multipliers w = [y, z].
#
# NOTE [sparse steps]: Newton's matrix M = Q + G'W G of the interior point is as full as G has long rows. So rows of one
# entry (bounds) go into its diagonal, and the other ones, G_l, keep unknowns t = W_l G_l dx of their own:
#     [Q + bounds  A'  G_l'  ] [dx]   [f   ]
#     [A           0   0     ] [dy] = [-r_y]
#     [G_l         0   -1/W_l] [t ]   [0   ]
#
# NOTE [sparse proof]: the matrix K of the active set is factorised in units in which Q and the rows have size one.
# Where Q is positive semidefinite (pivots of Q, shifted by its rounding, in a symmetric order) and K far from singular
# (an estimate of its condition), the rows that hold are independent and the solution is unique. What is not as clear
# as that is not proved.

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

import numpy as np
import torch

from implicitlayer._errors import extra
from implicitlayer.programs._interior_point import ProgramStatus, QuadraticSolution
from implicitlayer.programs._interior_point_single import Array, Maps, Step, Until, iterate
from implicitlayer.programs._interior_point_step import SHIFT
from implicitlayer.programs._kkt_linear import Factors
from implicitlayer.programs._qp_single import SingleProof, exact_near
from implicitlayer.programs._qp_terms import Mask, SingleProgram

_SURE = 1e10  # condition of K up to which its factors are believed
_ESTIMATES = 4  # of the norm of an inverse: the second is mostly the last
_MAX_STEPS = 60
# What the interior point is asked for: of most programs the active set shows early, and a proof needs no more.
_EARLY, _LATE = 1e-5, 1e-9

Triplets = tuple[Array, Any, Any, tuple[int, int]]  # values, rows, columns, shape


class SparseProgram(SingleProgram):
    """The data of one program, and what does not change with x; see :class:`SingleProgram`."""

    def __init__(self, Q: Triplets, p: Array, A: Triplets, b: Array, G: Triplets, h: Array) -> None:
        with extra("solvers", "il.qp needs SciPy for sparse matrices (not for .to_dense() of them)"):
            sparse, self.linalg = import_module("scipy.sparse"), import_module("scipy.sparse.linalg")
        self.sparse, self.lanes = sparse, torch.Size([])
        q, a, g = (sparse.csr_matrix((values, (i, j)), shape=shape) for values, i, j, shape in (Q, A, G))
        self.q, self.p, self.A, self.G = ((q + q.T) / 2).tocsr(), p, a, g
        self.n, self.e, self.sides = len(p), len(b), np.concatenate([b, h])
        self.J = sparse.vstack([a, g], format="csr")
        self.Qx, self.Jx, self.Jw = self.q.dot, self.J.dot, self.J.T.tocsr().dot
        lengths = np.sqrt(np.asarray(self.J.multiply(self.J).sum(1)).ravel())
        self._measure(lengths, float(np.abs(self.q.data).max(initial=0.0)))
        self.finite = self.finite and bool(np.isfinite(self.sides).all() and np.isfinite(self.q.data).all())
        self._systems: dict[bytes, SparseSystem] = {}

    def system(self, held: Mask) -> SparseSystem:
        """The factors for the inequalities ``held`` as equations."""
        key = held.tobytes()
        if key not in self._systems:
            self._systems[key] = SparseSystem(self, held)
        return self._systems[key]

    def independent(self, held: Mask) -> tuple[bool, bool]:
        """By the condition of the matrix of what holds: see NOTE [sparse proof]."""
        sure = self.system(held).condition() <= _SURE
        return sure, sure

    def definite(self, shift: float) -> bool:
        """Whether Q and ``shift`` times its rounding on the diagonal is positive definite."""
        size = self.curved or 1.0
        noise = shift * 1e3 * np.finfo(np.float64).eps * self.n
        matrix = (self.q / size + noise * self.sparse.identity(self.n)).tocsc()
        how = {"permc_spec": "MMD_AT_PLUS_A", "diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}
        try:
            factors = self.linalg.splu(matrix, **how)
        except RuntimeError:  # a pivot of zero
            return False
        # with pivots from the diagonal U is D L', and D has the signs of the eigenvalues
        same = np.array_equal(factors.perm_r, factors.perm_c)
        return same and bool((factors.U.diagonal() > 0).all())


class SparseSystem:
    """Factors of K = [Q, J_k'; J_k, 0] for the rows ``keep``; RuntimeError where it is singular."""

    def __init__(self, of: SparseProgram, held: Mask) -> None:
        self.of, self.keep = of, np.concatenate([np.arange(of.e), of.e + held.nonzero()[0]])
        self.size, self.over = of.curved or 1.0, of.over[self.keep]
        rows = of.sparse.diags(1 / self.over) @ of.J[self.keep]
        self.matrix = of.sparse.bmat([[of.q / self.size, rows.T], [rows, None]], format="csc")
        self.lu = of.linalg.splu(self.matrix)

    def solve(self, f: Array, g: Array) -> tuple[Array, Array]:
        """x [n] and w [c], zero where not held."""
        u, w = self.lu.solve(np.concatenate([f / self.size, g[self.keep] / self.over])), np.zeros_like(g)
        w[self.keep] = u[self.of.n :] * self.size / self.over
        return u[: self.of.n], w

    def factors(self, lanes: torch.Size) -> Factors:
        """Not needed: a proof of a sparse program is used as it is."""
        raise NotImplementedError

    def condition(self) -> float:
        """An estimate of the condition of K, in the 1-norm, from below.

        Source: W. W. Hager, SIAM J. Sci. Stat. Comput. 5 (1984), with the last vector of N. J. Higham, ACM TOMS 14
        (1988); K is symmetric. SciPy's ``onenormest`` draws from NumPy's global generator.
        """
        size = self.matrix.shape[0]
        found: float = 0.0
        x = np.full(size, 1 / size)
        for _ in range(_ESTIMATES):
            y = self.lu.solve(x)
            found, z = max(found, float(np.abs(y).sum())), self.lu.solve(np.sign(y))
            if not np.abs(z).max() > z.dot(x):
                break
            x = np.zeros(size)
            x[np.abs(z).argmax()] = 1.0
        last = np.linspace(1.0, 2.0, size)
        last[1::2] *= -1
        found = max(found, 2 * float(np.abs(self.lu.solve(last)).sum()) / (3 * size))
        norm = float(abs(self.matrix).sum(0).max())
        return found * norm


def sparse_proof(program: SparseProgram, start: Mask | None) -> SingleProof | None:
    """The proved solution; None where it is not found, or not as clear as NOTE [sparse proof] wants it.

    ``start``: inequalities whose solution is tried first.
    """
    if not program.finite or not program.definite(1.0):
        return None
    with np.errstate(all="ignore"), suppress(RuntimeError):
        proof = None if start is None else exact_near(program, start, SparseProgram.system)
        if proof is not None:
            return proof
    for rtol in (_EARLY, _LATE):
        with np.errstate(all="ignore"):
            try:
                answer = _interior_point(program, rtol)
                proof = exact_near(program, answer, SparseProgram.system)
            except RuntimeError:  # singular factors
                return None
        if proof is not None or answer.codes.item() in (int(ProgramStatus.INFEASIBLE), int(ProgramStatus.UNBOUNDED)):
            return proof
    return None


def _interior_point(of: SparseProgram, rtol: float) -> QuadraticSolution:
    """The answer of the interior point, in units of the data as in ``_interior_point``."""
    size = of.farthest or of.pull or 1.0
    cost = max(of.curved * size**2, float(np.abs(of.p).max()) * size) or 1.0
    scale = of.sparse.diags(1 / of.over)
    A, G = (scale @ of.J).tocsr()[: of.e], (scale @ of.J).tocsr()[of.e :]
    q, sides = of.q * (size**2 / cost), of.sides / of.over / size
    maps = Maps(q.dot, A.dot, A.T.tocsr().dot, G.dot, G.T.tocsr().dot)
    until = Until(rtol, _MAX_STEPS, lambda: of.definite(-1.0))
    found = iterate((of.p * (size / cost), sides[: of.e], sides[of.e :]), maps, _Newton(of, q, A, G).step, until)
    force = cost / (size * of.over)
    parts = found.x * size, found.y * force[: of.e], found.z * force[of.e :]
    numbers = (torch.tensor(number) for number in (int(ProgramStatus[found.ended]), found.steps, found.error))
    return QuadraticSolution(*(torch.from_numpy(part) for part in parts), *numbers)


class _Newton:
    """The pattern of the matrix of NOTE [sparse steps], filled in and factorised for every step."""

    def __init__(self, of: SparseProgram, q: Any, A: Any, G: Any) -> None:
        single = np.diff(G.indptr) == 1
        bounds = G[single]
        self.linalg, self.n, self.e = of.linalg, of.n, of.e
        self.single, self.long = single.nonzero()[0], (~single).nonzero()[0]
        self.at, self.squares = bounds.indices, bounds.data**2
        rows = of.sparse.vstack([A, G[self.long]])
        shift = of.sparse.identity(of.n) * SHIFT
        below = of.sparse.diags(np.full(rows.shape[0], -SHIFT)) if rows.shape[0] else None
        # a diagonal that cancels to zero would not be stored: its entries are set below
        ones = of.sparse.identity(of.n) * (2 * float(np.abs(q.data).max(initial=1.0)))
        whole = [[q + ones, rows.T], [rows, below]] if rows.shape[0] else [[q + ones]]
        self.matrix = of.sparse.bmat(whole, format="csc")
        self.matrix.sort_indices()
        columns = np.repeat(np.arange(self.matrix.shape[1]), np.diff(self.matrix.indptr))
        self.diagonal = (self.matrix.indices == columns).nonzero()[0]
        self.base = self.matrix.data.copy()
        self.base[self.diagonal[: of.n]] = q.diagonal() + shift.diagonal()

    def step(self, weights: Array) -> Step:
        """Factorised for W = diag(weights)."""
        data = self.base.copy()
        data[self.diagonal[: self.n]] += np.bincount(self.at, weights[self.single] * self.squares, self.n)
        data[self.diagonal[self.n + self.e :]] = -1 / weights[self.long]
        self.matrix.data = data
        lu, n, both = self.linalg.splu(self.matrix), self.n, self.n + self.e

        def solve(f: Array, r_y: Array) -> tuple[Array, Array]:
            rhs = np.zeros(lu.shape[0])
            rhs[:n], rhs[n:both] = f, -r_y
            u = lu.solve(rhs)
            return u[:n], u[n:both]

        return solve
