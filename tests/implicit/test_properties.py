"""Properties that every implicit gradient has, on random smooth strongly convex problems in float64."""

# Hypothesis draws small integers only (sizes, seeds, exponents), so that a failure shrinks to a small problem.
# Accuracy: the inner solver is dense Newton, exact to about 1e-15; conjugate gradients stop at rtol 1e-10 (1e-12 where
# asked for), which the condition number of these problems (below 1e4: strength >= e^-2, n and m <= 6) can amplify.

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from references import (
    F64,
    central_differences,
    dense_gradients,
    newton,
    orthogonal,
    randn,
    relative_error,
    smooth_objective,
    spd_matrix,
)
from torch import Tensor

import implicitlayer as il

sizes = st.integers(1, 6)
seeds = st.integers(0, 10_000)
exponents = st.integers(-2, 2)
TIGHT = il.ConjugateGradient(rtol=1e-13)


def problem(n: int, seed: int, exponent: int) -> list[Tensor]:
    m = 1 + (seed % 7)
    strength = torch.tensor(float(exponent), dtype=F64)
    return [t.requires_grad_() for t in (randn(m, n, seed=seed), randn(m, seed=seed + 1), strength)]


def layer(objective: Callable[..., Tensor] = smooth_objective) -> Callable[..., Tensor]:
    return il.argmin(objective, newton, linear_solver=TIGHT, on_failure="ignore")


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=F64)


def scale_of(tensors: list[Tensor]) -> float:
    return 1e-30 + sum(float(t.detach().norm()) for t in tensors)


