"""``il.constrained_argmin``: KKT conditions at a black box's answer, differentiated, and what is said about them."""

import pickle
from typing import Any

import pytest
import torch
from kkt_problems import bound, non_negative, objective, on_the_plane, slsqp, squares
from references import F64, central_differences, randn, relative_error
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import implicitlayer as il
from implicitlayer._errors import InfeasibleError, KinkError, KinkWarning
from implicitlayer.programs._kkt_linear import KktFactors, KktMatrices, multipliers, nonnegative_least_squares

optimize = pytest.importorskip("scipy.optimize")

# Two Newton steps from SLSQP's 1e-7 reach rounding; what follows has condition numbers below 1e3.
TIGHT = 1e-9

INIT = torch.full((4,), 0.25, dtype=F64)
T, A = torch.tensor([0.5, 0.9, -1.0, 0.3], dtype=F64), torch.tensor(0.3, dtype=F64)  # entry 2 is at its border
LAYER = il.constrained_argmin(objective, slsqp, equality=on_the_plane, inequality=non_negative, polish=2)


def test_gradients_are_the_differences_of_the_solver() -> None:
    v = randn(4, seed=1)
    by_t, by_a = grad(lambda t, a: LAYER(INIT, t, a) @ v, argnums=(0, 1))(T, A)
    with torch.no_grad():
        # central differences with steps of 1e-5: truncation about 1e-10, rounding 1e-15 / 1e-5
        expected = central_differences(lambda t: LAYER(INIT, t, A) @ v, T, 1e-5)
        expected_a = central_differences(lambda a: LAYER(INIT, T, a) @ v, A, 1e-5)
    assert relative_error(by_t, expected) < 1e-7 and relative_error(by_a, expected_a) < 1e-7


def test_forward_and_reverse_mode_agree_and_second_derivatives_are_differences() -> None:
    solve = lambda t: LAYER(INIT, t, A)  # noqa: E731
    forward, reverse = jacfwd(solve)(T), jacrev(solve)(T)
    assert relative_error(forward, reverse) < TIGHT
    loss = lambda t: (LAYER(INIT, t, A) ** 3).sum()  # noqa: E731
    got = hessian(loss)(T)
    for i in range(4):
        shift = torch.zeros(4, dtype=F64)
        shift[i] = 1e-5
        column = (grad(loss)(T + shift) - grad(loss)(T - shift)) / 2e-5
        assert torch.allclose(got[:, i], column, atol=1e-6)


def test_gradcheck_and_double_backward() -> None:
    t, a = T.clone().requires_grad_(), A.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda t, a: LAYER(INIT, t, a), (t, a), eps=1e-5, atol=1e-6)
    assert torch.autograd.gradgradcheck(lambda t, a: LAYER(INIT, t, a), (t, a), eps=1e-5, atol=1e-5)


def test_vmap_equals_a_loop_though_the_active_sets_differ() -> None:
    points = torch.stack([T, T.flip(0), torch.tensor([2.0, -1.0, -1.0, 0.2], dtype=F64)])
    one = grad(lambda t, a: (LAYER(INIT, t, a) ** 2).sum(), argnums=(0, 1))
    got = vmap(one, in_dims=(0, None))(points, A)
    active = LAYER.active_set
    loop = [one(t, A) for t in points]
    for lanes, parts in zip(got, zip(*loop, strict=True), strict=True):
        assert relative_error(lanes, torch.stack(parts)) < TIGHT
    assert active is not None and active.active.shape == (3, 4) and active.num_active.tolist() == [1, 1, 3]


