"""Layers within layers: a solution in the objective of another layer, and chains of solutions."""

# Accuracy as in test_transforms.py: closed forms, linear solves at rtol 1e-13.

from collections.abc import Callable

import pytest
import torch
from references import F64, central_differences, newton, relative_error
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

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
