"""GMRES: the smallest residual of each cycle, restarts, breakdown, preconditioners."""

import pytest
import scipy.sparse.linalg
import torch
from linear_systems import Counted, contraction, general_matrix, smallest_residual
from references import F64, randn, relative_error
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status


def test_each_truncated_solve_has_the_smallest_residual_of_its_krylov_space() -> None:
    matrix, b = contraction(15, seed=1), randn(15, seed=2)
    for steps in range(1, 9):
        # the condition is at most 3: rounding only
        ours = il.Gmres(max_steps=steps)(matrix, b).value
        assert relative_error(ours, smallest_residual(matrix, b, steps)) <= 1e-13


@pytest.mark.parametrize("restart", [3, 5, 20])
def test_restarted_iterates_agree_with_scipy(restart: int) -> None:
    matrix, b = contraction(40, seed=3, radius=0.8), randn(40, seed=4)
    ours = il.Gmres(restart=restart, max_steps=3 * restart)(matrix, b)
    reference, _ = scipy.sparse.linalg.gmres(matrix.numpy(), b.numpy(), rtol=0.0, restart=restart, maxiter=3)
    # the same three cycles; condition at most 9, so each adds rounding times a few
    assert ours.num_steps <= 3 * restart
    assert relative_error(ours.value, torch.from_numpy(reference)) <= 1e-12


def test_a_restart_computes_the_true_residual_and_keeps_the_step_limit() -> None:
    counted, b = Counted(contraction(40, seed=3, radius=0.9)), randn(40, seed=4)
    solution = il.Gmres(restart=4, max_steps=10)(counted.operator(), b)
    assert solution.status is Status.STEP_LIMIT and solution.num_steps == 10
    assert counted.num_products == 10 + 2  # one residual after each of the two full cycles
    true = float((b - counted.matrix @ solution.value).norm())
    assert float(solution.residual_norm) == pytest.approx(true, rel=1e-10)


def test_a_cyclic_shift_stagnates_when_restarted_and_is_solved_in_full() -> None:
    # Brown 1991: every Krylov space smaller than the whole leaves the residual of e_1 untouched
    shift = torch.eye(10, dtype=F64).roll(1, 0)
    b = torch.zeros(10, dtype=F64)
    b[0] = 1
    restarted = il.Gmres(restart=9)(shift, b)
    assert restarted.status is Status.DIVERGED and restarted.num_steps == 9
    full = il.Gmres(restart=10)(shift, b)
    assert full.status is Status.CONVERGED and torch.equal(shift @ full.value, b)


def test_breakdown_without_a_solution_is_singular() -> None:
    nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=F64)
    unreachable = il.Gmres()(nilpotent, torch.tensor([0.0, 1.0], dtype=F64))
    assert unreachable.status is Status.SINGULAR
    with pytest.raises(il.SingularError, match="GMRES met"):
        unreachable.enforce("warn")
    # in the range, but the Krylov space of b holds no solution: a failure of the method, never a wrong success
    assert not il.Gmres()(nilpotent, torch.tensor([1.0, 0.0], dtype=F64)).status.ok


def test_an_eigenvector_is_solved_in_one_step() -> None:
    solution = il.Gmres()(torch.diag(torch.tensor([-2.0, 3.0], dtype=F64)), torch.tensor([1.0, 0.0], dtype=F64))
    assert solution.value.tolist() == [-0.5, 0.0] and solution.num_steps == 1


def test_orthogonality_survives_a_condition_of_1e12() -> None:
    # one Gram-Schmidt pass would leave eps * 1e12 here; the residual of full GMRES is that of a dense solve
    matrix, b = general_matrix(30, 12, seed=5), randn(30, seed=6)
    ours = il.Gmres(rtol=1e-14)(matrix, b)
    dense = torch.linalg.solve(matrix, b)

    def residual(u: Tensor) -> float:
        return float((b - matrix @ u).norm())

    assert residual(ours.value) <= 10 * residual(dense)


def test_a_right_preconditioner_leaves_the_residual_that_of_the_system() -> None:
    scales = torch.logspace(0, 6, 50, dtype=F64)
    matrix, b = contraction(50, seed=7) * scales, randn(50, seed=8)  # columns scaled: undone from the right
    plain = il.Gmres(restart=10)(matrix, b)
    solution = il.Gmres(restart=10, preconditioner=lambda v: v / scales)(matrix, b)
    assert solution.status is Status.CONVERGED and plain.status is not Status.CONVERGED
    assert float((b - matrix @ solution.value).norm() / b.norm()) <= 1e-9
    truncated = il.Gmres(max_steps=4, preconditioner=lambda v: v / scales)(matrix, b)
    true = float((b - matrix @ truncated.value).norm())
    assert float(truncated.residual_norm) == pytest.approx(true, rel=1e-10)


def test_a_restart_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"restart=0 must be at least 1"):
        il.Gmres(restart=0)
