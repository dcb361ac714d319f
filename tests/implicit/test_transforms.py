"""The layer under every transform of torch and their compositions."""

# Accuracy: solvers are exact (closed forms, dense Newton); the linear solves stop at rtol 1e-13 and the condition
# numbers are below 100, so first derivatives are good to 1e-10 and second to 1e-8, unless a comment says more.

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from references import F64, central_differences, newton, randn, relative_error, smooth_objective
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import implicitlayer as il

TIGHT = il.ConjugateGradient(rtol=1e-13)
ZEROS = torch.zeros(3, dtype=F64)


def smooth_theta() -> tuple[Tensor, ...]:
    return randn(5, 3, seed=1), randn(5, seed=2), torch.tensor(-0.3, dtype=F64)


def layer(*theta: Tensor) -> Tensor:
    return il.argmin(smooth_objective, newton, linear_solver=TIGHT, on_failure="ignore")(ZEROS, *theta)


def log_layer(t: Tensor) -> Tensor:
    """x = log t, entry by entry."""
    implicit = il.argmin(lambda x, t: (x.exp() - t * x).sum(), lambda f, x, t: t.log(), linear_solver=TIGHT)
    return implicit(torch.zeros_like(t), t)


def cube_root(a: Tensor, t: Tensor) -> Tensor:
    """x = (t / a)^(1/3): not linear in either theta."""
    implicit = il.argmin(
        lambda x, a, t: (a * x**4 / 4 - t * x).sum(), lambda f, x, a, t: (t / a) ** (1 / 3), linear_solver=TIGHT
    )
    return implicit(torch.ones_like(t), a, t)


def explicit_cube_root(a: Tensor, t: Tensor) -> Tensor:
    return (t / a) ** (1 / 3)


def positive(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).abs() + 0.5


def test_gradcheck_passes() -> None:
    theta = tuple(t.requires_grad_() for t in smooth_theta())
    assert torch.autograd.gradcheck(layer, theta, check_forward_ad=True, check_batched_grad=True)


def test_gradgradcheck_passes_in_reverse_and_forward_over_reverse() -> None:
    theta = tuple(t.requires_grad_() for t in smooth_theta())
    assert torch.autograd.gradgradcheck(layer, theta, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_jacrev_and_jacfwd_agree_with_the_closed_form() -> None:
    a, t = positive(4, seed=3), positive(4, seed=4)
    for argnums in (0, 1):
        expected = jacrev(explicit_cube_root, argnums)(a, t)
        assert relative_error(jacrev(cube_root, argnums)(a, t), expected) < 1e-10
        assert relative_error(jacfwd(cube_root, argnums)(a, t), expected) < 1e-10


def test_jvp_and_vjp_agree_with_the_closed_form() -> None:
    a, t, da, dt = (positive(4, seed=s) for s in range(3, 7))
    x, dx = jvp(cube_root, (a, t), (da, dt))
    expected_x, expected_dx = jvp(explicit_cube_root, (a, t), (da, dt))
    assert torch.equal(x, expected_x) and relative_error(dx, expected_dx) < 1e-10
    _, pull = vjp(cube_root, a, t)
    _, expected_pull = vjp(explicit_cube_root, a, t)
    for g, e in zip(pull(dt), expected_pull(dt), strict=True):
        assert relative_error(g, e) < 1e-10


def test_dual_numbers_carry_the_tangent() -> None:
    a, t, dt = (positive(4, seed=s) for s in (3, 4, 5))
    with torch.autograd.forward_ad.dual_level():
        x = cube_root(a, torch.autograd.forward_ad.make_dual(t, dt))
        tangent = torch.autograd.forward_ad.unpack_dual(x).tangent
    assert relative_error(tangent, jvp(lambda t: explicit_cube_root(a, t), (t,), (dt,))[1]) < 1e-10


@pytest.mark.parametrize("argnums", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("way", ["hessian", "jacrev of jacrev", "jacfwd of jacrev", "jacrev of jacfwd"])
def test_second_derivatives_agree_with_the_closed_form(way: str, argnums: tuple[int, int]) -> None:
    first, second = argnums

    def both(function: Callable[..., Tensor]) -> Any:
        def scalar(a: Tensor, t: Tensor) -> Tensor:
            return (function(a, t) ** 2).sum()  # the cotangent depends on x

        return {
            "hessian": hessian(scalar, argnums=(0, 1)),
            "jacrev of jacrev": jacrev(jacrev(function, first), second),
            "jacfwd of jacrev": jacfwd(jacrev(function, first), second),
            "jacrev of jacfwd": jacrev(jacfwd(function, first), second),
        }[way](positive(3, seed=3), positive(3, seed=4))

    got, expected = both(cube_root), both(explicit_cube_root)
    if way == "hessian":
        got, expected = got[first][second], expected[first][second]
    assert relative_error(got, expected) < 1e-8


def test_a_constant_cotangent_has_the_right_second_derivative() -> None:
    """With a constant cotangent the graph of the first gradient hangs on saved tensors alone."""
    t = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_layer(t).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), t)
    assert relative_error(second, -1 / t.detach() ** 2) < 1e-10


