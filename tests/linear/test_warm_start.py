"""Warm start: fewer steps for a slowly changing system, and never another answer."""

import math
from typing import Any

import pytest
import torch
from linear_systems import Counted, contraction
from references import F64, randn, relative_error, spd_matrix

import implicitlayer as il
from implicitlayer import Status

INNER = [il.ConjugateGradient(), il.Minres(), il.Gmres(), il.Bicgstab()]


@pytest.mark.parametrize("inner", INNER, ids=lambda solver: type(solver).__name__)
def test_a_slowly_changing_system_takes_fewer_steps_to_the_same_tolerance(inner: Any) -> None:
    matrix, b, change = spd_matrix(60, 2, seed=1), randn(60, seed=2), spd_matrix(60, 2, seed=3)
    solver = il.WarmStart(inner)
    for k in range(4):
        current, rhs = matrix + 1e-5 * k * change, b + 1e-5 * k * randn(60, seed=4)
        warm, cold = solver(current, rhs), inner(current, rhs)
        assert warm.status is Status.CONVERGED
        assert float((rhs - current @ warm.value).norm() / rhs.norm()) <= 1e-9
        assert float(warm.relative_residual) == pytest.approx(
            float((rhs - current @ warm.value).norm() / rhs.norm()), rel=1e-3
        )
        assert warm.num_steps == cold.num_steps if k == 0 else warm.num_steps < 0.8 * cold.num_steps


def test_the_same_system_again_takes_one_product() -> None:
    counted, b = Counted(spd_matrix(30, 2, seed=1)), randn(30, seed=2)
    solver = il.WarmStart(il.Minres())
    first = solver(counted.operator(symmetric=True), b)
    counted.num_products = 0
    second = solver(counted.operator(symmetric=True), b)
    assert counted.num_products == 1 and second.num_steps == 0 and second.status is Status.CONVERGED
    assert torch.equal(second.value, first.value)


def test_reset_forgets() -> None:
    matrix, b = spd_matrix(30, 2, seed=1), randn(30, seed=2)
    solver = il.WarmStart(il.Minres())
    first = solver(matrix, b)
    solver.reset()
    again = solver(matrix, b)
    assert again.num_steps == first.num_steps and torch.equal(again.value, first.value)


def test_an_unrelated_system_is_solved_as_from_zero() -> None:
    solver = il.WarmStart(il.Gmres())
    solver(torch.eye(5, dtype=F64), 1e8 * torch.ones(5, dtype=F64))
    matrix, b = contraction(5, seed=1), randn(5, seed=2)
    solution = solver(matrix, b)
    assert relative_error(solution.value, torch.linalg.solve(matrix, b)) <= 1e-9
    assert torch.equal(solution.steps, il.Gmres()(matrix, b).steps)


def test_shapes_and_dtypes_do_not_mix() -> None:
    solver = il.WarmStart(il.Minres())
    solver(torch.eye(3, dtype=F64), torch.ones(3, dtype=F64))
    assert solver(torch.eye(4, dtype=F64), torch.ones(4, dtype=F64)).value.tolist() == [1.0] * 4
    single = solver(2 * torch.eye(3), torch.ones(3))
    assert single.value.dtype == torch.float32 and single.num_steps == 1


def test_each_lane_starts_from_its_own_answer_and_trouble_stays_in_its_lane() -> None:
    matrices = torch.stack([spd_matrix(20, 2, seed=i) for i in range(3)])
    b = randn(3, 20, seed=5) * torch.tensor([[1e-150], [1.0], [1e150]], dtype=F64)
    solver = il.WarmStart(il.Minres())
    first = solver(matrices, b)
    broken = b.clone()
    broken[1] = math.nan
    second = solver(matrices, broken)
    assert second.codes.tolist() == [Status.CONVERGED, Status.NONFINITE, Status.CONVERGED]
    assert second.steps.tolist()[::2] == [0, 0]
    third = solver(matrices, b)  # the broken lane kept its old start
    assert third.status is Status.CONVERGED and third.steps.tolist() == [0, 0, 0]
    assert torch.equal(third.value, first.value)


def test_a_zero_right_hand_side_stays_exactly_zero_and_keeps_the_start() -> None:
    counted, b = Counted(spd_matrix(10, 1, seed=1)), randn(10, seed=2)
    solver = il.WarmStart(il.Minres())
    solver(counted.operator(symmetric=True), b)
    counted.num_products = 0
    assert not solver(counted.operator(symmetric=True), torch.zeros(10, dtype=F64)).value.any()
    assert counted.num_products == 0
    assert solver(counted.operator(symmetric=True), b).num_steps == 0


def test_a_fixed_number_of_steps_goes_on_where_it_stopped() -> None:
    matrix, b = spd_matrix(40, 2, seed=1), randn(40, seed=2)
    solver = il.WarmStart(il.Minres(max_steps=5))
    residuals = []
    for _ in range(4):
        solution = solver(matrix, b)
        assert solution.status is Status.STEP_LIMIT and solution.num_steps == 5
        residuals.append(float((b - matrix @ solution.value).norm()))
        assert float(solution.residual_norm) == pytest.approx(residuals[-1], rel=1e-9)
    assert residuals == sorted(residuals, reverse=True) and residuals[-1] < 0.5 * residuals[0]


def test_an_absolute_tolerance_stays_in_units_of_the_right_hand_side() -> None:
    matrix, b = spd_matrix(40, 2, seed=1), 1e3 * randn(40, seed=2)
    solver = il.WarmStart(il.ConjugateGradient(atol=1.0))
    for shift in (0.0, 1e-2):
        solution = solver(matrix + shift * torch.eye(40, dtype=F64), b)
        residual = float((b - matrix @ solution.value - shift * solution.value).norm())
        assert solution.status is Status.CONVERGED and 1e-4 <= residual <= 10.0


def test_what_is_kept_is_detached_and_not_the_callers_tensor() -> None:
    matrix, b = spd_matrix(10, 1, seed=1), randn(10, seed=2).requires_grad_()
    solver = il.WarmStart(il.Minres())
    with torch.no_grad():
        first = solver(matrix, b)
        expected = first.value.clone()
        first.value.zero_()
        assert torch.equal(solver(matrix, b).value, expected)


def test_it_serves_inside_normal_equations_and_a_layer() -> None:
    matrix, b = contraction(20, seed=1), randn(20, seed=2)
    solver = il.NormalEquations(il.WarmStart(il.ConjugateGradient()))
    first, second = solver(matrix, b), solver(matrix, b)
    assert first.status is second.status is Status.CONVERGED and second.num_steps < first.num_steps


def test_a_solver_without_tolerances_is_refused() -> None:
    with pytest.raises(TypeError, match=r"needs a solver with rtol, atol and max_steps.*got NormalEquations"):
        il.WarmStart(il.NormalEquations())
