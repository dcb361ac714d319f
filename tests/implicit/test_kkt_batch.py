"""``il.constrained_argmin(batch_dims=k)``: the answer of a loop over the lanes, in values and all derivatives."""

from typing import Any

import pytest
import torch
from kkt_problems import bound, clamp, non_negative, objective, on_the_plane, slsqp, squares
from references import F64, randn, relative_error
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import implicitlayer as il

pytest.importorskip("scipy.optimize")

# Batch and loop run the same steps on the same numbers: they differ by the rounding of matrix products of other shapes,
# 1e-16 times condition numbers below 1e3, and by Newton steps whose last change is rounding.
ROUNDING = 1e-12

T = torch.stack([torch.tensor(t, dtype=F64) for t in ([0.5, 0.9, -1.0, 0.3], [2.0, -1.0, -1.0, 0.2], [0.3] * 4)])
A = torch.tensor(0.3, dtype=F64)
INIT = torch.full((3, 4), 0.25, dtype=F64)


def plane(x: torch.Tensor, t: torch.Tensor, a: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"sum": on_the_plane(x, t, a)}


SETTINGS: dict[str, Any] = {"equality": plane, "inequality": non_negative, "polish": 2, "return_multipliers": True}
ONE = il.constrained_argmin(objective, slsqp, **SETTINGS)
MANY = il.constrained_argmin(objective, slsqp, batch_dims=1, **SETTINGS)


def flat(answer: Any) -> torch.Tensor:
    x, found = answer
    return torch.cat([x, found.equality["sum"][..., None], found.inequality], -1)


