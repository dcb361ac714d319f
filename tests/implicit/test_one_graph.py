"""A plain backward does not run the function again, and its gradients are those of the composable rules."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error

import implicitlayer as il
from implicitlayer.equation._jacobian import OneGraph

Tensor = torch.Tensor


def positive(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).abs() + 0.5


ROUNDING = 1e-12  # sums of a few products; linear solves to 1e-14


def coupled(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return (torch.exp(x) - t * x).sum() + 0.5 * s * (x.roll(1, -1) * x).sum() + s * (x * x).sum()


def newton(f: Callable[..., Tensor], x: Tensor, *theta: Tensor) -> Tensor:
    return il.solvers.NewtonCG(rtol=1e-14)(f, x, *theta)


TIGHT = il.ConjugateGradient(rtol=1e-14)
LAYERS: dict[str, Any] = {
    "argmin": lambda: il.argmin(coupled, newton, linear_solver=TIGHT),
    "dense": lambda: il.argmin(coupled, newton, linear_solver=il.Dense()),
    "zero steps": lambda: il.argmin(coupled, newton, linear_solver=il.ConjugateGradient(max_steps=0)),
    "damped": lambda: il.argmin(coupled, newton, linear_solver=TIGHT, damping=0.1),
    "root": lambda: il.root(
        torch.func.grad(coupled), il.solvers.Newton(rtol=1e-14), linear_solver=il.Gmres(rtol=1e-14)
    ),
    "normal equations": lambda: il.root(
        torch.func.grad(coupled),
        il.solvers.Newton(rtol=1e-14),
        linear_solver=il.NormalEquations(il.ConjugateGradient(rtol=1e-14)),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_rules_that_can_be_differentiated(name: str) -> None:
    layer = LAYERS[name]()
    theta = [positive(4, seed=1).requires_grad_(), torch.tensor(0.3, dtype=F64, requires_grad=True)]
    value = (layer(torch.zeros(4, dtype=F64), *theta) ** 3).sum()
    plain = torch.autograd.grad(value, theta, retain_graph=True)
    composable = torch.autograd.grad(value, theta, create_graph=True)
    for got, want in zip(plain, composable, strict=True):
        assert relative_error(got, want.detach()) < ROUNDING


def test_gradients_of_a_vmapped_layer_are_those_of_a_loop() -> None:
    layer = LAYERS["argmin"]()
    t, s = positive(3, 4, seed=2).requires_grad_(), torch.tensor(0.3, dtype=F64, requires_grad=True)
    zeros = torch.zeros(4, dtype=F64)
    together = torch.autograd.grad((torch.vmap(lambda t: layer(zeros, t, s))(t) ** 3).sum(), (t, s))
    apart = torch.autograd.grad(sum((layer(zeros, lane, s) ** 3).sum() for lane in t), (t, s))
    for got, want in zip(together, apart, strict=True):
        assert relative_error(got, want) < ROUNDING


def test_a_call_runs_the_function_twice_and_its_backwards_never() -> None:
    runs = [0]

    def counted(x: Tensor, t: Tensor) -> Tensor:
        runs[0] += 1
        return (torch.exp(x) - t * x).sum()

    t = positive(3, seed=3).requires_grad_()
    x = il.argmin(counted, lambda f, x, t: torch.log(t))(torch.zeros(3, dtype=F64), t)
    assert runs[0] == 2  # once to see what it reads, once at the answer
    x.sum().backward(retain_graph=True)
    assert t.grad is not None
    assert relative_error(t.grad, 1 / t.detach()) < 1e-9  # the default rtol is 1e-10
    once = t.grad.clone()
    x.sum().backward()
    assert runs[0] == 2 and torch.equal(t.grad, 2 * once)


def test_a_call_under_hooks_on_saved_tensors_keeps_no_graph_of_its_function() -> None:
    runs, packed = [0], [0]

    def counted(x: Tensor, t: Tensor) -> Tensor:
        runs[0] += 1
        return (torch.exp(x) - t * x).sum()

    def pack(tensor: Tensor) -> Tensor:
        packed[0] += 1
        return tensor

    t = positive(3, seed=3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = il.argmin(counted, lambda f, x, t: torch.log(t))(torch.zeros(3, dtype=F64), t)
    assert packed[0] == 2  # x and t
    x.sum().backward()
    assert runs[0] == 3 and t.grad is not None and relative_error(t.grad, 1 / t.detach()) < 1e-9


def test_what_needs_no_gradient_gets_none_and_what_is_not_read_gets_zero() -> None:
    layer = il.argmin(lambda x, t, c, unread: ((x - t * c) ** 2).sum(), lambda f, x, t, c, unread: t * c)
    t, c, unread = randn(3, seed=4).requires_grad_(), randn(3, seed=5), randn(2, seed=6).requires_grad_()
    layer(torch.zeros(3, dtype=F64), t, c, unread).sum().backward()
    assert t.grad is not None and relative_error(t.grad, c) < 1e-9 and c.grad is None
    assert unread.grad is not None and not bool(unread.grad.any())


def test_a_zero_cotangent_makes_no_product_and_gives_zeros() -> None:
    t = positive(3, seed=7).requires_grad_()
    layer = il.argmin(lambda x, t: (torch.exp(x) - t * x).sum(), lambda f, x, t: torch.log(t))
    (gradient,) = torch.autograd.grad((0 * layer(torch.zeros(3, dtype=F64), t)).sum(), t)
    assert not bool(gradient.any()) and layer.records[-1].solution.num_steps == 0


def test_a_value_that_only_theta_gives_a_graph_is_an_error_in_backward_too() -> None:
    attached = [True]

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return ((x if attached[0] else x.detach()) * (x.detach() - t)).sum()

    t = randn(3, seed=8).requires_grad_()
    layer = il.argmin(objective, lambda f, x, t: t.clone(), stationarity_rtol=None)
    with torch.autograd.graph.save_on_cpu():  # backward runs the function again
        x = layer(torch.zeros(3, dtype=F64), t)
    attached[0] = False
    with pytest.raises(il.ObjectiveError, match="does not depend on x"):
        x.sum().backward()


def test_a_record_keeps_no_graph_alive() -> None:
    t = positive(3, seed=9).requires_grad_()
    layer = il.argmin(lambda x, t: (torch.exp(x) - t * x).sum(), lambda f, x, t: torch.log(t))
    with il.diagnostics() as records:
        layer(torch.zeros(3, dtype=F64), t).sum().backward()
    held = [cell.cell_contents for cell in records[-1].certificate.__closure__]  # type: ignore[union-attr]
    (family,) = [part for cell in held if isinstance(cell, partial) for part in cell.args if isinstance(part, OneGraph)]
    assert family.graph.held is None and float(records[-1].gradient_error) < 1e-8  # type: ignore[union-attr]
