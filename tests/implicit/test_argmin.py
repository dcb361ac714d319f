"""The layer against closed forms: ridge regression, scalar functions, aux flags, batches."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, newton, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il


def ridge(x: Tensor, strength: Tensor, data: Tensor, target: Tensor) -> Tensor:
    return ((data @ x - target) ** 2).sum() + strength * (x * x).sum()


def ridge_solution(strength: Tensor, data: Tensor, target: Tensor) -> Tensor:
    """(D'D + strength I)^-1 D'y: the closed form, differentiated by autograd."""
    return torch.linalg.solve(data.T @ data + strength * torch.eye(data.shape[1], dtype=F64), data.T @ target)


def ridge_problem() -> tuple[Tensor, ...]:
    tensors = (torch.tensor(0.7, dtype=F64), randn(12, 4, seed=1), randn(12, seed=2))
    return tuple(t.requires_grad_() for t in tensors)


def exact(objective: Any, init: Tensor, *theta: Tensor) -> Tensor:
    return ridge_solution(*theta)


# ------------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1, 2)], ids=["strength", "data", "target", "all"])
def test_gradient_matches_closed_form_on_ridge_regression(wanted: tuple[int, ...]) -> None:
    theta = [t if i in wanted else t.detach() for i, t in enumerate(ridge_problem())]
    v = randn(4, seed=3)
    x = il.argmin(ridge, exact)(torch.zeros(4, dtype=F64), *theta)
    chosen = [theta[i] for i in wanted]
    got = torch.autograd.grad(x, chosen, v)
    expected = torch.autograd.grad(ridge_solution(*theta), chosen, v)
    assert torch.equal(x, ridge_solution(*theta))
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-9  # rtol 1e-10 times a condition number below 10


def test_gradient_matches_closed_form_where_theta_is_the_centre_of_the_ridge() -> None:
    def objective(x: Tensor, theta: Tensor, data: Tensor, target: Tensor) -> Tensor:
        return ((data @ x - target) ** 2).sum() + 0.3 * ((x - theta) ** 2).sum()

    theta, (_, data, target) = randn(4, seed=4).requires_grad_(), ridge_problem()
    inverse = torch.linalg.inv(data.detach().T @ data.detach() + 0.3 * torch.eye(4, dtype=F64))
    x = il.argmin(objective, newton)(torch.zeros(4, dtype=F64), theta, data, target)
    v = randn(4, seed=5)
    (gradient,) = torch.autograd.grad(x, theta, v)
    assert relative_error(gradient, 0.3 * inverse @ v) < 1e-9  # as above


def test_exponential_has_the_gradient_of_the_logarithm() -> None:
    t = torch.tensor([0.5, 2.0, 40.0], dtype=F64, requires_grad=True)
    x = il.argmin(lambda x, t: (x.exp() - t * x).sum(), lambda f, x, t: t.log())(torch.zeros(3, dtype=F64), t)
    (gradient,) = torch.autograd.grad(x.sum(), t)
    assert torch.allclose(gradient, 1 / t, rtol=1e-9, atol=0)  # condition 80, rtol 1e-10, random enough


def test_a_quartic_has_the_gradient_of_the_cube_root() -> None:
    t = torch.tensor([0.1, 1.0, 8.0], dtype=F64, requires_grad=True)
    x = il.argmin(lambda x, t: (x**4 / 4 - t * x).sum(), lambda f, x, t: t ** (1 / 3))(torch.ones(3, dtype=F64), t)
    (gradient,) = torch.autograd.grad(x.sum(), t)
    assert torch.allclose(gradient, t.detach() ** (-2 / 3) / 3, rtol=1e-9, atol=0)


def test_a_scalar_unknown_has_its_gradient() -> None:
    t = torch.tensor(2.0, dtype=F64, requires_grad=True)
    x = il.argmin(lambda x, t: x.exp() - t * x, lambda f, x, t: t.log())(torch.tensor(0.0, dtype=F64), t)
    assert x.shape == ()
    (gradient,) = torch.autograd.grad(x, t)
    assert float(gradient) == pytest.approx(0.5, rel=1e-14)


def test_logistic_regression_matches_the_dense_gradient_and_finite_differences() -> None:
    data, labels = randn(20, 3, seed=6), (randn(20, seed=7) > 0).double()
    log_strength = torch.tensor(-1.0, dtype=F64, requires_grad=True)

    def objective(x: Tensor, log_strength: Tensor) -> Tensor:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(data @ x, labels, reduction="sum")
        return loss + 0.5 * log_strength.exp() * (x * x).sum()

    init = torch.zeros(3, dtype=F64)
    x = il.argmin(objective, newton)(init, log_strength)
    (gradient,) = torch.autograd.grad(x.sum(), log_strength)
    at, p = x.detach(), torch.sigmoid(data @ x.detach())
    hessian = data.T @ ((p * (1 - p))[:, None] * data) + math.exp(-1) * torch.eye(3, dtype=F64)
    assert float(gradient) == pytest.approx(float(-math.exp(-1) * torch.linalg.solve(hessian, at).sum()), rel=1e-9)
    h = 1e-5  # Newton is exact to 1e-15: truncation h^2 = 1e-10 against rounding 1e-15 / h = 1e-10
    up, down = (newton(objective, init, torch.tensor(-1.0 + s, dtype=F64)).sum() for s in (h, -h))
    assert float(gradient) == pytest.approx(float(up - down) / (2 * h), rel=1e-8)


def test_non_leaf_hyperparameters_pass_the_gradient_on() -> None:
    leaf = torch.tensor(0.3, dtype=F64, requires_grad=True)
    strength, (_, data, target) = leaf.exp() * 2, ridge_problem()
    x = il.argmin(ridge, exact)(torch.zeros(4, dtype=F64), strength, data, target)
    (got,) = torch.autograd.grad(x.sum(), leaf)
    (expected,) = torch.autograd.grad(ridge_solution(leaf.exp() * 2, data, target).sum(), leaf)
    assert relative_error(got, expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_gradients_have_the_dtype_and_shape_of_their_theta(dtype: torch.dtype) -> None:
    theta = [t.detach().to(dtype).requires_grad_() for t in ridge_problem()]
    x = il.argmin(ridge, lambda f, x, *t: ridge_solution(*(s.double() for s in t)))(torch.zeros(4, dtype=dtype), *theta)
    assert x.dtype == dtype
    x.sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in theta]
    ridge_solution(*doubles).sum().backward()
    for t, d in zip(theta, doubles, strict=True):
        assert t.grad is not None and d.grad is not None
        assert t.grad.dtype == dtype and t.grad.shape == t.shape
        # float32: rtol 1e-5 times a condition number below 10
        assert relative_error(t.grad.double(), d.grad) < (1e-4 if dtype is torch.float32 else 1e-9)


# --------------------------------------------------------------------------------------------------------- aux flags


def test_the_solvers_aux_comes_back_beside_the_solution() -> None:
    theta = ridge_problem()
    layer = il.argmin(ridge, lambda f, x, *t: (ridge_solution(*t), {"steps": 7}), solver_has_aux=True)
    x, aux = layer(torch.zeros(4, dtype=F64), *theta)
    assert aux == {"steps": 7} and torch.equal(x, ridge_solution(*theta)) and x.requires_grad


def test_the_aux_of_a_solver_result_comes_back_too() -> None:
    theta = ridge_problem()
    solver = il.solvers.SciPyMinimize("BFGS", tol=1e-9)
    x, aux = il.argmin(ridge, solver, solver_has_aux=True)(torch.zeros(4, dtype=F64), *theta)
    assert np.array_equal(aux.x, x.detach().numpy()) and aux.success


def test_the_objectives_aux_is_dropped_for_solver_and_gradient() -> None:
    theta = ridge_problem()
    layer = il.argmin(
        lambda x, *t: (ridge(x, *t), {"prediction": x}),
        il.solvers.SciPyMinimize("Newton-CG", options={"xtol": 1e-12}),
        objective_has_aux=True,
    )
    x = layer(torch.zeros(4, dtype=F64), *theta)
    got = torch.autograd.grad(x.sum(), theta)
    expected = torch.autograd.grad(ridge_solution(*theta).sum(), theta)
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-7  # the solver stops at steps near 1e-8 or below


def test_confused_aux_flags_are_errors_that_say_which_flag_is_meant() -> None:
    theta, init = ridge_problem(), torch.zeros(4, dtype=F64)
    with pytest.raises(il.SolverOutputError, match=r"If the solver returns \(x, aux\), pass solver_has_aux=True"):
        il.argmin(ridge, lambda f, x, *t: (ridge_solution(*t), None))(init, *theta)
    with pytest.raises(il.SolverOutputError, match=r"must return \(x, aux\), got Tensor.*pass objective_has_aux=True"):
        il.argmin(ridge, exact, solver_has_aux=True)(init, *theta)
    with pytest.raises(il.ObjectiveError, match=r"objective must return \(value, aux\), got Tensor"):
        il.argmin(ridge, exact, objective_has_aux=True)(init, *theta)
    with pytest.raises(il.ObjectiveError, match="objective_has_aux"):
        il.argmin(lambda x, *t: (ridge(x, *t), None), exact)(init, *theta)


# ------------------------------------------------------------------------------------------------------------ batches


def lane_objective(x: Tensor, matrix: Tensor, b: Tensor, shared: Tensor) -> Tensor:
    """One value per lane; ``shared`` has no lanes."""
    quadratic = 0.5 * (x * (matrix @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) - (b * x).sum(-1)
    return quadratic + 0.5 * (shared.exp() * x * x).sum(-1)


def lane_solution(matrix: Tensor, b: Tensor, shared: Tensor) -> Tensor:
    """The quadratic form sees the symmetric part of a matrix only."""
    symmetric = [(m + m.T) / 2 + torch.diag(shared.exp()) for m in matrix]
    return torch.stack([torch.linalg.solve(m, c) for m, c in zip(symmetric, b, strict=True)])


def lane_problem() -> tuple[Tensor, ...]:
    matrix = torch.stack([spd_matrix(3, c, seed=8) for c in (0.0, 1.0, 2.0, 4.0)])
    return tuple(t.requires_grad_() for t in (matrix, randn(4, 3, seed=9), randn(3, seed=10)))


# distance to the solution: rounding; gradient 1e-12 over the smallest curvature 0.3; last Newton step of 1e-12, taken
# with an inner tolerance of sqrt(gradient), so about its 2/3 power
@pytest.mark.parametrize(
    ("solver", "distance"),
    [
        (lambda f, x, *t: lane_solution(*t), 1e-13),
        (il.solvers.GradientDescent(step_size=0.2, max_steps=20_000, rtol=1e-12), 1e-11),
        (il.solvers.SciPyMinimize("Newton-CG", options={"xtol": 1e-12}), 1e-8),
    ],
    ids=["closed form", "batched", "sees the sum"],
)
def test_batch_dims_equal_a_loop_and_a_shared_theta_gets_the_sum_of_its_lanes(solver: Any, distance: float) -> None:
    theta, v = lane_problem(), randn(4, 3, seed=11)
    x = il.argmin(lane_objective, solver, batch_dims=1)(torch.zeros(4, 3, dtype=F64), *theta)
    got = torch.autograd.grad(x, theta, v)
    expected = torch.autograd.grad(lane_solution(*theta), theta, v)
    assert relative_error(x, lane_solution(*theta)) < distance
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-9 + 10 * distance  # rtol 1e-10 over the smallest curvature 0.3


def test_two_batch_dims_are_lanes_too() -> None:
    matrix, b, shared = lane_problem()
    layer = il.argmin(
        lane_objective,
        lambda f, x, m, c, s: lane_solution(m.flatten(0, 1), c.flatten(0, 1), s).view_as(x),
        batch_dims=2,
    )
    x = layer(torch.zeros(2, 2, 3, dtype=F64), matrix.view(2, 2, 3, 3), b.view(2, 2, 3), shared)
    got = torch.autograd.grad(x.sum(), (matrix, b, shared))
    expected = torch.autograd.grad(lane_solution(matrix, b, shared).sum(), (matrix, b, shared))
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-8


def test_lanes_stop_on_their_own_and_the_record_counts_each() -> None:
    theta = lane_problem()
    layer = il.argmin(lane_objective, lambda f, x, *t: lane_solution(*t), batch_dims=1)
    layer(torch.zeros(4, 3, dtype=F64), *theta).sum().backward()
    solution = layer.records[1].solution  # type: ignore[union-attr]
    assert solution.codes.shape == (4,) and solution.status is il.Status.CONVERGED


def test_init_leaves_must_agree_on_the_batch() -> None:
    layer = il.argmin(lambda x: (x["a"] ** 2).sum(-1) + (x["b"] ** 2).sum(-1), lambda f, x: x, batch_dims=1)
    with pytest.raises(ValueError, match=r"with batch_dims=1 .*x\['b'\] has shape \(4, 3\), x\['a'\] \(2, 3\)"):
        layer({"a": torch.zeros(2, 3), "b": torch.zeros(4, 3)})


def test_a_scalar_objective_in_a_batch_is_refused_with_both_shapes() -> None:
    theta = ridge_problem()
    layer = il.argmin(lambda x, t: ((x - t) ** 2).sum(), lambda f, x, t: t, batch_dims=1)
    with pytest.raises(il.ObjectiveError, match=r"one value per lane: expected shape \(4,\), got \(\)"):
        layer(torch.zeros(4, 1, dtype=F64), theta[1][:4, :1])


def test_a_batch_of_no_lanes_is_no_trouble() -> None:
    t = torch.zeros(0, 2, dtype=F64, requires_grad=True)
    for solver in (lambda f, x, t: t.log(), il.solvers.GradientDescent(0.1, max_steps=5, rtol=1e-6)):
        x = il.argmin(lambda x, t: (x.exp() - t * x).sum(-1), solver, batch_dims=1)(torch.zeros(0, 2, dtype=F64), t)
        (gradient,) = torch.autograd.grad(x.sum(), t)
        assert x.shape == gradient.shape == (0, 2)
