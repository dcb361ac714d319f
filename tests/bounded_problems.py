"""Sums of squares of Moré, Garbow and Hillstrom (ACM TOMS 7, 1981), their starts, and bounds that cut minima off."""

import math
from collections.abc import Callable

import torch
from references import F64
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def freudenstein_roth(x: Tensor) -> Tensor:
    a, b = x
    return (-13 + a + ((5 - b) * b - 2) * b) ** 2 + (-29 + a + ((b + 1) * b - 14) * b) ** 2


def rosenbrock(x: Tensor) -> Tensor:
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def powell_badly_scaled(x: Tensor) -> Tensor:
    return (1e4 * x[0] * x[1] - 1) ** 2 + ((-x[0]).exp() + (-x[1]).exp() - 1.0001) ** 2


def brown_badly_scaled(x: Tensor) -> Tensor:
    return (x[0] - 1e6) ** 2 + (x[1] - 2e-6) ** 2 + (x[0] * x[1] - 2) ** 2


def beale(x: Tensor) -> Tensor:
    powers = x[1] ** torch.arange(1, 4, dtype=F64)
    return ((tensor(1.5, 2.25, 2.625) - x[0] * (1 - powers)) ** 2).sum()


def jennrich_sampson(x: Tensor) -> Tensor:
    i = torch.arange(1, 11, dtype=F64)
    return ((2 + 2 * i - (i * x[0]).exp() - (i * x[1]).exp()) ** 2).sum()


def helical_valley(x: Tensor) -> Tensor:
    turn = torch.atan2(x[1], x[0]) / (2 * math.pi)
    return 100 * (x[2] - 10 * turn) ** 2 + 100 * ((x[0] ** 2 + x[1] ** 2).sqrt() - 1) ** 2 + x[2] ** 2


def bard(x: Tensor) -> Tensor:
    y = tensor(0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)
    u = torch.arange(1, 16, dtype=F64)
    v = 16 - u
    return ((y - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))) ** 2).sum()


def gaussian(x: Tensor) -> Tensor:
    half = tensor(0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521)
    y = torch.cat([half, tensor(0.3989), half.flip(0)])
    t = (8 - torch.arange(1, 16, dtype=F64)) / 2
    return ((x[0] * (-x[1] * (t - x[2]) ** 2 / 2).exp() - y) ** 2).sum()


def box(x: Tensor) -> Tensor:
    t = 0.1 * torch.arange(1, 11, dtype=F64)
    return (((-t * x[0]).exp() - (-t * x[1]).exp() - x[2] * ((-t).exp() - (-10 * t).exp())) ** 2).sum()


def powell_singular(x: Tensor) -> Tensor:
    return (x[0] + 10 * x[1]) ** 2 + 5 * (x[2] - x[3]) ** 2 + (x[1] - 2 * x[2]) ** 4 + 10 * (x[0] - x[3]) ** 4


def wood(x: Tensor) -> Tensor:
    a, b, c, d = x
    return (
        100 * (b - a**2) ** 2 + (1 - a) ** 2 + 90 * (d - c**2) ** 2 + (1 - c) ** 2
        + 10 * (b + d - 2) ** 2 + 0.1 * (b - d) ** 2
    )  # fmt: skip


def kowalik_osborne(x: Tensor) -> Tensor:
    y = tensor(0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
    u = tensor(4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)
    return ((y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])) ** 2).sum()


def brown_dennis(x: Tensor) -> Tensor:
    t = torch.arange(1, 21, dtype=F64) / 5
    return (((x[0] + t * x[1] - t.exp()) ** 2 + (x[2] + x[3] * t.sin() - t.cos()) ** 2) ** 2).sum()


def biggs(x: Tensor) -> Tensor:
    t = 0.1 * torch.arange(1, 14, dtype=F64)
    y = (-t).exp() - 5 * (-10 * t).exp() + 3 * (-4 * t).exp()
    return ((x[2] * (-t * x[0]).exp() - x[3] * (-t * x[1]).exp() + x[5] * (-t * x[4]).exp() - y) ** 2).sum()


def penalty(x: Tensor) -> Tensor:
    return 1e-5 * ((x - 1) ** 2).sum() + ((x**2).sum() - 0.25) ** 2


def variably_dimensioned(x: Tensor) -> Tensor:
    pull = (torch.arange(1, len(x) + 1, dtype=F64) * (x - 1)).sum()
    return ((x - 1) ** 2).sum() + pull**2 + pull**4


