"""A layer as a function of the floating leaves of theta: what the properties are stated on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicitlayer.testing._references import F64, Equation, Leaves, flat, plain

Layer = Callable[..., Any]


class Case:
    """A layer as a function of the floating leaves of theta."""

    def __init__(self, layer: Layer, init: Any, theta: tuple[Any, ...], rtol: float | None, seed: int) -> None:
        self.layer = layer
        self.equation = Equation.of(layer, "argmin", init, theta)
        if not self.equation.theta:
            raise ValueError("theta has no floating tensor with entries: there is no derivative to check.")
        self.rtol = rtol if rtol is not None else (1e-7 if self.equation.eps < 1e-12 else 1e-3)
        self.generator = torch.Generator().manual_seed(seed)
        self.solution: Leaves = []

    def call(self, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        start = self.equation.tree([t.clone() for t in self.equation.init])
        return tuple(self.equation.ordered(self.layer(start, *self.equation.arguments(leaves))))

    def random(self, like: Leaves) -> Leaves:
        return [torch.randn(t.shape, dtype=F64, generator=self.generator).to(t) for t in like]

    def gradients(self, v: Leaves) -> Leaves:
        points = [t.clone().requires_grad_() for t in self.equation.theta]
        x = list(self.call(*points))
        self.solution = [t.detach() for t in x]
        return pull(x, points, v)

    def require(self, holds: bool, rule: str, numbers: str, size: float) -> None:
        if not holds:
            raise AssertionError(f"{rule} does not hold: {numbers}, tolerance {self.rtol * size:.2e}.")

    def compare(self, got: Leaves, expected: Leaves, size: float, rule: str, names: list[str] | None = None) -> None:
        for name, g, e in zip(names or self.equation.names, got, expected, strict=True):
            difference = (plain(g) - plain(e)).abs().reshape(-1)
            if not difference.numel() or float(difference.norm()) <= self.rtol * size:
                continue
            i = int(difference.nan_to_num(nan=torch.inf).argmax())
            numbers = f"{float(plain(e).reshape(-1)[i]):.9g} and {float(plain(g).reshape(-1)[i]):.9g}"
            raise AssertionError(
                f"{rule}: {name} differs, most at entry {i}: {numbers}, error {float(difference[i]):.2e}, tolerance "
                f"{self.rtol * size:.2e}."
            )


def pull(x: Leaves, points: Leaves, v: Leaves) -> Leaves:
    attached = [(leaf, c) for leaf, c in zip(x, v, strict=True) if leaf.requires_grad]
    if not attached:
        return [torch.zeros_like(t) for t in points]
    outputs, vectors = zip(*attached, strict=True)
    return list(torch.autograd.grad(outputs, points, vectors, materialize_grads=True, retain_graph=True))


def dot(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return float(torch.dot(flat(a), flat(b)))
