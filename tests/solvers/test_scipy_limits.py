"""Bounds around SciPy: the layer's box reaches it; limits that only SciPy knows are refused where they bind."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from references import F64
from scipy import optimize
from torch import Tensor

import implicitlayer as il
from implicitlayer.solvers._scipy import WITH_BOUNDS, WITH_CONSTRAINTS

TARGET = torch.tensor([0.5, 2.0, -1.0], dtype=F64)
UPPER = torch.tensor(1.0, dtype=F64)
# Every method ends within about 1e-8 of the solution (tests/solvers/test_scipy_minimize.py says how). The derivative is
# piecewise constant, so it is right to the linear solve's 1e-10 as soon as the right entries are held.
OPTIONS: dict[str, dict[str, Any]] = {
    "L-BFGS-B": {"ftol": 0.0, "gtol": 1e-9},
    "TNC": {"ftol": 0.0, "gtol": 1e-9, "xtol": 0.0, "maxfun": 1000},
    "SLSQP": {"ftol": 1e-10},  # also of the violation of constraints, whose rounding can keep it above 1e-12
    "Nelder-Mead": {"xatol": 1e-9, "fatol": 1e-15, "maxiter": 5000, "maxfev": 5000},
    "Powell": {"xtol": 1e-10, "ftol": 1e-15},
    "trust-constr": {"gtol": 1e-12, "xtol": 1e-15},
    "COBYLA": {"tol": 1e-9, "maxiter": 5000},
    "COBYQA": {"final_tr_radius": 1e-9},
}


def distance(x: Tensor, target: Tensor, *_: Any) -> Tensor:
    return ((x - target) ** 2).sum()


def layer_in_a_box(solver: Any, **settings: Any) -> Callable[..., Tensor]:
    layer = il.argmin(
        distance, solver, constraint=lambda target, upper: il.sets.Box(-0.25, upper), on_failure="raise", **settings
    )
    return lambda target, upper: layer(torch.zeros_like(target), target, upper)


@pytest.mark.parametrize("method", WITH_BOUNDS)
@pytest.mark.filterwarnings("ignore:delta_grad == 0.0:UserWarning")  # trust-constr's own remark at the solution
def test_the_box_of_the_layer_reaches_every_method_with_bounds(method: str) -> None:
    answer = layer_in_a_box(il.solvers.SciPyMinimize(method, options=OPTIONS[method]))
    # free, at the upper bound (a theta), at the lower one (a number)
    held = torch.tensor([0.5, 1.0, -0.25], dtype=F64)
    # trust-constr ends inside of the box, at barrier parameter / multiplier = 2.6e-7 / 2
    atol = 1e-6 if method == "trust-constr" else 1e-7
    torch.testing.assert_close(answer(TARGET, UPPER), held, rtol=0, atol=atol)
    by_target, by_upper = torch.func.jacrev(answer, (0, 1))(TARGET, UPPER)
    torch.testing.assert_close(by_target, torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=F64)), rtol=0, atol=1e-8)
    torch.testing.assert_close(by_upper, torch.tensor([0.0, 1.0, 0.0], dtype=F64), rtol=0, atol=1e-8)


def test_lanes_of_vmap_have_boxes_of_their_own() -> None:
    answer = layer_in_a_box(il.solvers.SciPyMinimize("L-BFGS-B", options=OPTIONS["L-BFGS-B"]))
    uppers = torch.tensor([0.25, 1.0, 3.0], dtype=F64)
    x = torch.func.vmap(answer, (None, 0))(TARGET, uppers)
    torch.testing.assert_close(x, torch.stack([answer(TARGET, upper) for upper in uppers]), rtol=0, atol=1e-12)
    slopes = torch.func.vmap(torch.func.grad(lambda t, u: answer(t, u).sum(), 1), (None, 0))(TARGET, uppers)
    assert slopes.tolist() == pytest.approx([2.0, 1.0, 0.0], abs=1e-8)  # how many entries are at the upper bound


def test_a_bound_that_the_constraint_closes_over_gets_its_gradient() -> None:
    upper = torch.tensor(1.0, dtype=F64, requires_grad=True)
    layer = il.argmin(distance, il.solvers.SciPyMinimize(), constraint=lambda target: il.sets.Box(0.0, upper))
    layer(torch.zeros(3, dtype=F64), TARGET).sum().backward()
    assert upper.grad is not None and upper.grad.item() == pytest.approx(1.0, abs=1e-8)


def test_parts_of_the_unknowns_can_be_free() -> None:
    layer = il.argmin(
        lambda x, t: distance(x["a"], t) + distance(x["b"], t),
        il.solvers.SciPyMinimize(options=OPTIONS["L-BFGS-B"]),
        constraint={"a": il.sets.NonNegative(), "b": None},
    )
    x = layer({"a": torch.ones(3, dtype=F64), "b": torch.ones(3, dtype=F64)}, TARGET)
    torch.testing.assert_close(x["a"], TARGET.clamp_min(0), rtol=0, atol=1e-8)
    torch.testing.assert_close(x["b"], TARGET, rtol=0, atol=1e-8)


def test_a_method_without_bounds_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"method='BFGS' of SciPy has no bounds, and the layer has a box. Use one of"):
        layer_in_a_box(il.solvers.SciPyMinimize("BFGS"))(TARGET, UPPER)


@pytest.mark.parametrize("method", ["dogleg", "trust-exact"])
def test_a_method_that_needs_the_whole_hessian_is_refused_by_name(method: str) -> None:
    with pytest.raises(ValueError, match="trust-krylov"):
        il.solvers.SciPyMinimize(method)
    known = il.solvers.SciPyMinimize(method, hess=lambda x: 2 * np.eye(2))
    t = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert torch.allclose(known(lambda x: ((x - t) ** 2).sum(), torch.zeros(2, dtype=torch.float64)), t)


def test_a_set_that_is_no_box_is_refused_by_name() -> None:
    layer = il.argmin(distance, il.solvers.SciPyMinimize(), constraint=il.sets.Simplex())
    with pytest.raises(TypeError, match=r"can pass on il.sets.Box and il.sets.NonNegative only, got Simplex"):
        layer(torch.zeros(3, dtype=F64), TARGET)


def test_bounds_from_both_sides_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bounds= of SciPyMinimize beside constraint= of the layer: which one\?"):
        layer_in_a_box(il.solvers.SciPyMinimize(bounds=[(0.0, 1.0)] * 3))(TARGET, UPPER)


PAIRS = [(None, None), (0.0, 1.0), (None, 5.0)]
LIMITS: dict[str, tuple[str, dict[str, Any], str]] = {
    "pairs": ("L-BFGS-B", {"bounds": PAIRS}, r"bounds= \(entries \[1\]\)"),
    "Bounds": ("TNC", {"bounds": optimize.Bounds(-0.25, 9.0)}, r"bounds= \(entries \[2\]\)"),
    "interior": ("trust-constr", {"bounds": [(None, 1.0)] * 3}, r"bounds= \(entries \[1\]\)"),
    "equality": ("SLSQP", {"constraints": {"type": "eq", "fun": lambda x: x.sum() - 1}}, "constraints="),
    "inequality": ("SLSQP", {"constraints": [{"type": "ineq", "fun": lambda x: 1.0 - x[1]}]}, "constraints="),
    "linear": ("SLSQP", {"constraints": optimize.LinearConstraint(np.ones((1, 3)), 2.0, np.inf)}, "constraints="),
    "nonlinear": (
        "SLSQP",
        {"constraints": [optimize.NonlinearConstraint(lambda x: x @ x, 0.0, 1.0)], "bounds": [(0.0, None)] * 3},
        r"bounds= \(entries \[2\]\) and constraints=",
    ),
}


@pytest.mark.parametrize("kind", LIMITS)
def test_an_answer_that_rests_on_a_limit_of_scipys_own_is_refused(kind: str) -> None:
    method, settings, held = LIMITS[kind]
    solver = il.solvers.SciPyMinimize(method, **settings)
    message = f"the answer of SciPyMinimize rests on its {held}, of which the layer knows nothing"
    with pytest.raises(il.StationarityError, match=message) as caught:
        il.argmin(distance, solver)(torch.full((3,), 0.1, dtype=F64), TARGET)
    assert re.search(r"pass constraint=il\.sets\.Box\(lower, upper\) to il\.argmin", str(caught.value))


@pytest.mark.parametrize(
    "settings",
    [
        {"bounds": [(-9.0, 9.0)] * 3},
        {"bounds": optimize.Bounds(-9.0, 9.0)},
        {"constraints": {"type": "ineq", "fun": lambda x: 9.0 - x.sum()}},
        {"constraints": optimize.NonlinearConstraint(lambda x: x @ x, 0.0, 81.0)},
        {"constraints": ()},
    ],
    ids=["pairs", "Bounds", "inequality", "nonlinear", "none"],
)
def test_limits_that_hold_nothing_are_harmless(settings: dict[str, Any]) -> None:
    layer = il.argmin(distance, il.solvers.SciPyMinimize("SLSQP", options={"ftol": 1e-17}, **settings))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jacobian = torch.func.jacrev(lambda t: layer(torch.zeros(3, dtype=F64), t))(TARGET)
    torch.testing.assert_close(jacobian, torch.eye(3, dtype=F64), rtol=0, atol=1e-8)


def test_outside_of_a_layer_scipys_own_bounds_may_hold_the_answer() -> None:
    solver = il.solvers.SciPyMinimize("L-BFGS-B", bounds=[(0.0, 1.0)] * 3)
    assert solver(distance, torch.zeros(3, dtype=F64), TARGET).tolist() == pytest.approx([0.5, 1.0, 0.0])


def on_a_plane_in_a_ball(solver: Any) -> Callable[..., Tensor]:
    layer = il.constrained_argmin(
        lambda x, target: distance(x["x"], target),
        solver,
        equality=lambda x, target: {"sum": x["x"].sum() - 1},
        inequality=lambda x, target: x["x"] @ x["x"] - 1,
        on_failure="raise",
    )
    return lambda target: layer({"x": torch.full((3,), 0.2, dtype=F64)}, target)["x"]


def nearest_on_the_circle(target: Tensor) -> Tensor:
    """The plane sum(x) = 1 meets the unit ball in a disc around (1, 1, 1) / 3 of radius sqrt(2 / 3)."""
    along = target - target.mean()
    return 1 / 3 + (2 / 3) ** 0.5 * along / along.norm()


def with_equations(*methods: str) -> list[Any]:
    """The methods, those left out that this SciPy gives no equations."""
    old = tuple(map(int, scipy.__version__.split(".")[:2])) < (1, 16)
    skip = pytest.mark.skipif(old, reason="COBYLA takes no equations before SciPy 1.16, and says so")
    return [pytest.param(method, marks=[skip] if method == "COBYLA" else []) for method in methods]


@pytest.mark.parametrize("method", with_equations(*WITH_CONSTRAINTS))
@pytest.mark.filterwarnings("ignore:delta_grad == 0.0:UserWarning")
def test_equations_and_inequalities_of_the_layer_reach_every_method_with_constraints(method: str) -> None:
    answer = on_a_plane_in_a_ball(il.solvers.SciPyMinimize(method, options=OPTIONS[method]))
    # The derivative is smooth in x here: it inherits the accuracy of x (see OPTIONS), a few times over. The linear
    # models of COBYLA do not know the curvature along the circle: it keeps the border to a violation of about 1e-8 and
    # weighs that against values, which a move d along the circle changes by d^2 only. So it may end at d = sqrt(1e-8).
    allowed = {"trust-constr": 1e-5, "COBYLA": 1e-4}.get(method, 1e-6)
    torch.testing.assert_close(answer(TARGET), nearest_on_the_circle(TARGET), rtol=0, atol=allowed)
    found, expected = (torch.func.jacrev(f)(TARGET) for f in (answer, nearest_on_the_circle))
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


@pytest.mark.parametrize("method", with_equations("COBYLA", "COBYQA", "SLSQP"))  # trust-constr ends off the corner
def test_a_corner_of_the_layers_constraints_is_found_to_seven_digits(method: str) -> None:
    layer = il.constrained_argmin(
        lambda x, radius: distance(x, TARGET[:2]),
        il.solvers.SciPyMinimize(method, options=OPTIONS[method]),
        equality=lambda x, radius: x.sum() - 1,
        inequality=lambda x, radius: x @ x - radius**2,
        on_failure="raise",
    )
    radius = torch.tensor(1.1, dtype=F64)  # the nearest point of the line, (-1, 5) / 4, is outside
    answer = lambda radius: layer(torch.full((2,), 0.2, dtype=F64), radius)  # noqa: E731
    # The line x + y = 1 leaves the circle x^2 + y^2 = r^2 where y - x = sqrt(2 r^2 - 1), so dy/dr = -dx/dr =
    # r / sqrt(2 r^2 - 1). Both borders hold the answer, and linear models find where they meet as Newton's method does.
    gap = (2 * radius**2 - 1).sqrt()
    sign = torch.tensor([-1.0, 1.0], dtype=F64)
    torch.testing.assert_close(answer(radius), (1 + sign * gap) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.func.jacrev(answer)(radius), sign * radius / gap, rtol=0, atol=1e-6)


def test_constraints_in_scipys_own_form_go_before_those_of_the_layer() -> None:
    own = [
        {"type": "eq", "fun": lambda x: x.sum() - 1},
        {"type": "ineq", "fun": lambda x: 1 - x @ x},
    ]
    answer = on_a_plane_in_a_ball(il.solvers.SciPyMinimize("SLSQP", options={"ftol": 1e-17}, constraints=own))
    torch.testing.assert_close(answer(TARGET), nearest_on_the_circle(TARGET), rtol=0, atol=1e-6)


def test_a_method_without_constraints_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"method='L-BFGS-B' of SciPy has no constraints, and the layer"):
        on_a_plane_in_a_ball(il.solvers.SciPyMinimize())(TARGET)
