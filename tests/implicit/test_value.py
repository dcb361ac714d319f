"""``il.value``: the smallest value and its derivatives, against finite differences and closed forms."""

from typing import Any

import pytest
import torch
from references import F64, central_differences, randn, relative_error

import implicitlayer as il

Tensor = torch.Tensor
N = 4
EYE = torch.eye(N, dtype=F64)
STEP = 1e-5  # truncation about 1e-10 times third derivatives, rounding 1e-14 / 1e-5


def softplus(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return torch.nn.functional.softplus(x * t).sum() + 0.5 * s * x @ x - x.sum()


def newton(objective: Any, x: Tensor, *theta: Tensor) -> Tensor:
    """To rounding: the value of a point that is near is right to second order, its gradient to first only."""
    for _ in range(8):
        x = x - torch.linalg.solve(torch.func.hessian(objective)(x, *theta), torch.func.grad(objective)(x, *theta))
    return x


LAYER = il.argmin(softplus, newton)
THETA = (0.5 + randn(N, seed=1).abs(), torch.tensor(0.7, dtype=F64))


def smallest(t: Tensor, s: Tensor) -> Tensor:
    return il.value(LAYER)(torch.zeros(N, dtype=F64), t, s)


def differences_of(function: Any, leaves: list[Tensor]) -> list[Tensor]:
    def one(k: int) -> Tensor:
        with torch.no_grad():
            return central_differences(lambda t: function(*leaves[:k], t, *leaves[k + 1 :]), leaves[k].detach(), STEP)

    return [one(k) for k in range(len(leaves))]


def test_value_and_gradient_of_a_smooth_layer_are_those_of_finite_differences() -> None:
    leaves = [t.clone().requires_grad_() for t in THETA]
    value = smallest(*leaves)
    x = LAYER(torch.zeros(N, dtype=F64), *leaves)
    assert float((value - softplus(x, *leaves)).abs().detach()) < 1e-14
    for got, want in zip(torch.autograd.grad(value, leaves), differences_of(smallest, leaves), strict=True):
        assert relative_error(got, want) < 1e-8


def test_a_gradient_makes_no_linear_solve_and_a_second_derivative_does() -> None:
    leaves = [t.clone().requires_grad_() for t in THETA]
    with il.diagnostics() as records:
        (by_t, _) = torch.autograd.grad(smallest(*leaves), leaves)
    assert [type(record).__name__ for record in records] == ["ForwardRecord"]
    with il.diagnostics() as records:
        (graph, _) = torch.autograd.grad(smallest(*leaves), leaves, create_graph=True)
        torch.autograd.grad(graph.sum(), leaves)
    assert len(records) >= 3 and relative_error(graph, by_t) < 1e-12


@pytest.mark.parametrize("by", ["autograd", "torch.func"])
def test_second_derivatives_are_differences_of_first_ones(by: str) -> None:
    t, s = THETA

    def gradient(t: Tensor) -> Tensor:
        leaf = t.clone().requires_grad_()
        return torch.autograd.grad(smallest(leaf, s), leaf)[0]

    expected = torch.stack(
        [(gradient(t + STEP * e) - gradient(t - STEP * e)) / (2 * STEP) for e in EYE],
    )
    if by == "autograd":
        found = torch.autograd.functional.hessian(lambda t: smallest(t, s), t)
    else:
        found = torch.func.hessian(lambda t: smallest(t, s))(t)
    assert relative_error(found, expected) < 1e-8
    # the part that goes through x: without it the second derivative would be that at fixed x
    x = LAYER(torch.zeros(N, dtype=F64), t, s)
    at_fixed_x = torch.func.hessian(lambda t: softplus(x, t, s))(t)
    assert relative_error(at_fixed_x, expected) > 1e-2


def test_weights_that_are_closed_over_or_belong_to_a_module_have_their_gradient() -> None:
    w = THETA[0].clone().requires_grad_()
    closed = il.argmin(lambda x, s: softplus(x, w, s), newton)
    (got,) = torch.autograd.grad(il.value(closed)(torch.zeros(N, dtype=F64), THETA[1]), w)
    leaf = THETA[0].clone().requires_grad_()
    (want,) = torch.autograd.grad(smallest(leaf, THETA[1]), leaf)
    assert relative_error(got, want) < 1e-12

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(THETA[0].clone())

        def forward(self, x: Tensor, s: Tensor) -> Tensor:
            return softplus(x, self.w, s)

    module = il.ArgminLayer(Objective(), newton, init=torch.zeros(N, dtype=F64))
    il.value(module)(THETA[1]).backward()
    assert relative_error(module.objective.w.grad, want) < 1e-12  # type: ignore[union-attr, arg-type]


def nearest(problem: Any, init: Tensor, t: Tensor, r: Tensor) -> Tensor:
    return t * (r**0.5 / t.norm(dim=-1, keepdim=True)).clamp(max=1.0)


nearest.batched = True  # type: ignore[attr-defined]


@pytest.mark.parametrize("lanes", [(), (3,)])
def test_the_value_under_a_constraint_has_its_derivative_in_the_constraint(lanes: tuple[int, ...]) -> None:
    # the squared distance from the disc x'x <= r: (|t| - sqrt(r))^2 outside, zero inside
    disc = il.constrained_argmin(
        lambda x, t, r: ((x - t) ** 2).sum(-1),
        nearest,
        inequality=lambda x, t, r: (x**2).sum(-1) - r,
        batch_dims=len(lanes),
    )
    t = (torch.tensor([3.0, 4.0], dtype=F64) * torch.ones(*lanes, 1, dtype=F64)).requires_grad_()
    if lanes:
        with torch.no_grad():
            t[1] = torch.tensor([0.5, 0.1], dtype=F64)
    r = torch.tensor(4.0, dtype=F64, requires_grad=True)
    value = il.value(disc)(torch.zeros_like(t).detach(), t, r)
    expected = (t.norm(dim=-1) - r**0.5).clamp(min=0) ** 2
    assert value.shape == lanes and torch.allclose(value, expected, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(value.sum(), (t, r), create_graph=True),
        torch.autograd.grad(expected.sum(), (t, r), create_graph=True),
        strict=True,
    ):
        assert torch.allclose(got, want, atol=1e-10)
        second, right = (torch.autograd.grad(g.sum(), (t, r), retain_graph=True) for g in (got, want))
        assert all(torch.allclose(a, b, atol=1e-8) for a, b in zip(second, right, strict=True))


def program(lanes: tuple[int, ...] = ()) -> dict[str, Tensor]:
    root, inside = randn(*lanes, N, N, seed=1), randn(*lanes, N, seed=2)
    A, G = randn(1, N, seed=3), randn(3, N, seed=4)
    return {
        "Q": root @ root.mT + EYE,
        "p": 4 * randn(*lanes, N, seed=5),
        "A": A,
        "b": (inside @ A.T),
        "G": G,
        "h": inside @ G.T + 0.2,
        "lower": inside @ G.T - 0.2,
        "lb": inside - 0.3,
        "ub": inside + 0.3,
    }


@pytest.mark.parametrize("lanes", [(), (2,)])
def test_the_value_of_a_program_has_the_differences_of_it_in_all_its_data(lanes: tuple[int, ...]) -> None:
    data = program(lanes)
    leaves = [t.clone().requires_grad_() for t in data.values()]

    def smallest_of(*tensors: Tensor) -> Tensor:
        return il.value(il.qp)(**dict(zip(data, tensors, strict=True))).sum()

    x = il.qp(**data)
    assert torch.allclose(
        il.value(il.qp)(**data), (0.5 * x * (data["Q"] @ x[..., None])[..., 0] + data["p"] * x).sum(-1), atol=1e-12
    )
    for got, want in zip(
        torch.autograd.grad(smallest_of(*leaves), leaves), differences_of(smallest_of, leaves), strict=True
    ):
        assert float((got - want).norm()) < 1e-7 * (1 + float(want.norm()))


def test_second_derivatives_of_a_program_are_differences_of_first_ones() -> None:
    data = {name: t for name, t in program().items() if name in ("Q", "p", "G", "h")}
    names = ("p", "h")

    def gradient(p: Tensor, h: Tensor) -> Tensor:
        return torch.cat(torch.func.grad(lambda p, h: il.value(il.qp)(**{**data, "p": p, "h": h}), (0, 1))(p, h))

    leaves = [data[name].clone().requires_grad_() for name in names]
    value = il.value(il.qp)(**{**data, **dict(zip(names, leaves, strict=True))})
    first = torch.cat(torch.autograd.grad(value, leaves, create_graph=True))
    assert relative_error(first, gradient(*leaves)) < 1e-10
    for k, size in enumerate((N, 3)):
        for i in range(size):
            shift = [torch.zeros_like(t) for t in leaves]
            shift[k][i] = STEP
            up, down = (gradient(*(t.detach() + s * d for t, d in zip(leaves, shift, strict=True))) for s in (1, -1))
            column = torch.cat([torch.autograd.grad(g, leaves[k], retain_graph=True)[0][i : i + 1] for g in first])
            assert torch.allclose(column, (up - down) / (2 * STEP), atol=1e-7)


def test_a_side_that_is_none_gives_no_nan() -> None:
    t = torch.tensor([2.0, -1.0], dtype=F64, requires_grad=True)
    ub = torch.tensor([1.0, torch.inf], dtype=F64, requires_grad=True)
    value = il.value(il.qp)(torch.eye(2, dtype=F64), -t, ub=ub)
    assert float(value.detach()) == pytest.approx(0.5 * (1 + 1) - 2 - 1)
    by_t, by_ub = torch.autograd.grad(value, (t, ub))
    assert by_t.tolist() == pytest.approx([-1.0, 1.0]) and by_ub.tolist() == pytest.approx([-1.0, 0.0])


def test_what_has_no_value_is_refused_with_what_does() -> None:
    with pytest.raises(ValueError, match=r"needs a layer that minimises .*, or il\.qp; got root\. An equation has no"):
        il.value(il.root(lambda x, t: x - t, lambda f, x, t: t))
    with pytest.raises(ValueError, match="got function"):
        il.value(lambda x: x)
    with pytest.raises(ValueError, match="whether the regularizer of this layer belongs to the value"):
        il.value(il.argmin(lambda x, t: ((x - t) ** 2).sum(), lambda f, x, t: t, regularizer=il.L1(0.1)))


def distance(x: Any, t: Tensor) -> Tensor:
    return ((torch.cat([*x.values()]) - t) ** 2).sum() if isinstance(x, dict) else ((x - t) ** 2).sum()


MOVING = {
    "Box": lambda t, ub: il.sets.Box(-1.0, ub),
    "Ball": lambda t, ub: il.sets.Ball(ub.sum()),
    "Simplex": lambda t, ub: il.sets.Simplex(ub.sum()),
    "Projection": lambda t, ub: il.sets.Projection(lambda y, *_: torch.minimum(y, ub)),
    "pytree": lambda t, ub: {"a": il.sets.Box(-1.0, ub[:2]), "b": None},
}


@pytest.mark.parametrize("closed_over", [True, False])
@pytest.mark.parametrize("kind", MOVING)
def test_a_set_that_moves_with_its_data_has_its_part_of_the_derivative(kind: str, closed_over: bool) -> None:
    solver = il.solvers.ProjectedGradient(rtol=1e-14)
    init: Any = torch.zeros(3, dtype=F64)
    init = {"a": init[:2], "b": init[2:]} if kind == "pytree" else init

    def found(t: Tensor, ub: Tensor) -> Tensor:
        if closed_over:
            return il.value(il.argmin(distance, solver, constraint=MOVING[kind](t, ub)))(init, t)
        layer = il.argmin(lambda x, t, _: distance(x, t), solver, constraint=MOVING[kind])
        return il.value(layer)(init, t, ub)

    leaves = [torch.tensor([2.0, 0.1, -3.0], dtype=F64), torch.tensor([0.4, 0.7, 0.9], dtype=F64)]
    leaves = [t.requires_grad_() for t in leaves]
    for graph in (False, True):  # the first derivative does not depend on whether it makes one
        got = torch.autograd.grad(found(*leaves), leaves, create_graph=graph)
        for slope, want in zip(got, differences_of(found, leaves), strict=True):
            assert relative_error(slope.detach(), want) < 1e-8


def test_the_value_of_a_closest_program_is_that_of_its_solution() -> None:
    def found(lb: Tensor, ub: Tensor) -> Tensor:
        return il.value(il.qp)(EYE[:2, :2], torch.zeros(2, dtype=F64), lb=lb, ub=ub, infeasible="closest")

    sides = torch.tensor([1.0, 1.0], dtype=F64), torch.tensor([0.0, 5.0], dtype=F64)
    sides = sides[0].requires_grad_(), sides[1].requires_grad_()
    value = found(*sides)  # 1/2 |x|^2 at x = ((1 + 0) / 2, 1)
    assert float(value.detach()) == pytest.approx(0.625, abs=1e-12)
    by_lb, by_ub = torch.autograd.grad(value, sides)
    assert by_lb.tolist() == pytest.approx([0.25, 1.0]) and by_ub.tolist() == pytest.approx([0.25, 0.0])


def test_the_value_where_a_violation_is_to_be_ignored_is_that_of_the_objective() -> None:
    layer = il.constrained_argmin(
        lambda x, t: ((x - t) ** 2).sum(),
        lambda f, x, t: (x, (torch.ones(1, dtype=F64), None)),
        equality=lambda x, t: x.sum()[None] - 0.5,
        on_failure="ignore",
        solver_returns_multipliers=True,
    )
    t = torch.tensor([1.0, 2.0], dtype=F64)
    assert float(il.value(layer)(torch.ones(2, dtype=F64), t)) == 1.0


def test_a_masked_lane_has_no_value_and_costs_no_other_lane_its_derivative() -> None:
    shared = torch.tensor(1.5, dtype=F64, requires_grad=True)
    t = torch.tensor([[1.0, 2.0], [torch.nan, 3.0], [3.0, 1.0]], dtype=F64, requires_grad=True)
    init = torch.ones(3, 2, dtype=F64)
    layer = il.argmin(
        lambda x, t, s: (s * x**2 - t * x.log()).sum(-1), il.solvers.NewtonCG(), batch_dims=1, on_failure="mask"
    )
    constrained = il.constrained_argmin(
        lambda x, t, s: (s * (x - t) ** 2).sum(-1),
        il.solvers.SQP(),
        equality=lambda x, t, s: x.sum(-1, keepdim=True) - 1,
        batch_dims=1,
        on_failure="mask",
    )
    module = il.ArgminLayer(layer.function, layer.solver, batch_dims=1, on_failure="mask", init=lambda *_: init)
    assert il.value(module)(t, shared).isnan().tolist() == [False, True, False]
    for some in (layer, constrained):
        value = il.value(some)(init, t, shared)
        assert value.isnan().tolist() == [False, True, False]
        by_t, by_shared = torch.autograd.grad(value[~value.isnan()].sum(), (t, shared))
        alone = il.value(some)(init[::2], t.detach()[::2].requires_grad_(), shared)
        (want,) = torch.autograd.grad(alone.sum(), shared)
        assert torch.equal(by_t[1], torch.zeros(2, dtype=F64)) and float(by_shared) == pytest.approx(float(want))
    Q = torch.eye(2, dtype=F64, requires_grad=True)
    lb = torch.tensor([[0.5, 0.0], [2.0, 0.0]], dtype=F64)
    ones = torch.ones(2, dtype=F64)
    value = il.value(il.qp)(Q, ones, lb=lb, ub=ones, on_failure="mask")  # 2 <= x <= 1 in the second lane
    assert value.isnan().tolist() == [False, True]
    (by_Q,) = torch.autograd.grad(value[~value.isnan()].sum(), Q)
    assert by_Q.flatten().tolist() == pytest.approx([0.125, 0.0, 0.0, 0.0], abs=1e-12)  # x x' / 2 at (0.5, 0)


def test_a_set_that_does_not_depend_on_theta_is_no_matter() -> None:
    box = il.argmin(
        lambda x, t: ((x - t) ** 2).sum(), lambda f, x, t: t.clamp(-1, 1), constraint=il.sets.Box(-1.0, 1.0)
    )
    t = torch.tensor([3.0, 0.5], dtype=F64, requires_grad=True)
    (got,) = torch.autograd.grad(il.value(box)(torch.zeros(2, dtype=F64), t), t)
    assert torch.allclose(got, torch.tensor([4.0, 0.0], dtype=F64), atol=1e-12)  # 2 (t - 1) outside of the box
