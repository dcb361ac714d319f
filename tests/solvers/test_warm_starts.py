"""Solvers started at a solution: where only rounding is left they end soon and say so, alone and as lanes."""

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
    Newton,
    NewtonCG,
    ProjectedGradient,
    ProximalGradient,
)

L, MU = 1.01, 0.099  # around the spectrum of spd_matrix(., 1)
MAKERS: dict[str, Any] = {
    "gradient descent": lambda **s: GradientDescent(1 / L, **s),
    "step per leaf": lambda **s: GradientDescent(torch.tensor(1 / L, dtype=F64), **s),
    "armijo": lambda **s: GradientDescent(1 / L, line_search="armijo", **s),
    "nesterov": lambda **s: AcceleratedGradient(L, strong_convexity=MU, **s),
    "nesterov, restarts": lambda **s: AcceleratedGradient(L, **s),
    "nesterov, searched": AcceleratedGradient,
    "lbfgs": LBFGS,
    "lbfgs, pairs": lambda **s: LBFGS(memory=3, **s),
    "newton": NewtonCG,
}
TERMED: dict[str, Any] = {
    "proximal": lambda **s: ProximalGradient(il.L1(0.0), **s),
    "proximal, fixed step": lambda **s: ProximalGradient(il.L1(0.0), step_size=1 / L, **s),
    "proximal, plain": lambda **s: ProximalGradient(il.L1(0.0), accelerated=False, **s),
    "projected": lambda **s: ProjectedGradient(il.sets.Box(-1e3, 1e3), **s),
}
DTYPES = pytest.mark.parametrize("dtype", [F64, torch.float32])
FEW = 300  # of 5000: a random number sets a record rarely, and a cycle of rounding errors is given 400 at most


def quadratics(x: Tensor, matrices: Tensor, b: Tensor) -> Tensor:
    return 0.5 * (x * (matrices @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) - (b * x).sum(-1)


def fit(x: Tensor, factor: Tensor, target: Tensor) -> Tensor:
    """The same gradient, as a least squares fit whose least value is 0 but for rounding."""
    return 0.5 * ((factor @ x.unsqueeze(-1)).squeeze(-1) - target).square().sum(-1)


def problem(name: str, dtype: torch.dtype) -> tuple[Any, tuple[Tensor, Tensor], Tensor]:
    """Objective, theta, and the solution rounded to the dtype."""
    matrix, b = spd_matrix(8, 1, seed=1), randn(8, seed=2)
    solution = torch.linalg.solve(matrix, b)
    if name == "quadratic":
        return quadratics, (matrix.to(dtype), b.to(dtype)), solution.to(dtype)
    factor = torch.linalg.cholesky(matrix).mT.contiguous()
    return fit, (factor.to(dtype), (factor @ solution).to(dtype)), solution.to(dtype)


@DTYPES
@pytest.mark.parametrize("name", ["quadratic", "fit"])
@pytest.mark.parametrize("kind", {**MAKERS, **TERMED})
def test_a_start_at_the_solution_ends_after_few_steps(kind: str, name: str, dtype: torch.dtype) -> None:
    objective, theta, solution = problem(name, dtype)
    result = {**MAKERS, **TERMED}[kind](rtol=1e-6, max_steps=5000).run(objective, solution, *theta)
    assert result.num_steps <= FEW
    assert result.status in (Status.STAGNATED, Status.CONVERGED)  # a gradient may be 0 by luck
    if result.status is Status.STAGNATED:
        assert "as small as" in result.message and "rounding errors allow" in result.message
    # |x| = 10 |b| at most, and gradients of n = 8 terms round by a few eps of H x: 30 eps |b| over mu = 0.1
    error = (result.value.double() - solution.double()).norm()
    assert float(error) <= 300 * torch.finfo(dtype).eps * float(randn(8, seed=2).norm())


@pytest.mark.parametrize("kind", MAKERS)
def test_only_the_lanes_concerned_end_early(kind: str) -> None:
    matrices, b = torch.stack([spd_matrix(6, 1, seed=7)] * 3), randn(3, 6, seed=8)
    solution = torch.linalg.solve(matrices, b)
    init = torch.stack([solution[0], torch.zeros(6, dtype=F64), torch.zeros(6, dtype=F64)])
    solver = MAKERS[kind](rtol=1e-8, max_steps=5000)
    result = solver.run(quadratics, init, matrices, b)
    others = solver.run(quadratics, 0 * init, matrices, b)
    assert others.status is Status.CONVERGED and torch.equal(result.value[1:], others.value[1:])
    assert result.status is Status.STAGNATED and "in lane 0 of (3,)" in result.message
    assert float((result.value[0] - solution[0]).norm()) <= 1e-12 and result.num_steps <= FEW


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["quadratic", "fit"])
def test_a_start_near_by_still_reaches_a_tolerance_that_values_cannot_see(kind: str, name: str) -> None:
    """1e-9 away the values differ by 1e-18, which is rounding, and the gradients by 1e-9, which is not."""
    objective, theta, solution = problem(name, F64)
    init = solution + 1e-9 * randn(8, seed=3)
    result = MAKERS[kind](rtol=1e-4, max_steps=5000).run(objective, init, *theta)
    assert result.status is Status.CONVERGED
    assert float((result.value - solution).norm()) <= 1e-4 * 10 * float((init - solution).norm()) + 1e-14


