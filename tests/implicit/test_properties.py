"""Properties that every implicit gradient has, on random problems of il.testing, in float64."""

# Hypothesis draws small integers only (sizes, seeds, exponents), so that a failure shrinks to a small problem.
# Accuracy: the solvers of the problems are exact to rounding; linear solves stop at rtol 1e-13, which a condition of
# 2 10^3 at most can amplify to 2e-10. Where they stagnate before that, at eps times the condition, they may say so.

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import F64, dense_gradients, randn, relative_error
from torch import Tensor

import implicitlayer as il
from implicitlayer import testing

# a check of all derivatives by itself makes hundreds of comparisons
FEW = settings(max_examples=max(1, settings().max_examples // 4))
RTOL = 1e-9
SETTINGS: dict[str, Any] = {"linear_solver": il.ConjugateGradient(rtol=1e-13), "on_failure": "ignore"}
sizes, conditions, seeds = st.integers(1, 6), st.integers(0, 3), st.integers(0, 10_000)
convex = testing.smooth_convex_problems(n=sizes, log10_cond=conditions)
roots = testing.root_problems(n=sizes, log10_cond=conditions)
wells = testing.nonconvex_problems(n=st.integers(1, 4), log10_cond=st.integers(0, 1))
problems = st.one_of(convex, roots, wells)
Problem = testing.ArgminProblem | testing.RootProblem


def layer_of(problem: Problem) -> Callable[..., Tensor]:
    if isinstance(problem, testing.RootProblem):
        return il.root(problem.residual, problem.solver, linear_solver=il.Gmres(rtol=1e-13), on_failure="ignore")
    return il.argmin(problem.objective, problem.solver, **SETTINGS)


@FEW
@given(problem=st.one_of(convex, wells))
def test_every_derivative_of_a_minimiser_passes_the_gradient_check(problem: testing.ArgminProblem) -> None:
    report = testing.check_argmin_gradients(problem.objective, problem.solver, problem.init, *problem.theta, rtol=1e-9)
    assert report.verdict == "passed", report


@FEW
@given(problem=roots)
def test_every_derivative_of_a_root_passes_the_gradient_check(problem: testing.RootProblem) -> None:
    report = testing.check_argmin_gradients(
        problem.residual, problem.solver, problem.init, *problem.theta, kind="root", rtol=1e-9
    )
    assert report.verdict == "passed", report


@given(problem=convex, seed=seeds)
def test_gradients_match_the_dense_implicit_gradient(problem: testing.ArgminProblem, seed: int) -> None:
    """Against a reference that shares nothing with il.testing either."""
    x = layer_of(problem)(problem.init, *problem.theta)
    v = randn(len(problem.init), seed=seed)
    got = torch.autograd.grad(x, problem.theta, v)
    expected = dense_gradients(problem.objective, x.detach(), problem.theta, v)
    size = sum(float(e.norm()) for e in expected)  # one of them may vanish by chance
    for g, e in zip(got, expected, strict=True):
        assert float((g - e).norm()) <= RTOL * size


@given(problem=problems, seed=seeds)
def test_forward_and_reverse_mode_are_adjoint(problem: Problem, seed: int) -> None:
    testing.check_adjoint(layer_of(problem), problem.init, *problem.theta, rtol=RTOL, seed=seed)


@given(problem=problems, seed=seeds)
def test_gradients_are_linear_in_the_cotangent(problem: Problem, seed: int) -> None:
    testing.check_linear_in_cotangent(layer_of(problem), problem.init, *problem.theta, rtol=RTOL, seed=seed)


@given(problem=convex, factor=st.integers(-12, 12), shift=st.integers(-3, 3))
def test_scaling_and_shifting_the_objective_leaves_the_gradient(
    problem: testing.ArgminProblem, factor: int, shift: int
) -> None:
    testing.check_scaled_objective(
        problem.objective, problem.solver, problem.init, *problem.theta,
        factor=10.0**factor, shift=10.0**shift, rtol=RTOL, **SETTINGS,
    )  # fmt: skip


@given(problem=roots, factor=st.integers(-12, 12))
def test_scaling_the_residual_leaves_the_gradient(problem: testing.RootProblem, factor: int) -> None:
    testing.check_scaled_objective(
        problem.residual, problem.solver, problem.init, *problem.theta,
        factor=10.0**factor, kind="root", rtol=RTOL, linear_solver=il.Gmres(rtol=1e-13), on_failure="ignore",
    )  # fmt: skip


@given(problem=convex, seed=seeds)
def test_rotating_the_unknowns_rotates_the_solution_and_nothing_else(problem: testing.ArgminProblem, seed: int) -> None:
    testing.check_rotated_unknowns(
        problem.objective, problem.solver, problem.init, *problem.theta, rtol=RTOL, seed=seed, **SETTINGS
    )


@given(problem=problems, factors=st.lists(st.sampled_from([0.9, 0.97, 1.0, 1.02, 1.1]), min_size=1, max_size=4))
def test_a_batch_equals_its_loop(problem: Problem, factors: list[float]) -> None:
    # a well stays the one that it is
    layer = layer_of(problem)
    testing.check_batch_equals_loop(layer, problem.init, *problem.theta, lanes=factors, rtol=RTOL)


@given(problem=convex, lanes=st.integers(1, 4))
def test_a_batch_of_a_solver_that_is_called_lane_by_lane_has_the_bits_of_its_loop(
    problem: testing.ArgminProblem, lanes: int
) -> None:
    """Strengths from e^-2 to e^2 in one batch; the weight is shared."""
    weight, offset, _ = problem.theta
    layer, strengths = layer_of(problem), torch.linspace(-2, 2, lanes, dtype=F64)
    batch = torch.func.vmap(lambda s: layer(problem.init, weight, offset, s))(strengths)
    assert torch.equal(batch, torch.stack([layer(problem.init, weight, offset, s) for s in strengths]))


@given(problem=problems)
def test_repeats_are_bitwise_equal(problem: Problem) -> None:
    testing.check_repeatable(layer_of(problem), problem.init, *problem.theta)


@given(matrix=testing.spd_matrices(n=sizes, log10_cond=2, log10_scale=st.integers(-2, 2)), seed=seeds)
def test_an_objective_of_the_difference_has_the_identity_as_jacobian(matrix: Tensor, seed: int) -> None:
    n = len(matrix)
    theta = randn(n, seed=seed).requires_grad_()

    def objective(x: Tensor, theta: Tensor) -> Tensor:
        d = x - theta
        return 0.5 * d @ matrix @ d + (d**4).sum()

    difference = il.argmin(objective, lambda f, x, t: t.clone(), **SETTINGS)
    zeros = torch.zeros(n, dtype=F64)
    jacobian = torch.func.jacrev(lambda t: difference(zeros, t))(theta.detach())
    assert torch.allclose(jacobian, torch.eye(n, dtype=F64), rtol=0, atol=1e-10)  # rtol 1e-13, condition 100
    v = randn(n, seed=seed + 1)
    (gradient,) = torch.autograd.grad(difference(zeros, theta), theta, v)
    assert relative_error(gradient, v) < 1e-10


@given(problem=convex, seed=seeds)
def test_the_solution_of_the_linear_system_leaves_a_small_residual_when_recomputed(
    problem: testing.ArgminProblem, seed: int
) -> None:
    """Where f = g(x) - <x, t>, so that d^2 f / dt dx = -I, the gradient in t is u = H^-1 v itself."""
    weight, offset, log_strength = (t.detach() for t in problem.theta)
    x, v = problem.solution(*problem.theta), randn(len(problem.init), seed=seed)
    t = torch.zeros_like(x).requires_grad_()
    layer = il.argmin(lambda x, t: problem.objective(x, *problem.theta) - (x * t).sum(), lambda f, x0, t: x)
    (u,) = torch.autograd.grad(layer(problem.init, t), t, v)
    slope = torch.sigmoid(weight @ x + offset)
    hessian = weight.T @ ((slope * (1 - slope))[:, None] * weight)
    residual = hessian @ u + log_strength.exp() * u - v
    assert float(residual.norm()) <= 2e-10 * float(v.norm())  # the default rtol, and twice that by contract
