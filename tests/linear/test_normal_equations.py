"""Normal equations: any square system by a positive-definite solver, with its residual told."""

import pytest
import torch
from linear_systems import Counted, general_matrix
from references import F64, randn, relative_error, spd_matrix

import implicitlayer as il
from implicitlayer import Status


def test_an_orthogonal_matrix_takes_one_step() -> None:
    matrix = torch.eye(10, dtype=F64).roll(1, 0)
    solution = il.NormalEquations()(matrix, randn(10, seed=1))
    assert solution.num_steps == 1 and solution.status is Status.CONVERGED


def test_a_step_is_a_product_and_a_transposed_product() -> None:
    counted, b = Counted(general_matrix(20, 1, seed=1)), randn(20, seed=2)
    solution = il.NormalEquations(il.ConjugateGradient(max_steps=5))(counted.operator(), b)
    assert solution.status is Status.STEP_LIMIT and solution.num_steps == 5
    assert counted.num_products == 2 * 5 + 2  # A'b, and the residual
    true = float((b - counted.matrix @ solution.value).norm())
    assert float(solution.residual_norm) == pytest.approx(true, rel=1e-10)


def test_an_inconsistent_system_ends_singular_at_the_least_squares_residual() -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=F64)) @ general_matrix(3, 0.3, seed=1)
    b = torch.tensor([0.3, 0.4, 1.2], dtype=F64)
    solution = il.NormalEquations()(matrix, b)
    assert solution.status is Status.SINGULAR
    assert float(solution.relative_residual) == pytest.approx(1.2 / 1.3, rel=1e-9)
    orthogonal_rhs = torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    assert il.NormalEquations()(matrix, orthogonal_rhs).status is Status.SINGULAR


def test_any_positive_definite_solver_serves_inside() -> None:
    matrix, b = general_matrix(15, 1, seed=3), randn(15, seed=4)
    expected = torch.linalg.solve(matrix, b)
    for inner in (il.Minres(), il.Gmres(), il.Dense(), il.ConjugateGradient(atol=1e-9)):
        solution = il.NormalEquations(inner)(matrix, b)
        assert solution.status is Status.CONVERGED and type(inner).__name__ in solution.method
        assert relative_error(solution.value, expected) <= 1e-7


def test_an_operator_without_transpose_is_refused_and_a_symmetric_one_needs_none() -> None:
    matrix, b = spd_matrix(5, 1, seed=1), randn(5, seed=2)
    assert il.NormalEquations()(lambda v: matrix @ v, b).status is Status.CONVERGED
    operator = il.FlatOperator(lambda v: matrix @ v, symmetric=False)
    with pytest.raises(ValueError, match=r"needs products with the transpose.*il\.Gmres\(\)"):
        il.NormalEquations()(operator, b)


def test_a_solver_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a linear solver such as il\.ConjugateGradient"):
        il.NormalEquations(torch.linalg.solve)  # type: ignore[arg-type]
