"""Dense solves: right for any matrix, a status for singular lanes, a limit on the size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_systems import MATRICES, Counted, seeds, systems
from references import F64, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status, testing


@given(system=st.sampled_from(sorted(MATRICES)).flatmap(systems))
def test_solutions_are_backward_stable(system: tuple[Tensor, Tensor]) -> None:
    matrix, b = system
    solution = il.Dense()(matrix, b)
    assert solution.status is Status.CONVERGED
    # ||b - A u|| <= c n eps ||A|| ||u||, with ||A|| = 1
    assert float((b - matrix @ solution.value).norm()) <= 10 * len(b) * 2.2e-16 * float(solution.value.norm())


def test_one_product_per_unknown_serves_all_lanes_and_they_are_made_side_by_side() -> None:
    counted = Counted(torch.stack([spd_matrix(6, 1, seed=i) for i in range(4)]))
    solution = il.Dense()(counted.operator(symmetric=True), randn(4, 6, seed=5))
    assert (
        counted.num_products == 3 and solution.steps.tolist() == [6] * 4
    )  # the first, all others at once, the residual


def test_a_product_that_vmap_cannot_follow_is_made_one_by_one() -> None:
    matrix, b = spd_matrix(6, 1, seed=0), randn(6, seed=5)
    solution = il.Dense()(lambda v: torch.from_numpy(matrix.numpy() @ v.numpy()), b)
    assert torch.allclose(solution.value, torch.linalg.solve(matrix, b), rtol=1e-12)


def test_a_symmetric_operator_that_is_not_positive_definite_is_solved_by_lu() -> None:
    matrices = torch.stack([torch.eye(2, dtype=F64), torch.tensor([[0.0, 2.0], [2.0, 0.0]], dtype=F64)])
    solution = il.Dense()(matrices, torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=F64))
    assert solution.value.tolist() == [[3.0, 4.0], [2.0, 1.5]] and solution.status is Status.CONVERGED


@given(matrix=testing.singular_matrices(st.integers(1, 10)), seed=seeds())
def test_a_singular_consistent_system_gets_the_solution_of_smallest_norm(matrix: Tensor, seed: int) -> None:
    b = matrix @ randn(len(matrix), seed=seed)
    solution = il.Dense()(matrix, b)
    assert solution.status is Status.CONVERGED
    expected = torch.linalg.pinv(matrix, rtol=1e-8) @ b
    assert relative_error(solution.value, expected) <= 1e-10  # nonzero |eigenvalues| within a factor of ten


def test_an_inconsistent_system_is_singular_with_the_least_squares_residual() -> None:
    solution = il.Dense()(torch.diag(torch.tensor([2.0, 0.0], dtype=F64)), torch.tensor([3.0, 4.0], dtype=F64))
    assert solution.status is Status.SINGULAR
    assert solution.value.tolist() == pytest.approx([1.5, 0.0]) and float(solution.relative_residual) == 0.8
    with pytest.raises(il.SingularError, match="outside its range"):
        solution.enforce("warn")


def test_float32_lanes_are_refined_to_float32_accuracy() -> None:
    matrix, b = spd_matrix(20, 3, seed=1).float(), randn(20, seed=2, dtype=torch.float32)
    solution = il.Dense()(matrix, b)
    expected = torch.linalg.solve(matrix.double(), b.double())
    # factorised in float64: the error is that of rounding the answer, and of the float32 residual it is refined with
    assert solution.value.dtype == torch.float32
    assert relative_error(solution.value.double(), expected) <= 1e-6


def test_half_precision_is_accepted() -> None:
    solution = il.Dense()(2 * torch.eye(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16))
    assert solution.value.tolist() == [0.5] * 3 and solution.value.dtype == torch.bfloat16


def test_a_system_above_the_limit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"would store 11 x 11 numbers per system, above max_size=10.*ConjugateGradient"
    ):
        il.Dense(max_size=10)(torch.eye(11, dtype=F64), torch.ones(11, dtype=F64))


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rtol=-1.0 must be non-negative"):
        il.Dense(rtol=-1.0)
