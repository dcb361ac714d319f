"""Preconditioners from products: the diagonal and the randomised Nystrom approximation."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_systems import Counted, indefinite_matrix, seeds
from references import F64, orthogonal, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status


def built(preconditioner: Any, matrix: Tensor) -> Tensor:
    """M^-1 as a dense matrix."""
    n = matrix.shape[-1]
    apply = preconditioner.build(il.FlatOperator(lambda v: matrix @ v), torch.zeros(n, dtype=matrix.dtype))
    return torch.stack([apply(unit) for unit in torch.eye(n, dtype=matrix.dtype)], -1)


def test_jacobi_is_exact_when_it_may_spend_n_products() -> None:
    matrix = indefinite_matrix(12, 2, seed=1)
    counted = Counted(matrix)
    apply = il.Jacobi(num_probes=12).build(counted.operator(), randn(12, seed=0))
    assert counted.num_products == 12
    assert torch.equal(apply(torch.ones(12, dtype=F64)), 1 / matrix.diagonal().abs())


def test_jacobi_estimates_a_dominant_diagonal_from_few_products() -> None:
    scales = torch.logspace(0, 6, 300, dtype=F64)
    matrix = torch.diag(scales) + 0.02 * scales.sqrt().unsqueeze(1) * randn(300, 300, seed=1) * scales.sqrt()
    matrix = (matrix + matrix.T) / 2
    counted = Counted(matrix)
    estimate = 1 / il.Jacobi(num_probes=20).build(counted.operator(), randn(300, seed=0))(torch.ones(300, dtype=F64))
    assert counted.num_products == 20
    # an entry's error: sqrt(sum_j a_ij^2 / 20) <= 0.02 sqrt(a_ii sum_j a_jj / 20), large only for the smallest entries
    error = 0.02 * (scales * scales.sum() / 20).sqrt()
    assert bool(((estimate - matrix.diagonal().abs()).abs() <= 6 * error).all())
    b = randn(300, seed=2)
    plain, helped = il.Minres(max_steps=3000)(matrix, b), il.Minres(preconditioner=il.Jacobi(20))(matrix, b)
    assert helped.status is Status.CONVERGED and helped.num_steps < plain.num_steps / 3


def test_jacobi_never_divides_by_noise() -> None:
    # a zero diagonal with large entries beside it: the estimate is all noise, and must not become a huge inverse
    matrix = torch.ones(100, 100, dtype=F64) - torch.eye(100, dtype=F64)
    inverse = il.Jacobi(num_probes=10).build(il.FlatOperator(lambda v: matrix @ v), randn(100, seed=0))
    # the standard error of an entry is sqrt(99 / 10), about 3; every divisor is of that size
    assert float(inverse(torch.ones(100, dtype=F64)).max()) <= 2


def test_jacobi_replaces_entries_that_are_zero_or_not_finite() -> None:
    entries = torch.tensor([4.0, 0.0, math.nan, -2.0], dtype=F64)
    inverse = il.Jacobi().build(il.FlatOperator(lambda v: entries * v), torch.zeros(4, dtype=F64))
    assert inverse(torch.ones(4, dtype=F64)).isfinite().all()
    zero = il.Jacobi().build(il.FlatOperator(lambda v: 0 * v), torch.zeros(4, dtype=F64))
    assert zero(torch.ones(4, dtype=F64)).tolist() == [1.0] * 4


@given(n=st.integers(1, 12), rank=st.integers(1, 12), log10_cond=st.integers(0, 8), seed=seeds())
def test_the_nystrom_preconditioner_is_symmetric_positive_definite(
    n: int, rank: int, log10_cond: int, seed: int
) -> None:
    inverse = built(il.Nystrom(rank, damping=0.1), spd_matrix(n, log10_cond, seed) + 0.1 * torch.eye(n, dtype=F64))
    assert torch.allclose(inverse, inverse.T, atol=1e-12)
    # its eigenvalues are (lambda_l + mu) / (lambda + mu), at least mu / (1 + mu), and 1
    values = torch.linalg.eigvalsh((inverse + inverse.T) / 2)
    assert float(values.min()) >= 0.09 and float(values.max()) <= 1 + 1e-9


def test_nystrom_matches_its_formula_on_a_low_rank_matrix() -> None:
    # rank 3 and a sketch of 5: the approximation is exact, A = U diag(lambda) U'
    basis, values, damping = orthogonal(10, seed=1)[:, :3], torch.tensor([100.0, 10.0, 1.0], dtype=F64), 0.5
    low_rank = (basis * values) @ basis.T
    inverse = built(il.Nystrom(5, damping=damping), low_rank + damping * torch.eye(10, dtype=F64))
    # the fourth and fifth eigenvalues are zero: (0 + mu) / (lambda + mu) on the range, 1 off it
    expected = torch.eye(10, dtype=F64) + (basis * (damping / (values + damping) - 1)) @ basis.T
    assert torch.allclose(inverse, expected, atol=1e-9)


def test_nystrom_makes_the_condition_number_small() -> None:
    # theorem 5.1 of Frangella, Tropp & Udell: rank 2 d_eff + 1 gives an expected condition below 28
    n, damping = 120, 1e-3
    decay = 10 ** (-torch.arange(n, dtype=F64) / 5)
    basis = orthogonal(n, seed=1)
    matrix = (basis * decay) @ basis.T + damping * torch.eye(n, dtype=F64)
    effective_dimension = float((decay / (decay + damping)).sum())
    rank = 2 * math.ceil(effective_dimension) + 1
    inverse = built(il.Nystrom(rank, damping=damping), matrix)
    values = torch.linalg.eigvals(inverse @ matrix).real
    assert float(values.max() / values.min()) <= 28
    b = randn(n, seed=2)
    plain = il.Minres()(matrix, b)
    helped = il.Minres(preconditioner=il.Nystrom(rank, damping=damping))(matrix, b)
    assert helped.status is Status.CONVERGED and helped.num_steps + rank < plain.num_steps
    assert relative_error(helped.value, torch.linalg.solve(matrix, b)) <= 1e-6  # 10 rtol times condition 1e3


def test_nystrom_leaves_an_indefinite_or_nan_lane_alone() -> None:
    matrices = torch.stack([spd_matrix(8, 2, seed=1), -spd_matrix(8, 2, seed=1), torch.full((8, 8), math.nan)])
    operator = il.FlatOperator(lambda v: torch.linalg.vecdot(matrices, v.unsqueeze(-2)))
    apply = il.Nystrom(4).build(operator, torch.zeros(3, 8, dtype=F64))
    b = randn(3, 8, seed=2)
    result = apply(b)
    assert torch.equal(result[1:], b[1:]) and not torch.allclose(result[0], b[0])
    assert torch.allclose(result[0], built(il.Nystrom(4), matrices[0]) @ b[0])


@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_preconditioners_do_not_depend_on_scale(factor: float) -> None:
    matrix, b = spd_matrix(20, 4, seed=1), randn(20, seed=2)
    for preconditioner in (il.Jacobi(), il.Jacobi(5), il.Nystrom(6)):
        plain = il.Minres(preconditioner=preconditioner)(matrix, b)
        scaled = il.Minres(preconditioner=preconditioner)(matrix * factor, b)
        assert plain.status is scaled.status is Status.CONVERGED
        assert relative_error(scaled.value * factor, plain.value) <= 1e-5  # 10 rtol times the condition


def test_a_zero_right_hand_side_builds_nothing() -> None:
    counted = Counted(spd_matrix(5, 1, seed=1))
    for preconditioner in (il.Jacobi(), il.Nystrom(2)):
        il.ConjugateGradient(preconditioner=preconditioner)(counted.operator(), torch.zeros(5, dtype=F64))
        il.Minres(preconditioner=preconditioner)(counted.operator(), torch.zeros(5, dtype=F64))
    assert counted.num_products == 0


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_probes=0 must be at least 1"):
        il.Jacobi(0)
    with pytest.raises(ValueError, match=r"rank=0 must be at least 1"):
        il.Nystrom(0)
    with pytest.raises(ValueError, match=r"damping=-1.0 must be non-negative"):
        il.Nystrom(1, damping=-1.0)


SIGNS = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0], dtype=F64)
HALF = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=F64)


@pytest.mark.parametrize("lanes", [(), (3,)])
@pytest.mark.parametrize("bad", [-torch.ones(6, dtype=F64), torch.zeros(6, dtype=F64), SIGNS])
def test_conjugate_gradients_blame_a_preconditioner_that_is_not_positive_definite_not_the_matrix(
    lanes: tuple[int, ...], bad: torch.Tensor
) -> None:
    matrix = spd_matrix(6, 3, seed=1).expand(*lanes, 6, 6)
    solver = il.ConjugateGradient(preconditioner=lambda v: bad * v)
    with pytest.raises(ValueError, match="preconditioner of ConjugateGradient must be symmetric positive definite"):
        solver(matrix, randn(*lanes, 6, seed=2))


def test_a_negative_direction_of_the_matrix_is_not_laid_on_a_good_preconditioner() -> None:
    solution = il.ConjugateGradient(preconditioner=lambda v: v / 3)(-spd_matrix(6, 1, seed=1), randn(6, seed=2))
    with pytest.raises(il.IndefiniteError, match=r"p'Ap/p'p = -.* <= 0 .*preconditioner may be the reason, too"):
        solution.enforce("warn")


SOLVERS = pytest.mark.parametrize("solver", [il.ConjugateGradient, il.Minres, il.Gmres, il.Bicgstab])


@SOLVERS
def test_nan_of_a_preconditioner_is_told_as_its_own_and_nan_of_the_matrix_as_a_product(solver: Any) -> None:
    matrix, b = spd_matrix(6, 1, seed=1), randn(6, seed=2)
    with pytest.raises(il.NonFiniteError, match=r"met NaN or Inf in its preconditioner.*given as preconditioner="):
        solver(preconditioner=lambda v: v * torch.nan)(matrix, b).enforce("warn")
    with pytest.raises(il.NonFiniteError, match="in a Hessian-vector product"):
        solver(preconditioner=lambda v: v / 2)(matrix * torch.nan, b).enforce("warn")


@SOLVERS
def test_a_preconditioner_returns_the_shape_and_dtype_that_it_is_given(solver: Any) -> None:
    matrix, b = spd_matrix(6, 1, seed=1), randn(6, seed=2)
    for bad, got in (
        (lambda v: v.float(), r"torch.Size\(\[6\]\) torch.float32"),
        (lambda v: v[..., :3], r"torch.Size\(\[3\]\) torch.float64"),
        (lambda v: v.tolist(), "list"),
    ):
        with pytest.raises(
            TypeError, match=rf"preconditioner of {solver.__name__} must return .* torch.float64, got {got}"
        ):
            solver(preconditioner=bad)(matrix, b)


@pytest.mark.parametrize("solver", [il.Minres, il.Gmres, il.Bicgstab])
def test_a_failed_solve_says_that_a_preconditioner_takes_part(solver: Any) -> None:
    """With P = diag(1, 1, 1, 0, 0, 0) all u have three entries at most: none solves A u = b."""
    solution = solver(preconditioner=lambda v: HALF * v)(spd_matrix(6, 1, seed=1), randn(6, seed=2))
    with pytest.raises(il.LinearSolveError, match="The preconditioner may be the reason, too: solve without it to see"):
        solution.enforce("raise")