def test_the_second_derivative_matches_differences_of_the_first() -> None:
    weight, offset, strength = smooth_theta()
    v = randn(5, seed=5)

    def gradient(s: Tensor) -> Tensor:
        s, o = s.clone().requires_grad_(), offset.clone().requires_grad_()
        x = layer(weight, o, s)
        (g,) = torch.autograd.grad((x**2).sum(), o, create_graph=True)
        return g @ v

    s = strength.clone().requires_grad_()
    o = offset.clone().requires_grad_()
    (g,) = torch.autograd.grad((layer(weight, o, s) ** 2).sum(), o, create_graph=True)
    (second,) = torch.autograd.grad(g @ v, s)
    # the first gradient is good to 1e-13, so h = 3e-5: truncation 1e-9, rounding 3e-9
    expected = central_differences(lambda s: gradient(s).detach(), strength, 3e-5)
    assert relative_error(second, expected) < 1e-7


@pytest.mark.parametrize("order", [3, 4])
def test_higher_derivatives_of_the_logarithm(order: int) -> None:
    function: Callable[[Tensor], Tensor] = lambda t: log_layer(t).sum()  # noqa: E731
    for _ in range(order):
        function = grad(function)
    t = torch.tensor(1.7, dtype=F64)
    expected = {3: 2 / 1.7**3, 4: -6 / 1.7**4}[order]
    assert float(function(t)) == pytest.approx(expected, rel=1e-9)


def test_the_third_derivative_in_forward_over_reverse_over_reverse() -> None:
    t = torch.tensor(1.7, dtype=F64)
    assert float(jacfwd(grad(grad(lambda t: log_layer(t))))(t)) == pytest.approx(2 / 1.7**3, rel=1e-9)


def test_forward_over_forward_is_refused_and_not_zero() -> None:
    t = torch.tensor(1.7, dtype=F64)
    square = partial(il.linear_solve, lambda u, t: t**2 * u)
    for function in (
        jacfwd(jacfwd(log_layer)),
        lambda t: jvp(lambda t: jvp(log_layer, (t,), (t,))[1], (t,), (t,))[1],
        jacfwd(jacfwd(lambda t: square(t, None, t))),
        jacfwd(jacfwd(lambda t: il.linear_solve((t**2).reshape(1, 1), t.reshape(1)))),
    ):
        with pytest.raises(il.UnsupportedTransformError, match=r"jvp of jvp, jacfwd of jacfwd.*torch.func.hessian"):
            function(t)


def test_a_truncated_solve_is_differentiated_as_the_system_it_truncates() -> None:
    """Second order goes through the linear system, not through the steps: the result is that of solves with 3 steps."""
    truncated = il.argmin(
        lambda x, t: (x.exp() - t * x).sum(), lambda f, x, t: t.log(), linear_solver=il.ConjugateGradient(max_steps=3)
    )
    t = positive(3, seed=6).requires_grad_()
    (first,) = torch.autograd.grad(truncated(torch.zeros(3, dtype=F64), t).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t)
    # three distinct eigenvalues: three steps are exact, and so are the derivatives of the system
    assert relative_error(second, -1 / t.detach() ** 2) < 1e-10


