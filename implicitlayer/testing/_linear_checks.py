"""The conformance checks of linear solvers. Each takes a claim, and raises AssertionError with the numbers."""

# n: unknowns. Residuals are recomputed here, in float64, from the very entries that the solver saw; what the solver
# says of itself is compared with them and believed in nothing.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from implicitlayer._errors import LinearSolveError
from implicitlayer.base._status import Status
from implicitlayer.equation._public import linear_solve
from implicitlayer.testing import _arrays as arrays
from implicitlayer.testing._claims import LinearClaim, require
from implicitlayer.testing._linear_systems import (
    check_a_finished_lane_is_frozen,
    check_a_lane_in_trouble_leaves_the_others,
    check_batch_equals_loop,
    inverse_norm,
    powers_of_ten,
    require_residual,
    require_solved,
    require_true_claim,
    right_hand_sides,
    solution_of,
    system,
    value_of,
)

F64, F32 = torch.float64, torch.float32
SIZES = (1, 2, 5, 12, 20)

Check = Callable[[LinearClaim], None]


def check_solves_random_systems(claim: LinearClaim) -> None:
    """Every system up to the promised condition is solved, for random and for hard right-hand sides."""
    conditions = {0.0, claim.log10_cond / 2, claim.log10_cond}
    for n in SIZES:
        for log10_cond in sorted(conditions):
            require_solved(claim, n, log10_cond, F64)


def check_solves_in_float32(claim: LinearClaim) -> None:
    """The same in float32, to a condition of 100 at most."""
    for n in SIZES:
        require_solved(claim, n, min(claim.log10_cond, 2.0), F32)


def check_solves_with_a_preconditioner(claim: LinearClaim) -> None:
    """The same solver with a positive definite preconditioner (a diagonal from 1/2 to 2) solves the same systems."""
    assert claim.preconditioned is not None
    other = replace(claim, solver=claim.preconditioned, name=f"{claim.name} with a preconditioner")
    for n in (1, 5, 12):
        require_solved(other, n, claim.log10_cond, F64)


def check_shape_and_dtype(claim: LinearClaim) -> None:
    """The answer has the shape and dtype of the right-hand side and carries no graph."""
    for dtype in claim.dtypes:
        for n in (1, 4):
            b = arrays.normal_tensor((n,), seed=3, dtype=dtype)
            value = value_of(claim, system(claim, n, 0, 1, dtype), b)
            require(value.dtype == dtype, claim, f"returned dtype {value.dtype} for a right-hand side of {dtype}")
            require(not value.requires_grad, claim, "returned a tensor that requires grad")


def check_small_right_hand_sides(claim: LinearClaim) -> None:
    """No unknowns at all, and a 0-d unknown by way of il.linear_solve."""
    value_of(claim, torch.zeros(0, 0, dtype=F64), torch.zeros(0, dtype=F64))  # of the right shape, or it raises
    slope = {"positive definite": 4.0, "contraction": 1.25}.get(claim.systems, -4.0)
    scalar = _by_linear_solve(claim, lambda u: slope * u, torch.tensor(2.0, dtype=F64), symmetric=True)
    error = abs(float(scalar) * slope / 2 - 1)
    require(error <= claim.rtol + 1e-15, claim, f"solved {slope} u = 2 with a relative residual of {error:.2e}")


def check_zero_right_hand_side(claim: LinearClaim) -> None:
    """A zero right-hand side gives exactly zero: no 0/0."""
    for dtype in claim.dtypes:
        value = value_of(claim, system(claim, 5, 1, 1, dtype), torch.zeros(5, dtype=dtype))
        require(not bool((value != 0).any()), claim, f"answered a zero right-hand side by {value.tolist()}")


def check_linear_in_the_right_hand_side(claim: LinearClaim) -> None:
    """u(2 b - 3 c) = 2 u(b) - 3 u(c)."""
    # each solve is off by at most cond * rtol relative to ||b|| / ||A|| (the smallest singular value is 1 / cond)
    log10_cond = min(1.0, claim.log10_cond)
    matrix = system(claim, 8, log10_cond, 4, F64)
    b, c = arrays.normal_tensor((8,), seed=5), arrays.normal_tensor((8,), seed=6)
    parts = [value_of(claim, matrix, rhs) for rhs in (2 * b - 3 * c, b, c)]
    error = float((parts[0] - 2 * parts[1] + 3 * parts[2]).norm())
    size = float((2 * b - 3 * c).norm() + 2 * b.norm() + 3 * c.norm())
    allowed = inverse_norm(claim, log10_cond) * (claim.rtol + 1e-14) * size
    require(error <= allowed, claim, f"is not linear in the right-hand side: off by {error:.2e}, {allowed:.2e} allowed")


def check_scale_of_the_right_hand_side(claim: LinearClaim) -> None:
    """A right-hand side of any size is solved to the same relative residual."""
    for dtype in claim.dtypes:
        matrix = system(claim, 6, min(1.0, claim.log10_cond), 7, dtype)
        b = arrays.normal_tensor((6,), seed=8)
        for power in powers_of_ten(claim, dtype):
            require_residual(claim, matrix, (b * 10.0**power).to(dtype), f"b scaled by 1e{power}")


