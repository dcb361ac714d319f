"""Copies of modules that hold layers: a function over the module reads the weights of the copy."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from references import F64, newton
from torch import Tensor, nn

import implicitlayer as il

ZERO = torch.zeros(2, dtype=F64)
T = torch.tensor([0.5, -1.0], dtype=F64)


class Net(nn.Module):
    """x -> a |x - t|^2 / 2 + b x: the minimum is t - b / a."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(2.0, dtype=F64))
        self.b = nn.Parameter(torch.tensor(0.5, dtype=F64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * self.a * ((x - t) ** 2).sum() + self.b * x.sum()


def over_self(model: Any) -> Any:
    return il.argmin(lambda x, t: model.net(x, t), newton)


def over_a_part(model: Any) -> Any:
    net = model.net
    return il.argmin(lambda x, t: net(x, t), newton)


def over_tensors(model: Any) -> Any:
    a, b = model.net.a, model.net.b
    return il.argmin(lambda x, t: 0.5 * a * ((x - t) ** 2).sum() + b * x.sum(), newton)


def over_a_default(model: Any) -> Any:
    return il.argmin(lambda x, t, net=model.net: net(x, t), newton)


def over_a_nested_function(model: Any) -> Any:
    def inner(x: Tensor, t: Tensor) -> Tensor:
        return model.net(x, t)

    def outer(x: Tensor, t: Tensor) -> Tensor:
        return inner(x, t) + (0 * outer.factor * x).sum()  # a function that closes over itself, and has an attribute

    outer.factor = 1.0  # type: ignore[attr-defined]
    return il.argmin(outer, newton)


def over_a_partial(model: Any) -> Any:
    return il.argmin(partial(lambda net, x, t: net(x, t), model.net), newton)


def over_a_method(model: Any) -> Any:
    return il.argmin(model.energy, newton)


def as_a_module(model: Any) -> Any:
    layer = il.ArgminLayer(lambda x, t: model.net(x, t), newton)
    return layer


def proximal(model: Any) -> Any:
    return il.argmin(il.proximal(lambda x, t: model.net(x, t), 1e-30), newton)


def over_a_set(model: Any) -> Any:
    free = il.sets.Projection(lambda y, t: y + 0 * model.net.b)
    return il.argmin(lambda x, t: model.net(x, t), lambda f, x, t: newton(f, x, t), constraint=free, step_size=0.3)


def constrained(model: Any) -> Any:
    return il.constrained_argmin(
        lambda x, t: model.net(x, t),
        lambda problem, x, t: t - (model.net.b / model.net.a).detach(),
        inequality=lambda x, t: x.sum() - 100 - 0 * model.net.a,
    )


def root(model: Any) -> Any:
    return il.root(lambda x, t: model.net.a * (x - t) + model.net.b, lambda f, x, t: model.answer(t))


class Model(nn.Module):
    def __init__(self, layer_of: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net = Net()
        self.layer = layer_of(self)

    def energy(self, x: Tensor, t: Tensor) -> Tensor:
        return self.net(x, t)

    def answer(self, t: Tensor) -> Tensor:
        return t - (self.net.b / self.net.a).detach()

    def forward(self, t: Tensor) -> Tensor:
        start = (ZERO, ZERO) if isinstance(getattr(self.layer, "function", None), il.Proximal) else (ZERO,)
        return self.layer(*start, t)


LAYERS = [
    over_self, over_a_part, over_tensors, over_a_default, over_a_nested_function, over_a_partial, over_a_method,
    as_a_module, proximal, over_a_set, constrained, root,
]  # fmt: skip


@pytest.mark.parametrize("layer_of", LAYERS)
def test_the_layer_of_a_copied_module_reads_the_weights_of_the_copy(layer_of: Callable[[Any], Any]) -> None:
    model = Model(layer_of)
    twin = copy.deepcopy(copy.deepcopy(model))
    with torch.no_grad():
        twin.net.b.fill_(3.0)
    # linear solves at 1e-10
    for which, b in ((model, 0.5), (twin, 3.0)):
        x = which(T)
        assert torch.allclose(x, T - b / 2, rtol=1e-9, atol=0)
        a_bar, b_bar = torch.autograd.grad(x.sum(), (which.net.a, which.net.b))
        assert float(a_bar) == pytest.approx(2 * b / 4, rel=1e-8) and float(b_bar) == pytest.approx(-1.0, rel=1e-8)


def test_a_copied_layer_shares_what_its_function_does_not_own() -> None:
    """As Python has it: functions are no owners, and the weights would be out of reach."""
    net, calls = Net(), []

    def objective(x: Tensor, t: Tensor) -> Tensor:
        calls.append(1)
        return net(x, t)

    layer = copy.deepcopy(il.argmin(objective, newton))
    assert layer.function is objective
    (gradient,) = torch.autograd.grad(layer(ZERO, T).sum(), net.b)
    assert float(gradient) == pytest.approx(-1.0, rel=1e-8)
