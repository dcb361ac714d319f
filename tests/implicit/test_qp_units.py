"""``il.qp`` with unknowns in units that are far apart: the answers are those of the program in one unit."""

from typing import Any

import pytest
import torch
from references import F64, randn, relative_error
from torch import Tensor

import implicitlayer as il

CLOSE = 1e-10  # the programs have condition 1e3 or less, and are scaled by powers of ten, which round


def program(seed: int, curved: bool) -> list[Tensor]:
    """Q, p, A, b, G, h; of rank 3 and with a box around a feasible point where not ``curved``."""
    root = randn(6, 6 if curved else 3, seed=seed)
    Q, point = root @ root.T + 0.1 * float(curved) * torch.eye(6, dtype=F64), randn(6, seed=seed + 100)
    A, G = randn(2, 6, seed=seed + 200), randn(8, 6, seed=seed + 300)
    slack = randn(8, seed=seed + 400).abs() + 0.1
    h = G @ point + slack
    if not curved:
        eye = torch.eye(6, dtype=F64)
        G, h = torch.cat([G, eye, -eye]), torch.cat([h, point + 3, 3 - point])
    return [Q, randn(6, seed=seed + 500), A, A @ point, G, h]


def in_units(data: list[Tensor], unit: Tensor) -> list[Tensor]:
    """The program of x / unit."""
    Q, p, A, b, G, h = data
    return [unit[:, None] * Q * unit, unit * p, A * unit, b, G * unit, h]


def solved(data: list[Tensor], weights: Tensor, **settings: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    given = [t.clone().requires_grad_() for t in data]
    x, multipliers = il.qp(*given, return_multipliers=True, **settings)
    return x.detach(), [t.detach() for t in multipliers], list(torch.autograd.grad((weights * x).sum(), given))


def near(found: Tensor, expected: Tensor) -> bool:
    """Zeros, as gradients in p at a corner, are rounding of numbers of order one."""
    return bool((found - expected).norm() <= CLOSE * (1 + expected.norm()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("curved", [True, False])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("power", [4, 8])
def test_units_of_unknowns_do_not_matter(power: int, seed: int, curved: bool) -> None:
    data, weights = program(seed, curved), randn(6, seed=seed + 600)
    unit = 10.0 ** (power * (2 * torch.rand(6, dtype=F64, generator=torch.Generator().manual_seed(seed)) - 1))
    x, multipliers, gradients = solved(data, weights)
    y, others, changed = solved(in_units(data, unit), unit * weights)
    assert near(unit * y, x)
    assert all(near(a, b) for a, b in zip(others, multipliers, strict=True))
    columns = unit[:, None]
    back = [
        columns * changed[0] * unit,
        unit * changed[1],
        changed[2] * unit,
        changed[3],
        changed[4] * unit,
        changed[5],
    ]
    assert all(near(a, b) for a, b in zip(back, gradients, strict=True))


@pytest.mark.filterwarnings("error")
def test_every_program_of_a_batch_has_its_own_units() -> None:
    programs = [program(seed, True) for seed in range(3)]
    units = [torch.logspace(-k, k, 6, dtype=F64) for k in (0, 5, -7)]
    stacked = [torch.stack(parts) for parts in zip(*map(in_units, programs, units), strict=True)]
    expected = torch.stack([il.qp(*data) for data in programs])
    scales = torch.stack(units)
    assert near(scales * il.qp(*stacked), expected)
    assert near(scales * torch.func.vmap(il.qp)(*stacked), expected)
    slopes = [torch.func.jacrev(il.qp, 1)(*data) for data in programs]
    for slope, unit, data in zip(slopes, units, programs, strict=True):
        found = torch.func.jacrev(il.qp, 1)(*in_units(data, unit))
        assert near(unit[:, None] * found * unit, slope)
        forward = torch.func.jacfwd(il.qp, 1)(*in_units(data, unit))
        assert near(unit[:, None] * forward * unit, slope)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("far", [1e14, 1e15, 1e18])
def test_curvatures_that_are_far_apart_are_all_curvatures(far: float) -> None:
    """Bounds know no units: those of the unknowns are told by Q alone."""
    Q, p = torch.diag(torch.tensor([1.0, far], dtype=F64)), -torch.tensor([1.0, far**0.5], dtype=F64)
    assert relative_error(il.qp(Q, p), torch.tensor([1.0, far**-0.5], dtype=F64)) < CLOSE
    assert relative_error(il.qp(Q, torch.tensor([-1.0, 0.0], dtype=F64)), torch.tensor([1.0, 0.0], dtype=F64)) < CLOSE
    upper = torch.tensor([0.5, 2 * far**-0.5], dtype=F64)
    p.requires_grad_()
    x = il.qp(Q, p, ub=upper)
    assert relative_error(x.detach(), torch.tensor([0.5, far**-0.5], dtype=F64)) < CLOSE
    (gradient,) = torch.autograd.grad(x.sum(), p)
    assert relative_error(gradient * far, torch.tensor([0.0, -1.0], dtype=F64)) < CLOSE


def test_a_solver_of_the_user_is_given_what_the_user_gave() -> None:
    Q = torch.diag(torch.tensor([1.0, 1e14], dtype=F64))
    seen: list[Tensor] = []

    def solver(Q: Tensor, p: Tensor, *rest: Tensor) -> Tensor:
        seen.append(Q)
        return torch.linalg.solve(Q, -p)

    x = il.qp(Q, -torch.tensor([1.0, 1e7], dtype=F64), solver=solver)
    assert torch.equal(seen[0], Q)
    assert relative_error(x, torch.tensor([1.0, 1e-7], dtype=F64)) < CLOSE


@pytest.mark.parametrize("ratio", [1e4, 1e6, 1e-6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_closest_feasible_program_does_not_depend_on_the_units_of_the_unknowns(seed: int, ratio: float) -> None:
    """Two rows that contradict each other; the program in units of its own is the reference."""
    n, units = 5, torch.where(torch.arange(5) % 2 == 0, ratio, 1.0).double()
    generator = torch.Generator().manual_seed(seed)
    A, p, G = (torch.randn(*k, generator=generator, dtype=torch.float64) for k in ((n, n), (n,), (6, n)))
    p, h = 2 * p, 0.3 * torch.rand(6, generator=generator, dtype=torch.float64)
    Q, G, h = A @ A.mT / n + torch.eye(n, dtype=torch.float64), torch.cat([G, -G[:1]]), torch.cat([h, -h[:1] - 0.2])
    v = torch.arange(1.0, n + 1).double()

    def solved(s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        free = p.clone().requires_grad_()
        x = il.qp(Q / s[:, None] / s, free / s, G=G / s, h=h, infeasible="closest")
        return x.detach() / s, torch.autograd.grad((x / s) @ v, free)[0]

    for got, right in zip(solved(units), solved(torch.ones(n, dtype=torch.float64)), strict=True):
        assert torch.allclose(got, right, rtol=1e-9, atol=1e-9)
