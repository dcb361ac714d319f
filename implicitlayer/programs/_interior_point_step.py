"""One step of the interior-point method: the point, and Newton's matrix with its factors."""

# Legend as in ``_interior_point``. With M = Q + G'W G positive definite and L L' = M the matrix [M A'; A 0] needs no
# factors of its own size: A M^-1 A' = (L^-1 A')'(L^-1 A') is positive definite if the equations are independent, and
#     (A M^-1 A') dy = A M^-1 f + r_y,    M dx = f - A'dy    for    M dx + A'dy = f,  A dx = -r_y.
# In lanes where either is not positive definite beyond rounding, LU factors of the whole matrix do.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

SHIFT = 1e-13  # on the diagonals, relative to entries of size 1: keeps the factors of singular systems finite
INDEPENDENT = 1e-5  # smallest pivot of A M^-1 A', relative to the largest, that is not taken for a redundant equation
TO_BOUNDARY = 0.995  # part of the way to the boundary that a step may go
PATIENCE = 8  # steps without an improvement after which a lane has reached what rounding allows
FARTHEST = 1e8  # solutions this many times larger than the data suggest do not exist

Data = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Point:
    x: torch.Tensor
    y: torch.Tensor
    z: torch.Tensor
    s: torch.Tensor

    def moved(self, step: Point, length: torch.Tensor) -> Point:
        a = length[:, None]
        return Point(self.x + a * step.x, self.y + a * step.y, self.z + a * step.z, self.s + a * step.s)

    def where(self, mask: torch.Tensor, other: Point) -> Point:
        pairs = zip((self.x, self.y, self.z, self.s), (other.x, other.y, other.z, other.s), strict=True)
        return Point(*(torch.where(mask[:, None], a, b) for a, b in pairs))


def of_each(function: Callable[[torch.Tensor], torch.Tensor], data: Data) -> Data:
    """The data with ``function`` of each part."""
    Q, p, A, b, G, h = map(function, data)
    return Q, p, A, b, G, h


def flat_lanes(data: Data) -> Data:
    """The programs in a row, every tensor [B, ...]."""
    lanes = data[1].shape[:-1]
    return of_each(lambda t: t.reshape(lanes.numel(), *t.shape[len(lanes) :]), data)


def times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    return (matrix @ vector[..., None])[..., 0]


def norm_of(vectors: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return norms


class Newton:
    """The factors of one step's matrix and solves with them."""

    def __init__(self, data: Data, weights: torch.Tensor) -> None:
        Q, p, A, _, G, _ = data
        self.A, self.G, self.n = A, G, p.shape[-1]
        matrix = Q + G.mT @ (weights[..., None] * G) + torch.diag_embed(torch.full_like(p, SHIFT))
        self.bad = (~self._by_cholesky(matrix)).nonzero()[:, 0]  # a lane does not depend on what the others need
        if len(self.bad):
            matrix, rows = matrix[self.bad], A[self.bad]
            below = torch.diag_embed(rows.new_full(rows.shape[:-1], -SHIFT))
            full = torch.cat([torch.cat([matrix, rows.mT], -1), torch.cat([rows, below], -1)], -2)
            self.whole, self.pivots, _ = torch.linalg.lu_factor_ex(full)

    def _by_cholesky(self, matrix: torch.Tensor) -> torch.Tensor:
        """Factorise; the lanes in which that is accurate."""
        self.factor, info = torch.linalg.cholesky_ex(matrix)
        good: torch.Tensor = info == 0
        if self.A.shape[-2]:
            self.half = torch.linalg.solve_triangular(self.factor, self.A.mT, upper=False)
            self.schur, info = torch.linalg.cholesky_ex(self.half.mT @ self.half)
            pivots = self.schur.diagonal(dim1=-2, dim2=-1)
            good = good & (info == 0) & (pivots.amin(-1) > INDEPENDENT * pivots.amax(-1))
        return good

    def solve_reduced(self, f: torch.Tensor, r_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dx and dy with M dx + A'dy = f, A dx = -r_y."""
        dx, dy = self._with_cholesky(f, r_y)
        if len(self.bad):
            rhs = torch.cat([f, -r_y], -1)[self.bad, :, None]
            found = torch.linalg.lu_solve(self.whole, self.pivots, rhs)[..., 0]
            dx, dy = dx.clone(), dy.clone()
            dx[self.bad], dy[self.bad] = found[:, : self.n], found[:, self.n :]
        return dx, dy

    def _with_cholesky(self, f: torch.Tensor, r_y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.A.shape[-2]:
            return torch.cholesky_solve(f[..., None], self.factor)[..., 0], torch.zeros_like(r_y)
        u = torch.linalg.solve_triangular(self.factor, f[..., None], upper=False)
        dy = torch.cholesky_solve(self.half.mT @ u + r_y[..., None], self.schur)
        dx = torch.linalg.solve_triangular(self.factor.mT, u - self.half @ dy, upper=True)
        return dx[..., 0], dy[..., 0]

    def solve(self, left: Sequence[torch.Tensor], r_c: torch.Tensor, z: torch.Tensor, s: torch.Tensor) -> Point:
        r_x, r_y, r_s = left
        shifted = (z * r_s - r_c) / s
        dx, dy = self.solve_reduced(-r_x - times(self.G.mT, shifted), r_y)
        Gdx = times(self.G, dx)
        return Point(dx, dy, z / s * Gdx + shifted, -r_s - Gdx)
