"""Dense solves: the matrix is made by products with the unit vectors and factorised."""

# n: unknowns of one system. The matrix is held in float64: n^2 numbers per lane, whatever the dtype of the products.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from implicitlayer import _torch
from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.base._tree import positive
from implicitlayer.linear._common import NOISE, Correction, Limits, Round, refine_direct, select
from implicitlayer.linear._operator import FlatOperator, LinearSolver
from implicitlayer.linear._traced import TracedSolution, TracedSystem, dense

_CHUNK = 64  # products made side by side: their intermediate results are in memory together
# A smallest pivot below this many times the noise makes the singular values be computed.
_SUSPICIOUS = 1e4


@dataclass(frozen=True)
class Dense(LinearSolver):
    """Solve ``A u = b`` by a factorisation of A: Cholesky where A is symmetric positive definite, else LU.

    Makes n products with the unit vectors (each serves all lanes), so it is for small systems. The answer is improved
    by solves for its true residual while that halves it. A lane that is singular to working precision (singular values
    below (n + 16) eps of the largest) gets the least-squares solution of smallest norm: if its residual is zero the
    status is CONVERGED, else SINGULAR.

    Args:
        rtol: relative residual that counts as solved, not negative; default 1e-10 (float64), 1e-5 (float32).
        max_size: largest n that is accepted; ValueError above it.

    Source: Golub & Van Loan, Matrix Computations, 4th ed., sections 3.4, 3.5.3 (refinement) and 4.2. Difference from
    ``torch.linalg.solve``: a status per lane in place of an error for the whole batch.
    """

    rtol: float | None = None
    max_size: int = 4096

    def __post_init__(self) -> None:
        Limits(self.rtol)

    def traced(self, system: TracedSystem) -> TracedSolution:
        """The same for a compiler; see :func:`implicitlayer.compile`."""
        return dense(system, Limits(self.rtol), _SUSPICIOUS)

    def solve(self, operator: FlatOperator, rhs: torch.Tensor) -> LinearSolution:
        """Solve for a flat right-hand side [*lanes, n]."""
        n = rhs.shape[-1]
        if n > self.max_size:
            raise ValueError(
                f"il.Dense would store {n} x {n} numbers per system, above max_size={self.max_size}. Use a matrix-free "
                "solver (il.ConjugateGradient, il.Minres, il.Gmres), or raise max_size."
            )
        factors: list[Callable[[torch.Tensor], torch.Tensor]] = []
        codes = torch.zeros(rhs.shape[:-1], dtype=torch.int64, device=rhs.device)

        def correct(start: Round) -> Correction:
            nonlocal codes
            first = not factors
            if first:
                solve, codes = factorise(materialise(operator, rhs), operator.symmetric, torch.finfo(rhs.dtype).eps)
                factors.append(solve)
            value = factors[0](start.residual.double()).to(rhs.dtype)
            return Correction(value, codes, torch.full_like(codes, n if first else 0))

        found = refine_direct(operator, rhs, Limits(self.rtol), correct, "Dense solve")
        singular = codes == int(Status.SINGULAR)
        return replace(found, singular=singular) if bool(singular.any()) else found


def materialise(operator: FlatOperator, like: torch.Tensor) -> torch.Tensor:
    """The matrices [*lanes, n, n] of an operator, in float64, by n products; ``like`` [*lanes, n]."""
    n = like.shape[-1]
    units = torch.eye(n, dtype=like.dtype, device=like.device).reshape(n, *[1] * (like.ndim - 1), n)
    units = units.expand(n, *like.shape).contiguous()
    # an operator that builds its graph at first use must not build it inside vmap: the first product alone
    columns = [operator(units[i]) for i in range(min(n, 1))] if operator.prepare is None else []
    if operator.prepare is not None and n:
        operator.prepare()
    if len(columns) < n:
        rest = units[len(columns) :]
        try:
            columns += [column for part in rest.split(_CHUNK) for column in _torch.mapped_over(operator, part)]
        except RuntimeError:  # a product that vmap cannot follow (NumPy inside, data-dependent code): one by one
            columns += [operator(unit) for unit in rest]
    return (torch.stack(columns, -1) if columns else like.new_zeros(*like.shape, 0)).double()


def factorise(
    matrix: torch.Tensor, symmetric: bool, eps: float
) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
    """A function ``b -> A^-1 b`` on [*lanes, n], and a code per lane: CONVERGED, SINGULAR or NONFINITE.

    ``eps`` is the relative error of the entries: singular values below (n + 16) eps of the largest are noise. Small
    pivots only raise the suspicion, for they may miss the rank by orders of magnitude; the singular values decide it.
    """
    n = matrix.shape[-1]
    noise = (n + NOISE) * eps
    finite = matrix.isfinite().flatten(-2).all(-1)
    identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    matrix = torch.where(finite[..., None, None], matrix, identity)
    size = positive(matrix.abs().amax((-2, -1), keepdim=True))
    matrix = matrix / size  # no overflow inside the factorisations
    # each lane has the factorisation that fits it, whatever the others are
    definite = torch.zeros(finite.shape, dtype=torch.bool, device=matrix.device)
    pivots = torch.ones(matrix.shape[:-1], dtype=matrix.dtype, device=matrix.device)
    if symmetric:
        matrix = (matrix + matrix.mT) / 2
        cholesky, info = torch.linalg.cholesky_ex(matrix)
        definite = info == 0
        pivots = cholesky.diagonal(dim1=-2, dim2=-1) ** 2
    some_lu = not bool(definite.all())
    if some_lu:
        lu, permutation, _ = torch.linalg.lu_factor_ex(matrix)
        pivots = torch.where(definite.unsqueeze(-1), pivots, lu.diagonal(dim1=-2, dim2=-1).abs())
    singular = pivots.amin(-1) <= _SUSPICIOUS * noise * pivots.amax(-1)
    left, values, right = torch.linalg.svd(matrix[singular])
    kept = values > noise * values[..., :1]
    deficient = ~kept.all(-1)
    singular[singular.clone()] = deficient
    inverse_values = torch.where(kept, 1 / values, 0.0)[deficient].unsqueeze(-2)
    pseudo_inverse = (right[deficient].mT * inverse_values) @ left[deficient].mT
    codes = torch.where(singular, int(Status.SINGULAR), int(Status.CONVERGED))
    codes = torch.where(finite, codes, int(Status.NONFINITE))

    def solve(rhs: torch.Tensor) -> torch.Tensor:
        b = rhs.unsqueeze(-1)
        value = torch.linalg.lu_solve(lu, permutation, b) if some_lu else b
        if bool(definite.any()):
            value = torch.where(definite[..., None, None], torch.cholesky_solve(b, cholesky), value)
        value[singular] = pseudo_inverse @ b[singular]
        return select(finite, (value / size)[..., 0])

    return solve, codes
