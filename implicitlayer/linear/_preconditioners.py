"""Preconditioners built from products with the operator: the diagonal (Jacobi) and a randomised low rank (Nystrom)."""

# A preconditioner is any callable v -> M^-1 v on flat vectors [*lanes, n]; the classes here build one from an operator.
# n: unknowns, l: rank of the sketch. Products are made in the operator's dtype, small factorisations in float64.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.base._tree import name_lanes
from implicitlayer.linear._operator import FlatOperator, is_for_symmetric, lane_dot, lane_scale

Precondition = Callable[[torch.Tensor], torch.Tensor]


class Preconditioner:
    """Base class of preconditioners that are built from the operator, once per solve."""

    def build(self, operator: FlatOperator, like: torch.Tensor) -> Precondition:
        """``v -> M^-1 v`` for this operator; ``like`` [*lanes, n] gives shape, dtype and device."""
        raise NotImplementedError


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """Divide by the absolute value of the operator's diagonal, found by products.

    With ``num_probes >= n`` the diagonal is exact: n products with the unit vectors. Otherwise it is the mean of
    ``v * (A v)`` over random sign vectors v (``E[v_i v_j] = 0`` leaves the diagonal), and no entry is believed below
    its own standard error, so that noise cannot make a huge step. Entries that are zero or not finite count as 1 on
    the scale of the largest. Worth its products where the diagonal of A varies over orders of magnitude.

    Args:
        num_probes: products to spend, at least 1.
        seed: of the random signs, the same in every lane.

    Source: C. Bekas, E. Kokiopoulou and Y. Saad, An estimator for the diagonal of a matrix, Appl. Numer. Math. 57
    (2007), with sign vectors; the standard error as a floor is ours.
    """

    num_probes: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise ValueError(f"num_probes={self.num_probes} must be at least 1: each is one product with the operator.")

    def build(self, operator: FlatOperator, like: torch.Tensor) -> Precondition:
        """The diagonal and its division."""
        diagonal = operator_diagonal(operator, like, self.num_probes, self.seed)
        largest = diagonal.amax(-1, keepdim=True) if like.shape[-1] else diagonal
        usable = diagonal.isfinite() & (diagonal > torch.finfo(like.dtype).eps * largest)
        inverse = torch.where(usable, 1 / diagonal, torch.where(largest > 0, 1 / largest, 1.0))
        inverse = torch.where(inverse.isfinite(), inverse, 1.0).to(like.dtype)
        return lambda vector: vector * inverse


def operator_diagonal(operator: FlatOperator, like: torch.Tensor, num_probes: int, seed: int) -> torch.Tensor:
    """|diag A| [*lanes, n] in float64: exact if n <= num_probes, else estimated from below by its standard error."""
    n = like.shape[-1]
    if n <= num_probes:
        diagonal = torch.zeros_like(like, dtype=torch.float64)
        for i in range(n):
            unit = torch.zeros_like(like)
            unit[..., i] = 1
            diagonal[..., i] = operator(unit)[..., i]
        return diagonal.abs()
    # NOTE [safe squares]: sums of squares of samples are kept relative to the first sample's largest entry
    signs = _random(n, num_probes, seed).sign().to(like)
    total = square = torch.zeros_like(like, dtype=torch.float64)
    unit = torch.zeros_like(total[..., :1])
    for k in range(num_probes):
        probe = signs[:, k].expand(like.shape).contiguous()
        sample = (probe * operator(probe)).double()
        if k == 0:
            unit = lane_scale(sample)
        total, square = total + sample / unit, square + (sample / unit) ** 2
    mean = total / num_probes
    error = ((square / num_probes - mean**2).clamp(min=0) / max(num_probes - 1, 1)).sqrt()
    return torch.maximum(mean.abs(), error) * unit


@dataclass(frozen=True)
class Nystrom(Preconditioner):
    """Undo the ``rank`` largest eigenvalues of a positive semidefinite operator, estimated from a random sketch.

    For an operator ``A + damping I``: with the randomised approximation ``A ~ U diag(lambda) U'``,
    ``M^-1 v = (lambda_rank + damping) U (U'v / (lambda + damping)) + (v - U U'v)``. Conjugate gradients on the
    preconditioned system then see a condition number of a few units once ``rank`` is about twice the number of
    eigenvalues above ``damping`` (Frangella, Tropp & Udell, theorem 5.1). A lane whose sketch is not positive
    semidefinite (an indefinite or NaN matrix, a damping too large) is left without a preconditioner.

    Args:
        rank: size of the sketch, at least 1; that many products are spent per solve (n at most).
        damping: the multiple of the identity that the operator contains, if it is known; non-negative.
        seed: of the sketch, the same in every lane.

    Source: Z. Frangella, J. A. Tropp and M. Udell, Randomized Nystrom preconditioning, SIAM J. Matrix Anal. Appl. 44
    (2023), arXiv:2110.02820, algorithm 2.1 and equation (1.3).
    """

    rank: int
    damping: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1: it is the number of products that are spent.")
        if not self.damping >= 0:
            raise ValueError(f"damping={self.damping} must be non-negative: the operator is A + damping I, A >= 0.")

    def build(self, operator: FlatOperator, like: torch.Tensor) -> Precondition:
        """The sketch, its eigenvalues, and the formula above."""
        n = like.shape[-1]
        if n == 0:
            return lambda vector: vector
        test = torch.linalg.qr(_random(n, min(self.rank, n), self.seed)).Q.to(like.device)  # [n, l]
        columns = [operator(column.to(like.dtype).expand(like.shape).contiguous()).double() for column in test.mT]
        sketch = torch.stack(columns, -1) - self.damping * test  # [*lanes, n, l]
        basis, eigenvalues, usable = _nystrom(sketch, test, torch.finfo(like.dtype).eps)
        weights = (eigenvalues[..., -1:] + self.damping) / (eigenvalues + self.damping)
        gain = torch.where(usable.unsqueeze(-1), weights - 1, 0.0).unsqueeze(-1)  # M^-1 = I + U (weights - 1) U'

        def precondition(vector: torch.Tensor) -> torch.Tensor:
            part = gain * (basis.mT @ vector.double().unsqueeze(-1))
            return vector + (basis @ part)[..., 0].to(vector.dtype)

        return precondition


