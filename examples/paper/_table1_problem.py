"""The problem of table1.py, and its meters: a regression that costs little at a thousand unknowns."""

# n: unknowns; the design X is block diagonal, n/2 blocks U_b diag(s_b) V_b' of 2 x 2 with rotations U_b, V_b.

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

F64 = torch.float64
Batch = tuple[Tensor, Tensor]


def task_loss(phi: Tensor, batch: Batch) -> Tensor:
    """|X phi - y|^2 / 2, [B]; X [B, n/2, 2, 2], y [B, n]."""
    x, y = batch
    blocks = torch.bmm(x.flatten(0, 1), phi.reshape(-1, 2, 1))  # a gradient makes two such products, X phi and X'r
    return 0.5 * (blocks.view_as(y) - y).square().sum(-1)


@dataclasses.dataclass(frozen=True)
class Regression:
    """One task with lambda = 1 and the eigenvalues 1 ... kappa of the inner problem, evenly in the logarithm.

    The query loss is |phi - target|^2 / 2, written with a design of identities: its gradient, phi - target, counts as
    one more gradient of every method.
    """

    support: Batch
    query: Batch
    theta: Tensor
    solution: Tensor
    eigenvalues: Tensor
    rotations: Tensor  # V_b, [n/2, 2, 2]
    condition: float

    @staticmethod
    def draw(n: int, condition: float, generator: torch.Generator) -> Regression:
        def turns() -> Tensor:
            angle = 2 * math.pi * torch.rand(n // 2, dtype=F64, generator=generator)
            c, s = angle.cos(), angle.sin()
            return torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)

        def normal() -> Tensor:
            return torch.randn(n, dtype=F64, generator=generator)

        a = torch.logspace(0, math.log10(condition), n, dtype=F64)
        a = a[torch.randperm(n, generator=generator)]
        left, right = turns(), turns()
        x = left * (a - 1).clamp_min(0).sqrt().view(-1, 1, 2) @ right.mT
        y, theta, target = normal(), normal(), normal()
        # phi* = A^-1 (X'y + theta), block by block in the basis V
        pulled = (x.mT @ y.view(-1, 2, 1)) + theta.view(-1, 2, 1)
        solution = (right @ ((right.mT @ pulled) / a.view(-1, 2, 1))).flatten()
        identity = torch.eye(2, dtype=F64).expand(n // 2, 2, 2)
        return Regression((x[None], y[None]), (identity[None], target[None]), theta, solution, a, right, condition)

    def in_eigenbasis(self, vector: Tensor) -> Tensor:
        return (self.rotations.mT @ vector.view(-1, 2, 1)).flatten()

    @property
    def first_error(self) -> Tensor:
        return self.in_eigenbasis(self.theta - self.solution)

    def outer_gradient(self, error: Tensor) -> Tensor:
        """At phi* + error; all in the eigenbasis."""
        return error + self.in_eigenbasis(self.solution - self.query[1][0])

    @property
    def exact_in_eigenbasis(self) -> Tensor:
        """(I + H/lambda)^-1 grad L(phi*), which is that over a."""
        return self.outer_gradient(torch.zeros_like(self.eigenvalues)) / self.eigenvalues


class Products(TorchDispatchMode):
    """Counts products of blocks (the loss's design matrix) inside the `with` block, derivatives' included."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.ops.aten.bmm.default
        return function(*args, **(kwargs or {}))


def fewest(good: Callable[[int], Any], limit: int = 10**7) -> int:
    """The least k in 1 ... limit with good(k), which stays true from there on."""
    low, high = 0, 1
    while high < limit and not good(high):
        low, high = high, 2 * high
    high = min(high, limit)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high
