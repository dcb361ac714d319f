"""Layers within layers: a solution in the objective of another layer, and chains of solutions."""

# Accuracy as in test_transforms.py: closed forms, linear solves at rtol 1e-13.

from collections.abc import Callable

import numpy as np
import pytest
import torch
from references import F64, central_differences, newton, relative_error
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import implicitlayer as il

TIGHT = il.ConjugateGradient(rtol=1e-13)


def inner_solution(y: Tensor, t: Tensor) -> Tensor:
    """argmin_x of exp(x) - (y^2 + t) x: x = log(y^2 + t)."""
    inner = il.argmin(
        lambda x, y, t: (x.exp() - (y**2 + t) * x).sum(), lambda f, x, y, t: (y**2 + t).log(), linear_solver=TIGHT
    )
    return inner(torch.zeros_like(y), y, t)


def bilevel(t: Tensor, inner: Callable[[Tensor, Tensor], Tensor] = inner_solution) -> Tensor:
    """argmin_y of 1/2 inner(y, t)^2 + (y - t)^2: the objective of one layer holds another."""
    outer = il.argmin(
        lambda y, t: 0.5 * (inner(y, t) ** 2).sum() + ((y - t) ** 2).sum(),
        newton,
        linear_solver=TIGHT,
        on_failure="ignore",
    )
    return outer(torch.ones(2, dtype=F64), t)


def bilevel_explicit(t: Tensor) -> Tensor:
    return bilevel(t, lambda y, t: (y**2 + t).log())


def bilevel_closing(t: Tensor) -> Tensor:
    """The inner layer reads t from the closure of the outer objective."""
    outer = il.argmin(
        lambda y: 0.5 * (inner_solution(y, t) ** 2).sum() + ((y - t) ** 2).sum(),
        newton,
        linear_solver=TIGHT,
        on_failure="ignore",
    )
    return outer(torch.ones(2, dtype=F64))


@pytest.mark.parametrize("layer", [bilevel, bilevel_closing])
def test_a_layer_within_the_objective_of_a_layer_is_differentiated(layer: Callable[[Tensor], Tensor]) -> None:
    t = torch.tensor([0.7, 1.5], dtype=F64)
    assert relative_error(layer(t), bilevel_explicit(t)) < 1e-12
    expected = torch.diag(
        central_differences(lambda t: bilevel_explicit(t).sum(), t, 1e-5)  # entries are independent; error about 1e-10
    )
    assert relative_error(jacrev(bilevel_explicit)(t), expected) < 1e-8
    assert relative_error(jacrev(layer)(t), expected) < 1e-8
    leaf = t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    assert relative_error(gradient, expected.diagonal()) < 1e-8


@pytest.mark.parametrize("layer", [bilevel, bilevel_closing])
def test_a_layer_within_the_objective_of_a_layer_has_lanes(layer: Callable[[Tensor], Tensor]) -> None:
    t = torch.tensor([[0.7, 1.5], [1.1, 0.9]], dtype=F64)
    assert relative_error(vmap(layer)(t), torch.stack([layer(row) for row in t])) < 1e-12
    gradients = vmap(grad(lambda t: layer(t).sum()))(t)
    expected = torch.stack([grad(lambda t: layer(t).sum())(row) for row in t])
    assert relative_error(gradients, expected) < 1e-8


def test_a_solution_fed_to_another_layer_composes_to_second_order() -> None:
    def chain(t: Tensor) -> Tensor:
        return inner_solution(inner_solution(t, t), 1 + t)

    def direct(t: Tensor) -> Tensor:
        return ((t**2 + t).log() ** 2 + 1 + t).log()

    t = torch.tensor([0.7, 1.5], dtype=F64)
    assert relative_error(hessian(lambda t: chain(t).sum())(t), hessian(lambda t: direct(t).sum())(t)) < 1e-8
    assert relative_error(jacrev(jacrev(chain))(t), jacrev(jacrev(direct))(t)) < 1e-8


# Every kind of layer as z(x, t) inside the objective of another one; some solve in NumPy or read Python numbers.
WEIGHTS = torch.tensor([2.0, 3.0], dtype=F64)


def by_scipy(f: Callable[..., Tensor], init: Tensor, *theta: Tensor) -> Tensor:
    """Newton's method in NumPy for sum of w z^2 / 2 + z^4 / 4 - z y, to the last digit."""
    y = np.asarray((theta[0] * theta[1]).numpy())
    z = np.zeros_like(y)
    for _ in range(50):
        z = z - (WEIGHTS.numpy() * z + z**3 - y) / (WEIGHTS.numpy() + 3 * z**2)
    return torch.from_numpy(z)


