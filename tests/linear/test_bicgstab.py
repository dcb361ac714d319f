"""Bi-CGSTAB: agreement with SciPy step by step, breakdowns, what it cannot do."""

import pytest
import scipy.sparse.linalg
import torch
from linear_systems import Counted, Operations, contraction
from references import F64, randn, relative_error

import implicitlayer as il
from implicitlayer import Status


def test_each_iterate_agrees_with_scipy() -> None:
    matrix, b = contraction(30, seed=1), randn(30, seed=2)
    for iterations in range(1, 7):
        reference, _ = scipy.sparse.linalg.bicgstab(matrix.numpy(), b.numpy(), rtol=0.0, maxiter=iterations)
        ours = il.Bicgstab(max_steps=2 * iterations)(matrix, b)
        # the same recurrence; its rounding grows by the size of beta, a few units per iteration
        assert relative_error(ours.value, torch.from_numpy(reference)) <= 1e-11


def test_a_step_is_one_product() -> None:
    counted, b = Counted(contraction(30, seed=1)), randn(30, seed=2)
    solution = il.Bicgstab()(counted.operator(), b)
    # and one more product for the true residual of each round
    assert solution.num_steps < counted.num_products <= solution.num_steps + 3


def test_a_solution_after_half_an_iteration_is_taken() -> None:
    solution = il.Bicgstab()(4 * torch.eye(3, dtype=F64), torch.ones(3, dtype=F64))
    assert solution.num_steps == 1 and solution.value.tolist() == [0.25] * 3


def test_a_rotation_breaks_down_honestly() -> None:
    # <r, A r> = 0 in the first step: there is no Bi-CGSTAB iterate
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    solution = il.Bicgstab()(rotation, torch.tensor([1.0, 2.0], dtype=F64))
    assert solution.status is Status.DIVERGED and solution.value.tolist() == [0.0, 0.0]
    assert "another linear solver" in solution.describe()


def test_a_breakdown_later_on_is_restarted() -> None:
    # the shadow residual becomes orthogonal to the residual after one step; a restart goes on from there
    matrix = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 2.0]], dtype=F64)
    for seed in range(50):
        b = randn(3, seed=seed).round()
        if b.any():
            solution = il.Bicgstab()(matrix, b)
            assert solution.status is Status.CONVERGED
            assert relative_error(matrix @ solution.value, b) <= 1e-9


def test_a_preconditioner_saves_steps() -> None:
    scales = torch.logspace(0, 4, 50, dtype=F64)
    matrix, b = contraction(50, seed=7) * scales, randn(50, seed=8)
    solution = il.Bicgstab(preconditioner=lambda v: v / scales)(matrix, b)
    assert solution.status is Status.CONVERGED and solution.num_steps < 60
    assert float((b - matrix @ solution.value).norm() / b.norm()) <= 1e-9
    assert il.Bicgstab(max_steps=60, rtol=1e-10)(matrix, b).status is not Status.CONVERGED


def test_the_scale_of_one_lane_changes_no_bit_of_the_others() -> None:
    # squares of A v overflow in the first lane and vanish in the second
    matrices = torch.stack([contraction(12, seed=1)] * 3) * torch.tensor([1e200, 1e-200, 1.0], dtype=F64).reshape(
        3, 1, 1
    )
    b, like = randn(3, 12, seed=2), torch.stack([contraction(12, seed=1)] * 3)
    together, plain = il.Bicgstab()(matrices, b), il.Bicgstab()(like, b)
    assert together.status is Status.CONVERGED
    assert torch.equal(together.value[2], plain.value[2]) and together.steps.tolist() == plain.steps.tolist()
    # powers of ten round: a few units in each entry of A
    scaled = together.value[:2] * torch.tensor([[1e200], [1e-200]], dtype=F64)
    assert relative_error(scaled, plain.value[:2]) <= 1e-9  # ten times the default tolerance


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_an_iteration_makes_few_operations_while_no_lane_stops(dtype: torch.dtype) -> None:
    matrices = torch.stack([contraction(30, seed=seed) for seed in range(4)]).to(dtype)
    b = randn(4, 30, seed=9).to(dtype)
    made = []
    for steps in (4, 10):
        with Operations() as counted:
            assert il.Bicgstab(max_steps=steps)(matrices, b).num_steps == steps
        made.append(counted.number)
    # counted at the dispatcher: 3 iterations of 2 products, of which each is 4; a mask per lane and vector would be 300
    assert made[1] - made[0] <= 3 * 100
