"""What a layer over a set checks of its answer: the distance from the set, also in evaluation; curvature."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il
from implicitlayer.sets import Affine, Ball, Box, NonNegative, Simplex

ZERO = torch.zeros(2, dtype=F64)


def distance(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * ((x - t) ** 2).sum()


def returns(value: list[float]) -> Callable[..., Tensor]:
    return lambda f, x, t: torch.tensor(value, dtype=F64)


# ------------------------------------------------------------------------------------------------ distance from the set


def test_an_answer_outside_by_rounding_near_a_zero_solution_is_not_infeasible() -> None:
    # the solution is zero: 1e-12 is all of x, but nothing beside the data, which are of size 5
    t = torch.tensor([-0.01, -5.0], dtype=F64, requires_grad=True)
    layer = il.argmin(distance, returns([-1e-12, 0.0]), constraint=NonNegative())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", il.StationarityWarning)
        layer(ZERO, t)
    found = layer.records[0].active_set
    assert float(found.violation) == 1e-12
    # the floor is eps^(1/3) times the size of x - eta grad f = t
    assert float(found.relative_violation) == pytest.approx(1e-12 / (5 * torch.finfo(F64).eps ** (1 / 3)), rel=1e-9)


def test_a_large_multiplier_does_not_excuse_an_infeasible_answer() -> None:
    # x - eta grad f is 1e6 here; the answer is outside of [0, 1] by half of its size
    t = torch.tensor([1e6, 1e6], dtype=F64, requires_grad=True)
    layer = il.argmin(distance, returns([1.5, 1.0]), constraint=Box(0.0, 1.0))
    with pytest.raises(il.InfeasibleError, match=r"its distance is 0\.5 "):
        layer(ZERO, t)


SETS = [
    (Box(0.0, 1.0), [3.0, 3.0], r"its distance is 2\.83"),
    (Simplex(), [3.0, -1.0], "does not satisfy the constraint"),
    (Ball(0.5), [3.0, 4.0], r"its distance is 4\.5 "),
    (
        Affine(torch.ones(2, 2, dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)),
        [0.75, 0.75],
        r"its distance is 0\.354 .* Or the set is empty",
    ),
]


@pytest.mark.parametrize(("term", "answer", "message"), SETS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_an_infeasible_answer_is_an_error_in_evaluation_too(term: Any, answer: Any, message: str, mode: Any) -> None:
    with mode():
        t = torch.tensor([3.0, 3.0], dtype=F64)
        with pytest.raises(il.InfeasibleError, match=message):
            il.argmin(distance, returns(answer), constraint=term)(ZERO, t)
        for settings in ({"on_failure": "ignore"}, {"stationarity_rtol": None}):
            x = il.argmin(distance, returns(answer), constraint=term, **settings)(ZERO, t)
            assert x.tolist() == answer


def test_in_evaluation_a_feasible_answer_costs_no_gradient_and_rounding_is_no_error() -> None:
    calls = [0]

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls[0] += 1
        return distance(x, t)

    with torch.no_grad():
        layer = il.argmin(counted, returns([0.5, 1.0]), constraint=Box(0.0, 1.0))
        for _ in range(2):
            x = layer(ZERO, torch.tensor([0.5, 3.0], dtype=F64))
            assert (x.tolist(), calls[0]) == ([0.5, 1.0], 1)  # once for a layer, to see what it keeps of theta
        layer = il.argmin(counted, returns([-1e-12, 0.0]), constraint=NonNegative())
        layer(ZERO, torch.tensor([-0.01, -5.0], dtype=F64))


def test_in_evaluation_aux_outputs_and_lanes_are_read_right() -> None:
    t = torch.tensor([[0.5, 0.5], [3.0, 0.5]], dtype=F64)
    layer = il.argmin(
        lambda x, t: (0.5 * ((x - t) ** 2).sum(-1), None),
        lambda f, x, t: (t.clone(), "aux"),
        constraint=Box(0.0, 1.0),
        batch_dims=1,
        objective_has_aux=True,
        solver_has_aux=True,
    )
    with torch.no_grad(), pytest.raises(il.InfeasibleError, match=r"the constraint in lane 1 of \(2,\)"):
        layer(torch.zeros(2, 2, dtype=F64), t)


# ------------------------------------------------------------------------------------------- the second-order condition


def concave(x: Tensor, t: Tensor) -> Tensor:
    return -0.5 * ((x - t) ** 2).sum()


DOWN: dict[str, tuple[dict[str, Any], list[float]]] = {
    "box": ({"constraint": Box(-1.0, 1.0)}, [0.3, 0.2]),
    "simplex": ({"constraint": Simplex(0.5)}, [0.3, 0.2]),
    "plane": ({"constraint": Affine(torch.ones(1, 2, dtype=F64), torch.tensor([0.5], dtype=F64))}, [0.3, 0.2]),
    "ball": ({"constraint": Ball(1.0)}, [0.3, 0.2]),
    "l1": ({"regularizer": il.L1(0.1)}, [0.4, 0.3]),
}


@pytest.mark.parametrize("name", list(DOWN))
def test_a_maximum_is_not_accepted(name: str) -> None:
    settings, answer = DOWN[name]  # of the smooth part moved by the strength, for l1: grad f = -0.1 sign(x)
    t = torch.tensor([0.3, 0.2], dtype=F64, requires_grad=True)
    layer = il.argmin(concave, returns(answer), **settings, on_failure="raise")
    with pytest.raises(il.IndefiniteError, match="stationary, but no minimum: the objective bends down along a direct"):
        layer(ZERO, t)
    with pytest.warns(il.StationarityWarning, match="stationary, but no minimum"):
        il.argmin(concave, returns(answer), **settings)(ZERO, t)
    for quiet in ({"on_failure": "ignore"}, {"stationarity_rtol": None}):
        il.argmin(concave, returns(answer), **settings, **quiet)(ZERO, t)


def test_the_lane_of_a_maximum_is_named() -> None:
    scale = torch.tensor([1.0, -1.0], dtype=F64)
    layer = il.argmin(
        lambda x, s: s * distance(x, torch.full((2,), 0.3, dtype=F64)), lambda f, x, s: x, constraint=Box()
    )
    with pytest.warns(il.StationarityWarning, match=r"no minimum in lane 1 of \(2,\)"):
        torch.func.vmap(lambda s: layer(torch.full((2,), 0.3, dtype=F64), s))(scale)


def onto(A: Tensor, b: Tensor) -> Callable[..., Tensor]:
    """A user's own projection onto A x = b."""
    return lambda y, t: y - torch.linalg.pinv(A) @ (A @ y - b)


