"""Objectives that are a loss of a model's outputs: Gauss-Newton curvature, damping, and what they cost in exactness."""

# Systems have condition below 100 and are solved at rtol 1e-13: agreement to 1e-11, second derivatives to 1e-10.

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, dense_gradients, dense_hessian, dense_jacobian, newton, randn, relative_error, spd_matrix
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import implicitlayer as il

N = 3
CG = il.ConjugateGradient(rtol=1e-13)
ZEROS = torch.zeros(N, dtype=F64)
MIXING, T = randn(5, N, seed=1), randn(5, seed=2)


def residuals(x: Tensor, t: Tensor) -> Tensor:
    """Nonlinear, and no x makes them zero: the neglected curvature matters."""
    return torch.cat([MIXING @ x + 0.2 * (MIXING @ x) ** 2 - t, 0.5 * x])


def half_squares(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (residuals(x, t) ** 2).sum()


def dense_gauss_newton_gradient(model: Any, loss: Any, x: Tensor, t: Tensor, v: Tensor, damping: float = 0.0) -> Tensor:
    """-(d^2 f / dt dx)' (J' (d^2 loss / dy^2) J + damping)^-1 v, all dense."""
    jacobian = dense_jacobian(lambda x: model(x, t), x)
    matrix = jacobian.T @ dense_hessian(lambda y: loss(y, t), model(x, t).detach(), ()) @ jacobian
    u = torch.linalg.solve(matrix + damping * torch.eye(len(x), dtype=F64), v)
    x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(x, t), t), x, create_graph=True)
    return -torch.autograd.grad(gradient, t, u)[0]


def gradient_of(layer: il.ImplicitLayer, t: Tensor, v: Tensor) -> Tensor:
    t = t.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(torch.zeros_like(v), t), t, v)
    return gradient


def test_the_objectives_have_the_values_of_their_parts() -> None:
    assert relative_error(il.least_squares(residuals)(ZEROS + 1, T), half_squares(ZEROS + 1, T)) < 1e-15
    tree = il.least_squares(lambda x: {"a": x[0], "b": [x[1:].reshape(1, 2), x[:0]]})
    assert tree(torch.tensor([1.0, 2.0, 4.0], dtype=F64)).item() == 10.5
    assert il.composite(lambda y, t: (y * t).sum(), lambda x, t: x + t)(torch.ones(2), torch.ones(2)).item() == 4.0


def test_for_a_linear_model_gauss_newton_is_the_hessian_and_the_gradient_exact() -> None:
    """Ridge regression: x = (M'M + I/4)^-1 M't."""
    objective = il.least_squares(lambda x, t: [MIXING @ x - t, 0.5 * x])
    matrix = MIXING.T @ MIXING + 0.25 * torch.eye(N, dtype=F64)
    solver = lambda f, x, t: torch.linalg.solve(matrix, MIXING.T @ t)  # noqa: E731
    v = randn(N, seed=3)
    for curvature in ("hessian", "gauss_newton"):
        layer = il.argmin(objective, solver, linear_solver=CG, curvature=curvature)
        assert relative_error(gradient_of(layer, T, v), MIXING @ torch.linalg.solve(matrix, v)) < 1e-11


def test_where_the_data_are_fitted_the_gradient_is_exact_for_any_model() -> None:
    """x^3 = t has residual zero: the neglected term vanishes, and dx/dt = 1 / (3 x^2)."""
    t = torch.tensor([1.0, 8.0, 27.0], dtype=F64)
    layer = il.argmin(
        il.least_squares(lambda x, t: x**3 - t),
        lambda f, x, t: t ** (1 / 3),
        linear_solver=CG,
        curvature="gauss_newton",
    )
    assert relative_error(gradient_of(layer, t, torch.ones(3, dtype=F64)), t ** (-2 / 3) / 3) < 1e-11


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squares": lambda y, t: 0.5 * (y**2).sum(),
    "a coupled loss that reads theta": lambda y, t: torch.logsumexp(y, 0) + 0.5 * (t**2).sum() * (y**2).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_for_a_nonlinear_model_the_solve_uses_the_dense_gauss_newton_matrix(loss: str) -> None:
    objective, v = il.composite(LOSSES[loss], residuals), randn(N, seed=3)
    x = newton(objective, ZEROS, T)
    approximate = il.argmin(objective, newton, linear_solver=CG, curvature="gauss_newton")
    expected = dense_gauss_newton_gradient(residuals, LOSSES[loss], x, T, v)
    assert relative_error(gradient_of(approximate, T, v), expected) < 1e-11
    (exact,) = dense_gradients(objective, x, [T], v)
    assert relative_error(gradient_of(il.argmin(objective, newton, linear_solver=CG), T, v), exact) < 1e-11
    assert relative_error(expected, exact) > 1e-3  # they differ, so that each test can fail


