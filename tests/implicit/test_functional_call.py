"""torch.func.functional_call around a model with a layer inside: the weights that it was given get the gradients."""

# Newton is exact to 1e-15; linear solves at the default rtol of 1e-10, systems of condition below 50: 1e-8.

import gc
import weakref
from typing import Any

import torch
from references import F64, Energy, newton, randn, relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import implicitlayer as il

TOLERANCE = 1e-8


def energy_layer(**settings: Any) -> il.ArgminLayer:
    return il.ArgminLayer(Energy(), newton, init=torch.zeros(3, dtype=F64), **settings)


def test_functional_call_around_the_layer_differentiates_the_weights_that_it_was_given() -> None:
    """backward comes after functional_call has put the module's own weights back."""
    layer, given, t = energy_layer(), energy_layer(), randn(3, seed=1)
    weights = {name: p.detach().clone().requires_grad_() for name, p in given.named_parameters()}
    x = functional_call(layer, weights, (t,))
    assert torch.equal(x, given(t))
    got = torch.autograd.grad((x**2).sum(), list(weights.values()))
    for g, e in zip(got, torch.autograd.grad((given(t) ** 2).sum(), list(given.parameters())), strict=True):
        assert relative_error(g, e) < TOLERANCE


def test_an_ensemble_of_modules_by_functional_call_and_vmap_equals_a_loop() -> None:
    layers, t = [energy_layer() for _ in range(3)], randn(3, seed=1)
    stacked, buffers = torch.func.stack_module_state(layers)  # type: ignore[arg-type]

    def loss(weights: Any, buffers: Any) -> Tensor:
        return (functional_call(layers[0], (weights, buffers), (t,)) ** 2).sum()

    got = vmap(grad(loss))({k: p.detach() for k, p in stacked.items()}, buffers)
    for i, layer in enumerate(layers):
        weights = list(layer.parameters())
        expected = torch.autograd.grad((layer(t) ** 2).sum(), weights)
        for (name, _), e in zip(layer.named_parameters(), expected, strict=True):
            assert relative_error(got[name][i], e) < TOLERANCE


class Parent(nn.Module):
    """A model that owns the net and builds the layer where it uses it: the objective closes over ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = Energy()

    def forward(self, t: Tensor) -> Tensor:
        layer = il.argmin(lambda x, t: self.energy(x, t), newton)
        return layer(torch.zeros(3, dtype=F64), t)  # type: ignore[no-any-return]


def test_functional_call_around_a_closing_objective_is_right_or_an_error_and_never_zero() -> None:
    parent, given, t = Parent(), Parent(), randn(3, seed=1)
    weights = {name: p.detach().clone().requires_grad_() for name, p in given.named_parameters()}
    expected = torch.autograd.grad((given(t) ** 2).sum(), list(given.parameters()))
    try:
        got = torch.autograd.grad((functional_call(parent, weights, (t,)) ** 2).sum(), list(weights.values()))
    except il.ClosureError:
        return
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < TOLERANCE


def test_the_layer_keeps_no_weights_of_a_functional_call() -> None:
    layer, t = energy_layer(), randn(3, seed=1)
    weights = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    watched = [weakref.ref(w) for w in weights.values()]
    functional_call(layer, weights, (t,)).sum().backward()
    del weights
    gc.collect()
    assert [reference() is None for reference in watched] == [True, True]
