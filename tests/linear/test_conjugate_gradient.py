"""Conjugate gradients on one system: truncation, zero right-hand sides, trouble, scale, shapes."""

import math
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from references import F64, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status


class Counted:
    """A matrix that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.num_products = matrix, 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.num_products += 1
        return self.matrix @ vector


def diagonal(*entries: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.diag(torch.tensor(entries, dtype=dtype))


def textbook_iterates(matrix: Tensor, b: Tensor, num_steps: int) -> list[Tensor]:
    """Minimisers of 1/2 x'Ax - b'x over the Krylov spaces span{b, Ab, ...}: what conjugate gradients must return."""
    iterates, basis = [], [b / b.norm()]
    for _ in range(num_steps):
        v = torch.stack(basis, 1)
        iterates.append(v @ torch.linalg.solve(v.T @ matrix @ v, v.T @ b))
        new = matrix @ basis[-1]
        for _ in range(2):  # twice is enough for orthogonality to rounding
            new = new - v @ (v.T @ new)
        basis.append(new / new.norm())
    return iterates


def test_each_truncated_solve_minimises_the_energy_over_its_krylov_space() -> None:
    matrix, b = spd_matrix(12, 1.5, seed=1), randn(12, seed=2)
    for steps, expected in enumerate(textbook_iterates(matrix, b, 8), start=1):
        counted = Counted(matrix)
        solution = il.ConjugateGradient(max_steps=steps)(counted, b)
        # both are minimisers to rounding times the condition number: 30 * 1e-16 * a few
        assert relative_error(solution.value, expected) < 1e-12
        assert solution.status is Status.STEP_LIMIT and solution.num_steps == steps == counted.num_products
        assert not solution.residual_is_true
        true_residual = float((b - matrix @ solution.value).norm())
        assert float(solution.residual_norm) == pytest.approx(true_residual, rel=1e-9)


def test_identity_matrix_is_solved_in_one_step_and_not_the_step_before() -> None:
    b = randn(5, seed=3)
    solution = il.ConjugateGradient(max_steps=1)(torch.eye(5, dtype=F64), b)
    assert torch.allclose(solution.value, b, rtol=1e-15, atol=0)
    assert solution.status.ok and solution.num_steps == 1


def test_a_fixed_number_of_steps_stops_early_only_at_rounding() -> None:
    solution = il.ConjugateGradient(max_steps=50)(diagonal(1.0, 2.0, 3.0), torch.ones(3, dtype=F64))
    assert solution.status is Status.CONVERGED and solution.num_steps == 3
    assert torch.allclose(solution.value, torch.tensor([1.0, 1 / 2, 1 / 3], dtype=F64), rtol=1e-14)


def test_zero_steps_return_the_right_hand_side_without_a_product() -> None:
    counted, b = Counted(spd_matrix(4, 1, seed=0)), randn(4, seed=1)
    solution = il.ConjugateGradient(max_steps=0)(counted, b)
    assert torch.equal(solution.value, b) and counted.num_products == 0
    assert solution.status is Status.STEP_LIMIT and solution.num_steps == 0


def test_zero_steps_return_the_right_hand_side_over_the_metric() -> None:
    metric = torch.tensor([2.0, 4.0, 8.0], dtype=F64)
    operator = il.FlatOperator(lambda v: 3 * v, inverse_metric=1 / metric)
    solution = il.ConjugateGradient(max_steps=0)(operator, torch.ones(3, dtype=F64))
    assert torch.equal(solution.value, 1 / metric)  # powers of two: exact


def test_zero_steps_with_a_tolerance_do_not_count_as_success() -> None:
    solution = il.ConjugateGradient(rtol=1e-8, max_steps=0)(torch.eye(3, dtype=F64), torch.ones(3, dtype=F64))
    assert solution.status is Status.MAX_STEPS_REACHED and not solution.status.ok


@pytest.mark.parametrize("solver", [il.ConjugateGradient(), il.ConjugateGradient(max_steps=3)])
def test_a_zero_right_hand_side_gives_exact_zero_without_a_product(solver: il.ConjugateGradient) -> None:
    counted = Counted(spd_matrix(4, 1, seed=0))
    solution = solver(counted, torch.zeros(4, dtype=F64))
    assert torch.equal(solution.value, torch.zeros(4, dtype=F64)) and counted.num_products == 0
    assert solution.status is Status.CONVERGED and float(solution.relative_residual) == 0
    assert float(solution.smallest_curvature) == math.inf


def test_the_preconditioner_saves_steps_and_leaves_the_answer() -> None:
    # a badly scaled diagonal plus a rank-one part: with Jacobi's preconditioner two distinct eigenvalues remain
    scales = torch.logspace(0, 4, 30, dtype=F64)
    ones = torch.ones(30, dtype=F64)
    root = scales.sqrt()
    matrix = torch.diag(scales) + 0.01 * torch.outer(root, root)
    b = randn(30, seed=4)
    plain = il.ConjugateGradient(rtol=1e-10)(matrix, b)
    jacobi = il.ConjugateGradient(rtol=1e-10, preconditioner=lambda v: v / scales)(matrix, b)
    metric = il.ConjugateGradient(rtol=1e-10)(il.FlatOperator(lambda v: matrix @ v, inverse_metric=ones / scales), b)
    expected = torch.linalg.solve(matrix, b)
    for solution in (plain, jacobi, metric):
        assert relative_error(solution.value, expected) < 1e-6  # rtol 1e-10 times the condition number 1e4
    assert jacobi.num_steps == metric.num_steps == 2 < plain.num_steps
    # p'Ap / p'Mp lies between the extreme eigenvalues 1 and 1 + 0.01 * 30 of the preconditioned matrix
    assert 1 - 1e-12 <= float(jacobi.smallest_curvature) <= 1.3


def test_answer_agrees_with_scipy_and_the_dense_solve() -> None:
    matrix, b = spd_matrix(40, 3, seed=5), randn(40, seed=6)
    solution = il.ConjugateGradient(rtol=1e-10)(matrix, b)
    reference, info = scipy.sparse.linalg.cg(matrix.numpy(), b.numpy(), rtol=1e-12, atol=0.0, maxiter=4000)
    assert info == 0
    # error <= rtol * condition = 1e-7 in the worst case
    assert relative_error(solution.value, torch.from_numpy(reference)) < 1e-7
    assert relative_error(solution.value, torch.from_numpy(np.linalg.solve(matrix.numpy(), b.numpy()))) < 1e-7
    assert solution.residual_is_true
    assert float(solution.residual_norm) == pytest.approx(float((b - matrix @ solution.value).norm()), rel=1e-6)


def test_the_absolute_tolerance_is_in_units_of_the_right_hand_side() -> None:
    matrix, b = spd_matrix(30, 4, seed=7), 1e6 * randn(30, seed=8)
    loose = il.ConjugateGradient(atol=1e3)(matrix, b)
    tight = il.ConjugateGradient(atol=1e-2)(matrix, b)
    assert float((b - matrix @ loose.value).norm()) <= 2e3 and float((b - matrix @ tight.value).norm()) <= 2e-2
    assert loose.num_steps < tight.num_steps and loose.status is tight.status is Status.CONVERGED


# ------------------------------------------------------------------------------------------------------------- shapes


def test_a_matrix_shaped_right_hand_side_is_one_system_whose_limit_counts_elements() -> None:
    matrix, b = spd_matrix(36, 2, seed=15), randn(6, 6, seed=16)
    solution = il.ConjugateGradient(rtol=1e-12)(lambda v: (matrix @ v.reshape(-1)).reshape(6, 6), b)
    assert solution.status is Status.CONVERGED and solution.value.shape == (6, 6) and solution.codes.shape == ()
    assert solution.num_steps > 12  # more than the sum of the dimensions
    assert relative_error(solution.value.reshape(-1), torch.linalg.solve(matrix, b.reshape(-1))) < 1e-10


def test_pytrees_of_coupled_leaves_match_the_dense_solve() -> None:
    Pair = namedtuple("Pair", ["left", "right"])
    matrix = spd_matrix(9, 2, seed=17)
    b = {"w": randn(2, 3, seed=18), "rest": Pair(randn(seed=19), [randn(2, seed=20), torch.zeros(0, dtype=F64)])}

    def matvec(v: dict[str, Any]) -> dict[str, Any]:
        flat = torch.cat([v["rest"].left.reshape(1), v["rest"].right[0], v["w"].reshape(-1)])
        out = matrix @ flat
        return {"w": out[3:].reshape(2, 3), "rest": Pair(out[0], [out[1:3], torch.zeros(0, dtype=F64)])}

    solution = il.ConjugateGradient(rtol=1e-12)(matvec, b)
    expected = torch.linalg.solve(
        matrix, torch.cat([b["rest"].left.reshape(1), b["rest"].right[0], b["w"].reshape(-1)])
    )
    value = solution.value
    assert isinstance(value["rest"], Pair) and value["rest"].right[1].shape == (0,)
    got = torch.cat([value["rest"].left.reshape(1), value["rest"].right[0], value["w"].reshape(-1)])
    assert relative_error(got, expected) < 1e-10  # rtol 1e-12 times the condition number 100


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_single_unknown_of_any_shape_takes_one_step(shape: tuple[int, ...]) -> None:
    solution = il.ConjugateGradient()(lambda v: 4 * v, torch.full(shape, 2.0, dtype=F64))
    assert solution.value.shape == shape and solution.value.item() == 0.5 and solution.num_steps == 1


@pytest.mark.parametrize("solver", [il.ConjugateGradient(), il.ConjugateGradient(max_steps=2)])
@pytest.mark.parametrize("shape", [(0,), (3, 0)])
def test_no_unknowns_are_solved_at_once(shape: tuple[int, ...], solver: il.ConjugateGradient) -> None:
    solution = solver(lambda v: v, torch.zeros(shape, dtype=F64))
    assert solution.status is Status.CONVERGED and solution.value.shape == shape and solution.num_steps == 0


def test_the_right_hand_side_is_left_as_it_was() -> None:
    b = randn(6, seed=21)
    before = b.clone()
    il.ConjugateGradient()(spd_matrix(6, 2, seed=22), b)
    il.ConjugateGradient(max_steps=0)(spd_matrix(6, 2, seed=22), b).value.add_(1)
    assert torch.equal(b, before)


def test_repeats_are_bitwise_equal() -> None:
    matrix, b = spd_matrix(30, 5, seed=23), randn(30, seed=24)
    first, second = il.ConjugateGradient()(matrix, b), il.ConjugateGradient()(matrix, b)
    assert torch.equal(first.value, second.value) and torch.equal(first.residual_norm, second.residual_norm)


# ---------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rtol": -1e-3}, r"rtol=-0.001 must be non-negative. For a fixed number of steps pass max_steps only."),
        ({"atol": -1.0}, r"atol=-1.0 must be non-negative"),
        ({"rtol": math.nan}, r"rtol=nan must be non-negative"),
        ({"max_steps": -1}, r"max_steps=-1 must be non-negative. Zero steps return the right-hand side."),
    ],
)
def test_bad_settings_are_refused_by_name_value_and_rule(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        il.ConjugateGradient(**settings)


def test_a_matrix_that_does_not_fit_the_right_hand_side_is_refused_with_both_shapes() -> None:
    for matrix, b in ((torch.ones(3, 2), torch.ones(3)), (torch.eye(3), torch.ones(2)), (torch.ones(3), torch.ones(3))):
        with pytest.raises(ValueError, match=r"matrix \[\*lanes, n, n\] needs a right-hand side \[\*lanes, n\]"):
            il.ConjugateGradient()(matrix, b)


def test_a_right_hand_side_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="rhs must be a tensor or a pytree of tensors, got list"):
        il.ConjugateGradient()(lambda v: v, [1.0, 2.0])


def test_every_status_has_a_help_text_and_only_what_was_asked_for_is_success() -> None:
    assert [status for status in Status if status.ok] == [Status.CONVERGED, Status.STEP_LIMIT, Status.TRUNCATED]
    assert all(status.help.endswith((".", "?")) for status in Status)
    assert len({status.help for status in Status}) == len(Status)
