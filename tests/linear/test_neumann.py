"""The Neumann series: its sum, its residual, and its divergence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_systems import Counted, contraction, seeds
from references import F64, randn, relative_error

import implicitlayer as il
from implicitlayer import Status


@given(n=st.integers(1, 10), num_terms=st.integers(1, 12), seed=seeds(), log2_step=st.integers(-2, 0))
def test_the_sum_equals_that_of_matrix_powers(n: int, num_terms: int, seed: int, log2_step: int) -> None:
    matrix, b, step = contraction(n, seed), randn(n, seed=seed + 9), 2.0**log2_step
    powers = [torch.linalg.matrix_power(torch.eye(n, dtype=F64) - step * matrix, k) @ b for k in range(num_terms + 1)]
    solution = il.Neumann(num_terms, step_size=step)(matrix, b)
    expected = step * torch.stack(powers[:-1]).sum(0)
    # at most 12 terms, each of rounding eps n, of norm at most ||b||; the sum is at least step ||b|| / 1.5
    assert relative_error(solution.value, expected) <= 12 * n * 2.2e-16 * 10 / step
    assert solution.status.ok
    assert float(solution.residual_norm) == pytest.approx(float(powers[-1].norm()), rel=1e-8, abs=1e-13)
    assert float((b - matrix @ solution.value).norm()) == pytest.approx(float(powers[-1].norm()), rel=1e-8, abs=1e-13)


def test_it_equals_gradient_descent_from_zero() -> None:
    matrix, b = contraction(8, seed=1), randn(8, seed=2)
    u = torch.zeros_like(b)
    for _ in range(7):
        u = u - 0.5 * (matrix @ u - b)
    assert relative_error(il.Neumann(7, step_size=0.5)(matrix, b).value, u) <= 1e-14


def test_one_product_per_term_is_made() -> None:
    counted = Counted(contraction(8, seed=1))
    solution = il.Neumann(6)(counted.operator(), randn(8, seed=2))
    assert counted.num_products == solution.num_steps == 6


def test_a_series_that_does_not_contract_has_diverged() -> None:
    solution = il.Neumann(4)(torch.diag(torch.tensor([0.5, 3.0], dtype=F64)), torch.ones(2, dtype=F64))
    assert solution.status is Status.DIVERGED  # the terms grow by |1 - 3| = 2
    with pytest.raises(il.NotConvergedError, match="Neumann series ended with status diverged"):
        solution.enforce("warn")


def test_a_lane_whose_terms_explode_is_stopped_before_overflow() -> None:
    matrices = torch.stack([1e200 * torch.eye(2, dtype=F64), 0.5 * torch.eye(2, dtype=F64)])
    solution = il.Neumann(50)(matrices, torch.ones(2, 2, dtype=F64))
    assert Status(int(solution.codes[0])) is Status.DIVERGED and int(solution.steps[0]) == 1
    assert solution.value[1].tolist() == pytest.approx([2.0, 2.0], rel=1e-14)  # 2 (1 - 2^-50)
    assert solution.value.isfinite().all()


def test_enough_terms_count_as_converged() -> None:
    solution = il.Neumann(60)(torch.tensor([[0.5]], dtype=F64), torch.ones(1, dtype=F64))
    assert solution.status is Status.CONVERGED and float(solution.value) == 2.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_named(value: float) -> None:
    solution = il.Neumann(3)(lambda v: v * value, torch.ones(2, dtype=F64))
    assert solution.status is Status.NONFINITE
    with pytest.raises(il.NonFiniteError, match="Neumann series met NaN or Inf"):
        solution.enforce("ignore")


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_terms=0 must be at least 1"):
        il.Neumann(0)
    with pytest.raises(ValueError, match=r"step_size=-1.0 must be positive and finite"):
        il.Neumann(1, step_size=-1.0)
