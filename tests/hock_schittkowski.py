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


def _product(x: list[Tensor]) -> Tensor:
    found = x[0]
    for part in x[1:]:
        found = found * part
    return found


def _squares(x: list[Tensor]) -> Tensor:
    return torch.stack(x, -1).square().sum(-1)


def _of_78(x: list[Tensor]) -> list[Tensor]:
    return [_squares(x) - 10, x[1] * x[2] - 5 * x[3] * x[4], x[0] ** 3 + x[1] ** 3 + 1]


def _of_51(right: float) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda x: [x[0] + 3 * x[1] - right, x[2] + x[3] - 2 * x[4], x[1] - x[4]]


def _rest_of_51(x: list[Tensor]) -> Tensor:
    return (x[1] + x[2] - 2) ** 2 + (x[3] - 1) ** 2 + (x[4] - 1) ** 2


PROBLEMS = [
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
        _squares,
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
        lambda x: -_product(x),
        g=lambda x: [x[0] ** 2 + 2 * x[1] ** 2 + 4 * x[2] ** 2 - 48],
    ),
    Problem(
        30,
        (1, 1, 1),
        1.0,
        _squares,
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
        g=lambda x: [x[0] ** 2 + x[1] ** 2 - x[2] ** 2, 4 - _squares(x)],
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
        lambda x: -_product(x),
        g=lambda x: [x[0] + 2 * x[1] + 2 * x[2] - 72],
        lower=(0.0, 0.0, 0.0),
        upper=(20.0, 11.0, 42.0),
    ),
    Problem(
        37,
        (10, 10, 10),
        -3456.0,
        lambda x: -_product(x),
        g=lambda x: [x[0] + 2 * x[1] + 2 * x[2] - 72, -x[0] - 2 * x[1] - 2 * x[2]],
        lower=(0.0, 0.0, 0.0),
        upper=(42.0, 42.0, 42.0),
    ),
    Problem(
        39,
        (2, 2, 2, 2),
        -1.0,
        lambda x: -x[0],
        h=lambda x: [x[1] - x[0] ** 3 - x[2] ** 2, x[0] ** 2 - x[1] - x[3] ** 2],
    ),
    Problem(
        40,
        (0.8, 0.8, 0.8, 0.8),
        -0.25,
        lambda x: -_product(x),
        h=lambda x: [x[0] ** 3 + x[1] ** 2 - 1, x[0] ** 2 * x[3] - x[2], x[3] ** 2 - x[1]],
    ),
    Problem(
        41,
        (2, 2, 2, 2),
        52 / 27,
        lambda x: 2 - x[0] * x[1] * x[2],
        h=lambda x: [x[0] + 2 * x[1] + 2 * x[2] - x[3]],
        lower=(0.0, 0.0, 0.0, 0.0),
        upper=(1.0, 1.0, 1.0, 2.0),
    ),
    Problem(
        42,
        (1, 1, 1, 1),
        28 - 10 * ROOT2,
        lambda x: (x[0] - 1) ** 2 + (x[1] - 2) ** 2 + (x[2] - 3) ** 2 + (x[3] - 4) ** 2,
        h=lambda x: [x[0] - 2, x[2] ** 2 + x[3] ** 2 - 2],
    ),
    Problem(
        43,
        (0, 0, 0, 0),
        -44.0,
        lambda x: x[0] ** 2 + x[1] ** 2 + 2 * x[2] ** 2 + x[3] ** 2 - 5 * x[0] - 5 * x[1] - 21 * x[2] + 7 * x[3],
        g=lambda x: [
            _squares(x) + x[0] - x[1] + x[2] - x[3] - 8,
            x[0] ** 2 + 2 * x[1] ** 2 + x[2] ** 2 + 2 * x[3] ** 2 - x[0] - x[3] - 10,
            2 * x[0] ** 2 + x[1] ** 2 + x[2] ** 2 + 2 * x[0] - x[1] - x[3] - 5,
        ],
    ),
    Problem(
        48,
        (3, 5, -3, 2, -2),
        0.0,
        lambda x: (x[0] - 1) ** 2 + (x[1] - x[2]) ** 2 + (x[3] - x[4]) ** 2,
        h=lambda x: [x[0] + x[1] + x[2] + x[3] + x[4] - 5, x[2] - 2 * (x[3] + x[4]) + 3],
    ),
    Problem(51, (2.5, 0.5, 2, -1, 0.5), 0.0, lambda x: (x[0] - x[1]) ** 2 + _rest_of_51(x), h=_of_51(4.0)),
    Problem(52, (2, 2, 2, 2, 2), 1859 / 349, lambda x: (4 * x[0] - x[1]) ** 2 + _rest_of_51(x), h=_of_51(0.0)),
    Problem(
        53,
        (2, 2, 2, 2, 2),
        176 / 43,
        lambda x: (x[0] - x[1]) ** 2 + _rest_of_51(x),
        h=_of_51(0.0),
        lower=(-10.0,) * 5,
        upper=(10.0,) * 5,
    ),
    Problem(
        60,
        (2, 2, 2),
        0.03256820025,
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 4,
        h=lambda x: [x[0] * (1 + x[1] ** 2) + x[2] ** 4 - 4 - 3 * ROOT2],
        lower=(-10.0,) * 3,
        upper=(10.0,) * 3,
    ),
    Problem(
        61,
        (0, 0, 0),
        -143.6461422,
        lambda x: 4 * x[0] ** 2 + 2 * x[1] ** 2 + 2 * x[2] ** 2 - 33 * x[0] + 16 * x[1] - 24 * x[2],
        h=lambda x: [3 * x[0] - 2 * x[1] ** 2 - 7, 4 * x[0] - x[2] ** 2 - 11],
    ),
    Problem(
        63,
        (2, 2, 2),
        961.7151721,
        lambda x: 1000 - x[0] ** 2 - 2 * x[1] ** 2 - x[2] ** 2 - x[0] * x[1] - x[0] * x[2],
        h=lambda x: [8 * x[0] + 14 * x[1] + 7 * x[2] - 56, _squares(x) - 25],
        lower=(0.0,) * 3,
    ),
    Problem(
        64,
        (1, 1, 1),
        6299.842428,
        lambda x: 5 * x[0] + 50000 / x[0] + 20 * x[1] + 72000 / x[1] + 10 * x[2] + 144000 / x[2],
        g=lambda x: [4 / x[0] + 32 / x[1] + 120 / x[2] - 1],
        lower=(1e-5,) * 3,
    ),
    Problem(
        65,
        (-5, 5, 0),
        0.9535288567,
        lambda x: (x[0] - x[1]) ** 2 + (x[0] + x[1] - 10) ** 2 / 9 + (x[2] - 5) ** 2,
        g=lambda x: [_squares(x) - 48],
        lower=(-4.5, -4.5, -5.0),
        upper=(4.5, 4.5, 5.0),
    ),
    Problem(
        66,
        (0, 1.05, 2.9),
        0.5181632741,
        lambda x: 0.2 * x[2] - 0.8 * x[0],
        g=lambda x: [torch.exp(x[0]) - x[1], torch.exp(x[1]) - x[2]],
        lower=(0.0, 0.0, 0.0),
        upper=(100.0, 100.0, 10.0),
    ),
    Problem(
        71,
        (1, 5, 5, 1),
        17.0140173,
        lambda x: x[0] * x[3] * (x[0] + x[1] + x[2]) + x[2],
        h=lambda x: [_squares(x) - 40],
        g=lambda x: [25 - _product(x)],
        lower=(1.0,) * 4,
        upper=(5.0,) * 4,
    ),
    Problem(
        72,
        (1, 1, 1, 1),
        727.67937,
        lambda x: 1 + x[0] + x[1] + x[2] + x[3],
        g=lambda x: [
            4 / x[0] + 2.25 / x[1] + 1 / x[2] + 0.25 / x[3] - 0.0401,
            0.16 / x[0] + 0.36 / x[1] + 0.64 / x[2] + 0.64 / x[3] - 0.010085,
        ],
        lower=(0.001,) * 4,
        upper=(4e5, 3e5, 2e5, 1e5),
    ),
    Problem(
        76,
        (0.5,) * 4,
        -4.681818181,
        lambda x: (
            x[0] ** 2
            + 0.5 * x[1] ** 2
            + x[2] ** 2
            + 0.5 * x[3] ** 2
            - x[0] * x[2]
            + x[2] * x[3]
            - x[0]
            - 3 * x[1]
            + x[2]
            - x[3]
        ),
        g=lambda x: [
            x[0] + 2 * x[1] + x[2] + x[3] - 5,
            3 * x[0] + x[1] + 2 * x[2] - x[3] - 4,
            1.5 - x[1] - 4 * x[2],
        ],
        lower=(0.0,) * 4,
    ),
    Problem(
        77,
        (2,) * 5,
        0.24150513,
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[2] - 1) ** 2 + (x[3] - 1) ** 4 + (x[4] - 1) ** 6,
        h=lambda x: [
            x[0] ** 2 * x[3] + torch.sin(x[3] - x[4]) - 2 * ROOT2,
            x[1] + x[2] ** 4 * x[3] ** 2 - 8 - ROOT2,
        ],
    ),
    Problem(78, (-2, 1.5, 2, -1, -1), -2.91970041, _product, h=_of_78),
    Problem(
        79,
        (2,) * 5,
        0.0787768209,
        lambda x: (x[0] - 1) ** 2 + (x[0] - x[1]) ** 2 + (x[1] - x[2]) ** 2 + (x[2] - x[3]) ** 4 + (x[3] - x[4]) ** 4,
        h=lambda x: [
            x[0] + x[1] ** 2 + x[2] ** 3 - 2 - 3 * ROOT2,
            x[1] - x[2] ** 2 + x[3] + 2 - 2 * ROOT2,
            x[0] * x[4] - 2,
        ],
    ),
    Problem(
        80,
        (-2, 2, 2, -1, -1),
        0.0539498478,
        lambda x: torch.exp(_product(x)),
        h=_of_78,
        lower=(-2.3, -2.3, -3.2, -3.2, -3.2),
        upper=(2.3, 2.3, 3.2, 3.2, 3.2),
    ),
    Problem(
        81,
        (-2, 2, 2, -1, -1),
        0.0539498478,
        lambda x: torch.exp(_product(x)) - 0.5 * (x[0] ** 3 + x[1] ** 3 + 1) ** 2,
        h=_of_78,
        lower=(-2.3, -2.3, -3.2, -3.2, -3.2),
        upper=(2.3, 2.3, 3.2, 3.2, 3.2),
    ),
    Problem(
        100,
        (1, 2, 0, 4, 0, 1, 1),
        680.6300573,
        lambda x: (
            (x[0] - 10) ** 2
            + 5 * (x[1] - 12) ** 2
            + x[2] ** 4
            + 3 * (x[3] - 11) ** 2
            + 10 * x[4] ** 6
            + 7 * x[5] ** 2
            + x[6] ** 4
            - 4 * x[5] * x[6]
            - 10 * x[5]
            - 8 * x[6]
        ),
        g=lambda x: [
            2 * x[0] ** 2 + 3 * x[1] ** 4 + x[2] + 4 * x[3] ** 2 + 5 * x[4] - 127,
            7 * x[0] + 3 * x[1] + 10 * x[2] ** 2 + x[3] - x[4] - 282,
            23 * x[0] + x[1] ** 2 + 6 * x[5] ** 2 - 8 * x[6] - 196,
            4 * x[0] ** 2 + x[1] ** 2 - 3 * x[0] * x[1] + 2 * x[2] ** 2 + 5 * x[5] - 11 * x[6],
        ],
    ),
    Problem(
        113,
        (2, 3, 5, 5, 1, 2, 7, 3, 6, 10),
        24.3062091,
        lambda x: (
            x[0] ** 2
            + x[1] ** 2
            + x[0] * x[1]
            - 14 * x[0]
            - 16 * x[1]
            + (x[2] - 10) ** 2
            + 4 * (x[3] - 5) ** 2
            + (x[4] - 3) ** 2
            + 2 * (x[5] - 1) ** 2
            + 5 * x[6] ** 2
            + 7 * (x[7] - 11) ** 2
            + 2 * (x[8] - 10) ** 2
            + (x[9] - 7) ** 2
            + 45
        ),
        g=lambda x: [
            4 * x[0] + 5 * x[1] - 3 * x[6] + 9 * x[7] - 105,
            10 * x[0] - 8 * x[1] - 17 * x[6] + 2 * x[7],
            -8 * x[0] + 2 * x[1] + 5 * x[8] - 2 * x[9] - 12,
            3 * (x[0] - 2) ** 2 + 4 * (x[1] - 3) ** 2 + 2 * x[2] ** 2 - 7 * x[3] - 120,
            5 * x[0] ** 2 + 8 * x[1] + (x[2] - 6) ** 2 - 2 * x[3] - 40,
            0.5 * (x[0] - 8) ** 2 + 2 * (x[1] - 4) ** 2 + 3 * x[4] ** 2 - x[5] - 30,
            x[0] ** 2 + 2 * (x[1] - 2) ** 2 - 2 * x[0] * x[1] + 14 * x[4] - 6 * x[5],
            -3 * x[0] + 6 * x[1] + 12 * (x[8] - 8) ** 2 - 7 * x[9],
        ],
    ),
]
