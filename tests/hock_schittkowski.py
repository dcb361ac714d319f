"""Problems of W. Hock and K. Schittkowski, Test Examples for Nonlinear Programming Codes (1981), by their numbers."""

# h(x) = 0 and g(x) <= 0 hold at the solution; bounds are rows of g. x is [..., n], so that lanes can be added in front.

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ROOT2, ROOT3 = math.sqrt(2.0), math.sqrt(3.0)


@dataclass(frozen=True)
class Problem:
    """``best`` is the value at the solution that the book gives, to the digits that it gives."""

    number: int
    start: tuple[float, ...]
    best: float
    f: Callable[[list[Tensor]], Tensor]
    h: Callable[[list[Tensor]], list[Tensor]] | None = None
    g: Callable[[list[Tensor]], list[Tensor]] | None = None
    lower: tuple[float | None, ...] = ()
    upper: tuple[float | None, ...] = ()

    def objective(self, x: Tensor) -> Tensor:
        return self.f(list(x.unbind(-1)))

    @property
    def equality(self) -> Callable[[Tensor], Tensor] | None:
        h = self.h
        return None if h is None else lambda x: torch.stack(h(list(x.unbind(-1))), -1)

    @property
    def inequality(self) -> Callable[[Tensor], Tensor] | None:
        if self.g is None and not self.lower and not self.upper:
            return None

        def rows(x: Tensor) -> Tensor:
            parts = list(x.unbind(-1))
            found = [] if self.g is None else self.g(parts)
            found += [end - part for part, end in zip(parts, self.lower, strict=False) if end is not None]
            found += [part - end for part, end in zip(parts, self.upper, strict=False) if end is not None]
            return torch.stack(found, -1)

        return rows


def _rosenbrock(x: list[Tensor]) -> Tensor:
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def product(x: list[Tensor]) -> Tensor:
    found = x[0]
    for part in x[1:]:
        found = found * part
    return found


def squares(x: list[Tensor]) -> Tensor:
    return torch.stack(x, -1).square().sum(-1)


