"""What the objective of a compiled layer reads from outside of its arguments."""

from functools import partial

import pytest
import torch
from references import F64

import implicitlayer as il

traced = partial(il.compile, backend="eager")


def test_weights_that_are_closed_over_are_named() -> None:
    weight = torch.ones(2, dtype=F64, requires_grad=True)
    compiled = traced(il.argmin(lambda x, t: ((x - t * weight) ** 2).sum(), il.solvers.NewtonCG(rtol=1e-12)))
    with pytest.raises(il.ClosureError, match="closes over 1 tensor that require"):
        compiled(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64, requires_grad=True))


def test_weights_that_appear_later_are_named_too() -> None:
    held = {"weight": torch.ones(2, dtype=F64)}
    compiled = traced(il.argmin(lambda x, t: ((x - t * held["weight"]) ** 2).sum(), il.solvers.NewtonCG(rtol=1e-12)))
    t = torch.ones(2, dtype=F64, requires_grad=True)
    for _ in range(2):
        compiled(torch.zeros(2, dtype=F64), t)
    held["weight"] = torch.ones(2, dtype=F64, requires_grad=True)
    with pytest.raises(il.ClosureError, match="closes over"):
        compiled(torch.zeros(2, dtype=F64), t)


@pytest.mark.parametrize("inside", [False, True])
def test_what_is_closed_over_must_not_change_between_call_and_backward(inside: bool) -> None:
    w, t = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.5, -1.0], dtype=F64, requires_grad=True)
    layer = traced(il.argmin(lambda x, t: (w * torch.cosh(x - t)).sum() + (x**2).sum(), il.solvers.LBFGS(rtol=1e-12)))
    layer = torch.compile(layer, backend="aot_eager", fullgraph=True) if inside else layer
    for _ in range(3):
        x = layer(torch.zeros(2, dtype=F64), t)
        w.mul_(1.0005)
        with pytest.raises(il.ClosureError, match="was changed in place"):
            x.sum().backward()
    x = layer(torch.zeros(2, dtype=F64), t)
    (found,) = torch.autograd.grad(x.sum(), t)
    curvature = w * torch.cosh(x - t).detach()
    torch.testing.assert_close(found, curvature / (curvature + 2))


def test_an_objective_that_changes_between_call_and_backward_is_no_silent_gradient() -> None:
    settings = {"shift": 1.0}
    layer = il.argmin(lambda x, t: ((x - t * settings["shift"]) ** 2).sum(), il.solvers.NewtonCG(rtol=1e-12))
    compiled = traced(layer)
    t = torch.ones(2, dtype=F64, requires_grad=True)
    for _ in range(2):
        x = compiled(torch.zeros(2, dtype=F64), t)
    settings["shift"] = 3.0
    with pytest.warns(il.StationarityWarning):
        x.sum().backward()