def assert_close(got: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    """Each gradient against the size of all: one of them may vanish by chance."""
    for g, e in zip(got, expected, strict=True):
        assert float((g - e).detach().norm()) <= rtol * scale_of(list(expected))


@given(n=sizes, seed=seeds, exponent=exponents)
def test_gradients_match_the_dense_implicit_gradient(n: int, seed: int, exponent: int) -> None:
    theta, v = problem(n, seed, exponent), randn(n, seed=seed + 2)
    x = layer()(zeros(n), *theta)
    got = list(torch.autograd.grad(x, theta, v))
    assert_close(got, dense_gradients(smooth_objective, x.detach(), theta, v), 1e-9)


@given(n=sizes, seed=seeds, exponent=exponents)
def test_gradients_match_central_differences_of_the_solution(n: int, seed: int, exponent: int) -> None:
    theta, v = problem(n, seed, exponent), randn(n, seed=seed + 2)
    got = list(torch.autograd.grad(layer()(zeros(n), *theta), theta, v))
    fixed = [t.detach() for t in theta]
    expected = []
    for i in range(3):

        def response(t: Tensor, i: int = i) -> Tensor:
            return v @ newton(smooth_objective, zeros(n), *fixed[:i], t, *fixed[i + 1 :])

        # Newton is exact to about 1e-14 here, so h = e^(1/3) = 3e-5: truncation h^2 = 1e-9, rounding e / h = 3e-10,
        # both times third derivatives of the solution map (up to 1e3 where the strength is e^-2)
        expected.append(central_differences(response, fixed[i], 3e-5))
    assert_close(got, expected, 1e-6)


@given(n=sizes, seed=seeds, exponent=exponents)
def test_forward_and_reverse_mode_are_adjoint(n: int, seed: int, exponent: int) -> None:
    theta, u = problem(n, seed, exponent), randn(n, seed=seed + 2)
    tangents = tuple(randn(*t.shape, seed=seed + 3 + i) for i, t in enumerate(theta))
    x = layer()(zeros(n), *theta)
    pulled = torch.autograd.grad(x, theta, u)
    primals = tuple(t.detach() for t in theta)
    _, pushed = torch.func.jvp(lambda *t: layer()(zeros(n), *t), primals, tangents)
    left = float(u @ pushed)
    right = sum(float((p * t).sum()) for p, t in zip(pulled, tangents, strict=True))
    # both solves are good to 1e-13 * condition < 1e-9 of |u| |J t|
    assert abs(left - right) <= 1e-9 * float(u.norm() * pushed.norm()) + 1e-12


@given(n=sizes, seed=seeds, exponent=exponents, factor=st.integers(-9, 9))
def test_gradients_are_linear_in_the_cotangent(n: int, seed: int, exponent: int, factor: int) -> None:
    theta = problem(n, seed, exponent)
    first, second = randn(n, seed=seed + 2), randn(n, seed=seed + 3) * 10.0**factor
    x = layer()(zeros(n), *theta)

    def pull(v: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(x, theta, v, retain_graph=True))

    together, apart = pull(3 * first - second), [3 * a - b for a, b in zip(pull(first), pull(second), strict=True)]
    size = 3 * scale_of(pull(first)) + scale_of(pull(second))
    for t, a in zip(together, apart, strict=True):
        assert float((t - a).norm()) <= 1e-9 * size


@given(n=sizes, seed=seeds, factor=st.integers(-12, 12), shift=st.integers(-3, 3))
def test_scaling_and_shifting_the_objective_leaves_the_gradient(n: int, seed: int, factor: int, shift: int) -> None:
    theta, v = problem(n, seed, 0), randn(n, seed=seed + 2)
    x = newton(smooth_objective, zeros(n), *(t.detach() for t in theta))

    def gradients(objective: Callable[..., Tensor]) -> list[Tensor]:
        implicit = il.argmin(objective, lambda f, init, *t: x, linear_solver=TIGHT)
        return list(torch.autograd.grad(implicit(zeros(n), *theta), theta, v))

    changed = gradients(lambda x, *t: 10.0**factor * smooth_objective(x, *t) + 10.0**shift)
    assert_close(changed, gradients(smooth_objective), 1e-9)


@given(n=sizes, seed=seeds, exponent=exponents)
def test_rotating_the_unknowns_rotates_the_solution_and_nothing_else(n: int, seed: int, exponent: int) -> None:
    theta, v, q = problem(n, seed, exponent), randn(n, seed=seed + 2), orthogonal(n, seed + 3)
    plain = torch.autograd.grad(layer()(zeros(n), *theta), theta, v)
    rotated = layer(lambda y, *t: smooth_objective(q.T @ y, *t))  # y = Q x
    y = rotated(zeros(n), *theta)
    assert_close(list(torch.autograd.grad(y, theta, q @ v)), list(plain), 1e-9)


@given(n=sizes, seed=seeds, exponent=exponents)
def test_an_objective_of_the_difference_has_the_identity_as_jacobian(n: int, seed: int, exponent: int) -> None:
    matrix = 10.0**exponent * spd_matrix(n, 2, seed)
    theta = randn(n, seed=seed + 2).requires_grad_()

    def objective(x: Tensor, theta: Tensor) -> Tensor:
        d = x - theta
        return 0.5 * d @ matrix @ d + (d**4).sum()

    difference = il.argmin(objective, lambda f, x, t: t.clone(), linear_solver=TIGHT)
    jacobian = torch.func.jacrev(lambda t: difference(zeros(n), t))(theta.detach())
    assert torch.allclose(jacobian, torch.eye(n, dtype=F64), rtol=0, atol=1e-10)  # rtol 1e-13, condition 100
    v = randn(n, seed=seed + 3)
    (gradient,) = torch.autograd.grad(difference(zeros(n), theta), theta, v)
    assert relative_error(gradient, v) < 1e-10


@given(n=sizes, seed=seeds, lanes=st.integers(1, 4))
def test_a_batch_equals_its_loop(n: int, seed: int, lanes: int) -> None:
    """Strengths from e^-2 to e^2 in one batch; the weight is shared."""
    weight, offset, _ = problem(n, seed, 0)
    offsets = torch.stack([offset.detach() * (i + 1) for i in range(lanes)]).requires_grad_()
    strengths = torch.linspace(-2, 2, lanes, dtype=F64).requires_grad_()
    v = randn(lanes, n, seed=seed + 2)
    batch = torch.func.vmap(lambda o, s: layer()(zeros(n), weight, o, s))(offsets, strengths)
    loop = torch.stack([layer()(zeros(n), weight, o, s) for o, s in zip(offsets, strengths, strict=True)])
    assert torch.equal(batch, loop)  # the solver is called lane by lane
    theta = [weight, offsets, strengths]
    assert_close(list(torch.autograd.grad(batch, theta, v)), list(torch.autograd.grad(loop, theta, v)), 1e-9)


@given(n=sizes, seed=seeds, exponent=exponents)
def test_repeats_are_bitwise_equal(n: int, seed: int, exponent: int) -> None:
    theta, v = problem(n, seed, exponent), randn(n, seed=seed + 2)

    def run() -> tuple[Tensor, ...]:
        x = layer()(zeros(n), *theta)
        return (x, *torch.autograd.grad(x, theta, v, retain_graph=True), *torch.autograd.grad(x, theta, v))

    first, second = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first[1:4], first[4:], strict=True))


@given(n=sizes, seed=seeds, exponent=exponents)
def test_the_solution_of_the_linear_system_leaves_a_small_residual_when_recomputed(
    n: int, seed: int, exponent: int
) -> None:
    """theta_bar of the offset is -W' diag(softplus'') u up to the sign: u itself comes out where f = g(x) - <x, t>."""
    weight, offset, strength = (t.detach() for t in problem(n, seed, exponent))
    t, v = randn(n, seed=seed + 3).requires_grad_(), randn(n, seed=seed + 2)

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return smooth_objective(x, weight, offset, strength) - (x * t).sum()

    x = il.argmin(objective, newton)(zeros(n), t)
    (u,) = torch.autograd.grad(x, t, v)  # H^-1 v, since d^2 f / dt dx = -I
    rows = weight * torch.sigmoid(weight @ x.detach() + offset)[:, None]
    hessian = weight.T @ (rows * torch.sigmoid(-(weight @ x.detach() + offset))[:, None])
    residual = hessian @ u + strength.exp() * u - v
    assert float(residual.norm()) <= 2e-10 * float(v.norm())  # the default rtol, and twice that by contract of the test