SMALL = [
    Problem(6, (-1.2, 1), 0.0, lambda x: (1 - x[0]) ** 2, h=lambda x: [10 * (x[1] - x[0] ** 2)]),
    Problem(
        7,
        (2, 2),
        -ROOT3,
        lambda x: torch.log(1 + x[0] ** 2) - x[1],
        h=lambda x: [(1 + x[0] ** 2) ** 2 + x[1] ** 2 - 4],
    ),
    Problem(
        9,
        (0, 0),
        -0.5,
        lambda x: torch.sin(math.pi * x[0] / 12) * torch.cos(math.pi * x[1] / 16),
        h=lambda x: [4 * x[0] - 3 * x[1]],
    ),
    Problem(10, (-10, 10), -1.0, lambda x: x[0] - x[1], g=lambda x: [3 * x[0] ** 2 - 2 * x[0] * x[1] + x[1] ** 2 - 1]),
    Problem(11, (4.9, 0.1), -8.498464223, lambda x: (x[0] - 5) ** 2 + x[1] ** 2 - 25, g=lambda x: [x[0] ** 2 - x[1]]),
    Problem(
        12,
        (0, 0),
        -30.0,
        lambda x: 0.5 * x[0] ** 2 + x[1] ** 2 - x[0] * x[1] - 7 * x[0] - 7 * x[1],
        g=lambda x: [4 * x[0] ** 2 + x[1] ** 2 - 25],
    ),
    Problem(
        14,
        (2, 2),
        9 - 2.875 * math.sqrt(7.0),
        lambda x: (x[0] - 2) ** 2 + (x[1] - 1) ** 2,
        h=lambda x: [x[0] - 2 * x[1] + 1],
        g=lambda x: [0.25 * x[0] ** 2 + x[1] ** 2 - 1],
    ),
    Problem(15, (-2, 1), 306.5, _rosenbrock, g=lambda x: [1 - x[0] * x[1], -x[0] - x[1] ** 2], upper=(0.5,)),
    Problem(
        16,
        (-2, 1),
        0.25,
        _rosenbrock,
        g=lambda x: [-x[0] - x[1] ** 2, -(x[0] ** 2) - x[1]],
        lower=(-0.5,),
        upper=(0.5, 1.0),
    ),
    Problem(
        17,
        (-2, 1),
        1.0,
        _rosenbrock,
        g=lambda x: [x[0] - x[1] ** 2, x[1] - x[0] ** 2],
        lower=(-0.5,),
        upper=(0.5, 1.0),
    ),
    Problem(
        18,
        (2, 2),
        5.0,
        lambda x: 0.01 * x[0] ** 2 + x[1] ** 2,
        g=lambda x: [25 - x[0] * x[1], 25 - x[0] ** 2 - x[1] ** 2],
        lower=(2.0, 0.0),
        upper=(50.0, 50.0),
    ),
    Problem(
        19,
        (20.1, 5.84),
        -6961.81381,
        lambda x: (x[0] - 10) ** 3 + (x[1] - 20) ** 3,
        g=lambda x: [100 - (x[0] - 5) ** 2 - (x[1] - 5) ** 2, (x[1] - 5) ** 2 + (x[0] - 6) ** 2 - 82.81],
        lower=(13.0, 0.0),
        upper=(100.0, 100.0),
    ),
    Problem(
        20,
        (-2, 1),
        81.5 - 25 * ROOT3,
        _rosenbrock,
        g=lambda x: [-x[0] - x[1] ** 2, -(x[0] ** 2) - x[1], 1 - x[0] ** 2 - x[1] ** 2],
        lower=(-0.5,),
        upper=(0.5,),
    ),
    Problem(
        21,
        (-1, -1),
        -99.96,
        lambda x: 0.01 * x[0] ** 2 + x[1] ** 2 - 100,
        g=lambda x: [10 - 10 * x[0] + x[1]],
        lower=(2.0, -50.0),
        upper=(50.0, 50.0),
    ),
    Problem(
        22,
        (2, 2),
        1.0,
        lambda x: (x[0] - 2) ** 2 + (x[1] - 1) ** 2,
        g=lambda x: [x[0] + x[1] - 2, x[0] ** 2 - x[1]],
    ),
    Problem(
        23,
        (3, 1),
        2.0,
        squares,
        g=lambda x: [
            1 - x[0] - x[1],
            1 - x[0] ** 2 - x[1] ** 2,
            9 - 9 * x[0] ** 2 - x[1] ** 2,
            x[1] - x[0] ** 2,
            x[0] - x[1] ** 2,
        ],
        lower=(-50.0, -50.0),
        upper=(50.0, 50.0),
    ),
    Problem(
        24,
        (1, 0.5),
        -1.0,
        lambda x: ((x[0] - 3) ** 2 - 9) * x[1] ** 3 / (27 * ROOT3),
        g=lambda x: [x[1] - x[0] / ROOT3, -x[0] - ROOT3 * x[1], x[0] + ROOT3 * x[1] - 6],
        lower=(0.0, 0.0),
    ),
    Problem(
        27,
        (2, 2, 2),
        0.04,
        lambda x: 0.01 * (x[0] - 1) ** 2 + (x[1] - x[0] ** 2) ** 2,
        h=lambda x: [x[0] + x[2] ** 2 + 1],
    ),
    Problem(
        28,
        (-4, 1, 1),
        0.0,
        lambda x: (x[0] + x[1]) ** 2 + (x[1] + x[2]) ** 2,
        h=lambda x: [x[0] + 2 * x[1] + 3 * x[2] - 1],
    ),
    Problem(
        29,
        (1, 1, 1),
        -16 * ROOT2,
        lambda x: -product(x),
        g=lambda x: [x[0] ** 2 + 2 * x[1] ** 2 + 4 * x[2] ** 2 - 48],
    ),
    Problem(
        30,
        (1, 1, 1),
        1.0,
        squares,
        g=lambda x: [1 - x[0] ** 2 - x[1] ** 2],
        lower=(1.0, -10.0, -10.0),
        upper=(10.0, 10.0, 10.0),
    ),
    Problem(
        31,
        (1, 1, 1),
        6.0,
        lambda x: 9 * x[0] ** 2 + x[1] ** 2 + 9 * x[2] ** 2,
        g=lambda x: [1 - x[0] * x[1]],
        lower=(-10.0, 1.0, -10.0),
        upper=(10.0, 10.0, 1.0),
    ),
    Problem(
        32,
        (0.1, 0.7, 0.2),
        1.0,
        lambda x: (x[0] + 3 * x[1] + x[2]) ** 2 + 4 * (x[0] - x[1]) ** 2,
        h=lambda x: [x[0] + x[1] + x[2] - 1],
        g=lambda x: [x[0] ** 3 + 3 - 6 * x[1] - 4 * x[2]],
        lower=(0.0, 0.0, 0.0),
    ),
    Problem(
        33,
        (0, 0, 3),
        ROOT2 - 6,
        lambda x: (x[0] - 1) * (x[0] - 2) * (x[0] - 3) + x[2],
        g=lambda x: [x[0] ** 2 + x[1] ** 2 - x[2] ** 2, 4 - squares(x)],
        lower=(0.0, 0.0, 0.0),
        upper=(None, None, 5.0),
    ),
    Problem(
        34,
        (0, 1.05, 2.9),
        -math.log(math.log(10.0)),
        lambda x: -x[0],
        g=lambda x: [torch.exp(x[0]) - x[1], torch.exp(x[1]) - x[2]],
        lower=(0.0, 0.0, 0.0),
        upper=(100.0, 100.0, 10.0),
    ),
    Problem(
        35,
        (0.5, 0.5, 0.5),
        1 / 9,
        lambda x: (
            9
            - 8 * x[0]
            - 6 * x[1]
            - 4 * x[2]
            + 2 * x[0] ** 2
            + 2 * x[1] ** 2
            + x[2] ** 2
            + 2 * x[0] * x[1]
            + 2 * x[0] * x[2]
        ),
        g=lambda x: [x[0] + x[1] + 2 * x[2] - 3],
        lower=(0.0, 0.0, 0.0),
    ),
    Problem(
        36,
        (10, 10, 10),
        -3300.0,
        lambda x: -product(x),
        g=lambda x: [x[0] + 2 * x[1] + 2 * x[2] - 72],
        lower=(0.0, 0.0, 0.0),
        upper=(20.0, 11.0, 42.0),
    ),
    Problem(
        37,
        (10, 10, 10),
        -3456.0,
        lambda x: -product(x),
        g=lambda x: [x[0] + 2 * x[1] + 2 * x[2] - 72, -x[0] - 2 * x[1] - 2 * x[2]],
        lower=(0.0, 0.0, 0.0),
        upper=(42.0, 42.0, 42.0),
    ),
]
