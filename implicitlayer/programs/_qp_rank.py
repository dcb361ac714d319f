"""Equations of quadratic programs that depend on each other: their rank, decided once, and others in their place."""

# With rows of length one, A = U S V'. Singular values below the relative error of the data (NOISE) are rounding: the
# equations have rank r, and those that are left over say nothing, or contradict the others. In their place stand
#     V_r' x = T b   with   T = S_r^-1 U_r',
# which have the same solutions and are orthonormal, so that no solver has to ask for their rank again, nor loses digits
# to rows that are almost parallel. From A'y = V_r y~ follows y~ = S_r U_r' y and, of the smallest norm, y = T'y~. The
# matrix of the optimality conditions is congruent by the same T: with K~ that of the new equations,
#     u = diag(I, T', I) K~^-1 diag(I, T, I) v   solves   K u = v.

from __future__ import annotations

from dataclasses import dataclass

import torch

from implicitlayer._errors import InfeasibleError
from implicitlayer.base._failures import refuse
from implicitlayer.base._status import Status
from implicitlayer.base._tree import name_lanes, positive
from implicitlayer.linear._common import NOISE
from implicitlayer.programs._interior_point import ProgramStatus
from implicitlayer.programs._interior_point_step import Data, times
from implicitlayer.programs._kkt_linear import Factors

NEARLY = 1e-6  # squared distance of a row from the span of the others, below which the rows count as nearly dependent
_CONTRADICTION = 1e-6  # the same as for other contradictions of il.qp
_ROUNDINGS = 64


@dataclass(frozen=True, eq=False)
class Equations:
    """Independent equations in the place of given ones.

    Attributes:
        data: the program with V_r' x = T b.
        to_new: T [*lanes, r, e].
        of_old: S_r U_r' [*lanes, r, e], in the units of the given rows: y~ of y. That of T' is y of y~.
        deficient: bool [*lanes], where r is smaller than e.
    """

    data: Data
    to_new: torch.Tensor
    of_old: torch.Tensor
    deficient: torch.Tensor


def independent_equations(data: Data, eps: float) -> Equations | None:
    """Independent equations in the place of those of ``data``, whose entries have the relative error ``eps``.

    None where no lane needs it.

    Raises:
        InfeasibleError: equations that contradict each other.
    """
    Q, p, A, b, G, h = data
    e, n = A.shape[-2:]
    if e < 2:
        return None
    lengths = positive(torch.linalg.vector_norm(A, dim=-1))
    rows, sides = A / lengths[..., None], b / lengths
    finite = rows.isfinite().flatten(-2).all(-1) & sides.isfinite().all(-1)
    factor, info = torch.linalg.cholesky_ex(rows @ rows.mT)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    nearly = finite & ((info > 0) | ~(pivots.amin(-1) ** 2 > NEARLY))
    if not bool(nearly.any()):
        return None
    left, values, right = torch.linalg.svd(torch.where(finite[..., None, None], rows, 0.0), full_matrices=False)
    kept = values > (n + e + NOISE) * eps * values[..., :1]
    rest = sides - (left @ (kept[..., None] * (left.mT @ sides[..., None])))[..., 0]
    allowed = max(_CONTRADICTION, _ROUNDINGS * eps) * sides.abs().amax(-1)
    contrary = nearly & (rest.abs().amax(-1) > allowed)
    if bool(contrary.any()):
        error = InfeasibleError(
            f"the quadratic program is infeasible{name_lanes(contrary)}: equations that depend on each other have "
            f"right-hand sides that do not. {ProgramStatus.INFEASIBLE.help}"
        )
        refuse(contrary, error)
    rank = kept.sum(-1)
    r = int(rank.max()) if bool(nearly.all()) else e
    inverse = torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0)
    parts = kept[..., None] * right, inverse[..., None] * left.mT, values[..., None] * kept[..., None] * left.mT
    new_rows, to_new, of_old = (
        torch.nn.functional.pad(t, (0, 0, 0, max(r - t.shape[-2], 0)))[..., :r, :] for t in parts
    )
    to_new, of_old = to_new / lengths[..., None, :], of_old * lengths[..., None, :]
    if r == e:  # the others stay as they are
        unit, own = torch.eye(e, dtype=A.dtype, device=A.device), nearly[..., None, None]
        new_rows, to_new, of_old = (
            torch.where(own, t, other) for t, other in ((new_rows, A), (to_new, unit), (of_old, unit))
        )
    new_sides = torch.where(nearly[..., None], times(to_new, b), b) if r == e else times(to_new, b)
    return Equations((Q, p, new_rows, new_sides, G, h), to_new, of_old, nearly & (rank < e))


class RankFactors:
    """Solves with K by the factors of K~."""

    def __init__(self, factors: Factors, equations: Equations, rows: torch.Tensor) -> None:
        self.factors, self.to_new, self.flat = factors, equations.to_new, factors.flat
        singular = equations.deficient & (factors.codes == int(Status.CONVERGED))
        self.codes, self.curvature = torch.where(singular, int(Status.SINGULAR), factors.codes), factors.curvature
        self.r, self.e = self.to_new.shape[-2:]
        self.n = rows.shape[-1]
        of_x, _, of_rest = self._split(factors.units[..., None], self.r)
        of_rows = 1 / positive(torch.linalg.vector_norm(rows, dim=-1)) / of_x[..., :1, 0]
        self.units = torch.cat([of_x[..., 0], of_rows, of_rest[..., 0]], -1)

    def _split(self, vectors: torch.Tensor, middle: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        rest = vectors.shape[-2] - self.n - middle
        x, y, z = vectors.split([self.n, middle, rest], -2)
        return x, y, z

    def solve(self, rhs: torch.Tensor) -> torch.Tensor:
        """K^-1 rhs for [*lanes, n + c, k], of the smallest norm."""
        x, y, z = self._split(rhs, self.e)
        x, y, z = self._split(self.factors.solve(torch.cat([x, self.to_new @ y, z], -2)), self.r)
        return torch.cat([x, self.to_new.mT @ y, z], -2)
