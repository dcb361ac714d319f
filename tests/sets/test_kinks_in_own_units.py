"""Kinks of problems whose unknowns have units that are far apart: each entry is judged in units of its own."""

import warnings
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error
from torch import Tensor

import implicitlayer as il

N = 6
RATIOS = [1.0, 1e4, 1e6, 1e-4, 1e-6]
KINDS = ["NonNegative", "Box", "L1"]


def problem(ratio: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Q (condition below 10) and c of 1/2 z'Qz - c'z, and the units s of x = s z, every other one ``ratio``."""
    A = randn(N, N, seed=seed)
    units = torch.where(torch.arange(N) % 2 == 0, ratio, 1.0).double()
    return A @ A.mT / N + torch.eye(N, dtype=F64), 2 * randn(N, seed=seed + 100), units


def term(kind: str, units: Tensor) -> dict[str, Any]:
    if kind == "L1":
        return {"regularizer": il.L1(0.8 / units)}
    return {"constraint": il.sets.NonNegative() if kind == "NonNegative" else il.sets.Box(-0.3 * units, 0.3 * units)}


def solution(kind: str, Q: Tensor, c: Tensor) -> Tensor:
    """z to rounding, by 500 steps of a contraction by 0.9 or less."""
    known, step, z = term(kind, torch.ones(N, dtype=F64)), 1 / torch.linalg.eigvalsh(Q)[-1], torch.zeros(N, dtype=F64)
    for _ in range(500):
        z = next(iter(known.values())).prox(z - step * (Q @ z - c), step)
    return z


def layer(kind: str, Q: Tensor, z: Tensor, units: Tensor) -> Any:
    def objective(x: Tensor, c: Tensor) -> Tensor:
        return 0.5 * (x / units) @ Q @ (x / units) - c @ (x / units)

    return il.argmin(objective, lambda f, x, c: z * units, **term(kind, units))


def free_entries(kind: str, z: Tensor) -> Tensor:
    return z.abs() < 0.3 if kind == "Box" else z != 0


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_clear_in_units_of_its_own_is_no_kink(kind: str, ratio: float) -> None:
    for seed in range(3):
        Q, c, units = problem(ratio, seed)
        z, c = solution(kind, Q, c), c.requires_grad_()
        x = layer(kind, Q, z, units)(torch.zeros(N, dtype=F64), c)  # a warning is an error here
        (got,) = torch.autograd.grad((x / units).sum(), c)
        right, free = torch.zeros(N, dtype=F64), free_entries(kind, z)
        right[free] = torch.linalg.solve(Q[free][:, free], torch.ones(int(free.sum()), dtype=F64))
        assert relative_error(got, right) < 1e-4  # a residual of 1e-10, in units of which one may be 1e6 of another


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_multiplier_of_zero_is_a_kink_in_any_units(kind: str, ratio: float) -> None:
    for seed in range(3):
        Q, c, units = problem(ratio, seed)
        z = solution(kind, Q, c)
        held = (~free_entries(kind, z)).nonzero()[:, 0]
        i = int(held[seed % len(held)])  # c_i is such that the force on this entry is on the border
        c[i] = (Q @ z)[i] + (0.8 * torch.sign(c - Q @ z)[i] if kind == "L1" else 0.0)
        made = layer(kind, Q, z, units)
        with pytest.warns(il.KinkWarning, match="1 of its entries are at a border"):
            made(torch.zeros(N, dtype=F64), c.requires_grad_())
        assert made.records[0].active_set.kinks.nonzero().tolist() == [[i]]


@pytest.mark.parametrize("ratio", [1e-4, 1e-6])
def test_an_answer_too_rough_for_the_units_of_an_entry_is_told(ratio: float) -> None:
    """One half of the way to the bound from the solution, in an entry of small unit; x is right to 1e-4 of its size."""
    Q, c, units = torch.eye(N, dtype=F64), torch.ones(N, dtype=F64), problem(ratio, 0)[2]
    c[0] = -1e-3  # held at zero, by little
    z = c.clamp(min=0.0)
    z[0] = 0.5
    made = layer("NonNegative", Q, z, units)
    with pytest.warns((il.KinkWarning, il.StationarityWarning)):
        made(torch.zeros(N, dtype=F64), c.requires_grad_())


def test_problems_of_a_batch_are_judged_each_by_itself() -> None:
    Q, c, units = problem(1e-6, 1)
    z = solution("NonNegative", Q, c)
    i = int((z == 0).nonzero()[0, 0])
    both = torch.stack([c, c])
    both[1, i] = (Q @ z)[i]  # a kink in the second
    made = il.argmin(
        lambda x, c: 0.5 * ((x / units) @ Q * (x / units)).sum(-1) - (c * (x / units)).sum(-1),
        lambda f, x, c: (z * units).expand(2, N).clone(),
        constraint=il.sets.NonNegative(),
        batch_dims=1,
    )
    with pytest.warns(il.KinkWarning, match=r"in lane \[?1\]?"):
        made(torch.zeros(2, N, dtype=F64), both.requires_grad_())
    assert made.records[0].active_set.num_kinks.tolist() == [0, 1]


@pytest.mark.parametrize("lower", [0.0, -0.5])
def test_a_rough_answer_of_another_active_set_is_told_or_has_the_right_gradient(lower: float) -> None:
    """An entry within 1e-7 to 1e-2 of a kink, and an answer off by 1e-9 to 1e-3, projected: any piece may come out."""
    term, wrong = il.sets.Box(lower, 0.5 if lower else torch.inf), 0
    generator = torch.Generator().manual_seed(0)
    for trial in range(120):
        A, c, v, z, off = (randn(*shape, seed=7 * trial + i) for i, shape in enumerate([(N, N), *[(N,)] * 4]))
        Q = A @ A.mT / N + 0.5 * torch.eye(N, dtype=F64)
        z = term.project(z)
        close, rough = (10 ** torch.empty(()).uniform_(*ends, generator=generator) for ends in [(-7, -2), (-9, -3)])
        z[trial % N] = lower
        at_border = (z == lower) | (z == 0.5)
        push = torch.where(z == lower, -0.5, 0.5) * at_border * (1 + c.abs())
        push[trial % N] = close * (1 if trial % 2 else -1)
        t = Q @ z + push  # the solution for the first sign is z, for the other one nearby
        for _ in range(600):
            z = term.project(z - (Q @ z - t) / torch.linalg.eigvalsh(Q)[-1])
        answer, free = term.project(z + rough * off), (z > lower) & (z < 0.5 if lower else z >= 0)
        layer = il.argmin(lambda x, t, Q=Q: 0.5 * x @ Q @ x - t @ x, lambda f, x, t, y=answer: y, constraint=term)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            (got,) = torch.autograd.grad(layer(torch.zeros(N, dtype=F64), t.requires_grad_()) @ v, t)
        right = torch.zeros(N, dtype=F64)
        right[free] = torch.linalg.solve(Q[free][:, free], v[free])
        off_by = float((got - right).norm() / v.norm())
        wrong += off_by > 1e-2
        assert told or off_by < 1e-6, trial
    assert wrong > 5, "else it tests nothing"
