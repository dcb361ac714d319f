"""Layers over sets and with regularisers: gradients against closed forms and differences, records, refusals."""

# Accuracy: PG stops at 1e-13 of the first gradient; condition numbers here are below 100, so solutions are good to
# about 1e-11 and central differences with h = 1e-5 to e / h = 1e-6 of their own size (truncation h^2 times third
# derivatives). GMRES stops at rtol 1e-10.

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, central_differences, randn, relative_error, spd_matrix
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


CASES: dict[str, tuple[str, Any, tuple[Tensor, ...]]] = {
    "box": ("constraint", lambda b, lo, hi: Box(lo, hi), (-0.5 - randn(5, seed=2).abs(), 0.2 + randn(5, seed=3).abs())),
    "non-negative": ("constraint", NonNegative(), ()),
    "simplex": ("constraint", lambda b, total: Simplex(total), (scalar(6.0),)),
    "ball": ("constraint", lambda b, r, c: Ball(r, c), (scalar(0.5), 0.1 * randn(5, seed=4))),
    "affine": ("constraint", lambda b, A, c: Affine(A, c), (randn(2, 5, seed=5), randn(2, seed=6))),
    "projection": ("constraint", Projection(lambda y, b, top: torch.where(y < top, y, top)), (scalar(0.4),)),
    "l1": ("regularizer", lambda b, s: il.L1(s), (scalar(0.5),)),
    "elastic net": ("regularizer", lambda b, s, t: il.ElasticNet(s, t), (scalar(0.5), scalar(0.3))),
    "group": ("regularizer", lambda b, s: il.GroupL1(s), (scalar(0.4),)),
    "prox": ("regularizer", il.Prox(lambda y, step, b, s: il.L1(s).prox(y, step)), (scalar(0.5),)),
}
EACH = pytest.mark.parametrize("case", list(CASES))


def problem(case: str, **settings: Any) -> tuple[Callable[..., Tensor], list[Tensor]]:
    kind, term, data = CASES[case]
    theta = [t.clone().requires_grad_() for t in (1.5 * randn(5, seed=7), *data)]
    return il.argmin(quadratic, PG, **{kind: term}, **settings), theta


@EACH
def test_gradients_match_differences_of_the_solution(case: str) -> None:
    layer, theta = problem(case)
    gradients = torch.autograd.grad(layer(ZERO, *theta) @ WEIGHTS, theta)
    fixed = [t.detach() for t in theta]
    for i, gradient in enumerate(gradients):
        direction = randn(*fixed[i].shape, seed=30 + i)

        def response(s: Tensor, i: int = i, direction: Tensor = direction) -> Tensor:
            return layer(ZERO, *fixed[:i], fixed[i] + s * direction, *fixed[i + 1 :]) @ WEIGHTS

        expected = float(central_differences(response, scalar(0.0), 1e-5))
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5), i
        assert abs(expected) > 1e-3, "the data do not act here: the test shows nothing"


@EACH
def test_second_derivatives_match_differences_of_first_ones(case: str) -> None:
    layer, theta = problem(case)
    v = [randn(*t.shape, seed=40 + i) for i, t in enumerate(theta)]

    def slope(*args: Tensor) -> Tensor:  # along v
        inputs = [t if t.requires_grad else t.clone().requires_grad_() for t in args]
        gradients = torch.autograd.grad((layer(ZERO, *inputs) ** 2) @ WEIGHTS, inputs, create_graph=True)
        return torch.stack([(g * d).sum() for g, d in zip(gradients, v, strict=True)]).sum()

    exact = torch.autograd.grad(slope(*theta), theta)
    along = sum(float((g * d).sum()) for g, d in zip(exact, v, strict=True))
    h = 1e-4  # gradients are good to 1e-9
    ends = [slope(*(t.detach() + s * h * d for t, d in zip(theta, v, strict=True))).item() for s in (1, -1)]
    assert along == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-4, abs=1e-4)


@EACH
def test_forward_mode_agrees_with_reverse_mode(case: str) -> None:
    layer, theta = problem(case)
    fixed = [t.detach() for t in theta]
    tangents = [randn(*t.shape, seed=50 + i) for i, t in enumerate(fixed)]
    _, moved = torch.func.jvp(lambda *t: layer(ZERO, *t), tuple(fixed), tuple(tangents))
    gradients = torch.autograd.grad(layer(ZERO, *theta) @ WEIGHTS, theta)
    expected = sum(float((g * d).sum()) for g, d in zip(gradients, tangents, strict=True))
    assert float(moved @ WEIGHTS) == pytest.approx(expected, rel=1e-8)