def test_the_matrix_is_positive_definite_where_the_hessian_is_not() -> None:
    """1/2 (x^2 - t)^2 at x = 0.1, t = 1: Hessian 6 x^2 - 2 t = -1.94; J'J = 4 x^2 = 0.04."""
    model = lambda x, t: x**2 - t  # noqa: E731
    t, v = torch.ones(1, dtype=F64), torch.ones(1, dtype=F64)
    saddle = lambda f, x, t: 0.1 * t  # noqa: E731
    with pytest.raises(il.IndefiniteError, match="Gauss-Newton"):
        gradient_of(il.argmin(il.least_squares(model), saddle, stationarity_rtol=None), t, v)
    layer = il.argmin(il.least_squares(model), saddle, stationarity_rtol=None, curvature="gauss_newton")
    got = gradient_of(layer, t, v)
    # -(d^2 f / dt dx) u with d^2 f / dt dx = -2 x = -0.2 and u = 1 / 0.04
    assert relative_error(got, torch.tensor([5.0], dtype=F64)) < 1e-11


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_damping_is_added_to_the_diagonal(curvature: Any) -> None:
    matrix, v, t = spd_matrix(N, 1, seed=4), randn(N, seed=5), randn(N, seed=6)
    root = torch.linalg.cholesky(matrix)
    layer = il.argmin(
        il.least_squares(lambda x, t: root.T @ (x - t)),
        lambda f, x, t: t,
        linear_solver=CG,
        curvature=curvature,
        damping=0.3,
    )
    expected = matrix @ torch.linalg.solve(matrix + 0.3 * torch.eye(N, dtype=F64), v)
    assert relative_error(gradient_of(layer, t, v), expected) < 1e-11
    _, pushed = jvp(lambda t: layer(ZEROS, t), (t,), (v,))
    assert relative_error(pushed, torch.linalg.solve(matrix + 0.3 * torch.eye(N, dtype=F64), matrix @ v)) < 1e-11


def test_damping_turns_an_indefinite_hessian_into_a_usable_one() -> None:
    """x^2/2 - 3 y^2/2 at its saddle (0, 0): damping 4 makes it diag(5, 1)."""
    objective = lambda x, t: 0.5 * x[0] ** 2 - 1.5 * x[1] ** 2 - t @ x  # noqa: E731
    solver = lambda f, x, t: torch.stack([t[0], -t[1] / 3])  # noqa: E731
    v = torch.ones(2, dtype=F64)
    with pytest.raises(il.IndefiniteError, match="damping"):
        gradient_of(il.argmin(objective, solver), 0 * v, v)
    got = gradient_of(il.argmin(objective, solver, damping=4.0), 0 * v, v)
    assert relative_error(got, torch.tensor([0.2, 1.0], dtype=F64)) < 1e-11


# ---------------------------------------------------------------------------------------------- proximal and transforms


@pytest.mark.parametrize("strength", [0.7, [0.5, 1.0, 2.0]], ids=["one number", "one per entry"])
def test_inside_a_proximal_objective_the_strength_is_part_of_the_matrix(strength: Any) -> None:
    """theta_bar = D (J'J + D)^-1 v, D = diag(strength)."""
    given = strength if isinstance(strength, float) else torch.tensor(strength, dtype=F64)
    objective = il.proximal(il.least_squares(residuals), given)
    layer = il.argmin(objective, newton, linear_solver=CG, curvature="gauss_newton")
    theta, v = randn(N, seed=7), randn(N, seed=8)
    leaf = theta.clone().requires_grad_()
    phi = layer(theta, leaf, T)
    (got,) = torch.autograd.grad(phi, leaf, v)
    jacobian = dense_jacobian(lambda x: residuals(x, T), phi)
    d = torch.diag(torch.as_tensor(given, dtype=F64).expand(N))
    assert relative_error(got, d @ torch.linalg.solve(jacobian.T @ jacobian + d, v)) < 1e-11
    exact = d @ torch.linalg.solve(dense_hessian(half_squares, phi, [T]) + d, v)
    assert relative_error(got, exact) > 1e-3


