"""An answer that is further from the solution than its gradient shows: the solver's status, and the backward solve."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, orthogonal, randn
from torch import Tensor

import implicitlayer as il

N = 12
VALUES = torch.logspace(0, -6, N, dtype=F64)
BASIS = orthogonal(N, seed=0)
MATRIX = BASIS @ (VALUES[:, None] * BASIS.T)
PULL = randn(N, seed=1)
EXACT = BASIS @ ((BASIS.T @ PULL) / VALUES)
HIDDEN = BASIS[:, -1] + 1e-3 * BASIS[:, 0]
ZERO = torch.zeros(N, dtype=F64)


def ridge(x: Tensor, s: Tensor) -> Tensor:
    """Minimum H^-1 p at s = 0, whose gradient in s is -u'x with H u = v."""
    return 0.5 * ((x @ MATRIX) * x).sum(-1) + 0.5 * s * (x * x).sum(-1) - x @ PULL


def leaf(value: float = 0.0, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(value, dtype=dtype, requires_grad=True)


def far(part: float) -> Callable[..., Tensor]:
    """Off by this part of its size along the flattest direction, which the gradient hides behind a part in 1e3 of it
    along the steepest one: that makes all of the gradient, and the lower bound of the distance is its length."""
    return lambda f, x, *theta: EXACT + part * EXACT.norm() * HIDDEN


def words(run: Callable[[], Any]) -> list[tuple[type[Warning], str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    return [(w.category, str(w.message)) for w in caught if issubclass(w.category, il.ImplicitLayerWarning)]


# ---------------------------------------------------------------------------------------------- the solver's own status


def limited(**settings: Any) -> tuple[Any, Tensor, Tensor]:
    """A layer at condition 1e5 whose solver stops half way, its init, and the solution."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        basis = torch.linalg.qr(torch.randn(50, 50, dtype=F64))[0]
        pull = torch.randn(50, dtype=F64)
    values = torch.logspace(0, -5, 50, dtype=F64)
    matrix = basis @ (values[:, None] * basis.T)
    layer = il.argmin(
        lambda x, s: 0.5 * x @ matrix @ x + 0.5 * s * x @ x - pull @ x,
        il.solvers.LBFGS(max_steps=100, rtol=1e-6),
        **settings,
    )
    return layer, torch.zeros(50, dtype=F64), basis @ ((basis.T @ pull) / values)


def test_a_step_limit_that_came_before_the_tolerance_is_told() -> None:
    layer, init, exact = limited()
    s = leaf()
    with pytest.warns(il.ConvergenceWarning, match=r"stopped at its step limit .* Raise its max_steps"):
        x = layer(init, s)
    record = layer.records[0]
    assert isinstance(record, il.ForwardRecord) and record.solver_status is il.Status.MAX_STEPS_REACHED
    assert record.stationary, "else this tests nothing: the forward pass sees it by itself"
    for text in (record.explain(), str(record)):
        assert "max_steps_reached" in text
    assert "step limit" in record.explain() and "nothing to do" not in record.explain()
    with pytest.warns(il.StationarityWarning, match="a Newton step from it"):
        torch.autograd.grad(x @ x.detach(), s)
    # a solve to 1e-10 at condition 1e5
    away = float((x.detach() - exact).norm() / x.detach().norm())
    assert away > 0.4 and float(layer.records[1].relative_distance) == pytest.approx(away, rel=1e-4)
    with pytest.raises(il.NotConvergedError, match="step limit"):
        limited(on_failure="raise")[0](init, s)


@pytest.mark.parametrize("quiet", [{"on_failure": "ignore"}, {"stationarity_rtol": None}])
def test_a_step_limit_is_not_told_where_the_layer_judges_no_answer(quiet: dict[str, Any]) -> None:
    layer, init, _ = limited(**quiet)
    assert not words(lambda: layer(init, leaf()).sum().backward())
    assert layer.records[0].solver_status is il.Status.MAX_STEPS_REACHED


def test_a_fixed_number_of_steps_is_no_missed_tolerance() -> None:
    identity = lambda x, t: 0.5 * ((x - t) ** 2).sum()  # noqa: E731
    t = leaf(2.0)
    assert not words(lambda: il.argmin(identity, il.solvers.GradientDescent(0.5, max_steps=40))(leaf().detach(), t))


def test_an_answer_that_is_not_stationary_names_the_step_limit_once() -> None:
    layer = il.argmin(ridge, il.solvers.GradientDescent(1.0, max_steps=1, rtol=1e-9))
    said = words(lambda: layer(ZERO, leaf()))
    assert [category for category, _ in said] == [il.StationarityWarning]
    assert "not stationary" in said[0][1] and "stopped at its step limit" in said[0][1]


def test_a_loop_shows_one_warning_of_each_kind_although_their_numbers_differ() -> None:
    layer = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), lambda f, x, t: 0.5 * t)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(1, 30):
            layer(leaf().detach(), leaf(float(step)))
    assert len(caught) == 1 and "has norm 0.5 there" in str(caught[0].message)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(1, 5):
            layer(leaf().detach(), leaf(float(step)))
    assert len(caught) == 4 and len({str(w.message) for w in caught}) == 1


# ---------------------------------------------------------------------------------------- what the backward solve knows

SOLVERS = [None, il.Minres(), il.Dense(), il.ConjugateGradient(preconditioner=lambda v: v), il.Gmres()]
IDS = ["default", "minres", "dense", "preconditioned", "gmres"]


@pytest.mark.parametrize("linear_solver", SOLVERS, ids=IDS)
def test_the_backward_solve_sees_a_distance_that_the_gradient_hides(linear_solver: Any) -> None:
    settings = {} if linear_solver is None else {"linear_solver": linear_solver}
    layer, s, v = il.argmin(ridge, far(0.02), **settings), leaf(), randn(N, seed=3)
    x = layer(ZERO, s)
    assert layer.records[0].stationary, "else this tests nothing"
    with pytest.warns(il.StationarityWarning, match="a Newton step from it is 2.0e-02 of its size long"):
        torch.autograd.grad(x, s, v)
    record = layer.records[1]
    assert isinstance(record, il.BackwardRecord) and record.relative_distance is not None
    # a solve to 1e-10 at condition 1e6
    away = float((x.detach() - EXACT).norm() / x.detach().norm())
    assert float(record.relative_distance) == pytest.approx(away, rel=1e-3)
    assert "not stationary" in record.explain() and "nothing to do" not in record.explain()
    layer = il.argmin(ridge, far(0.02), on_failure="raise", **settings)
    with pytest.raises(il.StationarityError, match="a Newton step from it"):
        torch.autograd.grad(layer(ZERO, s), s, v)
    for quiet in ({"on_failure": "ignore"}, {"stationarity_rtol": None}):
        layer = il.argmin(ridge, far(0.02), **settings, **quiet)
        assert not words(lambda: torch.autograd.grad(layer(ZERO, s), s, v))  # noqa: B023


@pytest.mark.parametrize("linear_solver", SOLVERS, ids=IDS)
def test_an_answer_near_enough_is_not_called_far_at_any_condition(linear_solver: Any) -> None:
    settings = {} if linear_solver is None else {"linear_solver": linear_solver}
    for part in (0.0, 1e-9, 1e-6, 9e-4):
        layer, s = il.argmin(ridge, far(part), on_failure="raise", **settings), leaf()
        (got,) = torch.autograd.grad(layer(ZERO, s), s, randn(N, seed=3))
        u = BASIS @ ((BASIS.T @ randn(N, seed=3)) / VALUES)
        # -u'x: the error of x, and a residual of 1e-10 at condition 1e6, along directions that do not cancel much
        assert float(got) == pytest.approx(-float(u @ EXACT), rel=2 * part + 1e-3)


def test_forward_mode_roots_and_lanes_are_told_too() -> None:
    s, v = leaf(), randn(N, seed=3)
    layer = il.argmin(ridge, far(0.02))
    with pytest.warns(il.StationarityWarning, match="a Newton step from it"):
        torch.func.jvp(lambda s: layer(ZERO, s), (s.detach(),), (torch.ones((), dtype=F64),))
    root = il.root(lambda x, s: MATRIX @ x + s * x - PULL, far(0.02))
    with pytest.warns(il.StationarityWarning, match="a Newton step from it"):
        torch.autograd.grad(root(ZERO, s), s, v)
    fixed = il.fixed_point(lambda x, s: x - (MATRIX @ x + s * x - PULL), far(0.02))
    with pytest.warns(il.StationarityWarning, match="a Newton step from it"):
        torch.autograd.grad(fixed(ZERO, s), s, v)

    def some_far(f: Any, x: Tensor, s: Tensor) -> Tensor:
        return EXACT + s * EXACT.norm() * HIDDEN

    flat = lambda x, s: ridge(x, 0 * s)  # noqa: E731
    lanes = il.argmin(flat, some_far)
    parts = torch.tensor([0.0, 0.02, 1e-6], dtype=F64, requires_grad=True)
    with pytest.warns(il.StationarityWarning, match=r"not stationary in lane 1 of \(3,\): a Newton step"):
        torch.func.vmap(lambda s: lanes(ZERO, s))(parts).sum().backward()

    def batched(f: Any, x: Tensor, s: Tensor) -> Tensor:
        return EXACT + s[:, None] * EXACT.norm() * HIDDEN

    module = il.ArgminLayer(flat, batched, batch_dims=1)
    with pytest.warns(il.StationarityWarning, match=r"not stationary in lane 1 of \(3,\): a Newton step"):
        module(torch.zeros(3, N, dtype=F64), parts).sum().backward()
    # jacrev makes one solve for all rows of the identity: lanes of cotangents in front of those of the call
    with pytest.warns(il.StationarityWarning, match="a Newton step from it"):
        torch.func.jacrev(lambda s: layer(ZERO, s))(torch.zeros((), dtype=F64))


def test_the_distance_of_a_proximal_answer_is_that_in_x_whatever_the_metric() -> None:
    # H + L with L of 1e-6 to 1: conjugate gradients with L as preconditioner see the spectrum of L^-1 (H + L)
    strength = torch.logspace(0, -6, N, dtype=F64)
    flat = torch.zeros(N, dtype=F64)
    flat[0], flat[-1] = 1e-3, 1.0  # the steepest and the flattest direction
    total = torch.diag(strength) + torch.diag(VALUES)
    theta = leaf_vector(randn(N, seed=5))
    objective = il.proximal(lambda phi: 0.5 * (phi * VALUES * phi).sum(), strength)

    def solver(f: Any, x: Any, center: Any, *rest: Any) -> Any:
        exact = torch.linalg.solve(total, strength * center)
        return exact + 0.02 * exact.norm() * flat

    layer = il.argmin(objective, solver)
    x = layer(torch.zeros(N, dtype=F64), theta)
    assert layer.records[0].stationary
    with pytest.warns(il.StationarityWarning, match="a Newton step from it is 2.0e-02 of its size"):
        torch.autograd.grad(x, theta, randn(N, seed=3))


def leaf_vector(value: Tensor) -> Tensor:
    return value.requires_grad_()


def test_a_float32_answer_that_is_right_to_rounding_is_not_called_far() -> None:
    # F = H x - p is rounding: eps times condition 1e4 would be above the 1e-3 that is allowed
    values = torch.logspace(0, -4, N, dtype=F64)
    matrix = BASIS @ (values[:, None] * BASIS.T)
    exact = (BASIS @ ((BASIS.T @ PULL) / values)).float()
    single = lambda x, s: 0.5 * x @ matrix.float() @ x + 0.5 * s * x @ x - PULL.float() @ x  # noqa: E731
    # the residual of a solve with that condition is eps ||A|| ||u|| = 1e-3 of the right-hand side at most
    layer = il.argmin(single, lambda f, x, s: exact.clone(), on_failure="raise", linear_solver=il.Dense(rtol=1e-3))
    s = leaf(dtype=torch.float32)
    torch.autograd.grad(layer(ZERO.float(), s).sum(), s)


def test_the_decision_is_made_once_for_each_call() -> None:
    products = []

    def counted(operator: Any, rhs: Tensor) -> Any:
        products.append(rhs)
        return il.ConjugateGradient()(operator, rhs)

    layer, s = il.argmin(ridge, far(5e-4), linear_solver=counted), leaf()
    x = layer(ZERO, s)
    for _ in range(3):
        torch.autograd.grad(x, s, randn(N, seed=3), retain_graph=True)
    assert len(products) == 4  # one for each backward, and one Newton step
    layer = il.argmin(ridge, far(0.0), linear_solver=counted)
    products.clear()
    torch.autograd.grad(layer(ZERO, s), s, randn(N, seed=3))
    assert len(products) == 1


def test_a_warm_start_does_not_remember_the_newton_step() -> None:
    solver = il.WarmStart(il.ConjugateGradient())
    layer, s, v = il.argmin(ridge, far(5e-4), linear_solver=solver), leaf(), randn(N, seed=3)
    torch.autograd.grad(layer(ZERO, s), s, v)
    (kept,) = solver._kept.values()
    assert float((MATRIX @ kept - v).norm() / v.norm()) < 1e-8  # the answer for the cotangent


# ------------------------------------------------------------------------------------------------------------- pieces

# x'Gx / 2 - p'x + a |x|_1 with two columns that are almost one: (1, -1, 0) is flat, of curvature 1e-3. The force
# p - G x on the first entry is 3e-7 below a, so it is zero, x_1 = p_1 - a, and dx_1 / da = -1. With both free, where
# the minimum would be at x_0 = -1.5e-4, it would be about -1/2 each.
GRAM = torch.tensor([[1.0, 1 - 1e-3, 0.0], [1 - 1e-3, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)
STRENGTH = 0.1
SPARSE = torch.tensor([0.0, 1.0, 1.0], dtype=F64)
SPARSE_PULL = GRAM @ SPARSE + STRENGTH * torch.tensor([1 - 3e-6, 1.0, 1.0], dtype=F64)
ROUGH = SPARSE + 4e-4 * torch.tensor([1.0, -1.0, 0.0], dtype=F64)  # what stationarity allows, and no gradient shows


def sparse(x: Tensor, a: Tensor) -> Tensor:
    return 0.5 * x @ GRAM @ x - SPARSE_PULL @ x


def slope_of(answer: Tensor, **settings: Any) -> tuple[float, Any]:
    """dx_1 / da by a layer around this answer, and the layer."""
    layer = il.argmin(sparse, lambda f, x, a: answer.clone(), regularizer=lambda a: il.L1(a), **settings)
    a = leaf(STRENGTH)
    return float(torch.autograd.grad(layer(torch.zeros(3, dtype=F64), a)[1], a)[0]), layer


def test_an_answer_on_another_piece_than_the_solution_is_told() -> None:
    assert slope_of(SPARSE, on_failure="raise")[0] == pytest.approx(-1.0, rel=1e-9)
    with pytest.warns(il.StationarityWarning, match="too rough to tell its active set"):
        slope, layer = slope_of(ROUGH)
    assert slope == pytest.approx(-0.5, rel=1e-3), "else this tests nothing: the answer is on the right piece"
    assert layer.records[0].stationary and "too rough" in layer.records[1].explain()
    with pytest.raises(il.StationarityError, match="too rough to tell its active set"):
        slope_of(ROUGH, on_failure="raise")
    slope_of(ROUGH, on_failure="ignore")
    assert slope_of(ROUGH, on_failure="raise", polish=3)[0] == pytest.approx(-1.0, rel=1e-9)


# Sweeps of coordinate descent that stop early, as scikit-learn's do at tol=1e-3: the forward pass finds a distance
# below 1e-3, the true one is 5e-3, and the derivative that of another active set.
ROWS, COLUMNS = 10, 20


def lasso_problem() -> tuple[np.ndarray, np.ndarray, float]:
    draw = np.random.default_rng(5)
    data = draw.normal(size=(ROWS, COLUMNS))
    target = data[:, :5] @ draw.normal(size=5) + 0.5 * draw.normal(size=ROWS)
    return data, target, 0.02 * np.abs(data.T @ target).max() / ROWS


def lasso_sweeps(num_sweeps: int) -> np.ndarray:
    """Minimises |X x - y|^2 / 2m + a |x|_1, one entry after the other."""
    data, target, a = lasso_problem()
    x, squares = np.zeros(COLUMNS), (data**2).sum(0) / ROWS
    for _ in range(num_sweeps):
        for j in range(COLUMNS):
            pull = x[j] * squares[j] + data[:, j] @ (target - data @ x) / ROWS
            x[j] = math.copysign(max(abs(pull) - a, 0.0), pull) / squares[j]
    return x


def lasso_slope(answer: np.ndarray, **settings: Any) -> tuple[float, Any]:
    """d |x|^2 / da."""
    data, target, strength = lasso_problem()
    X, y = torch.from_numpy(data), torch.from_numpy(target)
    layer = il.argmin(
        lambda x, a: ((X @ x - y) ** 2).mean() / 2,
        lambda f, x, a: torch.from_numpy(answer.copy()),
        regularizer=lambda a: il.L1(a),
        **settings,
    )
    a = leaf(strength)
    x = layer(torch.zeros(COLUMNS, dtype=F64), a)
    return float(torch.autograd.grad((x**2).sum(), a)[0]), layer


def test_a_loose_lasso_is_right_or_told_and_polishing_makes_it_right() -> None:
    data, target, a = lasso_problem()
    free = lasso_sweeps(2000) != 0
    part, signs = data[:, free], np.sign(lasso_sweeps(2000)[free])
    gram = part.T @ part / ROWS
    right = -2 * np.linalg.solve(gram, part.T @ target / ROWS - a * signs) @ np.linalg.solve(gram, signs)
    rough = lasso_sweeps(29)
    with pytest.warns(il.StationarityWarning, match="a Newton step from it"):
        slope, layer = lasso_slope(rough)
    assert abs(slope / right) < 0.1 and layer.records[0].stationary, "else this tests nothing"
    slope, layer = lasso_slope(rough, polish=10, on_failure="raise")
    assert slope == pytest.approx(right, rel=1e-8) and layer.records[0].num_polish_steps > 1
    # the estimate looks at another point, where F is larger: no other objective
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", il.StationarityWarning)
        with il.diagnostics() as records:
            lasso_slope(rough)
        assert float(records[-1].gradient_error.relative) > 0.5


def test_a_polish_that_does_not_help_says_so() -> None:
    # a ramp: its slope is 1 to rounding wherever a part of a Newton step, of 1e15, leads
    ramp = lambda x, t: (torch.sqrt(1e-12 + (x - t) ** 2)).sum()  # noqa: E731
    layer = il.argmin(ramp, lambda f, x, t: t + 10.0, polish=2, stationarity_rtol=1e-3)
    with pytest.warns(il.StationarityWarning, match="polish=2 did not help"):
        x = layer(torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64, requires_grad=True))
    assert x.item() == 10.0 and layer.records[0].num_polish_steps == 0
    # where the gradient does not show the distance: the valley of a quadratic, and a solver that turns round
    stuck = il.argmin(ridge, far(0.02), polish=2, linear_solver=lambda operator, rhs: -il.Dense()(operator, rhs).value)
    with pytest.warns(il.StationarityWarning, match="polish=2 did not help: the Newton step from the solver's answer"):
        stuck(ZERO, leaf())


def test_the_gradient_error_of_a_rough_answer_is_no_closure_error() -> None:
    # the Newton step of the estimate leads to a point with a larger F: not because the objective has changed
    layer = il.argmin(
        lambda x, t: (torch.cosh(x) - t * x).sum(), lambda f, x, t: torch.asinh(t) * 0.9, stationarity_rtol=0.5
    )
    t = torch.tensor([6.0], dtype=F64, requires_grad=True)
    with il.diagnostics() as records:
        layer(torch.zeros(1, dtype=F64), t).sum().backward()
    backward = records[-1]
    assert isinstance(backward, il.BackwardRecord) and backward.gradient_error.relative.isfinite()


def test_a_layer_under_constraints_tells_the_step_limit_of_its_solver_too() -> None:
    class Limited(il.RecordingSolver):
        def run(self, objective: Any, init: Any, *theta: Any) -> il.SolverResult:
            return il.SolverResult(theta[0] / theta[0].detach().norm(), il.Status.MAX_STEPS_REACHED, 7)

    def layer(**settings: Any) -> Any:
        return il.constrained_argmin(
            lambda x, t: ((x - t) ** 2).sum(), Limited(), inequality=lambda x, t: (x**2).sum() - 1, **settings
        )

    t = torch.tensor([3.0, 4.0], dtype=F64, requires_grad=True)
    with pytest.warns(il.ConvergenceWarning, match="stopped at its step limit"):
        layer()(torch.zeros(2, dtype=F64), t)
    with pytest.raises(il.NotConvergedError, match="stopped at its step limit"):
        layer(on_failure="raise")(torch.zeros(2, dtype=F64), t)
    for quiet in ({"on_failure": "ignore"}, {"stationarity_rtol": None}):
        assert not words(lambda: layer(**quiet)(torch.zeros(2, dtype=F64), t))  # noqa: B023