def one_by_one(t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return torch.stack([flat(ONE(INIT[0], lane, a)) for lane in t])


def all_at_once(t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return flat(MANY(INIT, t, a))


def test_the_answer_its_multipliers_and_their_gradients_are_those_of_a_loop() -> None:
    weights = randn(3, 9, seed=1)
    t, a = T.clone().requires_grad_(), A.clone().requires_grad_()
    many = all_at_once(t, a)
    found = MANY.active_set
    assert found is not None and found.num_active.tolist() == [1, 3, 0] and found.active.shape == (3, 4)
    one = one_by_one(t, a)
    assert relative_error(many, one) < ROUNDING
    # a is shared: its gradient is the sum over the lanes
    for got, expected in zip(*(torch.autograd.grad((y * weights).sum(), (t, a)) for y in (many, one)), strict=True):
        assert relative_error(got, expected) < ROUNDING
    by_vmap = grad(lambda t, a: (vmap(lambda t: flat(ONE(INIT[0], t, a)))(t) * weights).sum(), argnums=(0, 1))(T, A)
    got = grad(lambda t, a: (all_at_once(t, a) * weights).sum(), argnums=(0, 1))(T, A)
    assert all(relative_error(g, e) < ROUNDING for g, e in zip(got, by_vmap, strict=True))


def test_forward_mode_and_second_derivatives_are_those_of_a_loop() -> None:
    direction, by_a = randn(3, 4, seed=2), torch.tensor(0.7, dtype=F64)
    results = [jvp(f, (T, A), (direction, by_a)) for f in (all_at_once, one_by_one)]
    assert all(relative_error(got, expected) < ROUNDING for got, expected in zip(*results, strict=True))
    cubes = lambda f: lambda a: (f(T, a) ** 3).sum()  # noqa: E731
    assert relative_error(hessian(cubes(all_at_once))(A), hessian(cubes(one_by_one))(A)) < ROUNDING
    assert relative_error(jacfwd(all_at_once)(T, A), jacrev(all_at_once)(T, A)) < ROUNDING


class AllAtOnce:
    """A solver of all lanes, with its multipliers, that counts its calls."""

    batched = True

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, problem: Any, init: torch.Tensor, t: torch.Tensor) -> Any:
        self.calls += 1
        assert problem.lane == () and problem.lane_dims == init.ndim - 1
        assert problem(init, t).shape == init.shape[:-1] and problem.inequality(init, t).shape == init.shape
        return t.clamp(max=1.0).expand(init.shape), (None, 2 * (t - 1).clamp(min=0).expand(init.shape))


def test_a_batched_solver_is_called_once_also_under_vmap() -> None:
    t = torch.stack([torch.tensor([[3.0, 0.2], [0.5, 0.7]], dtype=F64), torch.tensor([[2.0, 4.0]] * 2, dtype=F64)])
    zeros, expected = torch.zeros(2, 2, dtype=F64), (t < 1).to(F64)
    for batch_dims, call in (
        (2, lambda layer: grad(lambda t: layer(torch.zeros(2, 2, 2, dtype=F64), t).sum())(t)),
        (1, lambda layer: vmap(grad(lambda t: layer(zeros, t).sum()))(t)),
        (0, lambda layer: vmap(vmap(grad(lambda t: layer(zeros[0], t).sum())))(t)),
    ):
        solver = AllAtOnce()
        layer = il.constrained_argmin(
            squares, solver, inequality=bound, solver_returns_multipliers=True, batch_dims=batch_dims
        )
        assert torch.equal(call(layer), expected) and solver.calls == 1
        found = layer.active_set
        assert found is not None and torch.equal(found.active, t > 1) and found.num_active.tolist() == [[1, 0], [2, 2]]


def test_other_solvers_are_called_lane_by_lane_also_under_vmap() -> None:
    lanes: list[tuple[int, ...]] = []

    def solver(problem: Any, init: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        lanes.append(problem.lane)
        assert problem.lane_dims == 0 and init.shape == (2,) and t.shape == (3, 2)
        assert problem(init, t).item() == pytest.approx(float(squares(init, t[problem.lane])))
        assert torch.equal(problem.inequality(init, t), init - 1)
        init += 1  # its own copy
        return clamp(problem, init, t)

    t, init = 2 * randn(2, 3, 2, seed=3), torch.zeros(3, 2, dtype=F64)
    layer = il.constrained_argmin(squares, solver, inequality=bound, batch_dims=1)
    got = vmap(grad(lambda t: layer(init, t).sum()))(t)
    assert torch.allclose(got, (t < 1).to(F64)) and lanes == [(0,), (1,), (2,)] * 2 and not init.any()
    assert layer.active_set is not None and torch.equal(layer.active_set.active, t > 1)


def test_one_lane_is_evaluated_without_the_values_of_the_others() -> None:
    # log(x - t) is NaN where x <= t, and every lane has its own t
    layer = il.constrained_argmin(
        lambda x, t: (x - torch.log(x - t)).sum(-1),
        il.solvers.SciPyMinimize("SLSQP", options={"ftol": 1e-14}),
        inequality=lambda x, t: x - t - 1.5,
        batch_dims=1,
        polish=2,
    )
    t = torch.tensor([[-5.0], [0.0], [40.0]], dtype=F64, requires_grad=True)
    x = layer(t.detach() + 0.5, t)
    assert relative_error(x, t.detach() + 1) < ROUNDING
    assert relative_error(torch.autograd.grad(x.sum(), t)[0], torch.ones(3, 1, dtype=F64)) < ROUNDING


def test_lanes_are_polished_each_as_far_as_it_improves() -> None:
    # the exact lane has no better point, the rough ones need several: x^4 makes the problem nonlinear
    rough = torch.tensor([[0.0], [1e-4], [1e-3]], dtype=F64)
    exact = MANY(INIT, T.clone().requires_grad_(), A)[0].detach()
    solvers = [lambda p, x, t, a: (exact + rough)[p.lane], lambda p, x, t, a: (exact + rough)[lane]]
    settings = {**SETTINGS, "polish": 6, "active_rtol": 1e-2, "on_failure": "ignore"}
    many = flat(il.constrained_argmin(objective, solvers[0], batch_dims=1, **settings)(INIT, T.requires_grad_(), A))
    one = il.constrained_argmin(objective, solvers[1], **settings)
    for lane in range(3):
        assert relative_error(many[lane], flat(one(INIT[lane], T[lane], A))) < ROUNDING
        assert relative_error(many[lane, :4], exact[lane]) < ROUNDING


def test_multipliers_of_the_solver_may_be_known_in_some_lanes_only() -> None:
    def solver(problem: Any, init: torch.Tensor, t: torch.Tensor) -> Any:
        mu = 2 * (t[problem.lane] - 1).clamp(min=0)
        return clamp(problem, init, t), (None, mu if problem.lane == (0,) else None)

    layer = il.constrained_argmin(
        squares, solver, inequality=bound, solver_returns_multipliers=True, return_multipliers=True, batch_dims=1
    )
    t = torch.tensor([[3.0, 0.2], [0.5, 1.5]], dtype=F64, requires_grad=True)
    _, found = layer(torch.zeros(2, 2, dtype=F64), t)
    assert torch.allclose(found.inequality, torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=F64), atol=ROUNDING)
    assert torch.autograd.grad(found.inequality.sum(), t)[0].tolist() == [[2.0, 0.0], [0.0, 2.0]]


def test_pytrees_with_two_lane_dimensions_and_minres() -> None:
    b = torch.tensor([[1.0, 2.0, 3.0]], dtype=F64, requires_grad=True)  # lanes (2, 3), the first is broadcast
    init = {"u": torch.zeros(2, 3, dtype=F64), "v": torch.zeros(2, 3, 2, dtype=F64)}
    for linear_solver in (None, il.Minres(rtol=1e-12)):
        layer = il.constrained_argmin(  # smallest norm with the sum b
            lambda x, b: x["u"] ** 2 + (x["v"] ** 2).sum(-1),
            lambda problem, x, b: {
                "u": b.expand(2, 3)[problem.lane] / 3,
                "v": (b.expand(2, 3)[problem.lane] / 3).expand(2),
            },
            equality=lambda x, b: x["u"] + x["v"].sum(-1) - b,
            batch_dims=2,
            linear_solver=linear_solver,
        )
        x = layer(init, b)
        assert relative_error(torch.autograd.grad(x["u"].sum(), b)[0], torch.full((1, 3), 2 / 3, dtype=F64)) < 1e-11


def test_closed_over_tensors_are_differentiated() -> None:
    radius = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    layer = il.constrained_argmin(
        lambda x, t: ((x - t) ** 2).sum(-1),
        lambda problem, x, t: radius.detach()[problem.lane] * t[problem.lane] / t[problem.lane].norm(),
        equality=lambda x, t: (x**2).sum(-1) - radius**2,
        batch_dims=1,
    )
    x = layer(torch.ones(2, 2, dtype=F64), torch.tensor([[3.0, 4.0], [4.0, -3.0]], dtype=F64))
    assert torch.autograd.grad(x.sum(), radius)[0].tolist() == pytest.approx([1.4, 0.2])  # t / |t|, summed


def test_no_lanes_are_no_problem() -> None:
    layer = il.constrained_argmin(squares, clamp, inequality=bound, batch_dims=1, polish=1)
    t = torch.zeros(0, 2, dtype=F64, requires_grad=True)
    x = layer(torch.zeros(0, 2, dtype=F64), t)
    assert x.shape == (0, 2) and torch.autograd.grad(x.sum(), t)[0].shape == (0, 2)