def _nystrom(sketch: torch.Tensor, test: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Orthonormal U [*lanes, n, l], eigenvalues [*lanes, l] falling, and whether the lane is usable [*lanes].

    With Y = A W for the test matrix W, A ~ Y (W'Y)^-1 Y' = B B' where B = Y C^-1 and C'C = W'Y (Cholesky); the singular
    values of B squared are the eigenvalues. A shift of A by nu, taken off again, keeps the Cholesky factor real.
    """
    finite = sketch.isfinite().flatten(-2).all(-1)
    size = torch.where(finite, sketch.abs().flatten(-2).amax(-1), 0.0)
    usable = finite & (size > 0)
    scaled = torch.where(usable[..., None, None], sketch / torch.where(usable, size, 1.0)[..., None, None], test)
    # the products carry an error of eps times their norm: the shift must be larger than it
    shift = math.sqrt(test.shape[0]) * eps * scaled.flatten(-2).norm(dim=-1)[..., None]
    shifted = scaled + shift.unsqueeze(-1) * test
    core = test.mT @ shifted
    factor, info = torch.linalg.cholesky_ex((core + core.mT) / 2, upper=True)
    usable = usable & (info == 0)
    identity = torch.eye(test.shape[1], dtype=test.dtype, device=test.device)
    factor = torch.where(usable[..., None, None], factor, identity)
    root = torch.linalg.solve_triangular(factor, shifted, upper=True, left=False)
    basis, values, _ = torch.linalg.svd(root, full_matrices=False)
    eigenvalues = (values**2 - shift).clamp(min=0)
    eigenvalues = torch.maximum(eigenvalues, shift)  # what lies below the shift is not known
    return basis, eigenvalues * size.unsqueeze(-1), usable


def _random(n: int, columns: int, seed: int) -> torch.Tensor:
    """[n, columns] normal float64 numbers, the same on every device."""
    return torch.randn(n, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Given:
    """The preconditioner of a solver: what it returns is checked, and looked at where the solve fails."""

    def __init__(self, solver: Any, operator: FlatOperator, rhs: torch.Tensor) -> None:
        self.solver, self.operator, self.rhs = solver, operator, rhs
        self.broken = self.negative = torch.zeros(rhs.shape[:-1], dtype=torch.bool, device=rhs.device)

    @cached_property
    def function(self) -> Precondition:
        """Made at its first use: a zero rhs makes no product."""
        given = self.solver.preconditioner
        made: Precondition = given.build(self.operator, self.rhs) if isinstance(given, Preconditioner) else given
        return made

    def __call__(self, vector: torch.Tensor) -> torch.Tensor:
        answer = self.function(vector)
        form, wanted = ((getattr(t, "shape", type(t).__name__), getattr(t, "dtype", "")) for t in (answer, vector))
        if form != wanted:
            raise TypeError(
                f"the preconditioner of {type(self.solver).__name__} must return a tensor of the shape and dtype that "
                "it is given: expected {} {}, got {} {}.".format(*wanted, *form)
            )
        product = lane_dot(vector, answer)
        self.broken = self.broken | (vector.isfinite().all(-1) & ~answer.isfinite().all(-1))
        self.negative = self.negative | ((product <= 0) & vector.any(-1))
        return answer

    def judged(self, found: LinearSolution) -> LinearSolution:
        """The solution, which tells of NaN that came from here; what is not positive definite is refused."""
        failed, nonfinite = found.codes > int(Status.STAGNATED), found.codes == int(Status.NONFINITE)
        bad = failed & self.negative & ~self.broken
        if is_for_symmetric(self.solver) and bool(bad.any()):
            raise ValueError(
                f"the preconditioner of {type(self.solver).__name__} must be symmetric positive definite: it gave "
                f"<r, M^-1 r> <= 0{name_lanes(bad)} (a negative direction, or a singular one). Use the absolute value "
                "of what it approximates."
            )
        broken = bool(nonfinite.any()) and not bool((nonfinite & ~self.broken).any())
        return replace(found, preconditioned=True, broken_preconditioner=broken)