@pytest.mark.parametrize("log10_cond", [2, 4])
@pytest.mark.parametrize("settings", [{}, {"smoothness": 1.0}, {"smoothness": 1.0, "strong_convexity": True}])
def test_ripples_of_the_momentum_are_no_stall(log10_cond: int, settings: dict[str, Any]) -> None:
    """Far below the rounding of the values, and with gradients that rise for hundreds of steps."""
    matrix, x0 = spd_matrix(10, log10_cond, seed=5), randn(10, seed=6)
    if "strong_convexity" in settings:
        settings = {**settings, "strong_convexity": 10.0**-log10_cond}
    solver = AcceleratedGradient(rtol=1e-10, max_steps=20_000, **settings)
    result = solver.run(lambda x: 0.5 * x @ matrix @ x + 1e3, x0)
    assert result.status is Status.CONVERGED


def test_a_slow_descent_below_the_rounding_of_the_values_is_no_stall() -> None:
    matrix = spd_matrix(6, 3, seed=5)
    result = GradientDescent(1.0, rtol=1e-8, max_steps=40_000).run(
        lambda x: 0.5 * x @ matrix @ x + 1e3, randn(6, seed=6)
    )
    assert result.status is Status.CONVERGED


def test_steps_that_are_too_long_are_divergence_and_no_stall() -> None:
    result = GradientDescent(2.5, rtol=1e-8, max_steps=100).run(lambda x: 0.5 * (x - 1) @ (x - 1), randn(3, seed=1))
    assert result.status is Status.MAX_STEPS_REACHED and result.num_steps == 100


def test_the_answer_of_a_stalled_line_search_is_its_best_point() -> None:
    objective, theta, solution = problem("quadratic", F64)
    norms: list[float] = []
    result = LBFGS(rtol=1e-6, max_steps=500, callback=lambda i: norms.append(float(i.gradient_norm))).run(
        objective, solution, *theta
    )
    assert result.status is Status.STAGNATED and len(norms) > 2 and norms[-1] == min(norms)


@DTYPES
@pytest.mark.parametrize("lanes", [(), (2,)])
@pytest.mark.parametrize("kind", [Newton, Broyden, AndersonAcceleration])
def test_roots_and_fixed_points_end_soon_too(kind: Any, lanes: tuple[int, ...], dtype: torch.dtype) -> None:
    weights, shift = (0.8 * spd_matrix(6, 1, seed=3)).to(dtype), randn(6, seed=4).to(dtype)

    def contraction(x: Tensor) -> Tensor:
        return torch.tanh(x @ weights) + shift

    fixed = kind is AndersonAcceleration
    function = contraction if fixed else lambda x: contraction(x) - x
    x = torch.zeros(*lanes, 6, dtype=dtype)
    for _ in range(300):  # a contraction by 0.8: rounding is all that is left
        x = contraction(x)
    result = kind(rtol=1e-3, max_steps=500, batch_dims=len(lanes)).run(function, x)
    assert result.num_steps <= 100 and result.status in (Status.STAGNATED, Status.CONVERGED)
    assert float((result.value - x).abs().max()) <= 100 * torch.finfo(dtype).eps * float(x.abs().max())
