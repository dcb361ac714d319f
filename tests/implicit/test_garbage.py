"""What a call leaves behind is freed when the last reference to it goes, without the garbage collector."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64
from torch import Tensor, nn

import implicitlayer as il

ZEROS, TARGET = torch.zeros(3, dtype=F64), torch.tensor([0.5, 2.0, -1.0], dtype=F64, requires_grad=True)


def quartic(x: Tensor, t: Tensor) -> Tensor:
    return ((x - t) ** 2).sum() + (x**4).sum()


def pair(x: dict[str, Tensor], t: Tensor) -> Tensor:
    return ((x["a"] - t) ** 2).sum() + (x["b"] ** 2).sum()


WEIGHT = torch.ones(3, dtype=F64, requires_grad=True)


def closing_over(made: Tensor, t: Tensor) -> Any:
    return il.argmin(lambda x, t: quartic(x, made * t), il.solvers.LBFGS(rtol=1e-10))(ZEROS, t)


def in_a_dict(t: Tensor) -> Any:
    layer = il.argmin(pair, lambda f, x, t: {"b": 0 * t, "a": t.detach()})
    return layer({"a": ZEROS, "b": ZEROS}, t)["a"]


class Weighted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.ones(3, dtype=F64)), nn.LayerNorm(3).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        value: Tensor = ((x - self.weight * t) ** 2).sum() + 0.1 * self.norm(x - t).square()[0]
        return value


EYE = torch.eye(3, dtype=F64)
LAYER = il.argmin(quartic, il.solvers.LBFGS(rtol=1e-10))
MODULE = il.ArgminLayer(quartic, il.solvers.NewtonCG(rtol=1e-10), init=torch.zeros_like)
LAYERS: dict[str, Callable[[Tensor], Any]] = {
    "argmin": lambda t: LAYER(ZEROS, t),
    "ArgminLayer": MODULE,
    "a dict": in_a_dict,
    "SciPy": lambda t: il.argmin(quartic, il.solvers.SciPyMinimize())(ZEROS, t),
    "a box": lambda t: il.argmin(quartic, il.solvers.ProjectedGradient(rtol=1e-9), constraint=il.sets.NonNegative())(
        ZEROS, t
    ),
    "weights of a module": il.ArgminLayer(Weighted(), il.solvers.LBFGS(rtol=1e-10), init=torch.zeros_like),
    "a closed-over weight": lambda t: il.argmin(lambda x, t: quartic(x, WEIGHT * t), il.solvers.LBFGS(rtol=1e-10))(
        ZEROS, t
    ),
    "what was made of a weight": lambda t: closing_over(2 * WEIGHT, t),
    "Newton steps": lambda t: il.argmin(quartic, il.solvers.LBFGS(rtol=1e-3), polish=2)(ZEROS, t),
    "SLSQP": lambda t: il.constrained_argmin(
        quartic,
        il.solvers.SciPyMinimize("SLSQP"),
        equality=lambda x, t: x.sum() - WEIGHT[0],
        inequality=lambda x, t: x - 2,
    )(ZEROS, t),
    "a root": lambda t: il.root(lambda x, t: x**3 + WEIGHT * x - t, il.solvers.Newton())(ZEROS, t),
    "qp": lambda t: il.qp(EYE, -t, None, None, EYE, torch.ones(3, dtype=F64)),
}


def backward(call: Callable[[Tensor], Any]) -> None:
    call(TARGET).sum().backward()


def forward(call: Callable[[Tensor], Any]) -> None:
    call(TARGET.detach())


def kept(call: Callable[[Tensor], Any]) -> None:
    call(TARGET)  # with a graph for a backward that never comes


def watched(call: Callable[[Tensor], Any]) -> None:
    with il.diagnostics() as records:
        call(TARGET).sum().backward()
    assert [str(record) for record in records]


@pytest.mark.parametrize("use", [forward, kept, backward, watched])
@pytest.mark.parametrize("name", LAYERS)
def test_a_call_leaves_nothing_to_the_garbage_collector(name: str, use: Callable[..., None]) -> None:
    use(LAYERS[name])  # what is made once and kept is made now
    gc.collect()
    gc.disable()
    try:
        for _ in range(3):
            use(LAYERS[name])
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_of_a_transform_no_tensor_waits_for_the_garbage_collector() -> None:
    # torch's own transforms leave small functions in cycles; the tensors must not be among them
    def use() -> None:
        torch.func.jvp(lambda t: LAYER(ZEROS, t), (TARGET.detach(),), (ZEROS,))
        (g,) = torch.autograd.grad((LAYER(ZEROS, TARGET) ** 2).sum(), TARGET, create_graph=True)
        torch.autograd.grad(g.sum(), TARGET)

    use()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        use()
        gc.collect()
        assert not [thing for thing in gc.garbage if isinstance(thing, Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


def test_records_live_on_with_the_list_that_the_user_holds() -> None:
    layer = il.argmin(quartic, il.solvers.LBFGS(rtol=1e-10))
    x = layer(ZEROS, TARGET)
    records = layer.records
    layer(ZEROS, TARGET.detach())
    x.sum().backward()
    assert [type(record) for record in records] == [il.ForwardRecord, il.BackwardRecord]
