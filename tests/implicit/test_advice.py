"""What errors of the solve behind a gradient advise fits the layer at hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64
from torch import Tensor

import implicitlayer as il


def flat(x: Tensor, t: Tensor) -> Tensor:
    """An objective that leaves x[0] - x[1] free; the cotangent of the tests has a part along it."""
    return 0.5 * (x.sum() - t) ** 2


def slope_of_flat(x: Tensor, t: Tensor) -> Tensor:
    return (x.sum() - t).expand(2)


def halfway(f: Any, x: Tensor, t: Tensor) -> Tensor:
    return t.expand(2) / 2


def up(x: Tensor, t: Tensor) -> Tensor:
    return (x**2).sum() * 0.5 - 2 * (x[0] - t) ** 2


def top(f: Any, x: Tensor, t: Tensor) -> Tensor:
    return torch.stack([4 * t / 3, torch.zeros_like(t)])


LAYERS: dict[str, tuple[bool, Callable[[], Any]]] = {
    "argmin": (True, lambda: il.argmin(flat, halfway, linear_solver=il.Minres())),
    "argmin at a saddle": (True, lambda: il.argmin(up, top)),
    "over a set": (False, lambda: il.argmin(flat, halfway, constraint=il.sets.Box(-9.0, 9.0))),
    "with a regularizer": (False, lambda: il.argmin(flat, halfway, regularizer=il.L1(0.0), linear_solver=il.Dense())),
    "root": (False, lambda: il.root(slope_of_flat, halfway)),
    "fixed_point": (False, lambda: il.fixed_point(lambda x, t: x - slope_of_flat(x, t), halfway)),
    "constrained_argmin": (False, lambda: il.constrained_argmin(up, top, inequality=lambda x, t: x[:1] - 9)),
    "constrained_argmin by MINRES": (
        False,
        lambda: il.constrained_argmin(flat, halfway, inequality=lambda x, t: x[:1] - 9, linear_solver=il.Minres()),
    ),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_damping_is_advised_where_a_layer_takes_it(kind: str) -> None:
    damps, make = LAYERS[kind]
    t = torch.tensor(1.0, dtype=F64, requires_grad=True)
    made = make()
    x = made(torch.zeros(2, dtype=F64), t)
    with pytest.raises((il.SingularError, il.IndefiniteError, il.NotConvergedError)) as told:
        torch.autograd.grad(x, t, torch.tensor([1.0, 0.5], dtype=F64))
    assert ("damping" in str(told.value)) == damps and ("Gauss-Newton" in str(told.value)) <= damps
    assert ("damping" in made.records[-1].explain()) == damps