def quartic(z: Tensor, x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * (WEIGHTS * z**2).sum() + 0.25 * (z**4).sum() - (z * x * t).sum()


INSIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "argmin": lambda x, t: il.argmin(quartic, by_scipy, linear_solver=TIGHT)(torch.zeros(2, dtype=F64), x, t),
    "root": lambda x, t: il.root(grad(quartic), by_scipy)(torch.zeros(2, dtype=F64), x, t),
    "set": lambda x, t: il.argmin(
        quartic, lambda *a: by_scipy(*a).clamp(max=0.4), constraint=il.sets.Box(-5.0, 0.4), step_size=0.2
    )(torch.zeros(2, dtype=F64), x, t),
    "constrained_argmin": lambda x, t: il.constrained_argmin(
        lambda z, x, t: 0.5 * ((z - x * t) ** 2).sum(),
        lambda problem, init, x, t: x * t - ((x * t).sum() - 1) / 2,
        equality=lambda z, x, t: z.sum() - 1,
    )(torch.zeros(2, dtype=F64), x, t),
    "qp": lambda x, t: il.qp(WEIGHTS.diag(), -x * t, G=torch.eye(2, dtype=F64), h=torch.full((2,), 0.3, dtype=F64)),
}


def around(inside: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def objective(x: Tensor, t: Tensor) -> Tensor:
        z = inside(x, t)
        return 2 * ((x - t) ** 2).sum() + 0.3 * (z * z).sum() + 0.2 * (z * t).sum()

    return lambda t: il.argmin(objective, newton, linear_solver=TIGHT)(torch.ones(2, dtype=F64), t)


@pytest.mark.parametrize("kind", INSIDE)
def test_a_layer_around_any_other_agrees_with_finite_differences_under_every_transform(kind: str) -> None:
    outer, at, v = around(INSIDE[kind]), torch.tensor([0.9, 1.4], dtype=F64), torch.tensor([1.0, -0.5], dtype=F64)
    # newton and the inner solvers are exact to 1e-15: truncation 1e-10, rounding 1e-15 / 1e-5 = 1e-10
    with torch.no_grad():
        rows = [central_differences(lambda t, i=i: outer(t)[i], at, 1e-5) for i in range(2)]
    expected = torch.stack(rows)
    leaf = at.clone().requires_grad_()
    assert relative_error(torch.autograd.grad(outer(leaf) @ v, leaf)[0], v @ expected) < 1e-8
    forward = torch.stack([jvp(outer, (at,), (e,))[1] for e in torch.eye(2, dtype=F64)], -1)
    for jacobian in (
        jacrev(outer)(at),
        forward,
        jacfwd(outer)(at),
        vmap(jacrev(outer))(torch.stack([0.9 * at, at]))[1],
    ):
        assert relative_error(jacobian, expected) < 1e-8
    loss = lambda t: (outer(t) ** 3).sum()  # noqa: E731
    second = torch.stack([central_differences(lambda t, i=i: grad(loss)(t)[i].detach(), at, 1e-5) for i in range(2)])
    assert relative_error(hessian(loss)(at), second) < 1e-6  # the solves at 1e-13, over a step of 1e-5, of 0.1


def test_a_solver_without_gradients_may_evaluate_a_layer_within_the_objective() -> None:
    w = torch.tensor([0.7, 1.2], dtype=F64, requires_grad=True)  # closed over by both layers

    def objective(x: Tensor) -> Tensor:
        z = il.argmin(lambda z: ((z - w * x) ** 2).sum(), lambda f, z: (w * x).detach())(torch.zeros_like(x))
        return ((x - w) ** 2).sum() + (z**2).sum()

    def solver(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The minimum of a separable quadratic, by three values along each axis."""
        with torch.no_grad():
            e = torch.eye(2, dtype=F64)
            up, at, down = (torch.stack([f(s * d) for d in e]) for s in (1.0, 0.0, -1.0))
        return (down - up) / (2 * (up - 2 * at + down))

    x = il.argmin(objective, solver, linear_solver=TIGHT)(torch.zeros(2, dtype=F64))
    assert relative_error(x.detach(), (w / (1 + w**2)).detach()) < 1e-14
    (gradient,) = torch.autograd.grad(x.sum(), w)  # x = w / (1 + w^2)
    assert relative_error(gradient, ((1 - w**2) / (1 + w**2) ** 2).detach()) < 1e-12


def test_the_solver_of_a_layer_within_an_objective_may_take_numbers_of_theta() -> None:
    """They enter the answer and no graph: the implicit rule differentiates, whatever the solver does."""

    def inner(x: Tensor, t: Tensor) -> Tensor:
        solver = lambda f, z, x, t: torch.tensor((x * t).tolist(), dtype=F64)  # noqa: E731
        return il.argmin(lambda z, x, t: ((z - x * t) ** 2).sum(), solver)(torch.zeros(2, dtype=F64), x, t)

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return ((x - t) ** 2).sum() + (inner(x, t) ** 2).sum()

    t = torch.tensor([0.7, 1.2], dtype=F64, requires_grad=True)
    x = il.argmin(objective, lambda f, x, t: t / (1 + t**2), linear_solver=TIGHT)(torch.zeros(2, dtype=F64), t)
    (gradient,) = torch.autograd.grad(x.sum(), t)
    assert relative_error(gradient, ((1 - t**2) / (1 + t**2) ** 2).detach()) < 1e-12
