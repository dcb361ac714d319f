"""An answer near enough for its own size, over whose distance from the solution the Hessian changes."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from references import randn

import implicitlayer as il

F64 = torch.float64
BARRIER = 1e-4  # c x - BARRIER log(1 - x), c = -1: x = 1 + BARRIER / c, at a slack of BARRIER, and dx / dc = -BARRIER


def barrier_slope(part_of_slack: float, **settings: Any) -> tuple[float, Any]:
    """dx / dc by a layer whose answer is off by this part of the slack."""
    layer = il.argmin(
        lambda x, c: (c * x - BARRIER * torch.log(1 - x)).sum(),
        lambda f, x, c: 1 + BARRIER / c * (1 + part_of_slack),
        **settings,
    )
    c = torch.tensor([-1.0], dtype=F64, requires_grad=True)
    return float(torch.autograd.grad(layer(torch.zeros(1, dtype=F64), c).sum(), c)[0]), layer


def test_a_hessian_that_changes_over_the_distance_of_the_answer_is_told() -> None:
    with pytest.warns(il.StationarityWarning, match=r"the Hessian changes by \d\.\de-01 of itself over that distance"):
        slope, layer = barrier_slope(0.1)  # x is right to 1e-5
    assert slope == pytest.approx(-BARRIER * 1.1**2, rel=1e-6), "else this tests nothing: H = BARRIER / slack^2"
    assert layer.records[0].stationary
    with pytest.raises(il.StationarityError, match="the Hessian changes by"):
        barrier_slope(0.1, on_failure="raise")
    assert barrier_slope(0.1, on_failure="raise", polish=4)[0] == pytest.approx(-BARRIER, rel=1e-9)
    # an error of 2 x 1e-4 is what an answer within stationarity_rtol lets expect
    assert barrier_slope(1e-4, on_failure="raise")[0] == pytest.approx(-BARRIER, rel=3e-4)


def test_an_ordinary_curve_is_no_changing_hessian() -> None:
    # cosh bends by tanh(x) < 1 of itself for a distance of 1: 9e-4 of |x| = 2 changes it by less than 2e-3
    layer = il.argmin(
        lambda x, t: (torch.cosh(x) - t * x).sum(), lambda f, x, t: torch.asinh(t) * (1 + 9e-4), on_failure="raise"
    )
    layer(torch.zeros(3, dtype=F64), torch.tensor([3.0, -2.0, 0.5], dtype=F64, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("unit", [1.0, 1e8, 1e-8])
@pytest.mark.parametrize("width", [1.0, 1e-2, 1e2])
def test_a_pseudo_huber_loss_has_its_gradient_in_any_unit(unit: float, width: float) -> None:
    t = torch.tensor([2.0, -3.0], dtype=F64).mul(unit).requires_grad_()
    ridge = 1e-3

    def objective(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        u = (x - t) / (width * unit)
        return (width**2 * ((1 + u * u).sqrt() - 1) + 0.5 * ridge * (x / unit) ** 2).sum()

    x = il.argmin(objective, il.solvers.NewtonCG(rtol=1e-13))(torch.zeros(2, dtype=F64), t)
    curvature = (1 + ((x - t).detach() / (width * unit)) ** 2) ** -1.5  # of the loss; dx / dt = curvature / (both)
    expected = curvature / (curvature + ridge)
    assert torch.allclose(torch.autograd.grad(x.sum(), t)[0], expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("off", [1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 8e-4])
@pytest.mark.parametrize("dtypes", [(torch.float32, F64), (torch.bfloat16, torch.float32)], ids=str)
def test_a_model_in_a_shorter_dtype_that_sees_no_short_step_is_no_changing_hessian(dtypes: Any, off: float) -> None:
    """What changes for a step that the model does not see is rounding; the answer is right to ``off``."""
    short, long = dtypes
    weight = randn(8, 3, seed=2)

    def objective(x: torch.Tensor, t: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.tanh(weight.to(dtype) @ x.to(dtype)).sum().to(x.dtype) + 1.5 * ((x - t) ** 2).sum()

    t, none = randn(3, seed=1), torch.zeros(3, dtype=F64)
    right = il.argmin(lambda x, t: objective(x, t, F64), il.solvers.NewtonCG(rtol=1e-14))(none, t)
    answer = (right * (1 + off * torch.tensor([1.0, -1.0, 1.0]))).to(long)
    layer = il.argmin(lambda x, t: objective(x, t, short), lambda f, x, t: answer, on_failure="raise")
    # near enough in the sense of `stationarity_rtol`, up to what the short model takes for the minimum
    layer = replace(layer, stationarity_rtol=1e-3 + 8 * torch.finfo(short).eps)
    assert layer(none.to(long), t.to(long).requires_grad_()).requires_grad


def test_a_barrier_beside_a_model_in_float32_is_told_where_it_changes() -> None:
    def objective(x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return (torch.tanh(x.float()).double() * 1e-3 + c * x - BARRIER * torch.log(1 - x)).sum()

    def slope(part_of_slack: float) -> float:
        pull = c.detach() + 1e-3 * (1 - math.tanh(1) ** 2)
        layer = il.argmin(objective, lambda f, x, c: 1 + BARRIER / pull * (1 + part_of_slack), on_failure="raise")
        return float(torch.autograd.grad(layer(torch.zeros(1, dtype=F64), c).sum(), c)[0])

    c = torch.tensor([-1.0], dtype=F64, requires_grad=True)
    with pytest.raises(il.StationarityError, match="the Hessian changes by"):
        slope(0.1)
    assert slope(1e-4) == pytest.approx(-BARRIER, rel=2e-3)


def of_cube(kind: str, off: float, **settings: Any) -> Any:
    """x = t^(1/3), in equations that a rotation mixes, found with this relative error; dx / dt = 1 / (3 x^2)."""
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=F64)

    def residual(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return turn @ (x**3 - t)

    def solver(f: Any, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return t ** (1 / 3) * (1 + off)

    if kind == "root":
        return il.root(residual, solver, linear_solver=il.Dense(), **settings)
    return il.fixed_point(lambda x, t: x - residual(x, t), solver, linear_solver=il.Dense(), **settings)


@pytest.mark.parametrize("kind", ["root", "fixed_point"])
def test_a_jacobian_that_changes_over_the_distance_of_the_answer_is_told(kind: str) -> None:
    t = torch.tensor([1e-12, 2e-12], dtype=F64, requires_grad=True)
    init = torch.ones(2, dtype=F64)  # the answer is within 1e-3 of the way from here, and off by a tenth of itself
    with pytest.warns(il.StationarityWarning, match=r"the Jacobian changes by \d\.\de-01 of itself over that distance"):
        x = of_cube(kind, 0.1)(init, t)
    (slope,) = torch.autograd.grad(x.sum(), t)
    assert slope.tolist() == pytest.approx((1 / (3 * 1.1**2 * t.detach() ** (2 / 3))).tolist()), "else it tests nothing"
    with pytest.raises(il.StationarityError, match="the Jacobian changes by"):
        of_cube(kind, 0.1, on_failure="raise")(init, t)
    exact = of_cube(kind, 0.1, on_failure="raise", polish=8)(init, t)
    (slope,) = torch.autograd.grad(exact.sum(), t)
    # a map near the identity rounds x - map(x) by eps |x|, which J = 3 x^2 = 3e-8 takes for 7e-9 of |x|
    assert slope.tolist() == pytest.approx((1 / (3 * t.detach() ** (2 / 3))).tolist(), rel=1e-7)
    of_cube(kind, 1e-4, on_failure="raise")(init, t)


@pytest.mark.parametrize("solver", [il.solvers.Newton(), il.solvers.Broyden()], ids=["Newton", "Broyden"])
def test_a_root_that_the_librarys_own_solver_leaves_early_is_told(solver: Any) -> None:
    t = torch.tensor([1e-12], dtype=F64, requires_grad=True)
    with pytest.warns(il.StationarityWarning, match="the Jacobian changes"):
        il.root(lambda x, t: x**3 - t, solver)(torch.ones(1, dtype=F64), t)


def test_an_answer_that_has_run_away_to_where_numbers_end_is_told() -> None:
    t = torch.tensor([-1.0], dtype=F64, requires_grad=True)  # exp(x) + x has no minimum
    layer = il.argmin(lambda x, t: (x.exp() - t * x).sum(), lambda f, x, t: torch.full_like(x, -1.79e308))
    with pytest.warns(il.StationarityWarning, match=r"at least about inf away \(inf of its size"):
        il.value(layer)(torch.zeros(1, dtype=F64), t)
