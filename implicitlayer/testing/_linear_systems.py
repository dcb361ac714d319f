"""Systems for the checks of linear solvers, the residuals of their answers, recomputed, and the checks of lanes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.linear._operator import FlatOperator
from implicitlayer.testing import _arrays as arrays
from implicitlayer.testing._claims import LinearClaim, require

F64 = torch.float64
# A hundred times eps ||A|| ||u|| (true_residual returns four times that), in so many entries that luck is out.
_PLAIN, _SOME = 400.0, 8


def system(claim: LinearClaim, n: int, log10_cond: float, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A system of the claimed kind; contractions have singular values in [1/2, 3/2] whatever ``log10_cond`` says."""
    if claim.systems == "contraction":
        jacobian = arrays.normal_tensor((n, n), seed=seed)
        jacobian = jacobian / float(torch.linalg.matrix_norm(jacobian, 2))
        return (torch.eye(n, dtype=F64) - 0.5 * jacobian).to(dtype)
    make = {"positive definite": arrays.spd_matrix, "symmetric": arrays.indefinite_matrix}
    return make.get(claim.systems, arrays.general_matrix)(n, log10_cond=log10_cond, seed=seed, dtype=dtype)


def inverse_norm(claim: LinearClaim, log10_cond: float) -> float:
    return 2.0 if claim.systems == "contraction" else float(10**log10_cond)


def operator_of(claim: LinearClaim, matrix: torch.Tensor) -> FlatOperator:
    return FlatOperator(
        lambda v: torch.linalg.vecdot(matrix, v.unsqueeze(-2)),
        lambda v: torch.linalg.vecdot(matrix.mT, v.unsqueeze(-2)),
        symmetric=claim.symmetric,
    )


