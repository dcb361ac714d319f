"""Conjugate gradients in trouble: negative curvature, singular matrices, NaN, limits of precision and of scale."""

import math

import pytest
import torch
from references import F64, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status


def diagonal(*entries: float, dtype: torch.dtype = F64) -> Tensor:
    return torch.diag(torch.tensor(entries, dtype=dtype))


def test_negative_curvature_is_indefinite_with_its_number() -> None:
    solution = il.ConjugateGradient()(diagonal(1.0, -2.0), torch.tensor([0.0, 3.0], dtype=F64))
    assert solution.status is Status.INDEFINITE and float(solution.smallest_curvature) == pytest.approx(-2.0)
    with pytest.raises(il.IndefiniteError, match=r"p'Ap/p'p = -2 <= 0 after 1 steps.*il\.Minres\(\)") as caught:
        solution.enforce("warn")
    assert caught.value.solution is solution


@pytest.mark.parametrize("shift", [1e-2, 0.3, 5.0])
def test_a_negative_eigenvalue_is_found_whatever_its_size(shift: float) -> None:
    matrix = spd_matrix(20, 1, seed=9)
    values, vectors = torch.linalg.eigh(matrix)
    values[0] = -shift
    indefinite = (vectors * values) @ vectors.T
    solution = il.ConjugateGradient()(indefinite, randn(20, seed=10))
    assert solution.status is Status.INDEFINITE
    # the smallest curvature is a Rayleigh quotient: never below the smallest eigenvalue
    assert -shift * (1 + 1e-9) <= float(solution.smallest_curvature) < 0


def test_one_step_on_an_indefinite_matrix_does_not_explode() -> None:
    # p'Ap = 1 - (1 + 1e-6)^2 x tiny: a step without the check has length 1e6
    matrix = diagonal(1.0, -1.0 + 1e-6)
    for solver in (il.ConjugateGradient(max_steps=1), il.ConjugateGradient()):
        b = torch.tensor([1.0, 1.0 + 1e-6], dtype=F64)
        solution = solver(matrix, b)
        assert solution.status is Status.INDEFINITE and torch.equal(solution.value, b)


def test_singular_matrix_is_solved_where_the_right_hand_side_is_in_its_range() -> None:
    solution = il.ConjugateGradient()(diagonal(1.0, 4.0, 0.0), torch.tensor([1.0, 1.0, 0.0], dtype=F64))
    assert solution.status is Status.CONVERGED
    assert torch.allclose(solution.value, torch.tensor([1.0, 0.25, 0.0], dtype=F64), rtol=1e-14)


def test_singular_matrix_is_an_error_where_the_right_hand_side_is_outside_its_range() -> None:
    for b in ([0.0, 0.0, 1.0], [1.0, 1.0, 1.0]):
        solution = il.ConjugateGradient()(diagonal(1.0, 4.0, 0.0), torch.tensor(b, dtype=F64))
        assert not solution.status.ok
        with pytest.raises(il.LinearSolveError):
            solution.enforce("warn")
    with pytest.raises(il.SingularError, match=r"zero to working precision.*outside its range"):
        il.ConjugateGradient()(diagonal(1.0, 0.0), torch.tensor([0.0, 1.0], dtype=F64)).enforce("warn")


def test_a_random_singular_matrix_never_gives_a_silent_answer() -> None:
    for seed in range(20):
        basis = torch.linalg.qr(randn(12, 12, seed=seed))[0][:, :8]
        matrix = (basis * torch.linspace(0.1, 1, 8, dtype=F64)) @ basis.T
        inside, outside = matrix @ randn(12, seed=100 + seed), randn(12, seed=200 + seed)
        good, bad = il.ConjugateGradient()(matrix, inside), il.ConjugateGradient()(matrix, outside)
        assert good.status is Status.CONVERGED
        # in the range the answer is the pseudo-inverse's; 1e-10 residual over the smallest eigenvalue 0.1
        assert relative_error(good.value, torch.linalg.pinv(matrix) @ inside) < 1e-8
        assert not bad.status.ok
        with pytest.raises(il.LinearSolveError):
            bad.enforce("warn")


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_product_is_an_error_that_names_the_product(poison: float) -> None:
    for solver in (il.ConjugateGradient(), il.ConjugateGradient(max_steps=2)):
        solution = solver(diagonal(1.0, poison), torch.ones(2, dtype=F64))
        assert solution.status is Status.NONFINITE
        for policy in ("raise", "warn", "ignore"):
            with pytest.raises(il.NonFiniteError, match="NaN or Inf in a Hessian-vector product"):
                solution.enforce(policy)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_right_hand_side_is_reported(poison: float) -> None:
    for solver in (il.ConjugateGradient(), il.ConjugateGradient(max_steps=0), il.ConjugateGradient(max_steps=2)):
        solution = solver(diagonal(1.0, 2.0), torch.tensor([1.0, poison], dtype=F64))
        assert solution.status is Status.NONFINITE


