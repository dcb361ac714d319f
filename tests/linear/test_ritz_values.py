"""Ritz values: the ends of the spectrum from the coefficients of conjugate gradients, at no product."""

# Ritz values are computed to a relative 1e-3 (the width of the last bracket), so tests allow 2e-3 besides what the
# iteration itself leaves open.

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_systems import Counted, indefinite_matrix
from references import F64, randn, spd_matrix

import implicitlayer as il
from implicitlayer.base._ritz import RitzValues

DIGITS = 2e-3


def tridiagonal_extremes(pivots: list[float], betas: list[float]) -> tuple[float, float]:
    """Smallest and largest eigenvalue of L D L'; the smallest positive one by the inverse, which keeps its digits."""
    lower = np.eye(len(pivots)) + np.diag(np.sqrt(betas), -1)
    matrix = lower @ np.diag(pivots) @ lower.T
    values = np.linalg.eigvalsh(matrix)
    if min(pivots) <= 0:
        return values[0], values[-1]
    inverse = np.linalg.inv(lower)
    return 1 / np.linalg.eigvalsh(inverse.T @ np.diag(1 / np.array(pivots)) @ inverse)[-1], values[-1]


@given(k=st.integers(1, 12), seed=st.integers(0, 10_000), log10_spread=st.integers(0, 12), negative=st.booleans())
def test_extremes_are_those_of_the_tridiagonal_matrix(k: int, seed: int, log10_spread: int, negative: bool) -> None:
    rng = np.random.default_rng(seed)
    pivots = list(10 ** rng.uniform(-log10_spread, 0, k))
    betas = list(rng.uniform(0, 2, k - 1))
    if negative:
        pivots[-1] *= -1
    ritz = RitzValues()
    for values, kept in zip((pivots, betas), ritz.new_round(), strict=True):
        kept += values
    low, high = (float(t) for t in ritz.extremes(torch.zeros(())))
    expected = tridiagonal_extremes(pivots, betas)
    # below 1e-13 of the matrix the dense reference itself is rounding
    slack = 1e-13 * max(abs(v) for v in expected) if negative else 0.0
    assert abs(low - expected[0]) <= DIGITS * abs(expected[0]) + slack
    assert abs(high - expected[1]) <= DIGITS * abs(expected[1]) + slack


@given(n=st.integers(1, 20), log10_cond=st.integers(0, 6), seed=st.integers(0, 10_000), single=st.booleans())
def test_ritz_values_lie_inside_the_spectrum_and_reach_its_ends(
    n: int, log10_cond: int, seed: int, single: bool
) -> None:
    matrix, rhs = spd_matrix(n, log10_cond, seed), randn(n, seed=seed + 3)
    values = torch.linalg.eigvalsh(matrix)
    if single:
        solution = il.ConjugateGradient()(matrix, rhs)
    else:  # the path of batches
        solution = il.ConjugateGradient()(matrix.expand(2, n, n), torch.stack([rhs, randn(n, seed=seed + 4)]))
    low, high = (t.reshape(-1)[0] for t in solution.ritz_values)
    assert float(low) >= float(values[0]) * (1 - DIGITS) and float(high) <= float(values[-1]) * (1 + DIGITS)
    # solved to 1e-10 with condition <= 1e6: a random right-hand side has a part in every eigenvector, and what is
    # missing at an end would still be in the residual
    assert float(low) <= float(values[0]) * 1.05 and float(high) >= float(values[-1]) * 0.95
    condition = float(solution.condition_estimate.reshape(-1)[0])
    assert abs(condition / float(values[-1] / values[0]) - 1) < 0.11


def test_lanes_have_the_ritz_values_of_their_own() -> None:
    matrices = torch.stack([spd_matrix(8, 4, 0), 10 * spd_matrix(8, 1, 1), torch.eye(8, dtype=F64)])
    rhs = randn(3, 8, seed=2)
    rhs[2] = 0
    solution = il.ConjugateGradient()(matrices, rhs)
    low, high = solution.ritz_values
    for lane in range(2):
        alone = il.ConjugateGradient()(matrices[lane], rhs[lane])
        assert math.isclose(float(low[lane]), float(alone.ritz_values[0]), rel_tol=DIGITS)
        assert math.isclose(float(high[lane]), float(alone.ritz_values[1]), rel_tol=DIGITS)
    assert math.isnan(low[2]) and math.isnan(solution.condition_estimate[2])  # a zero right-hand side: no product