@pytest.mark.parametrize("parts", ["none", "proximal of none"])
def test_an_objective_without_parts_is_an_error_that_shows_the_way(parts: str) -> None:
    objective: Any = half_squares if parts == "none" else il.proximal(half_squares, 1.0)
    theta = (T,) if parts == "none" else (ZEROS, T)
    layer = il.argmin(objective, newton, curvature="gauss_newton")
    with pytest.raises(il.ObjectiveError, match=r"il\.least_squares\(residuals\) or il\.composite\(loss, model\)"):
        layer(ZEROS, *[t.clone().requires_grad_() for t in theta]).sum().backward()
    with pytest.raises(ValueError, match="curvature='fisher' must be 'hessian' or 'gauss_newton'"):
        il.argmin(objective, newton, curvature="fisher")  # type: ignore[arg-type]


def ridge(t: Tensor) -> Tensor:
    """Closed form of the layer below: the exact minimiser, with exact Gauss-Newton curvature at every order."""
    scaled = MIXING * t.exp()
    return torch.linalg.inv(scaled.T @ scaled + torch.eye(N, dtype=F64)) @ (scaled.T @ T)


def ridge_layer(t: Tensor) -> Tensor:
    layer = il.argmin(
        il.composite(
            lambda y, t: 0.5 * (y[0] ** 2).sum() + 0.5 * (y[1] ** 2).sum(), lambda x, t: (MIXING @ (t.exp() * x) - T, x)
        ),
        lambda f, x, t: ridge(t),
        linear_solver=CG,
        curvature="gauss_newton",
    )
    solution: Tensor = layer(ZEROS, t)
    return solution


def test_transforms_of_a_linear_model_are_those_of_the_closed_form() -> None:
    t = 0.3 * randn(2, N, seed=9)
    scalar = lambda f: lambda t: (f(t) ** 2).sum()  # noqa: E731
    for transform in (grad, lambda f: jacfwd(f), lambda f: jacrev(f)):
        function = scalar if transform is grad else (lambda f: f)
        got, expected = (transform(function(f))(t[0]) for f in (ridge_layer, ridge))
        assert relative_error(got, expected) < 1e-11
        got, expected = (vmap(transform(function(f)))(t) for f in (ridge_layer, ridge))
        assert relative_error(got, expected) < 1e-11
    for got, expected in (
        (hessian(scalar(ridge_layer))(t[0]), hessian(scalar(ridge))(t[0])),
        (vmap(hessian(scalar(ridge_layer)))(t), vmap(hessian(scalar(ridge)))(t)),
        (jacrev(jacrev(ridge_layer))(t[0]), jacrev(jacrev(ridge))(t[0])),
    ):
        assert relative_error(got, expected) < 1e-10


def test_lanes_of_batch_dims_equal_a_loop() -> None:
    objective = il.composite(
        lambda y, t: 0.5 * (y**2).sum(-1),
        lambda x, t: torch.cat([x @ MIXING.T + 0.2 * (x @ MIXING.T) ** 2 - t, 0.5 * x], -1),
    )
    t, v = (T + 0.3 * randn(4, 5, seed=10)).requires_grad_(), randn(4, N, seed=11)
    x = il.argmin(
        objective,
        lambda f, x, t: torch.stack([newton(objective, x[0], lane) for lane in t]),
        linear_solver=CG,
        curvature="gauss_newton",
        batch_dims=1,
    )(torch.zeros(4, N, dtype=F64), t)
    layer = il.argmin(objective, newton, linear_solver=CG, curvature="gauss_newton")
    loop = torch.stack([layer(ZEROS, lane) for lane in t])
    got, expected = torch.autograd.grad(x, t, v)[0], torch.autograd.grad(loop, t, v)[0]
    assert relative_error(got, expected) < 1e-11


def module_level_residuals(x: Tensor, t: Tensor) -> Tensor:
    return x - t


def test_the_objectives_pickle() -> None:
    copied = pickle.loads(pickle.dumps(il.least_squares(module_level_residuals)))
    assert copied(ZEROS + 1, ZEROS).item() == 1.5