def test_the_step_limit_before_the_tolerance_warns_with_residual_rtol_and_steps() -> None:
    solution = il.ConjugateGradient(rtol=1e-10, max_steps=5)(spd_matrix(40, 2, seed=11), randn(40, seed=12))
    assert solution.status is Status.MAX_STEPS_REACHED and solution.num_steps == 5
    relative = f"{float(solution.relative_residual):.2e}"
    with pytest.warns(
        il.ConvergenceWarning, match=rf"after 5 steps \(true relative residual {relative}, rtol 1.0e-10\)"
    ):
        solution.enforce("warn")
    with pytest.raises(il.NotConvergedError, match="Raise max_steps"):
        solution.enforce("raise")
    solution.enforce("ignore")


def test_a_tolerance_below_rounding_is_reported_as_stagnation_or_reached_in_truth() -> None:
    for seed in range(10):
        matrix, b = spd_matrix(30, 10, seed=seed), randn(30, seed=seed + 50)
        solution = il.ConjugateGradient(rtol=1e-15)(matrix, b)
        true_relative = float((b - matrix @ solution.value).norm() / b.norm())
        assert not solution.status.ok or true_relative <= 1e-14


def test_a_non_symmetric_matrix_is_never_called_solved_when_it_is_not() -> None:
    for seed in range(30):
        matrix, b = torch.eye(8, dtype=F64) + 0.8 * randn(8, 8, seed=seed), randn(8, seed=seed + 50)
        solution = il.ConjugateGradient()(matrix, b)
        true_relative = float((b - matrix @ solution.value).norm() / b.norm())
        assert not solution.status.ok or true_relative <= 1e-9


# -------------------------------------------------------------------------------------------------------------- scale


# Powers of two round nothing, so the answers agree to the last bit: 2^83 is 1e25, 2^664 is 1e200.
SCALES = [(torch.float32, 2.0**83), (torch.float32, 2.0**-83), (F64, 2.0**664), (F64, 2.0**-664)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_the_scale_of_the_right_hand_side_changes_no_bit(dtype: torch.dtype, scale: float) -> None:
    matrix, b = spd_matrix(20, 2, seed=13).to(dtype), randn(20, seed=14, dtype=dtype)
    plain, scaled = il.ConjugateGradient()(matrix, b), il.ConjugateGradient()(matrix, b * scale)
    assert plain.status is scaled.status is Status.CONVERGED
    assert torch.equal(scaled.value, plain.value * scale)
    assert torch.equal(scaled.relative_residual, plain.relative_residual)


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_the_scale_of_the_matrix_changes_no_bit(dtype: torch.dtype, scale: float) -> None:
    matrix, b = spd_matrix(20, 2, seed=13).to(dtype), randn(20, seed=14, dtype=dtype)
    plain, scaled = il.ConjugateGradient()(matrix, b), il.ConjugateGradient()(matrix * scale, b)
    assert plain.status is scaled.status is Status.CONVERGED
    assert torch.equal(scaled.value, plain.value / scale)


def test_a_tiny_right_hand_side_in_float32_is_no_nan() -> None:
    b = torch.full((3,), 1e-13, dtype=torch.float32)
    solution = il.ConjugateGradient()(diagonal(1.0, 2.0, 4.0, dtype=torch.float32), b)
    assert solution.status is Status.CONVERGED
    assert torch.allclose(solution.value, b / torch.tensor([1.0, 2.0, 4.0]), rtol=1e-6, atol=0)