def value_of(claim: LinearClaim, matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """The answer of the solver, checked to be a tensor of the right shape."""
    answer = claim.solver(operator_of(claim, matrix), rhs)
    value: torch.Tensor = answer.value if isinstance(answer, LinearSolution) else answer
    require(isinstance(value, torch.Tensor), claim, f"returned {type(value).__name__}: a tensor is needed")
    shapes = f"returned shape {tuple(value.shape)} for a right-hand side of shape {tuple(rhs.shape)}"
    require(value.shape == rhs.shape, claim, shapes)
    return value


def solution_of(claim: LinearClaim, matrix: torch.Tensor, rhs: torch.Tensor) -> LinearSolution:
    """The answer of the solver, checked to be a record with a status."""
    answer: LinearSolution = claim.solver(operator_of(claim, matrix), rhs)
    text = f"returned {type(answer).__name__} in place of il.LinearSolution"
    require(isinstance(answer, LinearSolution), claim, text)
    return answer


def right_hand_sides(matrix: torch.Tensor, seed: int) -> list[tuple[str, torch.Tensor]]:
    """Random, and A z for a random z; a random one flatters Krylov methods, whose answer it fills with small modes."""
    z = arrays.normal_tensor((len(matrix),), seed=seed)
    return [("random", z.to(matrix.dtype)), ("hard", (matrix.double() @ z).to(matrix.dtype))]


def true_residual(matrix: torch.Tensor, value: torch.Tensor, rhs: torch.Tensor) -> tuple[float, float]:
    """``||b - A u|| / ||b||`` and the rounding of computing A u in the dtype of A, relative to ``||b||``.

    A and b are brought to size one first (by powers of two), so that no scale overflows. A product of length n rounds
    by at most n eps ||A|| ||u||, and by less than eps ||A|| ||u|| as a rule: the signs of the errors differ. Honest
    solvers, which compute b - A u in the dtype of A, were found off by up to 0.4 of that; four times it is allowed.
    """
    if not bool(value.isfinite().all()):
        return math.inf, 0.0
    size_a, size_b = power_of_two(matrix), power_of_two(rhs)
    a, b, u = matrix.double() / size_a, rhs.double() / size_b, value.double() * size_a / size_b
    norm = float(b.norm())
    spectral = float(torch.linalg.matrix_norm(a, 2))
    rounding = 4 * torch.finfo(matrix.dtype).eps * spectral * float(u.norm()) / norm
    return float((b - a @ u).norm()) / norm, rounding


def power_of_two(tensor: torch.Tensor) -> float:
    """The power of two below the largest magnitude."""
    return 2.0 ** math.floor(math.log2(float(tensor.abs().max())))


def require_solved(claim: LinearClaim, n: int, log10_cond: float, dtype: torch.dtype) -> None:
    matrix = system(claim, n, log10_cond, n, dtype)
    for name, b in right_hand_sides(matrix, n + 1):
        require_residual(claim, matrix, b, f"n={n}, condition 1e{log10_cond:g}, {name} b, {dtype}")


def require_residual(claim: LinearClaim, matrix: torch.Tensor, rhs: torch.Tensor, system: str) -> None:
    residual, rounding = true_residual(matrix, value_of(claim, matrix, rhs), rhs)
    allowed = claim.allowed(matrix.dtype)
    text = f"left a relative residual of {residual:.2e}, {allowed:.1e} is promised ({system})"
    require(residual <= allowed + rounding, claim, text)


def require_true_claim(
    claim: LinearClaim, matrix: torch.Tensor, rhs: torch.Tensor, system: str, solver: Callable[..., Any] | None = None
) -> None:
    """CONVERGED is not said above the promised residual.

    Rounding is no excuse where it is so large that the solver's own residual must have shown it: honest ones, each
    entry of which is off by a tenth of eps ||A|| ||u|| at least as a rule, then say that they stagnated.
    """
    answer = (solver or claim.solver)(operator_of(claim, matrix), rhs)
    assert isinstance(answer, LinearSolution)
    if answer.status is Status.CONVERGED:
        residual, rounding = true_residual(matrix, answer.value, rhs)
        allowed = claim.allowed(matrix.dtype)
        if rounding > _PLAIN * allowed and rhs.shape[-1] >= _SOME:
            rounding = 0.0
        text = f"says CONVERGED at a relative residual of {residual:.2e}, {allowed:.1e} is promised ({system})"
        require(residual <= allowed + rounding, claim, text)


def powers_of_ten(claim: LinearClaim, dtype: torch.dtype) -> list[int]:
    most = min(claim.log10_scale, arrays.MAX_LOG10_SCALE[dtype])
    return sorted({sign * power for power in (min(12, most), most) for sign in (-1, 1)})


def check_batch_equals_loop(claim: LinearClaim) -> None:
    """Systems side by side are solved as one by one: also finished, zero and hard ones in one batch."""
    _require_lanes_agree(claim, *_mixed_batch(claim), "in a batch", None)


def check_a_lane_in_trouble_leaves_the_others(claim: LinearClaim) -> None:
    """NaN in the matrix or the right-hand side of one lane changes no other lane."""
    for where in ("matrix", "right-hand side"):
        matrices, b, inverse = _mixed_batch(claim)
        (matrices if where == "matrix" else b)[2] = math.nan
        _require_lanes_agree(claim, matrices, b, inverse, f"beside a lane with NaN in its {where}", 2)


def check_a_finished_lane_is_frozen(claim: LinearClaim) -> None:
    """The answer of a lane is bitwise the same whether its neighbours finish before it or long after it."""
    n, own = 12, 1
    # 1 - 0.1 S with ||S|| = 1 is a system of every kind, and solved in a few steps, to a rest that more would change
    middle = torch.eye(n, dtype=F64) - 0.1 * arrays.indefinite_matrix(n, seed=32)
    b = arrays.normal_tensor((3, n), seed=33)
    early = torch.stack([torch.eye(n, dtype=F64), middle, torch.eye(n, dtype=F64)])
    late = early.clone()
    for i in (0, 2):
        late[i] = system(claim, n, claim.log10_cond, 34 + i, F64)
    hard = b.clone()
    hard[0] = late[0] @ b[0]
    b[2] = 0  # nothing to solve
    first = value_of(claim, early, b)[own].clone()
    second = value_of(claim, late, hard)[own]
    apart = float((second - first).abs().max())
    text = f"gave one lane of a batch two answers, {apart:.2e} apart, as its neighbours finished early or late"
    require(torch.equal(first, second), claim, text)


def _mixed_batch(claim: LinearClaim) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """Five systems: random, random with a tiny b, the hardest promised, one solved at once (A = I), one with b = 0."""
    conditions = [0.0, claim.log10_cond / 2, claim.log10_cond, 0.0, claim.log10_cond / 2]
    matrices = torch.stack([system(claim, 6, c, 30 + i, F64) for i, c in enumerate(conditions)])
    if claim.systems != "contraction":
        matrices[3] = torch.eye(6, dtype=F64)
    b = arrays.normal_tensor((5, 6), seed=31)
    b[1] *= 10.0 ** -min(9, claim.log10_scale)  # beside lanes of size one
    b[4] = 0
    return matrices, b, [inverse_norm(claim, c) for c in conditions]


def _require_lanes_agree(
    claim: LinearClaim, matrices: torch.Tensor, b: torch.Tensor, inverse: list[float], where: str, but: int | None
) -> None:
    """Lanes solved together have the answers that they have alone, ``but`` one that is in trouble."""
    together = value_of(claim, matrices, b)
    for i in (i for i in range(len(b)) if i != but):
        alone = value_of(claim, matrices[i], b[i])
        error = float((together[i] - alone).norm())
        allowed = 2 * inverse[i] * (claim.rtol + 1e-14) * float(b[i].norm())
        text = f"solves lane {i} {where} otherwise than alone: {error:.2e} apart, {allowed:.2e} allowed"
        require(error <= allowed, claim, text)