@EACH
def test_vmap_over_everything_is_the_loop(case: str) -> None:
    layer, theta = problem(case)
    lanes = [torch.stack([t.detach(), 0.9 * t.detach()]) for t in theta]
    gradient = torch.func.grad(lambda *t: layer(ZERO, *t) @ WEIGHTS, argnums=tuple(range(len(theta))))
    together = torch.func.vmap(gradient)(*lanes)
    for lane in range(2):
        alone = gradient(*(t[lane] for t in lanes))
        for a, b in zip(together, alone, strict=True):
            # each is within 1e-10 times the condition number of the exact one
            torch.testing.assert_close(a[lane], b, rtol=1e-7, atol=1e-8)


@EACH
def test_the_derivative_does_not_depend_on_the_step_of_the_equation(case: str) -> None:
    answers = []
    for step_size in (None, 0.01, 3.0):
        layer, theta = problem(case, step_size=step_size)
        answers.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(layer(ZERO, *theta) @ WEIGHTS, theta)]))
    assert relative_error(answers[1], answers[0]) < 1e-7
    assert relative_error(answers[2], answers[0]) < 1e-7


def test_a_clamp_has_its_closed_form() -> None:
    layer = il.argmin(
        lambda x, t, lo, hi: 0.5 * ((x - t) ** 2).sum(),
        lambda f, x, t, lo, hi: t.clamp(lo, hi),
        constraint=lambda t, lo, hi: Box(lo, hi),
    )
    t = torch.tensor([-1.0, 0.5, 3.0, 4.0], dtype=F64, requires_grad=True)
    lo, hi = scalar(0.0).requires_grad_(), scalar(1.0).requires_grad_()
    x = layer(torch.zeros(4, dtype=F64), t, lo, hi)
    slopes = torch.autograd.grad(x.sum(), [t, lo, hi])
    assert [s.tolist() for s in slopes] == [[0.0, 1.0, 0.0, 0.0], 1.0, 2.0]
    found = layer.records[0].active_set  # type: ignore[union-attr]
    assert found is not None
    assert found.active.tolist() == [True, False, True, True]
    assert int(found.num_active) == 3
    assert int(found.num_kinks) == 0
    assert "active 3, kinks 0" in str(layer.records[0])


def test_data_that_the_set_closes_over_get_their_gradients_under_vmap_too() -> None:
    t = torch.tensor([-1.0, 0.5, 3.0], dtype=F64)
    hi = scalar(1.0).requires_grad_()
    layer = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), PG, constraint=Box(0.0, hi))
    layer(torch.zeros(3, dtype=F64), t).sum().backward()
    assert hi.grad is not None
    assert float(hi.grad) == pytest.approx(1.0, abs=1e-12)

    def with_bound(top: Tensor) -> Tensor:
        inner = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), PG, constraint=Box(0.0, top))
        return inner(torch.zeros(3, dtype=F64), t).sum()

    tops = torch.tensor([0.2, 1.0, 5.0], dtype=F64)
    slopes = torch.func.vmap(torch.func.grad(with_bound))(tops)
    torch.testing.assert_close(slopes, torch.tensor([2.0, 1.0, 0.0], dtype=F64), rtol=0, atol=1e-9)


def test_batch_dims_solve_every_lane_over_its_own_set() -> None:
    b, totals = randn(3, 5, seed=60).requires_grad_(), torch.tensor([0.5, 1.0, 2.0], dtype=F64, requires_grad=True)

    def lanes(x: Tensor, b: Tensor, _: Tensor) -> Tensor:
        return 0.5 * ((x @ H) * x).sum(-1) - (b * x).sum(-1)

    layer = il.argmin(lanes, PG, batch_dims=1, constraint=lambda b, total: Simplex(total))
    got = torch.autograd.grad((layer(torch.zeros(3, 5, dtype=F64), b, totals) @ WEIGHTS).sum(), [b, totals])
    single = il.argmin(lambda x, b, _: 0.5 * x @ H @ x - b @ x, PG, constraint=lambda b, total: Simplex(total))
    x = torch.stack([single(ZERO, b[i], totals[i]) for i in range(3)])
    expected = torch.autograd.grad((x @ WEIGHTS).sum(), [b, totals])
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-7, atol=1e-8)


