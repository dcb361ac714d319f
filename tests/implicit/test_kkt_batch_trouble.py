"""``il.constrained_argmin(batch_dims=k)`` where something is wrong: faults name their lanes, shapes are checked."""

from typing import Any

import pytest
import torch
from kkt_problems import bound, clamp, squares
from references import F64

import implicitlayer as il

POINTS = torch.tensor([[0.5, 0.2], [2.0, 0.1], [0.3, 0.4]], dtype=F64)
ZEROS = torch.zeros_like(POINTS)


def batched(function: Any) -> Any:
    function.batched = True
    return function


def run(solver: Any = clamp, points: torch.Tensor = POINTS, **settings: Any) -> torch.Tensor:
    layer = il.constrained_argmin(
        settings.pop("objective", squares), solver, **{"inequality": bound, "batch_dims": 1, **settings}
    )
    x: torch.Tensor = layer(ZEROS, points.clone().requires_grad_())
    return x


@pytest.mark.parametrize(
    ("solver", "error", "message"),
    [
        (lambda p, x, t: t[p.lane], il.InfeasibleError, r"in lane 1 of \(3,\): its distance from one is about 1 "),
        (lambda p, x, t: 0.5 * t[p.lane], il.StationarityError, r"optimality conditions in lane 0, 1, 2 of \(3,\)"),
        (
            lambda p, x, t: clamp(p, x, t) * (torch.nan if p.lane == (2,) else 1),
            il.NonFiniteError,
            r"NaN or Inf in x in lane 2 of \(3,\)",
        ),
        (batched(lambda p, x, t: torch.where(t > 1, torch.inf, t)), il.NonFiniteError, r"in x in lane 1 of \(3,\)"),
    ],
)
def test_a_bad_answer_is_named_by_its_lane(solver: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(solver, on_failure="raise")


def test_a_kink_is_named_by_its_lane_and_leaves_the_others_alone() -> None:
    t = torch.tensor([[0.5, 0.2], [2.0, 0.1], [1.0, 0.4]], dtype=F64, requires_grad=True)
    layer = il.constrained_argmin(squares, clamp, inequality=bound, batch_dims=1, at_kink="active")
    with pytest.warns(il.KinkWarning, match=r"kink in lane 2 of \(3,\)"):
        x = layer(ZEROS, t)
    assert torch.autograd.grad(x.sum(), t)[0].tolist() == [[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]]


def test_negative_curvature_is_named_by_its_lane() -> None:
    signs = torch.tensor([1.0, -1.0, 1.0], dtype=F64)  # the farthest point of the circle, in lane 1
    x = run(
        lambda p, x, t: signs[p.lane] * t[p.lane] / t[p.lane].norm(),
        inequality=None,
        equality=lambda x, t: (x**2).sum(-1) - 1,
    )
    with pytest.raises(il.IndefiniteError, match=r"in lane 1 of \(3,\)"):
        x.sum().backward()


def test_functions_that_are_not_finite_are_named_by_their_lane() -> None:
    with pytest.raises(il.NonFiniteError, match=r"holds NaN or Inf at the solver's answer in lane 1 of \(3,\)"):
        run(objective=lambda x, t: squares(x, t) + 0 * (1 - x).log().sum(-1))  # 0 * inf at x = 1


def test_multipliers_are_checked() -> None:
    settings = {"solver_returns_multipliers": True}
    with pytest.raises(il.SolverOutputError, match=r"1 multipliers for inequality, which has 2 entries\. It is called"):
        run(lambda p, x, t: (clamp(p, x, t), (None, x[:1])), **settings)
    with pytest.raises(il.SolverOutputError, match=r"shape \(2,\) for inequality; .* with the lanes \(3,\) in front"):
        run(batched(lambda p, x, t: (t.clamp(max=1.0), (None, x[0]))), **settings)
    with pytest.raises(il.NonFiniteError, match=r"in the multipliers of inequality in lane 0, 1, 2 of \(3,\)"):
        run(lambda p, x, t: (clamp(p, x, t), (None, x * torch.nan)), **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"objective": lambda x, t: squares(x, t).sum()},
            il.ObjectiveError,
            r"one value per lane: .* \(3,\), got \(\)",
        ),
        ({"objective": lambda x, t: (x - t) ** 2}, il.ObjectiveError, r"expected shape \(3,\), got \(3, 2\)"),
        (
            {"inequality": lambda x, t: (x - 1).sum()},
            il.ObjectiveError,
            r"with batch_dims=1 inequality must return the lanes of x, \(3,\), in front .* got shape \(\)",
        ),
        ({"equality": lambda x, t: x.sum(0)}, il.ObjectiveError, r"equality must return the lanes .* shape \(2,\)"),
        ({"batch_dims": 3}, ValueError, r"batch_dims=3 counts the leading dimensions of every leaf of init"),
        ({"batch_dims": -1}, ValueError, "batch_dims=-1 must be non-negative"),
        (
            {"solver": lambda p, x, t: t.clamp(max=1.0)},
            il.SolverOutputError,
            r"x with shape \(3, 2\), but init has shape \(2,\).* for lane \(0,\): theta comes whole.*batched = True",
        ),
        (
            {"solver": lambda p, x, t: p(t, t)},
            il.SolverOutputError,
            r"evaluates its problem at shape \(3, 2\), but it is called for one lane, \(0,\) of \(3,\), whose x has",
        ),
        ({"solver": batched(lambda p, x, t: t[0])}, il.SolverOutputError, r"x with shape \(2,\), but .* \(3, 2\)\.$"),
    ],
)
def test_wrong_shapes_are_refused(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(**settings)
