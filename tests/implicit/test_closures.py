"""Tensors and modules that the objective closes over: differentiated, or refused by name, never lost."""

# Accuracy as in test_transforms.py: closed forms, linear solves at rtol 1e-13 (default 1e-10 where not asked for).

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, central_differences, newton, randn, relative_error
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import implicitlayer as il

TIGHT = il.ConjugateGradient(rtol=1e-13)


def positive(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).abs() + 0.5


def closing_layer(a: Tensor, t: Tensor) -> Tensor:
    """x = (t / a)^(1/3) where ``a`` comes through the closure."""
    implicit = il.argmin(
        lambda x, t: (a * x**4 / 4 - t * x).sum(), lambda f, x, t: (t / a.detach()) ** (1 / 3), linear_solver=TIGHT
    )
    return implicit(torch.ones_like(t), t)


def all_closed(a: Tensor, t: Tensor) -> Tensor:
    """The same with nothing passed: both are closed over, and so is a number made from them."""
    b = a * 2
    implicit = il.argmin(
        lambda x: (b * x**4 / 8 - t * x).sum(),
        il.solvers.GradientDescent(0.1, max_steps=3000, rtol=1e-14),
        linear_solver=TIGHT,
    )
    return implicit(torch.ones(t.shape[-1:], dtype=F64))


def explicit(a: Tensor, t: Tensor) -> Tensor:
    return (t / a) ** (1 / 3)


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, t: (function(a, t) ** 2).sum()


def newton_on_closure(a: Tensor, t: Tensor) -> Tensor:
    """A black-box solver that only has the objective: closed-over values must be right inside it, lane by lane."""
    implicit = il.argmin(lambda x: (a * x**4 / 4 - t * x).sum(), newton, linear_solver=TIGHT, on_failure="ignore")
    return implicit(torch.ones(t.shape[-1:], dtype=F64))


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "grad": lambda f: grad(scalar(f), argnums=(0, 1)),
    "jacrev": lambda f: jacrev(f, argnums=(0, 1)),
    "jacfwd": lambda f: jacfwd(f, argnums=(0, 1)),
    "hessian": lambda f: hessian(scalar(f), argnums=(0, 1)),
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "jvp": lambda f: lambda a, t: jvp(f, (a, t), (t, a)),
}
BATCHED: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "vmap": vmap,
    "vmap(grad)": lambda f: vmap(grad(scalar(f), argnums=(0, 1))),
    "vmap(hessian)": lambda f: vmap(hessian(scalar(f))),
    "vmap(jacfwd)": lambda f: vmap(jacfwd(f)),
    "grad(vmap)": lambda f: grad(lambda a, t: vmap(scalar(f))(a, t).sum(), argnums=(0, 1)),
    "jvp(vmap)": lambda f: lambda a, t: jvp(vmap(f), (a, t), (t, a)),
    "grad(vmap(grad))": lambda f: grad(lambda a, t: (vmap(grad(scalar(f)))(a, t) ** 2).sum(), argnums=1),
}
LAYERS = {"a closed over": closing_layer, "everything closed over": all_closed, "black box": newton_on_closure}


def compare(got: Any, expected: Any) -> None:
    got, expected = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape and relative_error(g, e) < 1e-8  # second order at rtol 1e-13, condition below 20