def test_closed_over_tensors_of_objective_and_constraints_are_differentiated() -> None:
    radius, centre = torch.tensor(4.0, dtype=F64, requires_grad=True), torch.tensor([3.0, 4.0], dtype=F64)
    centre.requires_grad_()
    layer = il.constrained_argmin(
        lambda x: ((x - centre) ** 2).sum(), slsqp, inequality=lambda x: (x**2).sum() - radius, polish=2
    )
    x = layer(torch.ones(2, dtype=F64))
    by_radius, by_centre = torch.autograd.grad(x.sum(), (radius, centre))
    # x = sqrt(r) c / |c|: d/dr = (c1 + c2) / (2 sqrt(r) |c|) = 7 / 20, d/dc = sqrt(r) (1 - c (c1 + c2) / |c|^2) / |c|
    assert by_radius.item() == pytest.approx(0.35, rel=TIGHT)
    assert torch.allclose(by_centre, 0.4 * (1 - centre.detach() * 7 / 25), rtol=TIGHT)


def test_pytrees_of_unknowns_and_constraints_with_their_multipliers() -> None:
    def solver(problem: Any, init: Any, b: torch.Tensor, c: torch.Tensor) -> Any:
        assert problem.equality(init, b, c)["sum"].shape == () and problem.inequality(init, b, c).shape == (1, 2)
        return {"u": ((b - c) / 2).reshape(1), "v": torch.stack([c, (b - c) / 2])}

    layer = il.constrained_argmin(  # smallest norm with the sum b and v[0] >= c
        lambda x, b, c: 0.5 * (x["u"] ** 2).sum() + 0.5 * (x["v"] ** 2).sum(),
        solver,
        equality=lambda x, b, c: {"sum": x["u"].sum() + x["v"].sum() - b},
        inequality=lambda x, b, c: torch.stack([c - x["v"][0], -9 - x["u"][0]]).reshape(1, 2),
        return_multipliers=True,
    )
    b, c = torch.tensor(2.0, dtype=F64, requires_grad=True), torch.tensor(1.0, dtype=F64, requires_grad=True)
    init = {"u": torch.zeros(1, dtype=F64), "v": torch.zeros(2, dtype=F64)}
    x, found = layer(init, b, c)
    # u + lambda = 0, c + lambda - mu = 0: lambda = -(b - c)/2, mu = c - (b - c)/2
    assert found.equality["sum"].item() == pytest.approx(-0.5)
    assert torch.allclose(found.inequality, torch.tensor([[0.5, 0.0]], dtype=F64))
    assert [g.item() for g in torch.autograd.grad(found.inequality.sum(), (b, c), retain_graph=True)] == pytest.approx(
        [-0.5, 1.5]
    )
    assert [g.item() for g in torch.autograd.grad(x["u"].sum(), (b, c))] == pytest.approx([0.5, -0.5])


def test_multipliers_of_the_solver_are_used_and_fitted_ones_are_the_same() -> None:
    fitted = il.constrained_argmin(objective, slsqp, equality=on_the_plane, inequality=non_negative, polish=2)
    fitted(INIT, T.clone().requires_grad_(), A)
    assert fitted.active_set is not None
    known = fitted.active_set.equality, fitted.active_set.inequality
    for given in (known, (known[0], None), (None, known[1])):
        x = LAYER(INIT, T, A)
        layer = il.constrained_argmin(
            objective,
            lambda problem, init, *theta, x=x, given=given: (x, given),
            equality=on_the_plane,
            inequality=non_negative,
            solver_returns_multipliers=True,
        )
        got = grad(lambda t, layer=layer: layer(INIT, t, A).prod())(T)
        assert relative_error(got, grad(lambda t: LAYER(INIT, t, A).prod())(T)) < 1e-7
        assert torch.allclose(layer.active_set.inequality, known[1], atol=1e-8)


def test_minres_gives_the_same_gradient() -> None:
    settings = {"equality": on_the_plane, "inequality": non_negative, "polish": 2}
    layer = il.constrained_argmin(objective, slsqp, linear_solver=il.Minres(rtol=1e-12), **settings)
    loss = lambda layer: grad(lambda t: (layer(INIT, t, A) ** 2).sum())(T)  # noqa: E731
    assert relative_error(loss(layer), loss(LAYER)) < TIGHT


