"""Standard test functions of unconstrained minimisation, and a count of gradients and Hessian products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def beale(x: Tensor) -> Tensor:
    return sum(((c - x[0] * (1 - x[1] ** k)) ** 2 for k, c in ((1, 1.5), (2, 2.25), (3, 2.625))), torch.zeros(()))


def himmelblau(x: Tensor) -> Tensor:
    return (x[0] ** 2 + x[1] - 11) ** 2 + (x[0] + x[1] ** 2 - 7) ** 2


def powell_singular(x: Tensor) -> Tensor:
    a, b, c, d = x
    return (a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4


def styblinski_tang(x: Tensor) -> Tensor:
    return 0.5 * (x**4 - 16 * x**2 + 5 * x).sum()


class Counted:
    """An objective that counts the gradients (one for every evaluation, as our solvers use it) and Hessian products.

    Products that are made side by side, by ``vmap``, count as one.
    """

    def __init__(self, function: Function) -> None:
        self.function, self.num_gradients, self.num_products = function, 0, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.num_gradients += 1
        value: Tensor = self.function(_Watch.apply(x, self))
        return value


class _Watch(torch.autograd.Function):
    """The identity. A gradient runs its backward; a product with the Hessian runs the backward of that."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counted: Counted) -> Tensor:
        ctx.counted = counted
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _WatchSlope.apply(grads[0], ctx.counted), None


class _WatchSlope(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, counted: Counted) -> Tensor:
        return g.view_as(g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.counted = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.counted.num_products += 1
        return grads[0], None
