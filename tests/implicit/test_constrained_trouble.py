"""Layers over sets where something is wrong or on an edge: infeasible answers, kinks, shapes, scales, refusals."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, randn, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer.sets import Affine, Ball, Box, NonNegative, Projection, Simplex

H = spd_matrix(5, 1.0, seed=1)
WEIGHTS = torch.arange(1.0, 6.0, dtype=F64)
ZERO = torch.zeros(5, dtype=F64)
PG = il.solvers.ProximalGradient(rtol=1e-13, max_steps=2000)


def quadratic(x: Tensor, b: Tensor, *_: Any) -> Tensor:
    return 0.5 * x @ H @ x - b @ x + 0.1 * torch.logsumexp(x, 0)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def unconstrained(f: Any, x: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(H, b)


def test_a_solver_that_ignores_the_set_is_refused_with_its_distance() -> None:
    layer = il.argmin(lambda x, b: 0.5 * x @ H @ x - b @ x, unconstrained, constraint=Ball(0.1))
    b = randn(5, seed=7).requires_grad_()
    distance = float(torch.linalg.solve(H, b.detach()).norm()) - 0.1
    with pytest.raises(il.InfeasibleError, match=rf"does not satisfy the constraint: its distance is {distance:.3g} "):
        layer(ZERO, b)


def test_a_feasible_point_that_is_no_solution_is_not_stationary() -> None:
    layer = il.argmin(lambda x, b: 0.5 * x @ H @ x - b @ x, lambda f, x, b: x, constraint=Ball(0.1))
    with pytest.warns(il.StationarityWarning, match="not stationary"):
        layer(ZERO, randn(5, seed=7).requires_grad_())
    layer = il.argmin(lambda x, b: 0.5 * x @ H @ x - b @ x, unconstrained, regularizer=il.L1(0.5))
    with pytest.warns(il.StationarityWarning, match="not stationary"):
        layer(ZERO, randn(5, seed=7).requires_grad_())


def test_equations_without_solution_are_refused() -> None:
    A = torch.ones(2, 5, dtype=F64)
    layer = il.argmin(quadratic, PG, constraint=Affine(A, torch.tensor([0.0, 1.0], dtype=F64)))
    with pytest.raises(il.InfeasibleError, match="Or the set is empty"):
        layer(ZERO, randn(5, seed=7).requires_grad_())


@pytest.mark.parametrize("build", [il.L1, lambda s: il.ElasticNet(1.0, s), il.GroupL1])
def test_a_negative_strength_that_a_transform_hides_is_refused(build: Callable[..., Any]) -> None:
    layer = il.argmin(quadratic, PG, regularizer=lambda b, s: build(s), stationarity_rtol=0.5)
    strengths, b = torch.tensor([0.5, -0.01], dtype=F64), randn(5, seed=7)
    with pytest.raises(il.InfeasibleError, match=r"the regularizer in lane 1 of \(2,\): .* or a strength negative"):
        torch.func.vmap(torch.func.grad(lambda s: layer(ZERO, b, s).sum()))(strengths)


def test_an_explanation_reads_the_set_too() -> None:
    layer = il.argmin(quadratic, PG, constraint=lambda b, hi, unused: Box(-1.0, hi))
    theta = [randn(5, seed=7).requires_grad_(), scalar(0.1).requires_grad_(), scalar(1.0).requires_grad_()]
    lines = str(il.explain_gradient(layer, layer(ZERO, *theta).detach(), *theta)).splitlines()
    assert lines[0].startswith("theta[0]") and lines[0].endswith("gets its gradient.")
    assert lines[1].startswith("theta[1]") and lines[1].endswith("gets its gradient.")
    assert "theta[2]" in lines[2] and "never reads it" in lines[2]


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_unknowns_of_every_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    t = randn(*shape, seed=80, dtype=dtype).requires_grad_()
    solver = il.solvers.ProximalGradient(rtol=1e-6)
    layer = il.argmin(lambda x, t: (0.5 * (x - t) ** 2).sum(), solver, regularizer=il.L1(0.3))
    (slope,) = torch.autograd.grad(layer(torch.zeros(shape, dtype=dtype), t).sum(), t)
    # the solver's first step is exact here, and GMRES stops at 1e-5 in float32
    torch.testing.assert_close(slope, (t.detach().abs() > 0.3).to(dtype), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_neither_the_scale_of_the_objective_nor_that_of_x_matters(scale: float) -> None:
    t = torch.tensor([-1.0, 0.5, 3.0], dtype=F64, requires_grad=True)
    start, solver = torch.zeros(3, dtype=F64), il.solvers.ProximalGradient(rtol=1e-12)
    layer = il.argmin(lambda x, t: scale * (0.5 * (x - t) ** 2).sum(), solver, regularizer=il.L1(0.6 * scale))
    (slope,) = torch.autograd.grad(layer(start, t).sum(), t)
    torch.testing.assert_close(slope, torch.tensor([1.0, 0.0, 1.0], dtype=F64), rtol=0, atol=1e-12)
    layer = il.argmin(lambda x, t: (0.5 * (x / scale - t) ** 2).sum(), solver, constraint=Box(0.0, scale))
    (slope,) = torch.autograd.grad(layer(start, t).sum() / scale, t)
    torch.testing.assert_close(slope, torch.tensor([0.0, 1.0, 0.0], dtype=F64), rtol=0, atol=1e-12)


def test_a_linear_objective_has_a_vertex_of_the_simplex_as_solution() -> None:
    c = torch.tensor([3.0, 1.0, 2.0], dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, c: c @ x, il.solvers.ProjectedGradient(rtol=1e-12), constraint=Simplex(1.0))
    x = layer(torch.full((3,), 1 / 3, dtype=F64), c)
    assert x.tolist() == [0.0, 1.0, 0.0]
    assert torch.autograd.grad(x @ WEIGHTS[:3], c)[0].tolist() == [0.0, 0.0, 0.0]


def kinked(**settings: Any) -> Callable[..., Tensor]:
    distance = lambda x, t: 0.5 * ((x - t) ** 2).sum()  # noqa: E731
    return il.argmin(distance, lambda f, x, t: t.clamp_min(0), constraint=NonNegative(), **settings)


def test_a_kink_is_warned_about_and_recorded() -> None:
    t = torch.tensor([0.0, 1.0, -1.0], dtype=F64, requires_grad=True)  # entry 0: at the bound with multiplier 0
    layer = kinked()
    with pytest.warns(il.KinkWarning, match=r"at a kink: 1 of its entries .* its derivative is that of one side"):
        layer(torch.zeros(3, dtype=F64), t)
    assert layer.records[0].active_set.kinks.tolist() == [True, False, False]  # type: ignore[attr-defined]
    with pytest.raises(il.KinkError, match="at a kink"):
        kinked(on_failure="raise")(torch.zeros(3, dtype=F64), t)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kinked(on_failure="ignore")(torch.zeros(3, dtype=F64), t)


def test_the_lanes_with_a_kink_are_named() -> None:
    t = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=F64, requires_grad=True)
    layer = kinked()
    with pytest.warns(il.KinkWarning, match=r"at a kink in lane 1 of \(2,\)"):
        torch.func.vmap(lambda t: layer(torch.zeros(2, dtype=F64), t))(t)
    found = layer.records[0].active_set  # type: ignore[attr-defined]
    assert found.num_kinks.tolist() == [0, 1]
    assert found.active.shape == (2, 2)
    assert str(found) == "active 0 to 1 over (2,) lanes, kinks 0 to 1 over (2,) lanes"


@pytest.mark.parametrize("gap", [1e-3, -1e-3])
def test_next_to_a_kink_the_derivative_is_that_of_its_side_without_a_warning(gap: float) -> None:
    t = torch.tensor([gap], dtype=F64, requires_grad=True)
    layer = kinked()
    (slope,) = torch.autograd.grad(layer(torch.zeros(1, dtype=F64), t), t)
    assert float(slope) == float(gap > 0)


def test_kinks_of_a_projection_of_the_user_are_unknown() -> None:
    ceiling = Projection(lambda y, b, top: torch.where(y < top, y, top))
    layer = il.argmin(quadratic, PG, constraint=ceiling)
    layer(ZERO, (1.5 * randn(5, seed=7)).requires_grad_(), scalar(0.4))
    found = layer.records[0].active_set  # type: ignore[attr-defined]
    assert not found.kinks_known
    assert str(found).endswith("kinks unknown")


def test_an_objective_without_a_graph_is_refused() -> None:
    layer = il.argmin(lambda x, t: (x.detach() * t).sum(), lambda f, x, t: x, constraint=NonNegative())
    with pytest.raises(il.ObjectiveError, match="does not depend on x in a way autograd can see"):
        layer(ZERO, ZERO.clone().requires_grad_())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"constraint": Box(), "regularizer": il.L1(1.0)}, "constraint and regularizer cannot be given together"),
        ({"step_size": 1.0}, r"step_size=1\.0 needs a constraint or a regularizer"),
        ({"constraint": Box(), "linear_solver": il.Minres()}, r"linear_solver=Minres\(\) is for symmetric systems"),
        ({"constraint": Box(), "step_size": 0.0}, r"step_size=0\.0 must be positive and finite"),
        ({"constraint": Box(), "curvature": "gauss_newton"}, "do not apply to a layer with a constraint"),
        ({"regularizer": il.L1(1.0), "damping": 1.0}, "do not apply to a layer with a regularizer"),
        (
            {"constraint": Box(), "assumptions": il.Assumptions(strong_convexity=1.0)},
            "assumptions are those of a lemma",
        ),
    ],
)
def test_settings_that_contradict_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        il.argmin(quadratic, PG, **settings)


def test_what_is_no_set_is_refused_when_the_layer_is_made() -> None:
    with pytest.raises(TypeError, match="constraint must be a set or regulariser"):
        il.argmin(quadratic, PG, constraint=3.0)


def test_the_module_takes_a_constraint_too() -> None:
    layer = il.ArgminLayer(quadratic, PG, init=ZERO, constraint=Simplex(1.0))
    b = randn(5, seed=7).requires_grad_()
    assert layer(b).sum().item() == pytest.approx(1.0, abs=1e-12)
    assert layer.records[0].active_set is not None  # type: ignore[union-attr]
