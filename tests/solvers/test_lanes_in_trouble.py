"""Every batched solver names the lanes in trouble and leaves the others as they are without them."""

import math
from typing import Any

import pytest
import torch
from references import F64, randn, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status
from implicitlayer.solvers import (
    LBFGS,
    AcceleratedGradient,
    AndersonAcceleration,
    Broyden,
    GradientDescent,
    InteriorPoint,
    Newton,
    NewtonCG,
    ProximalGradient,
    TorchOptimizer,
)

TO = {"rtol": 1e-8, "max_steps": 400}
MINIMISERS: dict[str, Any] = {
    "gradient descent": GradientDescent(1.0, **TO),
    "gradient descent, fixed steps": GradientDescent(1.0, max_steps=20),
    "gradient descent, armijo": GradientDescent(1.0, line_search="armijo", **TO),
    "nesterov": AcceleratedGradient(1.0, strong_convexity=0.1, **TO),
    "nesterov, searched": AcceleratedGradient(**TO),
    "nesterov, fixed steps": AcceleratedGradient(1.0, max_steps=20),
    "lbfgs": LBFGS(**TO),
    "lbfgs, pairs": LBFGS(memory=4, **TO),
    "lbfgs, fixed steps": LBFGS(max_steps=3),
    "newton-cg": NewtonCG(**TO),
    "torch": TorchOptimizer(torch.optim.Adam, max_steps=20, lr=0.1),
}
ROOTS: dict[str, Any] = {
    "newton": Newton(batch_dims=1),
    "broyden": Broyden(batch_dims=1),
    "anderson": AndersonAcceleration(batch_dims=1),
}


def quadratics(x: Tensor, matrices: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (x * (matrices @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) - (b * x).sum(-1)


def batch() -> tuple[Tensor, Tensor]:
    return torch.stack([spd_matrix(6, c, seed=7) for c in (0.0, 0.3, 0.6, 1.0)]), randn(4, 6, seed=8)


class Zero:
    """A term that is zero: the proximal solver knows lanes through its layer only."""

    def __init__(self, objective: Any) -> None:
        self.objective, self.terms = objective, self

    def __call__(self, *args: Any) -> Any:
        return self.objective(*args)

    def prox(self, y: Any, step: Tensor, *theta: Any) -> Any:
        return y


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*MINIMISERS, "proximal", *ROOTS])
def test_a_lane_that_is_not_finite_is_named_and_changes_no_bit_of_the_others(name: str, poison: float) -> None:
    matrices, b = batch()
    function: Any = quadratics
    if name == "proximal":
        solver, function = ProximalGradient(**TO), Zero(quadratics)
    elif name in MINIMISERS:
        solver = MINIMISERS[name]
    else:
        solver = ROOTS[name]

        def function(x: Tensor, matrices: Tensor, b: Tensor) -> Tensor:
            residual = b - (matrices @ x.unsqueeze(-1)).squeeze(-1)
            return x + residual if name == "anderson" else residual

    init = torch.zeros(4, 6, dtype=F64)
    clean = solver.run(function, init, matrices, b)
    bad = b.clone()
    bad[3, 0] = poison
    result = solver.run(function, init, matrices, bad)
    assert clean.status.ok and clean.message == ""
    assert result.status is Status.NONFINITE and "in lane 3 of (4,)" in result.message
    assert torch.equal(result.value[:3], clean.value[:3])


@pytest.mark.parametrize("name", [n for n, s in MINIMISERS.items() if getattr(s, "rtol", 0) > 0])
def test_a_lane_that_misses_the_tolerance_is_named(name: str) -> None:
    import dataclasses

    matrices, b = batch()
    init = torch.linalg.solve(matrices, b)
    init[1] = 1e3
    solver = dataclasses.replace(MINIMISERS[name], rtol=0.0, atol=1e-12, max_steps=2)
    if isinstance(solver, NewtonCG):
        solver = dataclasses.replace(solver, cg_steps=1)  # else one step does
    result = solver.run(quadratics, init, matrices, b)
    assert result.status is Status.MAX_STEPS_REACHED
    assert result.message == "The step limit came before the tolerance in lane 1 of (4,)."


@pytest.mark.parametrize("solver", MINIMISERS.values(), ids=MINIMISERS)
def test_a_batch_of_no_lanes_is_no_trouble(solver: Any) -> None:
    result = solver.run(lambda x: (x * x).sum(-1), torch.zeros(0, 3, dtype=F64))
    assert result.status.ok and result.message == "" and result.value.shape == (0, 3)


def test_a_root_that_does_not_exist_is_named() -> None:
    shift = torch.tensor([[-1.0], [1.0]], dtype=F64)
    for solver in (Newton(batch_dims=1), Broyden(batch_dims=1)):
        result = solver.run(lambda x: x * x + shift, torch.full((2, 1), 0.7, dtype=F64))  # x^2 + 1 has none
        assert not result.status.ok and "in lane 1 of (2,)" in result.message
        assert float(result.value[0]) == pytest.approx(1.0, abs=1e-11)


def test_a_quadratic_program_that_is_not_finite_has_its_own_code() -> None:
    p = torch.tensor([[-1.0, -1.0], [math.nan, -1.0]], dtype=F64)
    full = torch.eye(2, dtype=F64).expand(2, 2, 2)
    none = torch.zeros(2, 0, 2, dtype=F64), torch.zeros(2, 0, dtype=F64)
    solution = InteriorPoint()(full, p, *none, full, torch.full((2, 2), 0.5, dtype=F64))
    assert [int(code) for code in solution.codes] == [0, 4]
    assert torch.allclose(solution.x[0], torch.full((2,), 0.5, dtype=F64), atol=1e-7)  # rtol 1e-9, of a vertex


def test_a_layer_passes_on_which_lane_it_was() -> None:
    theta = torch.tensor([1.0, 2.0, torch.nan, 3.0], dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, t: ((x - t) ** 2).sum(), il.solvers.LBFGS(rtol=1e-8))
    with pytest.raises(il.NonFiniteError, match=r"lane 2 of \(4,\)"):
        torch.vmap(layer)(torch.zeros(4, 3, dtype=F64), theta)
