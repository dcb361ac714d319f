"""The conformance checks of linear solvers that take many systems at once: lanes do not know of each other."""

# n: unknowns. Systems lie side by side, one in each lane.

from __future__ import annotations

import math

import torch

from implicitlayer.testing import _arrays as arrays
from implicitlayer.testing._claims import LinearClaim, require
from implicitlayer.testing._linear_systems import F64, inverse_norm, system, value_of


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
