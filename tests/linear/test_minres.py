"""MINRES: the smallest residual over each Krylov space, singular systems, preconditioners."""

import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_systems import indefinite_matrix, seeds, smallest_residual
from references import F64, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status, testing


def test_each_truncated_solve_has_the_smallest_residual_of_its_krylov_space() -> None:
    matrix, b = indefinite_matrix(15, 1, seed=1), randn(15, seed=2)
    for steps in range(1, 9):
        solution = il.Minres(max_steps=steps)(matrix, b)
        # rounding times the condition of the small problem, at most 10, and a few steps of lost orthogonality
        assert relative_error(solution.value, smallest_residual(matrix, b, steps)) <= 1e-12


def test_solution_agrees_with_scipy() -> None:
    matrix, b = indefinite_matrix(40, 2, seed=5), randn(40, seed=6)
    reference, info = scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), rtol=1e-14, maxiter=2000)
    assert info == 0
    assert relative_error(il.Minres()(matrix, b).value, torch.from_numpy(reference)) <= 1e-7  # 10 rtol * condition


@given(matrix=testing.singular_matrices(st.integers(1, 15)), seed=seeds())
def test_an_inconsistent_system_ends_singular_at_the_least_squares_residual(matrix: Tensor, seed: int) -> None:
    b = randn(len(matrix), seed=seed)
    values, vectors = torch.linalg.eigh(matrix)
    null = vectors[:, values.abs() < 1e-8]
    outside = float((null.T @ b).norm() / b.norm())  # the part of b that no u can reach
    solution = il.Minres()(matrix, b)
    if outside > 1e-6:
        assert solution.status is Status.SINGULAR
        # ||A r|| falls to about sqrt(eps) ||A|| ||r||, so r is off by that over the smallest |eigenvalue|, 0.1
        assert float(solution.relative_residual) == pytest.approx(outside, rel=1e-5)


def test_a_singular_lane_raises_singular_error_by_name() -> None:
    solution = il.Minres()(torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), torch.ones(2, dtype=F64))
    with pytest.raises(il.SingularError, match=r"MINRES met p'Ap/p'p = .*outside its range"):
        solution.enforce("warn")


def test_a_preconditioner_saves_steps_and_the_tolerance_stays_in_the_2_norm() -> None:
    signs = randn(60, seed=3).sign()
    scales = torch.logspace(0, 6, 60, dtype=F64)
    root = scales.sqrt()
    matrix = torch.diag(scales * signs) + 0.1 * root.unsqueeze(1) * indefinite_matrix(60, 1, seed=4) * root
    b = randn(60, seed=5)
    plain = il.Minres(max_steps=400, rtol=1e-10)(matrix, b)
    solution = il.Minres(preconditioner=lambda v: v / scales)(matrix, b)
    assert solution.status is Status.CONVERGED and solution.num_steps < 30 < plain.num_steps
    assert float((b - matrix @ solution.value).norm() / b.norm()) <= 1e-9


def test_the_residual_of_a_truncated_preconditioned_solve_is_the_2_norm() -> None:
    matrix, b = indefinite_matrix(20, 2, seed=1), randn(20, seed=2)
    weights = 1 + torch.rand(20, dtype=F64)
    for steps in (1, 3, 7):
        solution = il.Minres(max_steps=steps, preconditioner=lambda v: v * weights)(matrix, b)
        assert not solution.residual_is_true
        assert float(solution.residual_norm) == pytest.approx(float((b - matrix @ solution.value).norm()), rel=1e-10)


@pytest.mark.parametrize("lanes", [(), (3,)])
def test_an_indefinite_preconditioner_is_refused(lanes: tuple[int, ...]) -> None:
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64)
    matrix = spd_matrix(4, 1, seed=0).expand(*lanes, 4, 4)
    with pytest.raises(ValueError, match="preconditioner of Minres must be symmetric positive definite"):
        il.Minres(preconditioner=lambda v: v * signs)(matrix, randn(*lanes, 4, seed=1))


def test_a_preconditioner_that_returns_nan_is_nonfinite() -> None:
    solution = il.Minres(preconditioner=lambda v: v * float("nan"))(spd_matrix(4, 1, seed=0), randn(4, seed=1))
    assert solution.status is Status.NONFINITE


def test_each_iterate_agrees_with_scipy() -> None:
    matrix, b = indefinite_matrix(30, 1, seed=7), randn(30, seed=8)
    for steps in range(1, 12):
        reference, _ = scipy.sparse.linalg.minres(matrix.numpy(), b.numpy(), rtol=0.0, maxiter=steps)
        # the same recurrence in another order of operations: rounding times the condition 10, a little more each step
        assert relative_error(il.Minres(max_steps=steps)(matrix, b).value, torch.from_numpy(reference)) <= 1e-12