@pytest.mark.parametrize("layer", ["everything closed over", "black box"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_closed_over_tensors_have_the_closed_form_derivatives(transform: str, layer: str) -> None:
    a, t = positive(3, seed=1), positive(3, seed=2)
    compare(TRANSFORMS[transform](LAYERS[layer])(a, t), TRANSFORMS[transform](explicit)(a, t))


@pytest.mark.parametrize("layer", ["everything closed over", "black box"])
@pytest.mark.parametrize("transform", BATCHED)
def test_closed_over_tensors_have_lanes(transform: str, layer: str) -> None:
    a, t = positive(4, 3, seed=3), positive(4, 3, seed=4)
    compare(BATCHED[transform](LAYERS[layer])(a, t), BATCHED[transform](explicit)(a, t))


def test_a_closed_over_leaf_gets_its_gradient_beside_an_explicit_theta() -> None:
    a, t = positive(3, seed=1).requires_grad_(), positive(3, seed=2).requires_grad_()
    closing_layer(a, t).sum().backward()
    assert a.grad is not None and t.grad is not None
    expected = torch.autograd.grad(explicit(a, t).sum(), (a, t))
    compare([a.grad, t.grad], list(expected))


def test_the_same_tensor_closed_over_and_passed_gets_the_sum() -> None:
    t = positive(3, seed=2).requires_grad_()
    layer = il.argmin(lambda x, s: (t * x**4 / 4 - s**2 * x).sum(), lambda f, x, s: s ** (1 / 3), linear_solver=TIGHT)
    (gradient,) = torch.autograd.grad(layer(torch.ones(3, dtype=F64), t).sum(), t)  # x = (t^2 / t)^(1/3)
    assert relative_error(gradient, t.detach() ** (-2 / 3) / 3) < 1e-10


def test_a_closed_over_non_leaf_passes_its_gradient_on() -> None:
    leaf = positive(3, seed=1).requires_grad_()
    a = leaf.exp()
    x = closing_layer(a, torch.ones(3, dtype=F64))  # exp(-leaf / 3)
    (gradient,) = torch.autograd.grad(x.sum(), leaf)
    assert relative_error(gradient, -x.detach() / 3) < 1e-10


def test_views_slices_and_containers_of_closed_over_tensors_are_found() -> None:
    w = positive(2, 3, seed=5).requires_grad_()
    box = {"parts": [w.T, (w,)]}

    def objective(x: Tensor) -> Tensor:
        rows = torch.cat([w[0], box["parts"][1][0][1]])
        return 0.5 * ((x - rows) ** 2).sum() + 0.5 * ((x.reshape(3, 2) - box["parts"][0] ** 2) ** 2).sum()

    def solution(w: Tensor) -> Tensor:
        return 0.5 * (torch.cat([w[0], w[1]]) + (w.T**2).reshape(-1))

    x = il.argmin(objective, lambda f, x: solution(w))(torch.zeros(6, dtype=F64))
    v = randn(6, seed=6)
    compare(torch.autograd.grad(x, w, v), torch.autograd.grad(solution(w), w, v))


# ------------------------------------------------------------------------------------------------------------ modules


def module_objective(net: torch.nn.Module) -> Callable[..., Tensor]:
    return lambda x, data: torch.nn.functional.softplus(net(data * x)).sum() + 0.5 * (x**2).sum()


def make_net() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()


def test_module_weights_have_the_gradient_of_finite_differences() -> None:
    net, data, v = make_net(), randn(5, 3, seed=7), randn(3, seed=8)
    x = il.argmin(module_objective(net), newton)(torch.zeros(3, dtype=F64), data)
    (x @ v).backward()
    for name, parameter in net.named_parameters():

        def response(value: Tensor, name: str = name) -> Tensor:
            substituted = {**{k: p.detach() for k, p in net.named_parameters()}, name: value}
            objective = lambda x, data: (  # noqa: E731
                torch.nn.functional.softplus(functional_call(net, substituted, (data * x,))).sum() + 0.5 * (x**2).sum()
            )
            return newton(objective, torch.zeros(3, dtype=F64), data) @ v

        # Newton is exact to 1e-15; h = 1e-5: truncation 1e-10, rounding 1e-10
        expected = central_differences(response, parameter, 1e-5)
        assert parameter.grad is not None
        assert float((parameter.grad - expected).abs().max()) < 1e-8


def test_module_weights_under_functional_call_have_all_transforms() -> None:
    net, data = make_net(), randn(5, 3, seed=7)
    weights = {k: p.detach() for k, p in net.named_parameters()}

    def outer(weights: dict[str, Tensor], data: Tensor) -> Tensor:
        objective = lambda x: (  # noqa: E731
            torch.nn.functional.softplus(functional_call(net, weights, (data * x,))).sum() + 0.5 * (x**2).sum()
        )
        layer = il.argmin(objective, newton, linear_solver=TIGHT, on_failure="ignore")
        return (layer(torch.zeros(3, dtype=F64)) ** 2).sum()

    for parameter in net.parameters():
        parameter.grad = None
    x = il.argmin(module_objective(net), newton, linear_solver=TIGHT)(torch.zeros(3, dtype=F64), data)
    (x**2).sum().backward()
    expected = {k: p.grad for k, p in net.named_parameters()}
    compare(grad(outer)(weights, data), expected)
    lanes = vmap(grad(outer), in_dims=(None, 0))(weights, torch.stack([data, 2 * data]))
    compare({k: g[0] for k, g in lanes.items()}, expected)
    compare({k: g[1] for k, g in lanes.items()}, grad(outer)(weights, 2 * data))
    # second order: forward over reverse against reverse over reverse
    compare(
        jacfwd(grad(outer))(weights, data)["0.bias"]["0.bias"], jacrev(grad(outer))(weights, data)["0.bias"]["0.bias"]
    )


def test_frozen_weights_and_buffers_stay_without_gradient() -> None:
    net, data = make_net(), randn(5, 3, seed=7)
    for parameter in net[0].parameters():  # type: ignore[index]
        parameter.requires_grad_(False)
    il.argmin(module_objective(net), newton)(torch.zeros(3, dtype=F64), data).sum().backward()
    assert all(p.grad is None for p in net[0].parameters())  # type: ignore[index]
    assert all(p.grad is not None and float(p.grad.norm()) > 0 for p in net[2].parameters())  # type: ignore[index]


def test_a_tensor_that_only_a_custom_function_reads_gets_its_gradient() -> None:
    a = positive(3, seed=1).requires_grad_()

    class Times(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor, a: Tensor) -> Tensor:
            return x * a

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            x, a = ctx.saved_tensors
            return g * a, g * x

    layer = il.argmin(
        lambda x, t: (Times.apply(x**4 / 4, a) - t * x).sum(), lambda f, x, t: (t / a.detach()) ** (1 / 3)
    )
    t = positive(3, seed=2)
    (gradient,) = torch.autograd.grad(layer(torch.ones(3, dtype=F64), t).sum(), a)
    compare(gradient, torch.autograd.grad(explicit(a, t).sum(), a)[0])
