"""An answer near enough for its own size, over whose distance from the solution the Hessian changes."""

from typing import Any

import pytest
import torch

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