def test_parts_of_a_pytree_have_terms_of_their_own() -> None:
    def objective(x: dict[str, Tensor], t: Tensor) -> Tensor:
        return 0.5 * ((x["w"] - t) ** 2).sum() + 0.5 * ((x["b"] - t.sum()) ** 2).sum()

    t = torch.tensor([0.3, 2.0], dtype=F64, requires_grad=True)
    strength = scalar(0.5).requires_grad_()
    term: Callable[..., Any] = lambda t, s: {"b": Box(upper=1.0), "w": il.L1(s)}  # noqa: E731
    layer = il.argmin(lambda x, t, s: objective(x, t), PG, regularizer=term)
    x = layer({"w": torch.zeros(2, dtype=F64), "b": torch.zeros(1, dtype=F64)}, t, strength)
    torch.testing.assert_close(x["w"], torch.tensor([0.0, 1.5], dtype=F64), rtol=0, atol=1e-12)
    assert x["b"].tolist() == [1.0]
    slopes = torch.autograd.grad(x["w"].sum() + x["b"].sum(), [t, strength])
    torch.testing.assert_close(slopes[0], torch.tensor([0.0, 1.0], dtype=F64), rtol=0, atol=1e-10)
    assert float(slopes[1]) == pytest.approx(-1.0, abs=1e-10)


def test_polish_makes_newton_steps_on_the_free_entries() -> None:
    loose = il.solvers.ProximalGradient(rtol=1e-3, max_steps=2000)
    layer = il.argmin(quadratic, loose, constraint=NonNegative(), polish=4, on_failure="ignore")
    b = (1.5 * randn(5, seed=7)).requires_grad_()
    exact = il.argmin(quadratic, PG, constraint=NonNegative())(ZERO, b)
    # the support is found by 1e-3; from there on Newton's method is quadratic
    torch.testing.assert_close(layer(ZERO, b), exact, rtol=0, atol=1e-11)


# ---------------------------------------------------------------------------------------------------------- black boxes


@pytest.mark.parametrize("model", ["Lasso", "ElasticNet"])
def test_scikit_learn_gets_gradients_in_its_strengths_and_data(model: str) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    A, y = randn(30, 5, seed=70), randn(30, seed=71)

    def fit(_: Any, x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
        settings: dict[str, Any] = {"fit_intercept": False, "tol": 1e-14, "max_iter": 100_000}
        if model == "ElasticNet":
            settings["l1_ratio"] = 0.7
        fitted = getattr(linear_model, model)(alpha=alpha.item(), **settings).fit(A.numpy(), y.detach().numpy())
        return torch.from_numpy(fitted.coef_)

    def mean_squares(x: Tensor, y: Tensor, alpha: Tensor) -> Tensor:
        return ((A @ x - y) ** 2).mean() / 2

    def term(y: Tensor, alpha: Tensor) -> Any:
        return il.L1(alpha) if model == "Lasso" else il.ElasticNet(0.7 * alpha, 0.3 * alpha)

    layer = il.argmin(mean_squares, fit, regularizer=term)
    alpha, y = scalar(0.1).requires_grad_(), y.requires_grad_()
    x = layer(ZERO, y, alpha)
    assert 0 < int((x == 0).sum()) < 5
    got = torch.autograd.grad(x @ WEIGHTS, [y, alpha])
    # coordinate descent is good to about 1e-13: h = 1e-5 leaves 1e-8
    expected = central_differences(lambda a: fit(None, ZERO, y, a) @ WEIGHTS, alpha, 1e-5)
    assert float(got[1]) == pytest.approx(float(expected), rel=1e-5)
    v = randn(30, seed=72)
    expected = central_differences(lambda s: fit(None, ZERO, y.detach() + s * v, alpha) @ WEIGHTS, scalar(0.0), 1e-5)
    assert float(got[0] @ v) == pytest.approx(float(expected), rel=1e-5)


def test_scipy_with_bounds_is_a_solver_like_any_other() -> None:
    optimize = pytest.importorskip("scipy.optimize")

    def solver(f: Any, x: Tensor, b: Tensor, hi: Tensor) -> Tensor:
        def both(flat: Any) -> Any:
            at = torch.from_numpy(flat).requires_grad_()
            value = f(at, b, hi)
            return value.item(), torch.autograd.grad(value, at)[0].numpy()

        settings = {"ftol": 1e-16, "gtol": 1e-12}
        bounds = [(-1.0, float(h)) for h in hi]
        answer = optimize.minimize(both, x.numpy(), jac=True, method="L-BFGS-B", bounds=bounds, options=settings)
        return torch.from_numpy(answer.x)

    b, hi = (1.5 * randn(5, seed=7)).requires_grad_(), torch.full((5,), 0.3, dtype=F64, requires_grad=True)
    box: Callable[..., Any] = lambda b, hi: Box(-1.0, hi)  # noqa: E731
    got = torch.autograd.grad(il.argmin(quadratic, solver, constraint=box)(ZERO, b, hi) @ WEIGHTS, [b, hi])
    expected = torch.autograd.grad(il.argmin(quadratic, PG, constraint=box)(ZERO, b, hi) @ WEIGHTS, [b, hi])
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-5  # L-BFGS-B is good to about 1e-7 here