def test_polish_makes_a_rough_answer_exact() -> None:
    rough = lambda problem, init, t, a: LAYER(INIT, t, a).detach() + 1e-4  # noqa: E731
    layer = il.constrained_argmin(
        objective, rough, equality=on_the_plane, inequality=non_negative, polish=4, active_rtol=1e-2
    )
    t = T.clone().requires_grad_()
    assert relative_error(layer(INIT, t, A), LAYER(INIT, T, A)) < TIGHT


def exact(problem: Any, init: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return t.clamp(max=1.0)


def test_at_a_kink_the_derivative_is_that_of_the_chosen_side() -> None:
    t = torch.tensor([1.0, 2.0, 0.0], dtype=F64, requires_grad=True)
    for side, expected in (("inactive", [1.0, 0.0, 1.0]), ("active", [0.0, 0.0, 1.0])):
        layer = il.constrained_argmin(squares, exact, inequality=bound, at_kink=side)  # type: ignore[arg-type]
        with pytest.warns(KinkWarning, match="1 inequalities are at their border"):
            x = layer(torch.zeros(3, dtype=F64), t)
        assert torch.autograd.grad(x.sum(), t)[0].tolist() == pytest.approx(expected)
        found = layer.active_set
        assert found is not None and found.kinks.tolist() == [True, False, False]
        assert found.active.tolist() == [False, True, False] and "kinks 1" in str(layer.records[0])


def test_kinks_name_their_lane_and_follow_the_policy() -> None:
    points = torch.tensor([[2.0], [1.0]], dtype=F64)
    layer = il.constrained_argmin(squares, exact, inequality=bound, on_failure="raise")
    with pytest.raises(KinkError, match=r"kink in lane 1 of \(2,\)"):
        vmap(grad(lambda t: layer(torch.zeros(1, dtype=F64), t).sum()))(points)
    quiet = il.constrained_argmin(squares, exact, inequality=bound, on_failure="ignore")
    got = vmap(grad(lambda t: quiet(torch.zeros(1, dtype=F64), t).sum()))(points)
    assert got.tolist() == [[0.0], [1.0]]


def test_units_of_a_constraint_do_not_matter() -> None:
    t = torch.tensor([3.0, 0.2, 1 - 1e-3], dtype=F64, requires_grad=True)
    for unit in (1e-9, 1.0, 1e9):
        layer = il.constrained_argmin(squares, exact, inequality=lambda x, t, unit=unit: unit * (x - 1))
        x = layer(torch.zeros(3, dtype=F64), t)
        assert torch.autograd.grad(x.sum(), t)[0].tolist() == pytest.approx([0.0, 1.0, 1.0])


def test_an_answer_outside_of_the_constraints_is_an_error() -> None:
    layer = il.constrained_argmin(squares, lambda problem, init, t: t, inequality=bound)
    with pytest.raises(InfeasibleError, match=r"distance from one is about 1 .*Does the solver know the constraints"):
        layer(torch.zeros(1, dtype=F64), torch.tensor([2.0], dtype=F64, requires_grad=True))


def test_an_answer_that_is_not_stationary_is_warned_about() -> None:
    settings: dict[str, Any] = {"inequality": bound}
    wrong = lambda problem, init, t: 0.5 * t  # noqa: E731
    t = torch.tensor([0.8], dtype=F64, requires_grad=True)
    with pytest.warns(il.StationarityWarning, match="does not satisfy the optimality conditions"):
        il.constrained_argmin(squares, wrong, **settings)(torch.zeros(1, dtype=F64), t)
    with pytest.raises(il.StationarityError, match=r"5\.0e-01 of it is left|optimality conditions"):
        il.constrained_argmin(squares, wrong, on_failure="raise", **settings)(torch.zeros(1, dtype=F64), t)
    il.constrained_argmin(squares, wrong, stationarity_rtol=None, **settings)(torch.zeros(1, dtype=F64), t)


def test_multipliers_of_the_wrong_sign_are_noticed() -> None:
    layer = il.constrained_argmin(
        squares,
        lambda problem, init, t: (t.clamp(max=1.0), (None, -2 * (t - 1).clamp(min=0))),
        inequality=bound,
        solver_returns_multipliers=True,
        on_failure="raise",
    )
    with pytest.raises(il.StationarityError, match="check the sign of multipliers"):
        layer(torch.zeros(1, dtype=F64), torch.tensor([2.0], dtype=F64, requires_grad=True))


def test_a_maximum_on_the_constraint_is_no_minimum() -> None:
    # on the circle the nearest point to t is t / |t|; the farthest, -t / |t|, is stationary too
    layer = il.constrained_argmin(
        squares, lambda problem, init, t: -t / t.norm(), equality=lambda x, t: (x**2).sum() - 1
    )
    x = layer(torch.zeros(2, dtype=F64), torch.tensor([3.0, 4.0], dtype=F64, requires_grad=True))
    with pytest.raises(il.IndefiniteError, match="met p'Ap/p'p = -10"):  # 2 + 2 lambda with lambda = -6
        x.sum().backward()


def test_dependent_constraints_are_told_and_harmless_in_their_range() -> None:
    layer = il.constrained_argmin(
        squares, lambda problem, init, t: t - t.mean(), equality=lambda x, t: torch.stack([x.sum(), 3 * x.sum()])
    )
    t = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    with pytest.warns(KinkWarning, match="linearly dependent"):
        x = layer(torch.zeros(2, dtype=F64), t)
    assert torch.autograd.grad(x[0], t)[0].tolist() == pytest.approx([0.5, -0.5])


def test_fitted_multipliers_are_the_closest_non_negative_ones() -> None:
    scipy_nnls = optimize.nnls
    for seed in range(10):
        matrix, rhs = randn(6, 8, seed=seed), randn(6, seed=seed + 50)
        got = nonnegative_least_squares(matrix, rhs)
        _, norm = scipy_nnls(matrix.numpy(), rhs.numpy())
        assert float((matrix @ got - rhs).norm()) == pytest.approx(norm, abs=1e-12) and bool((got >= 0).all())
    gradient, rows_h, rows_g = randn(4, seed=1), randn(1, 4, seed=2), randn(3, 4, seed=3)
    y, z = multipliers(gradient, rows_h, rows_g, torch.tensor([True, False, True]))
    left = gradient + rows_h.T @ y + rows_g.T @ z
    assert float((rows_h @ left).abs()) < 1e-12 and z[1] == 0 and bool((z >= 0).all())
    assert bool((rows_g[[0, 2]] @ left >= -1e-12).all())  # no force pushes where it could still help


def test_the_factors_are_right_and_tell_what_is_wrong() -> None:
    held = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=F64)
    H = randn(4, 5, 5, seed=1)
    H = 1e3 * (H @ H.mT)
    J = 1e-3 * randn(4, 3, 5, seed=2)
    H[1] -= 2 * torch.linalg.eigvalsh(H[1])[-1] * torch.eye(5, dtype=F64)  # negative definite
    J[2, 2] = 2 * J[2, 1]  # dependent
    factors = KktFactors(KktMatrices(H, J, held), 2.2e-16)
    assert [il.Status(int(code)).name for code in factors.codes] == ["CONVERGED", "INDEFINITE", "SINGULAR", "CONVERGED"]
    masked = J * held[..., None]
    full = torch.cat([torch.cat([H, masked.mT], -1), torch.cat([masked, torch.diag_embed(held - 1)], -1)], -2)
    rhs = randn(4, 8, 2, seed=3)
    rhs[2, 5:] = 0  # in the range
    value = factors.solve(rhs)
    for lane in (0, 2, 3):
        # rounding of entries that range from 1e-3 to 1e4
        assert relative_error(full[lane] @ value[lane], rhs[lane]) < 1e-8
    assert not bool(value[1].any()) and float(factors.curvature[1]) < 0