def check_scale_of_the_matrix(claim: LinearClaim) -> None:
    """A matrix of any size is solved to the same relative residual."""
    for dtype in claim.dtypes:
        b = arrays.normal_tensor((6,), seed=8, dtype=dtype)
        for power in powers_of_ten(claim, dtype):
            matrix = system(claim, 6, min(1.0, claim.log10_cond), 7, F64) * 10.0**power
            require_residual(claim, matrix.to(dtype), b, f"A scaled by 1e{power}")


def check_inputs_are_left_alone(claim: LinearClaim) -> None:
    """Neither the right-hand side nor the matrix is changed in place."""
    matrix, b = system(claim, 5, 1, 9, F64), arrays.normal_tensor((5,), seed=10)
    before, versions = (matrix.clone(), b.clone()), (matrix._version, b._version)
    value_of(claim, matrix, b)
    for name, now, then in (("the matrix", matrix, before[0]), ("the right-hand side", b, before[1])):
        require(torch.equal(now, then), claim, f"changed {name} in place")
    require((matrix._version, b._version) == versions, claim, "wrote to its inputs in place")


def check_repeats_are_bitwise_equal(claim: LinearClaim) -> None:
    """The same system gives the same bits, also after another one was solved."""
    matrix, b = system(claim, 7, 1, 11, F64), arrays.normal_tensor((7,), seed=12)
    first = value_of(claim, matrix, b).clone()
    value_of(claim, system(claim, 7, 0, 13, F64), 3 * b)
    second = value_of(claim, matrix, b)
    worst = float((second - first).abs().max())
    require(torch.equal(first, second), claim, f"gave two answers to one system, {worst:.2e} apart")


def check_gradients_of_a_linear_solve(claim: LinearClaim) -> None:
    """il.linear_solve around it has the gradients A^-T v and -(A^-T v) u'; a general solver also solves with A'."""
    log10_cond = min(1.0, claim.log10_cond)
    matrix = system(claim, 6, log10_cond, 14, F64).requires_grad_()
    b, v = arrays.normal_tensor((6,), seed=15).requires_grad_(), arrays.normal_tensor((6,), seed=16)
    u = _by_linear_solve(claim, matrix, b, symmetric=claim.symmetric)
    try:
        got = torch.autograd.grad(u, (matrix, b), v)
    except LinearSolveError as failure:
        raise AssertionError(f"{claim.name} failed inside the backward of il.linear_solve: {failure}") from failure
    b_bar = torch.linalg.solve(matrix.detach().T, v)
    right = (-torch.outer(b_bar, torch.linalg.solve(matrix.detach(), b.detach())), b_bar)
    # two solves, each off by cond * rtol; the outer product carries both
    allowed = 4 * inverse_norm(claim, log10_cond) * 10**log10_cond * claim.rtol + 1e-12
    for name, g, r in zip(("the matrix", "the right-hand side"), got, right, strict=True):
        error = float((g - r).norm() / r.norm())
        text = f"gives a gradient in {name} that is off by {error:.2e}, {allowed:.2e} allowed"
        require(error <= allowed, claim, text)


def _by_linear_solve(claim: LinearClaim, operator: Any, rhs: torch.Tensor, symmetric: bool) -> torch.Tensor:
    """il.linear_solve with the solver; its own failures count as failures of the check."""
    try:
        u: torch.Tensor = linear_solve(operator, rhs, claim.solver, symmetric=symmetric, on_failure="raise")
    except LinearSolveError as error:
        raise AssertionError(f"{claim.name} failed inside il.linear_solve: {error}") from error
    return u


# ------------------------------------------------------------------------------------------------------------- status


def check_status_tells_the_truth(claim: LinearClaim) -> None:
    """CONVERGED is said only where the recomputed residual is as promised, however hard the system."""
    for dtype in claim.dtypes:
        hardest = (2, 4, 6, 8) if dtype == F32 else (2, 8, 10, 12, 16)
        for n in (2, 8, 16):
            for log10_cond in hardest:
                if claim.systems == "contraction":  # it may fail here, but must say so
                    matrix = arrays.general_matrix(n, log10_cond=log10_cond, seed=n + 17, dtype=dtype)
                else:
                    matrix = system(claim, n, log10_cond, n + 17, dtype)
                for name, b in right_hand_sides(matrix, 18):
                    require_true_claim(claim, matrix, b, f"n={n}, condition 1e{log10_cond}, {name} b, {dtype}")
    if claim.systems == "positive definite":
        matrix = arrays.indefinite_matrix(6, log10_cond=1, seed=19)
        require_true_claim(claim, matrix, arrays.normal_tensor((6,), seed=20), "an indefinite matrix")


