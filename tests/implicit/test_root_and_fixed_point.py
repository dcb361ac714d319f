"""Roots and fixed points with Jacobians that are not symmetric: transposed solves in reverse, direct in forward."""

# F(x, w, b) = 2 x + w tanh(x) - b with ||w|| = 0.9: J = 2 I + w diag(1 - tanh^2) has singular values in [1.1, 2.9],
# so a solve of relative residual 1e-12 is good to 3e-12. TOLERANCE leaves the same again for Newton and the pull-backs.
# T(x) = (b - w tanh(x)) / 2 has the same solution as its fixed point, and contracts by 0.45.

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, dense_jacobian, newton_root, randn, relative_error
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import implicitlayer as il

N = 3
TOLERANCE = 1e-11
ZEROS = torch.zeros(N, dtype=F64)


def problem(seed: int = 1) -> tuple[Tensor, Tensor]:
    w = randn(N, N, seed=seed)
    return 0.9 * w / torch.linalg.matrix_norm(w, 2), randn(N, seed=seed + 1)


def residual(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return 2 * x + w @ torch.tanh(x) - b


def contraction(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (b - w @ torch.tanh(x))


def newton_fixed_point(function: Callable[..., Tensor], init: Tensor, *theta: Any) -> Tensor:
    return newton_root(lambda x, *t: x - function(x, *t), init, *theta)


def make(kind: str, **settings: Any) -> il.ImplicitLayer:
    if kind == "root":
        return il.root(residual, newton_root, **settings)
    return il.fixed_point(contraction, newton_fixed_point, **settings)


def dense_parts(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, J, dF/dw as [n, n*n], dF/db."""
    x = newton_root(residual, ZEROS, w, b)
    return (
        x,
        dense_jacobian(lambda y: residual(y, w, b), x),
        dense_jacobian(lambda w: residual(x, w, b), w),
        dense_jacobian(lambda b: residual(x, w, b), b),
    )


SOLVERS: dict[str, Callable[[str], Any]] = {
    "default": lambda kind: None,
    "gmres": lambda kind: il.Gmres(rtol=1e-12),
    "bicgstab": lambda kind: il.Bicgstab(rtol=1e-12),
    "normal equations": lambda kind: il.NormalEquations(il.ConjugateGradient(rtol=1e-12)),
    "dense": lambda kind: il.Dense(),
    # ||I - J / 2|| <= 0.45 for the residual as it stands, and the same for x - T(x): 0.45^60 = 2e-21
    "neumann": lambda kind: il.Neumann(60, step_size=0.5 if kind == "root" else 1.0),
}
KINDS = ("root", "fixed_point")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_reverse_mode_is_the_dense_solve_with_the_transposed_jacobian(solver: str, kind: str) -> None:
    (w, b), v = problem(), randn(N, seed=5)
    x, jacobian, by_w, by_b = dense_parts(w, b)
    leaves = [w.clone().requires_grad_(), b.clone().requires_grad_()]
    got_x = make(kind, linear_solver=SOLVERS[solver](kind))(ZEROS, *leaves)
    got = torch.autograd.grad(got_x, leaves, v)
    assert relative_error(got_x, x) < 1e-14
    # the default tolerance is 1e-10
    tolerance = 1e-9 if solver == "default" else TOLERANCE
    for matrix, is_right in ((jacobian.T, True), (jacobian, False)):
        u = torch.linalg.solve(matrix, v)
        for g, e in zip(got, (-(by_w.T @ u).reshape(N, N), -(by_b.T @ u)), strict=True):
            assert (relative_error(g, e) < tolerance) is is_right
            assert is_right or relative_error(g, e) > 1e-2  # J for J' is far away: the test can tell them apart


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_forward_mode_is_the_dense_solve_with_the_jacobian_itself(solver: str, kind: str) -> None:
    w, b = problem()
    tangents = randn(N, N, seed=6), randn(N, seed=7)
    _, jacobian, by_w, by_b = dense_parts(w, b)
    change = by_w @ tangents[0].reshape(-1) + by_b @ tangents[1]
    implicit = make(kind, linear_solver=SOLVERS[solver](kind))
    _, got = jvp(lambda w, b: implicit(ZEROS, w, b), (w, b), tangents)
    tolerance = 1e-9 if solver == "default" else TOLERANCE
    assert relative_error(got, -torch.linalg.solve(jacobian, change)) < tolerance
    assert relative_error(got, -torch.linalg.solve(jacobian.T, change)) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_solver_gets_the_transpose_in_reverse_the_jacobian_in_forward_and_both_products(kind: str) -> None:
    w, b = problem()
    _, jacobian, _, _ = dense_parts(w, b)
    expected = jacobian if kind == "root" else jacobian / 2  # x - T(x) = F / 2
    seen: list[tuple[Tensor, Tensor, bool]] = []

    def spy(operator: il.FlatOperator, rhs: Tensor) -> il.LinearSolution:
        assert operator.transpose_matvec is not None
        columns = [(operator(e), operator.transpose_matvec(e)) for e in torch.eye(N, dtype=F64)]
        seen.append((torch.stack([c for c, _ in columns], 1), torch.stack([r for _, r in columns]), operator.symmetric))
        return il.Dense()(operator, rhs)

    implicit = make(kind, linear_solver=spy)
    implicit(ZEROS, w, b.clone().requires_grad_()).sum().backward()
    jvp(lambda b: implicit(ZEROS, w, b), (b,), (b,))
    for (by_matvec, by_transpose, symmetric), matrix in zip(seen, (expected.T, expected), strict=True):
        assert relative_error(by_matvec, matrix) < 1e-14 and relative_error(by_transpose, matrix) < 1e-14
        assert not symmetric


@pytest.mark.parametrize("kind", KINDS)
def test_both_modes_and_the_second_order_pass_gradcheck(kind: str) -> None:
    w, b = (t.requires_grad_() for t in problem())
    implicit = make(kind, linear_solver=il.Gmres(rtol=1e-13))
    run = lambda w, b: implicit(ZEROS, w, b)  # noqa: E731
    # eps = 1e-6: Newton is exact to 1e-15 and the solves to 1e-13, so differences are good to 1e-9 and 1e-7
    assert torch.autograd.gradcheck(run, (w, b), atol=1e-7, rtol=0, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (w, b), atol=1e-6, rtol=0, check_fwd_over_rev=True)


def test_a_rotation_turns_the_cotangent_the_right_way() -> None:
    """R x = t: x = R't, so theta_bar = R v; with R for R' it would have the opposite sign."""
    rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    t = randn(2, seed=1).requires_grad_()
    x = il.root(lambda x, t: rotation @ x - t, lambda f, x, t: rotation.T @ t)(torch.zeros(2, dtype=F64), t)
    v = torch.tensor([1.0, 2.0], dtype=F64)
    (gradient,) = torch.autograd.grad(x, t, v)
    assert relative_error(gradient, torch.tensor([-2.0, 1.0], dtype=F64)) < 1e-14


def test_three_orders_of_the_square_root_by_herons_map() -> None:
    implicit = il.fixed_point(
        lambda x, a: 0.5 * (x + a / x), lambda f, x, a: a.sqrt(), linear_solver=il.Gmres(rtol=1e-14)
    )
    run: Callable[[Tensor], Tensor] = lambda a: implicit(torch.ones((), dtype=F64), a)  # noqa: E731
    for order, factor in enumerate((1.0, 0.5, -0.25, 0.375)):
        function = run
        for _ in range(order):
            function = grad(function)
        expected = torch.tensor(factor * 4.0 ** (0.5 - order), dtype=F64)
        assert relative_error(function(torch.tensor(4.0, dtype=F64)), expected) < 1e-12  # scalars: rounding only


@pytest.mark.parametrize("num_terms", [1, 2, 7])
def test_neumann_terms_are_back_propagation_through_as_many_last_iterations(num_terms: int) -> None:
    (w, b), v = problem(), randn(N, seed=8)
    leaves = [w.clone().requires_grad_(), b.clone().requires_grad_()]
    unrolled = newton_root(residual, ZEROS, w, b)
    for _ in range(num_terms):
        unrolled = contraction(unrolled, *leaves)
    x = make("fixed_point", linear_solver=il.Neumann(num_terms))(ZEROS, *leaves)
    for got, expected in zip(torch.autograd.grad(x, leaves, v), torch.autograd.grad(unrolled, leaves, v), strict=True):
        assert relative_error(got, expected) < 1e-13  # the same sum: rounding


PROBLEMS = [problem(seed) for seed in (1, 3, 5)]
TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "values": lambda f: f,
    "jacrev": lambda f: jacrev(f, argnums=(0, 1)),
    "jacfwd": lambda f: jacfwd(f, argnums=1),
    "hessian": lambda f: hessian(lambda w, b: (f(w, b) ** 3).sum(), argnums=1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0), (0, None), (0, 1)], ids=str)
def test_vmap_over_any_arguments_and_dimensions_equals_a_loop(in_dims: Any, transform: str, kind: str) -> None:
    implicit = make(kind, linear_solver=il.Gmres(rtol=1e-13))
    run = TRANSFORMS[transform](lambda w, b: implicit(ZEROS, w, b))
    stacked = [torch.stack(parts) for parts in zip(*PROBLEMS, strict=True)]
    args = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip(stacked, in_dims, strict=True)]
    lanes = [[t[0] if dim is None else t[i] for t, dim in zip(stacked, in_dims, strict=True)] for i in range(3)]
    got = torch.utils._pytree.tree_leaves(vmap(run, in_dims=in_dims)(*args))
    looped = [torch.utils._pytree.tree_leaves(run(*lane)) for lane in lanes]
    for g, e in zip(got, zip(*looped, strict=True), strict=True):
        assert relative_error(g, torch.stack(e)) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_of_a_sum_over_lanes_equals_a_loop(kind: str) -> None:
    implicit = make(kind, linear_solver=il.Gmres(rtol=1e-13))
    loss = lambda w, b: (implicit(ZEROS, w, b) ** 2).sum()  # noqa: E731
    w, b = (torch.stack(parts) for parts in zip(*PROBLEMS, strict=True))
    got = grad(lambda w: vmap(loss)(w, b).sum())(w)
    assert relative_error(got, torch.stack([grad(loss)(*lane) for lane in PROBLEMS])) < TOLERANCE


def test_lanes_of_batch_dims_equal_a_loop() -> None:
    w, b = problem()[0].requires_grad_(), randn(3, N, seed=9).requires_grad_()
    x = il.root(
        lambda x, w, b: 2 * x + torch.tanh(x) @ w.T - b,
        lambda f, x, w, b: torch.stack([newton_root(residual, x[0], w, lane) for lane in b]),
        linear_solver=il.Gmres(rtol=1e-12),
        batch_dims=1,
    )(torch.zeros(3, N, dtype=F64), w, b)
    v = randn(3, N, seed=10)
    loop = torch.stack([make("root", linear_solver=il.Dense())(ZEROS, w, lane) for lane in b])
    for got, expected in zip(torch.autograd.grad(x, (w, b), v), torch.autograd.grad(loop, (w, b), v), strict=True):
        assert relative_error(got, expected) < TOLERANCE


@pytest.mark.parametrize("solver", [il.solvers.Newton(), il.solvers.Broyden(), il.solvers.AndersonAcceleration()])
@pytest.mark.parametrize("batch_dims", [0, 1])
def test_a_fixed_point_is_found_by_solvers_of_roots_too(solver: Any, batch_dims: int) -> None:
    # x = x / 2 + t is x = 2 t
    t = torch.tensor([8.0, 1.0], dtype=torch.float64, requires_grad=True)
    layer = il.fixed_point(lambda x, t: 0.5 * x + t[..., None], solver, batch_dims=batch_dims)
    x = layer(torch.ones(2, 1, dtype=torch.float64), t)
    assert torch.allclose(x[:, 0], 2 * t, rtol=1e-9)
    assert torch.allclose(torch.autograd.grad(x.sum(), t)[0], torch.full_like(t, 2.0), rtol=1e-9)


def test_a_root_is_not_looked_for_by_a_solver_of_fixed_points() -> None:
    with pytest.raises(TypeError, match=r"looks for a fixed point, and il.root needs a root"):
        il.root(lambda x, t: 0.5 * x - t, il.solvers.AndersonAcceleration())