def trigonometric(x: Tensor) -> Tensor:
    n = len(x)
    return ((n - x.cos().sum() + torch.arange(1, n + 1, dtype=F64) * (1 - x.cos()) - x.sin()) ** 2).sum()


def broyden_tridiagonal(x: Tensor) -> Tensor:
    before, after = torch.nn.functional.pad(x[:-1], (1, 0)), torch.nn.functional.pad(x[1:], (0, 1))
    return (((3 - 2 * x) * x - before - 2 * after + 1) ** 2).sum()


def chebyquad(x: Tensor) -> Tensor:
    n = len(x)
    angle = torch.acos((2 * x - 1).clamp(-1 + 1e-15, 1 - 1e-15))
    i = torch.arange(1, n + 1, dtype=F64)
    integral = torch.where(i % 2 == 0, -1 / (i**2 - 1).clamp(min=1), 0.0)
    return (((i[:, None] * angle).cos().mean(1) - integral) ** 2).sum()


def same(value: float, count: int) -> Tensor:
    return torch.full((count,), value, dtype=F64)


# name: (function, start, lower, upper)
PROBLEMS: dict[str, tuple[Function, Tensor, Tensor, Tensor]] = {
    "rosenbrock": (rosenbrock, tensor(-1.2, 1.0), tensor(-50, 0), tensor(0.5, 100)),
    "freudenstein-roth": (freudenstein_roth, tensor(0.5, -2.0), tensor(0, -30), tensor(20, -0.9)),
    "powell badly scaled": (powell_badly_scaled, tensor(0.0, 1.0), tensor(0, 1), tensor(1, 9)),
    "brown badly scaled": (brown_badly_scaled, tensor(1.0, 1.0), tensor(0, 3e-5), tensor(1e6, 100)),
    "beale": (beale, tensor(1.0, 1.0), tensor(0.6, 0.5), tensor(10, 100)),
    "jennrich-sampson": (jennrich_sampson, tensor(0.3, 0.4), tensor(0.26, 0), tensor(10, 20)),
    "helical valley": (helical_valley, tensor(-1.0, 0.0, 0.0), tensor(-100, -1, -1), tensor(0.8, 1, 1)),
    "bard": (bard, tensor(1.0, 1.0, 1.0), tensor(0.1, 0, 0), tensor(50, 100, 50)),
    "gaussian": (gaussian, tensor(0.4, 1.0, 0.0), tensor(0.398, 1, -0.5), tensor(4.2, 2, 0.1)),
    "box": (box, tensor(0.0, 10.0, 20.0), tensor(0, 5, 0), tensor(2, 9.5, 20)),
    "powell singular": (powell_singular, tensor(3.0, -1.0, 0.0, 1.0), tensor(0.1, -20, -1, -1), tensor(100, 20, 1, 50)),
    "wood": (wood, tensor(-3.0, -1.0, -3.0, -1.0), tensor(-100, -100, -100, -100), tensor(0, 10, 100, 100)),
    "kowalik-osborne": (
        kowalik_osborne, tensor(0.25, 0.39, 0.415, 0.39), tensor(0, -1, 0.13, 0.12), tensor(10, 12, 13, 12)
    ),
    "brown-dennis": (brown_dennis, tensor(25, 5, -5, -1), tensor(-10, 0, -100, -20), tensor(100, 15, 0, 0.2)),
    "biggs": (biggs, tensor(1, 2, 1, 1, 1, 1), tensor(0, 0, 0, 1, 0, 0), tensor(2, 8, 1, 7, 5, 5)),
    "penalty": (penalty, torch.arange(1, 11, dtype=F64), same(0.1, 10), tensor(*[1, 2, 3, 4, 5] * 2)),
    "variably dimensioned": (
        variably_dimensioned, 1 - torch.arange(1, 11, dtype=F64) / 10, tensor(*[-5.0, 0.2] * 5), tensor(*[0.8, 20] * 5)
    ),
    "trigonometric": (
        trigonometric, same(0.1, 10), same(0.02, 10), same(0.3, 10)
    ),
    "broyden tridiagonal": (
        broyden_tridiagonal, same(-1.0, 50), same(-0.6, 50), same(0.2, 50)
    ),
    "chebyquad": (chebyquad, torch.arange(1, 9, dtype=F64) / 9, same(0.06, 8), same(0.9, 8)),
}  # fmt: skip