def test_an_indefinite_matrix_shows_a_negative_ritz_value() -> None:
    matrix = indefinite_matrix(10, 1, 0)
    values = torch.linalg.eigvalsh(matrix)
    assert float(values[0]) < 0 < float(values[-1])
    solution = il.ConjugateGradient()(matrix, randn(10, seed=1))
    assert solution.status is il.Status.INDEFINITE
    low = float(solution.ritz_values[0])
    assert float(values[0]) * (1 + DIGITS) <= low < 0
    assert float(solution.condition_estimate) == math.inf


def test_they_cost_no_product() -> None:
    counted = Counted(spd_matrix(12, 3, 0))
    solution = il.ConjugateGradient()(counted.operator(symmetric=True), randn(12, seed=1))
    made = counted.num_products
    _, _ = solution.ritz_values, solution.condition_estimate
    assert counted.num_products == made


def test_with_a_preconditioner_they_are_those_of_the_preconditioned_matrix() -> None:
    diagonal = torch.logspace(0, 6, 12, dtype=F64)
    matrix = torch.diag(diagonal) + 0.1 * spd_matrix(12, 1, 0)
    solution = il.ConjugateGradient(preconditioner=lambda v: v / diagonal)(matrix, randn(12, seed=1))
    root = diagonal.rsqrt()
    values = torch.linalg.eigvalsh(root[:, None] * matrix * root)
    assert abs(float(solution.ritz_values[0] / values[0]) - 1) < 0.05
    assert abs(float(solution.ritz_values[1] / values[-1]) - 1) < 0.05


def test_other_solvers_have_none() -> None:
    solution = il.Minres()(spd_matrix(4, 1, 0), randn(4, seed=1))
    assert math.isnan(solution.ritz_values[0]) and math.isnan(solution.condition_estimate)


def test_float32_and_a_condition_of_1e12_are_no_trouble() -> None:
    matrix = torch.diag(torch.logspace(-12, 0, 30, dtype=F64))
    solution = il.ConjugateGradient(max_steps=300)(matrix, torch.ones(30, dtype=F64))
    assert abs(float(solution.ritz_values[0]) / 1e-12 - 1) < 0.05
    solution = il.ConjugateGradient()(spd_matrix(10, 2, 0).float(), randn(10, seed=1).float())
    assert solution.ritz_values[0].dtype == F64 and abs(float(solution.condition_estimate) / 100 - 1) < 0.05


@given(
    k=st.integers(1, 12),
    seed=st.integers(0, 10_000),
    log10_spread=st.integers(0, 12),
    negative=st.booleans(),
    lanes=st.integers(0, 3),
)
def test_one_sweep_tells_whether_a_ritz_value_is_below_a_number(
    k: int, seed: int, log10_spread: int, negative: bool, lanes: int
) -> None:
    rng = np.random.default_rng(seed)
    ritz, lowest = RitzValues(), []
    columns = []
    for lane in range(max(lanes, 1)):
        pivots, betas = list(10 ** rng.uniform(-log10_spread, 0, k)), list(rng.uniform(0, 2, k - 1))
        if negative and lane == 0:
            pivots[-1] *= -1
        columns.append((pivots, betas))
        lowest.append(tridiagonal_extremes(pivots, betas)[0])
    for part, kept in enumerate(ritz.new_round()):
        rows = zip(*(column[part] for column in columns), strict=True)
        kept.extend(torch.tensor(row, dtype=torch.float64) if lanes else row[0] for row in rows)
    bottom = torch.tensor(lowest if lanes else lowest[0], dtype=torch.float64)
    # the reference itself is known to a few eps of its terms: 1e-3 to either side is well outside of that
    assert bool(ritz.any_below(bottom + 1e-3 * bottom.abs()).all())
    assert not bool(ritz.any_below(bottom - 1e-3 * bottom.abs()).any())