def test_no_corner_is_called_a_saddle() -> None:
    # as many independent equations as unknowns: the solution does not move with t, and rounding is no direction
    checked = 0
    for seed in range(250):
        n = 2 + seed % 4
        A = torch.randint(-3, 4, (n, n), generator=torch.Generator().manual_seed(seed)).to(F64)
        condition = float(torch.linalg.cond(A))
        if condition > 1e6:
            continue
        b = torch.ones(n, dtype=F64)
        corner = torch.linalg.solve(A, b)
        t = randn(n, seed=seed).requires_grad_()
        for constraint in (Affine(A, b), Affine(torch.cat([A, A[:1] + A[1:2]]), torch.cat([b, b[:1] + b[1:2]])),
                           il.sets.Projection(onto(A, b))):  # fmt: skip
            layer = il.argmin(distance, lambda f, x, t, at=corner: at, constraint=constraint, on_failure="raise")
            (slope,) = torch.autograd.grad(layer(torch.zeros(n, dtype=F64), t).sum(), t)
            # the projection onto the free directions, of which there are none, is known to eps times the condition
            assert float(slope.norm()) <= 64 * n * condition * torch.finfo(F64).eps
            checked += 1
    assert checked >= 3 * 200


def test_curvature_that_the_constraint_holds_back_does_not_count() -> None:
    # x_1 bends down but sits on its bound with a multiplier: a strict minimum over the box
    t = torch.tensor([0.3, 0.2], dtype=F64, requires_grad=True)
    layer = il.argmin(
        lambda x, t: 0.5 * (x[0] - t[0]) ** 2 - 0.5 * (x[1] - t[1]) ** 2,
        returns([0.3, 1.0]),
        constraint=Box(-1.0, 1.0),
        on_failure="raise",
    )
    assert torch.autograd.grad(layer(ZERO, t).sum(), t)[0].tolist() == pytest.approx([1.0, 0.0], abs=1e-12)


def test_the_curvature_of_a_sphere_counts() -> None:
    # f = -x'x/2 - t'x over the unit ball: bends down everywhere, but |t| = 5 holds x = t / |t| as a strict minimum
    t = torch.tensor([3.0, 4.0], dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, t: -0.5 * x @ x - t @ x, returns([0.6, 0.8]), constraint=Ball(1.0), on_failure="raise")
    (slope,) = torch.autograd.grad(layer(ZERO, t)[0], t)
    torch.testing.assert_close(
        slope, torch.tensor([0.64, -0.48], dtype=F64) / 5, rtol=0, atol=1e-12
    )  # (I - x x') / |t|


@pytest.mark.parametrize("constraint", [Box(0.0, 0.1), Simplex(), Ball(0.1), NonNegative()])
def test_convex_problems_of_any_kind_pass(constraint: Any) -> None:
    for seed in range(5):
        matrix = randn(4, 6, seed=seed)  # a singular Hessian: some directions have no curvature at all
        layer = il.argmin(
            lambda x, b, m=matrix: 0.5 * ((m @ x - b) ** 2).sum() + 1e-3 * (x @ x),
            il.solvers.ProjectedGradient(rtol=1e-12, max_steps=20_000),
            constraint=constraint,
            on_failure="raise",
        )
        x = layer(torch.zeros(6, dtype=F64), randn(4, seed=10 + seed).requires_grad_())
        assert x.requires_grad
