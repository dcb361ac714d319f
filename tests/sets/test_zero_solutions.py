"""Solutions that are zero: an answer near one is compared with the step that the set or regulariser took to zero."""

# A layer allows a distance of 1e-3 of the size of the answer. Where the solution is zero that size is the answer's own
# rounding, so eps^(1/3) of the size of y = x - eta grad f stands in: 6e-6 in float64 and 5e-3 in float32. Answers at
# 1e-13 (1e-7) of it are rounding, 1e-4 (1e-2) of it is a mistake.

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il
from implicitlayer.sets import Affine, Ball, Box, NonNegative

SCALES = pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
A = randn(30, 5, seed=1)


def squares(x: Tensor, y: Tensor, factor: float, unit: float) -> Tensor:
    return factor * ((A.to(x.dtype) @ x / unit - y) ** 2).mean() / 2


def off_by(distance: float) -> Callable[..., Tensor]:
    """A solver whose answer is off by that much in every entry; all solutions here are zero."""
    return lambda f, x, *theta: torch.full_like(x, distance)


def lasso(dtype: torch.dtype, distance: float, factor: float = 1.0, unit: float = 1.0) -> tuple[Any, Tensor]:
    y = randn(30, seed=2, dtype=dtype).requires_grad_()
    critical = float((A.T @ y.detach().double()).abs().max()) * factor / unit / 30  # |grad f(0)|, entry by entry
    layer = il.argmin(
        lambda x, y: squares(x, y, factor, unit), off_by(distance * unit), regularizer=il.L1(1.5 * critical)
    )
    return layer(torch.zeros(5, dtype=dtype), y), y


@SCALES
@pytest.mark.parametrize("what", ["objective", "x"])
@pytest.mark.parametrize("distance", [0.0, 1e-15, 1e-13, -1e-12])
def test_a_lasso_above_the_critical_strength_is_solved_by_rounding(scale: float, what: str, distance: float) -> None:
    scales = {"factor": scale} if what == "objective" else {"unit": scale}
    x, y = lasso(F64, distance, **scales)  # a warning would be an error
    assert not bool(torch.autograd.grad(x.sum(), y)[0].any())


@SCALES
def test_an_answer_beyond_rounding_is_still_told(scale: float) -> None:
    with pytest.warns(il.StationarityWarning, match="the solver's answer is not stationary"):
        lasso(F64, 1e-4, factor=scale)
    with pytest.warns(il.StationarityWarning, match="the solver's answer is not stationary"):
        lasso(F64, 1e-4, unit=scale)


def test_the_same_in_float32() -> None:
    for distance in (0.0, 1e-9, -1e-7):
        x, y = lasso(torch.float32, distance)
        assert not bool(torch.autograd.grad(x.sum(), y)[0].any())
    with pytest.warns(il.StationarityWarning, match="the solver's answer is not stationary"):
        lasso(torch.float32, 1e-2)


ZERO_AT: dict[str, tuple[dict[str, Any], list[float]]] = {
    "non-negative": ({"constraint": NonNegative()}, [-1.0, -3.0]),
    "box": ({"constraint": Box(0.0, 1.0)}, [-1.0, -3.0]),
    "group": ({"regularizer": il.GroupL1(4.0)}, [1.0, -3.0]),
    "elastic net": ({"regularizer": il.ElasticNet(4.0, 1.0)}, [1.0, -3.0]),
    "ball of radius zero": ({"constraint": Ball(0.0)}, [1.0, -3.0]),
    "plane": (
        {"constraint": Affine(torch.tensor([[1.0, 2.0]], dtype=F64), torch.zeros(1, dtype=F64))},
        [1.0, 2.0],  # across the plane, so that the nearest point of it is zero
    ),
}


@pytest.mark.parametrize("name", list(ZERO_AT))
def test_a_projection_onto_zero_is_solved_by_rounding(name: str) -> None:
    settings, point = ZERO_AT[name]
    t = torch.tensor(point, dtype=F64, requires_grad=True)
    start = torch.zeros(2, dtype=F64)
    for distance in (0.0, 1e-13):
        layer = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), off_by(distance), **settings)
        assert layer(start, t).requires_grad
    assert layer.records[0].relative_distance is not None  # type: ignore[union-attr]
    assert float(layer.records[0].relative_distance) < 1e-6  # type: ignore[union-attr]  (1e-13 / 6e-6)


def test_each_lane_is_measured_by_its_own_size() -> None:
    t = torch.tensor([[-1.0, -2.0], [-1e-12, -2e-12]], dtype=F64, requires_grad=True)
    start = torch.zeros(2, 2, dtype=F64)

    def layer(answer: Tensor) -> Any:
        return il.argmin(
            lambda x, t: 0.5 * ((x - t) ** 2).sum(-1), lambda f, x, t: answer, constraint=NonNegative(), batch_dims=1
        )

    layer(1e-13 * t.detach().abs())(start, t)
    with pytest.warns(il.StationarityWarning, match=r"not stationary in lane 1 of \(2,\)"):
        layer(torch.tensor([[0.0, 0.0], [0.0, 1e-16]], dtype=F64))(start, t)


def test_a_set_away_from_zero_has_no_size_at_zero() -> None:
    # x, grad f and the start are zero: nothing tells a size, and the answer is outside of the set by all of it
    layer = il.argmin(lambda x, t: (t * x * x).sum(), off_by(0.0), constraint=Box(1.0, 2.0))
    with pytest.raises(il.InfeasibleError, match="does not satisfy the constraint"):
        layer(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64, requires_grad=True))