def test_the_dense_solve_refuses_to_fill_the_memory() -> None:
    from implicitlayer.programs._kkt_linear import KktSolver

    layer = il.constrained_argmin(squares, exact, inequality=bound, linear_solver=KktSolver(3, 0, 3, max_size=5))
    x = layer(torch.zeros(3, dtype=F64), torch.tensor([2.0, 0.5, 0.0], dtype=F64, requires_grad=True))
    with pytest.raises(ValueError, match="above max_size=5"):
        x.sum().backward()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, ValueError, "needs equality= or inequality="),
        ({"inequality": 1}, TypeError, "inequality must be callable or None, got int"),
        ({"inequality": bound, "at_kink": "both"}, ValueError, "at_kink='both' must be"),
        ({"inequality": bound, "polish": -1}, ValueError, "polish=-1 must be non-negative"),
        ({"inequality": bound, "active_rtol": 2.0}, ValueError, r"active_rtol=2\.0 must be at least 0"),
        ({"inequality": bound, "stationarity_rtol": -1.0}, ValueError, r"stationarity_rtol=-1\.0 must be"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        il.constrained_argmin(squares, exact, **settings)
    with pytest.raises(TypeError, match="solver must be callable"):
        il.constrained_argmin(squares, 1, inequality=bound)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("solver", "settings", "error", "message"),
    [
        (lambda p, x, t: {"x": x}, {}, il.SolverOutputError, "structure of init"),
        (lambda p, x, t: x * torch.nan, {}, il.NonFiniteError, "NaN or Inf in x"),
        (exact, {"solver_returns_multipliers": True}, il.SolverOutputError, r"must return \(x, \(lambda, mu\)\)"),
        (lambda p, x, t: (x, (x,)), {"solver_returns_multipliers": True}, il.SolverOutputError, "two multipliers"),
        (
            lambda p, x, t: (x, (None, x[:0])),
            {"solver_returns_multipliers": True},
            il.SolverOutputError,
            "0 multipliers for inequality, which has 1",
        ),
        (
            lambda p, x, t: (x, (None, x * torch.nan)),
            {"solver_returns_multipliers": True},
            il.NonFiniteError,
            "multipliers of inequality",
        ),
        (exact, {"inequality": lambda x, t: x > 1}, il.ObjectiveError, "must return a floating tensor"),
        (exact, {"inequality": lambda x, t: (x * 0 + 2).log() / x.detach() * 0 + x}, il.NonFiniteError, "NaN or Inf"),
    ],
)
def test_wrong_answers_are_refused(solver: Any, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    layer = il.constrained_argmin(squares, solver, **{"inequality": bound, **settings})
    with pytest.raises(error, match=message):
        layer(torch.zeros(1, dtype=F64), torch.tensor([0.0], dtype=F64, requires_grad=True))


def test_the_number_of_constraints_must_not_change() -> None:
    layer = il.constrained_argmin(squares, exact, inequality=lambda x, t: x[: 1 + int(float(x.detach()[0]) > 0)] - 1)
    with pytest.raises(il.ObjectiveError, match="must not depend on x"):
        layer(torch.zeros(2, dtype=F64), torch.tensor([0.5, 0.5], dtype=F64, requires_grad=True))


def test_a_layer_can_be_pickled() -> None:
    layer = il.constrained_argmin(squares, exact, inequality=bound)
    x = layer(torch.zeros(1, dtype=F64), torch.tensor([2.0], dtype=F64, requires_grad=True))
    again = pickle.loads(pickle.dumps(layer))
    assert again.records == [] and again.last_record is None and layer.last_record is not None
    assert torch.equal(again(torch.zeros(1, dtype=F64), torch.tensor([2.0], dtype=F64)), x.detach())