# --------------------------------------------------------------------------------------------------------------- vmap


def loop(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    return torch.stack([function(*lane) for lane in zip(*batches, strict=True)])


@pytest.mark.parametrize(
    "solver",
    [newton, il.solvers.GradientDescent(step_size=0.1, max_steps=3000, rtol=1e-13)],
    ids=["lane by lane", "batched"],
)
@pytest.mark.parametrize("in_dims", [(0, 0, 0), (None, 0, None), (0, None, 0), (1, 1, None)])
def test_vmap_over_any_subset_of_theta_equals_the_loop(in_dims: tuple[int | None, ...], solver: Any) -> None:
    def run(*theta: Tensor) -> Tensor:
        return il.argmin(smooth_objective, solver, linear_solver=TIGHT, on_failure="ignore")(ZEROS, *theta)

    lanes = [
        torch.stack([t + 0.1 * i for i in range(4)], dim) if dim is not None else t
        for t, dim in zip(smooth_theta(), in_dims, strict=True)
    ]
    singles = [
        [t if dim is None else t.select(dim, i) for t, dim in zip(lanes, in_dims, strict=True)] for i in range(4)
    ]
    got = vmap(run, in_dims=in_dims)(*lanes)
    expected = torch.stack([run(*single) for single in singles])
    assert relative_error(got, expected) < 1e-11  # gradient 1e-13 of the first over a curvature of 0.7
    v = randn(3, seed=7)
    gradients = vmap(grad(lambda *t: v @ run(*t), argnums=(0, 1, 2)), in_dims=in_dims)(*lanes)
    for i, single in enumerate(singles):
        for g, e in zip(gradients, grad(lambda *t: v @ run(*t), argnums=(0, 1, 2))(*single), strict=True):
            assert relative_error(g[i], e) < 1e-9


def test_vmap_over_init_alone_gives_each_lane_the_solution() -> None:
    t = positive(3, seed=8)
    run = il.argmin(lambda x, t: (x.exp() - t * x).sum(), lambda f, x, t: t.log() + 0 * x)
    got = vmap(lambda init: run(init, t))(randn(4, 3, seed=9))
    assert torch.equal(got, t.log().expand(4, 3))
    gradient = grad(lambda t: vmap(lambda init: run(init, t))(randn(4, 3, seed=9)).sum())(t)
    assert relative_error(gradient, 4 / t) < 1e-9  # a theta shared by four lanes gets the sum


def test_nested_vmap_equals_nested_loops() -> None:
    a, t = positive(2, 3, seed=10), positive(4, 3, seed=11)
    got = vmap(lambda a: vmap(lambda t: cube_root(a, t))(t))(a)
    assert got.shape == (2, 4, 3) and relative_error(got, explicit_cube_root(a[:, None], t)) < 1e-14
    inner = vmap(vmap(grad(lambda a, t: cube_root(a, t).sum(), argnums=(0, 1)), (None, 0)), (0, None))(a, t)
    expected = vmap(vmap(grad(lambda a, t: explicit_cube_root(a, t).sum(), argnums=(0, 1)), (None, 0)), (0, None))(a, t)
    for g, e in zip(inner, expected, strict=True):
        assert relative_error(g, e) < 1e-10


def compositions(function: Callable[..., Tensor]) -> dict[str, Callable[..., Any]]:
    def scalar(a: Tensor, t: Tensor) -> Tensor:
        return (function(a, t) ** 2).sum()

    return {
        "vmap(grad)": vmap(grad(scalar)),
        "grad(vmap)": grad(lambda a, t: vmap(scalar)(a, t).sum()),
        "vmap(hessian)": vmap(hessian(scalar, argnums=1)),
        "hessian(vmap)": hessian(lambda a, t: vmap(scalar)(a, t).sum()),
        "vmap(jacrev)": vmap(jacrev(function, argnums=1)),
        "vmap(jacfwd)": vmap(jacfwd(function)),
        "jacrev(vmap)": jacrev(vmap(function), argnums=1),
        "jacfwd(vmap)": jacfwd(vmap(function)),
        "vmap(jvp)": vmap(lambda a, t: jvp(function, (a, t), (t, a))[1]),
        "jvp(vmap)": lambda a, t: jvp(vmap(function), (a, t), (t, a))[1],
        "vmap(grad(grad))": vmap(grad(lambda a, t: grad(scalar)(a, t).sum(), argnums=1)),
        "grad(vmap(grad))": grad(lambda a, t: (vmap(grad(scalar))(a, t) ** 2).sum(), argnums=1),
        "jacfwd(vmap(grad))": jacfwd(vmap(grad(scalar)), argnums=1),
        "vmap(jacfwd(grad)) shared": vmap(jacfwd(grad(scalar), argnums=1), in_dims=(None, 0)),
        "grad(vmap) shared": grad(lambda a, t: vmap(scalar, in_dims=(None, 0))(a, t).sum()),
        "vmap(vjp)": vmap(lambda a, t: vjp(function, a, t)[1](a + t)),
    }


@pytest.mark.parametrize("name", compositions(cube_root))
def test_compositions_agree_with_the_closed_form(name: str) -> None:
    a, t = positive(4, 3, seed=12), positive(4, 3, seed=13)
    a = a[0] if name.endswith("shared") else a
    got, expected = compositions(cube_root)[name](a, t), compositions(explicit_cube_root)[name](a, t)
    got, expected = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape and relative_error(g, e) < 1e-8


def test_double_backward_through_vmap_matches_the_loop() -> None:
    a, t = positive(4, 3, seed=12).requires_grad_(), positive(4, 3, seed=13).requires_grad_()

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(vmap(function)(a, t).sum(), a, create_graph=True)
        return torch.autograd.grad((g**2).sum(), (a, t))

    for g, e in zip(second(cube_root), second(explicit_cube_root), strict=True):
        assert relative_error(g, e) < 1e-8


def test_batch_dims_compose_with_vmap_and_second_order() -> None:
    def batched(a: Tensor, t: Tensor) -> Tensor:
        implicit = il.argmin(
            lambda x, a, t: (a * x**4 / 4 - t * x).sum(-1),
            lambda f, x, a, t: (t / a) ** (1 / 3),
            linear_solver=TIGHT,
            batch_dims=1,
        )
        return implicit(torch.ones_like(t), a, t)

    a, t = positive(2, 4, 3, seed=14), positive(2, 4, 3, seed=15)
    for name in ("vmap(grad)", "vmap(hessian)", "grad(vmap)", "vmap(jacfwd)", "jvp(vmap)"):
        got, expected = compositions(batched)[name](a, t), compositions(explicit_cube_root)[name](a, t)
        assert relative_error(got, expected) < 1e-8


def test_the_batched_gradients_of_autograd_work() -> None:
    t = positive(3, seed=16).requires_grad_()
    (rows,) = torch.autograd.grad(log_layer(t), t, torch.eye(3, dtype=F64), is_grads_batched=True)
    assert relative_error(rows, torch.diag(1 / t.detach())) < 1e-10


def test_functional_jacobian_and_hessian_of_autograd_work() -> None:
    t = positive(3, seed=17)
    got = torch.autograd.functional.hessian(lambda t: log_layer(t).sum(), t, vectorize=True)
    assert relative_error(got, torch.diag(-1 / t**2)) < 1e-8
    assert relative_error(torch.autograd.functional.jacobian(log_layer, t), torch.diag(1 / t)) < 1e-10


def test_an_integer_theta_passes_through_vmap() -> None:
    index, t = torch.tensor([0, 2, 1]), positive(3, 3, seed=18)

    def run(t: Tensor, i: Tensor) -> Tensor:
        def picked(t: Tensor, i: Tensor) -> Tensor:
            return t.index_select(0, i.reshape(1)).sum() ** 2

        implicit = il.argmin(lambda x, t, i: 0.5 * (x - picked(t, i)) ** 2, lambda f, x, t, i: picked(t, i))
        return implicit(torch.zeros((), dtype=F64), t, i)

    got = vmap(grad(run))(t, index)
    expected = torch.zeros(3, 3, dtype=F64)
    for lane, i in enumerate(index.tolist()):
        expected[lane, i] = 2 * t[lane, i]
    assert relative_error(got, expected) < 1e-12
