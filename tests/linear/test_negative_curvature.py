"""Policies for negative curvature: truncate, damp, MINRES, Gauss-Newton; what was done stands in the record."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_systems import indefinite_matrix
from references import F64, orthogonal, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il


def quadratic_layer(matrix: Tensor, **settings: Any) -> il.ImplicitLayer:
    """x = A^-1 b, so the gradient in b for a cotangent v is A^-1 v."""
    return il.argmin(
        lambda x, b: 0.5 * x @ matrix @ x - b @ x, lambda f, x, b: torch.linalg.solve(matrix, b), **settings
    )


def gradient_and_record(layer: il.ImplicitLayer, b: Tensor, v: Tensor) -> tuple[Tensor, il.BackwardRecord]:
    b = b.detach().requires_grad_()
    with il.diagnostics() as records:
        (gradient,) = torch.autograd.grad(layer(torch.zeros_like(b), b), b, v)
    record = records[-1]
    assert isinstance(record, il.BackwardRecord)
    return gradient, record


SADDLE = indefinite_matrix(6, 1, 0)


def test_the_saddle_has_both_signs() -> None:
    values = torch.linalg.eigvalsh(SADDLE)
    assert float(values[0]) < 0 < float(values[-1])


def test_by_default_it_is_an_error() -> None:
    with pytest.raises(il.IndefiniteError, match="p'Ap/p'p = -"):
        gradient_and_record(quadratic_layer(SADDLE), randn(6, seed=1), randn(6, seed=2))


@given(n=st.integers(2, 12), log10_cond=st.integers(0, 3), seed=st.integers(0, 10_000))
def test_minres_gives_the_exact_gradient_at_a_saddle(n: int, log10_cond: int, seed: int) -> None:
    matrix, v = indefinite_matrix(n, log10_cond, seed), randn(n, seed=seed + 7)
    gradient, record = gradient_and_record(
        quadratic_layer(matrix, negative_curvature="minres"), randn(n, seed=seed + 6), v
    )
    # rtol 1e-10 times a condition of up to 1e3
    assert relative_error(gradient, torch.linalg.solve(matrix, v)) < 1e-6
    met = float(record.solution.smallest_curvature) < 0
    assert record.solution.remedy == ("solved again by MINRES after negative curvature" if met else "")
    assert record.status is il.Status.CONVERGED


@given(n=st.integers(2, 12), log10_cond=st.integers(0, 3), seed=st.integers(0, 10_000))
def test_damping_solves_the_damped_system_that_the_record_names(n: int, log10_cond: int, seed: int) -> None:
    matrix, v = indefinite_matrix(n, log10_cond, seed), randn(n, seed=seed + 7)
    gradient, record = gradient_and_record(
        quadratic_layer(matrix, negative_curvature="damp"), randn(n, seed=seed + 6), v
    )
    damping = record.solution.damping
    if damping is None:  # no direction of negative curvature was met
        assert record.solution.remedy == ""
        return
    assert float(damping) > 0 and f"damped by up to {float(damping):.3g}" in record.solution.remedy
    damped = matrix + damping * torch.eye(n, dtype=F64)
    # the system that was solved may have any condition: its residual is what must be small
    assert relative_error(damped @ gradient, v) < 1e-8
    # a multiple of the most negative eigenvalue, not some huge number: doubled at most until it is above it
    assert float(damping) <= 8 * abs(float(torch.linalg.eigvalsh(matrix)[0]))


def test_damping_mirrors_the_smallest_eigenvalue_that_the_coefficients_show() -> None:
    # four steps on four eigenvalues: the smallest Ritz value is -1, though no direction has bent down by more than 0.65
    matrix, v = (
        torch.diag(torch.tensor([-1.0, 0.5, 2.0, 5.0], dtype=F64)),
        torch.tensor([0.1, 1.0, 1.0, 1.0], dtype=F64),
    )
    seen = il.ConjugateGradient()(matrix, v)
    assert seen.status is il.Status.INDEFINITE and float(seen.smallest_curvature) > -0.65
    _, record = gradient_and_record(quadratic_layer(matrix, negative_curvature="damp"), randn(4, seed=1), v)
    assert record.solution.damping is not None
    assert float(record.solution.damping) == pytest.approx(2.0, rel=2e-3)  # Ritz values have three digits


def test_damping_with_a_preconditioner_is_in_units_of_the_matrix() -> None:
    v = randn(6, seed=2)
    layer = quadratic_layer(
        SADDLE, negative_curvature="damp", linear_solver=il.ConjugateGradient(preconditioner=lambda v: v / 1e3)
    )
    gradient, record = gradient_and_record(layer, randn(6, seed=1), v)
    assert record.solution.damping is not None
    assert relative_error((SADDLE + record.solution.damping * torch.eye(6, dtype=F64)) @ gradient, v) < 1e-8


def test_truncation_keeps_the_iterate_before_the_negative_direction() -> None:
    """A known spectrum: the first direction is the right-hand side, with positive curvature, the second is not."""
    matrix = torch.diag(torch.tensor([4.0, 2.0, -0.1], dtype=F64))
    v = torch.tensor([1.0, 1.0, 0.5], dtype=F64)
    gradient, record = gradient_and_record(quadratic_layer(matrix, negative_curvature="truncate"), v.clone(), v)
    solution = record.solution
    assert record.status is il.Status.TRUNCATED and record.status.ok
    assert solution.remedy == "truncated at negative curvature"
    plain = il.ConjugateGradient(max_steps=solution.num_steps - 1)(matrix, v)  # the last step was not taken
    assert solution.num_steps > 1 and torch.equal(gradient, plain.value)


def test_truncation_in_the_first_direction_returns_the_right_hand_side() -> None:
    matrix = torch.diag(torch.tensor([1.0, -4.0], dtype=F64))
    v = torch.ones(2, dtype=F64)
    gradient, _ = gradient_and_record(quadratic_layer(matrix, negative_curvature="truncate"), v, v)
    assert torch.equal(gradient, v)


def test_gauss_newton_takes_over_where_the_hessian_fails() -> None:
    """f = 1/2 |r|^2 with r = (x^2 - t) / 2 + c: at x the Hessian r'^2 + r'' r is negative, r'^2 is not."""
    objective = il.least_squares(lambda x, t: 0.5 * (x**2 - t))
    # d^2f/dx^2 = x^2 + (x^2 - t)/2, negative for x^2 < t/3; Gauss-Newton: x^2; mixed derivative: -x/2
    t = torch.tensor([4.0, 6.0], dtype=F64, requires_grad=True)
    point = torch.tensor([1.0, 1.2], dtype=F64)
    layer = il.argmin(objective, lambda f, x, t: point, negative_curvature="gauss_newton", stationarity_rtol=None)
    with il.diagnostics() as records:
        (gradient,) = torch.autograd.grad(layer(torch.ones(2, dtype=F64), t).sum(), t)
    assert torch.allclose(gradient, 0.5 * point / point**2, rtol=1e-10)
    assert isinstance(records[-1], il.BackwardRecord)
    assert records[-1].solution.remedy == "solved again with the Gauss-Newton matrix after negative curvature"
    assert "biased" in records[-1].explain()


def test_gauss_newton_needs_an_objective_that_knows_its_model() -> None:
    layer = quadratic_layer(SADDLE, negative_curvature="gauss_newton")
    with pytest.raises(il.ObjectiveError, match=r"il\.least_squares"):
        gradient_and_record(layer, randn(6, seed=1), randn(6, seed=2))


@pytest.mark.parametrize("policy", ["truncate", "damp", "minres"])
def test_lanes_that_met_none_keep_their_bits(policy: Any) -> None:
    matrices = torch.stack([spd_matrix(6, 2, 0), SADDLE, spd_matrix(6, 3, 1)])
    b, v = randn(3, 6, seed=1), randn(3, 6, seed=2)

    def gradients(matrices: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, il.BackwardRecord]:
        layer = il.argmin(
            lambda x, m, b: 0.5 * x @ m @ x - b @ x,
            lambda f, x, m, b: torch.linalg.solve(m, b),
            negative_curvature=policy,
        )
        b = b.detach().requires_grad_()
        with il.diagnostics() as records:
            x = torch.func.vmap(lambda m, b: layer(torch.zeros(6, dtype=F64), m, b))(matrices, b)
            (gradient,) = torch.autograd.grad(x, b, v)
        assert isinstance(records[-1], il.BackwardRecord)
        return gradient, records[-1]

    together, record = gradients(matrices, b, v)
    keep = torch.tensor([0, 2])
    definite, _ = gradients(matrices[keep], b[keep], v[keep])
    assert torch.equal(together[keep], definite)
    assert bool(together[1].isfinite().all()) and record.solution.remedy
    alone, _ = gradients(matrices[1:2], b[1:2], v[1:2])
    assert relative_error(together[1:2], alone) < 1e-8  # the one lane, to the tolerance of its solve


@pytest.mark.parametrize("policy", ["truncate", "damp", "gauss_newton"])
def test_a_second_derivative_through_another_system_is_an_error(policy: Any) -> None:
    objective = il.least_squares(lambda x, t: 0.5 * (x**2 - t))
    t = torch.tensor([4.0, 6.0], dtype=F64, requires_grad=True)
    layer = il.argmin(
        objective, lambda f, x, t: torch.ones(2, dtype=F64), negative_curvature=policy, stationarity_rtol=None
    )
    (gradient,) = torch.autograd.grad(layer(torch.ones(2, dtype=F64), t).sum(), t, create_graph=True)
    with pytest.raises(il.UnsupportedTransformError, match="solves another system"):
        gradient.sum().backward()


def test_a_second_derivative_through_minres_is_right() -> None:
    """f = sum(x^3/3 - t x) has the saddle x = -sqrt t: dx/dt = -1/(2 sqrt t), second derivative 1/(4 t^1.5)."""
    layer = il.argmin(lambda x, t: (x**3 / 3 - t * x).sum(), lambda f, x, t: -t.sqrt(), negative_curvature="minres")
    t = torch.tensor([4.0, 9.0], dtype=F64, requires_grad=True)
    (first,) = torch.autograd.grad(layer(-torch.ones(2, dtype=F64), t).sum(), t, create_graph=True)
    assert torch.allclose(first, -0.5 / t.sqrt(), rtol=1e-9)
    (second,) = torch.autograd.grad(first.sum(), t)
    assert torch.allclose(second, 0.25 / t**1.5, rtol=1e-8)


def test_in_a_proximal_layer_damping_counts_in_units_of_the_strength() -> None:
    """(A + sigma Lambda) u = v with A = H + Lambda: more strength, as if lambda were (1 + sigma) lambda."""
    strength = 2.0
    q = orthogonal(5, 0)
    hessian = (q * torch.tensor([-5.0, -3.0, 1.0, 2.0, 4.0], dtype=F64)) @ q.T
    objective = il.proximal(lambda phi: 0.5 * phi @ hessian @ phi, strength)
    matrix = hessian + strength * torch.eye(5, dtype=F64)
    layer = il.argmin(
        objective, lambda f, x, theta: torch.linalg.solve(matrix, strength * theta), negative_curvature="damp"
    )
    v = randn(5, seed=3)
    gradient, record = gradient_and_record(layer, randn(5, seed=1), v)
    assert record.solution.damping is not None
    damped = matrix + record.solution.damping * strength * torch.eye(5, dtype=F64)
    assert relative_error(gradient, strength * torch.linalg.solve(damped, v)) < 1e-8


def test_linear_solve_has_the_policies_too() -> None:
    b = randn(6, seed=1)
    u = il.linear_solve(SADDLE, b, il.ConjugateGradient(), negative_curvature="minres")
    assert relative_error(u, torch.linalg.solve(SADDLE, b)) < 1e-8
    with pytest.raises(ValueError, match="no Gauss-Newton matrix"):
        il.linear_solve(SADDLE, b, il.ConjugateGradient(), negative_curvature="gauss_newton")


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"negative_curvature='hope' must be one of"):
        quadratic_layer(SADDLE, negative_curvature="hope")
    with pytest.raises(ValueError, match=r"negative_curvature='hope' must be one of"):
        il.linear_solve(SADDLE, randn(6, seed=1), negative_curvature="hope")  # type: ignore[arg-type]


def test_a_vanishing_damping_is_not_reported_where_there_was_no_trouble() -> None:
    matrix = spd_matrix(6, 2, 0)
    _, record = gradient_and_record(
        quadratic_layer(matrix, negative_curvature="damp"), randn(6, seed=1), randn(6, seed=2)
    )
    assert record.solution.remedy == "" and record.solution.damping is None
    assert math.isfinite(float(record.solution.condition_estimate))


@pytest.mark.parametrize("policy", ["truncate", "damp", "gauss_newton"])
def test_a_second_derivative_whose_own_solve_meets_negative_curvature_is_an_error(policy: Any) -> None:
    """The first solve has a zero cotangent and meets none: the second would be repaired without a word."""
    curvature = torch.tensor([-1.0, 3.0], dtype=F64)
    residuals = il.composite(  # loss 1/2 o'Do + sum x^4/4, so that there is a Gauss-Newton matrix to ask for
        lambda o, t: 0.5 * (curvature * o * o).sum() + 0.25 * (o**4).sum() - t @ o, lambda x, t: x + 0.1 * x**3
    )
    layer = il.argmin(
        residuals, lambda f, x, t: torch.zeros(2, dtype=F64), negative_curvature=policy, on_failure="ignore"
    )
    zeros = torch.zeros(2, dtype=F64)
    with pytest.raises(il.UnsupportedTransformError, match="met negative curvature"):
        torch.func.hessian(lambda t: layer(zeros, t).sum().square())(zeros)


def test_the_same_second_derivative_by_minres_is_right() -> None:
    """x = t / D to first order at t = 0: the Hessian of (sum x)^2 is 2 (1/D)(1/D)'."""
    curvature = torch.tensor([-1.0, 3.0], dtype=F64)
    layer = il.argmin(
        lambda x, t: 0.25 * (x**4).sum() + 0.5 * (curvature * x * x).sum() - t @ x,
        lambda f, x, t: torch.zeros(2, dtype=F64),
        negative_curvature="minres",
    )
    zeros = torch.zeros(2, dtype=F64)
    hessian = torch.func.hessian(lambda t: layer(zeros, t).sum().square())(zeros)
    assert torch.allclose(hessian, 2 * torch.outer(1 / curvature, 1 / curvature), rtol=1e-9)