def check_an_easy_system_is_a_success(claim: LinearClaim) -> None:
    """A system of condition 10 at most ends with a status of success: caution alone is no virtue."""
    for n in (1, 8):
        matrix, b = system(claim, n, min(1.0, claim.log10_cond), 29, F64), arrays.normal_tensor((n,), seed=30)
        solution = solution_of(claim, matrix, b)
        require(solution.status.ok, claim, f"says {solution.status.name} for an easy system ({n=})")


def check_a_singular_system_is_no_success(claim: LinearClaim) -> None:
    """A right-hand side outside the range of a singular matrix never gives CONVERGED."""
    kind = {"positive definite": "positive semidefinite", "symmetric": "symmetric"}.get(claim.systems, "general")
    for n, rank in ((1, 0), (3, 2), (8, 5)):
        matrix = arrays.singular_matrix(n, rank, kind=kind, seed=n)
        outside = torch.linalg.svd(matrix)[0][:, -1]  # orthogonal to the range
        b = arrays.normal_tensor((n,), seed=21)
        b = b + outside * torch.copysign(b.norm(), outside @ b)  # at least half of it is outside
        text = f"says CONVERGED for a singular matrix (n={n}, {rank=})"
        require(solution_of(claim, matrix, b).status is not Status.CONVERGED, claim, text)


def check_an_indefinite_system_is_no_success(claim: LinearClaim) -> None:
    """A solver for positive definite systems never reports success on one that is not, alone or in a lane."""
    negative = -arrays.spd_matrix(6, log10_cond=1, seed=26)
    indefinite = arrays.indefinite_matrix(6, log10_cond=1, seed=27)
    # along the eigenvector of the most negative eigenvalue -1, so that the first curvature b'Ab is it
    worst = torch.linalg.eigh(indefinite)[1][:, 0]
    b = arrays.normal_tensor((6,), seed=28)
    systems = [
        (torch.tensor([[-4.0]], dtype=F64), torch.tensor([2.0], dtype=F64), "-4 u = 2"),
        (negative, b, "a negative definite matrix"),
        (indefinite, worst, "an indefinite matrix and b along negative curvature"),
    ]
    remedy = "If it is for such systems too, say so: systems='symmetric' or 'general'"
    for matrix, rhs, what in systems:
        status = solution_of(claim, matrix, rhs).status
        require(not status.ok, claim, f"says {status.name} for {what}. {remedy}")
    if claim.batched:
        together = solution_of(claim, torch.stack([-negative, negative, indefinite]), torch.stack([b, b, worst]))
        for lane, (_, _, what) in enumerate(systems[1:], start=1):
            status = Status(int(together.codes[lane]))
            require(not status.ok, claim, f"says {status.name} for {what} in lane {lane} of a batch. {remedy}")


def check_nan_is_no_success(claim: LinearClaim) -> None:
    """NaN in the products never gives a status of success."""
    matrix = system(claim, 4, 0, 22, F64)
    matrix[1, 2] = math.nan
    solution = solution_of(claim, matrix, arrays.normal_tensor((4,), seed=23))
    require(not solution.status.ok, claim, f"says {solution.status.name} although the products hold NaN")


def check_a_step_limit_is_no_success(claim: LinearClaim) -> None:
    """Stopped after one step, it does not say CONVERGED unless it has."""
    assert claim.limited is not None
    for seed in range(3):
        matrix = system(claim, 20, 2, seed + 24, F64)
        b = arrays.normal_tensor((20,), seed=seed + 25)
        require_true_claim(claim, matrix, b, "stopped after one step", claim.limited)


def linear_checks(claim: LinearClaim) -> Iterator[Check]:
    tells = claim.returns_status  # of a bare tensor the layer recomputes the residual itself
    asked: dict[Check, bool] = {
        check_shape_and_dtype: True,
        check_solves_random_systems: True,
        check_solves_in_float32: F32 in claim.dtypes,
        check_small_right_hand_sides: True,
        check_zero_right_hand_side: True,
        check_linear_in_the_right_hand_side: True,
        check_scale_of_the_right_hand_side: claim.log10_scale > 0,
        check_scale_of_the_matrix: claim.log10_scale > 0 and claim.systems != "contraction",  # scaled it is none
        check_solves_with_a_preconditioner: claim.preconditioned is not None,
        check_inputs_are_left_alone: True,
        check_repeats_are_bitwise_equal: claim.deterministic,
        check_gradients_of_a_linear_solve: True,
        check_batch_equals_loop: claim.batched,
        check_a_lane_in_trouble_leaves_the_others: claim.batched,
        check_a_finished_lane_is_frozen: claim.batched and claim.deterministic,
        check_status_tells_the_truth: tells,
        check_an_easy_system_is_a_success: tells,
        check_a_singular_system_is_no_success: tells,
        check_an_indefinite_system_is_no_success: tells and claim.systems == "positive definite",
        check_nan_is_no_success: tells,
        check_a_step_limit_is_no_success: tells and claim.limited is not None,
    }
    yield from (check for check, wanted in asked.items() if wanted)
