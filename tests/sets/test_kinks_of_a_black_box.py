"""Projections and proximal operators of one's own: a kink that shows in differences of the function is told."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il


def ordered(y: Tensor) -> Tensor:
    """x0 <= x1, the others free."""
    mean = 0.5 * (y[..., 0] + y[..., 1])
    first, second = (
        torch.where(y[..., 0] <= y[..., 1], y[..., 0], mean),
        torch.where(y[..., 0] <= y[..., 1], y[..., 1], mean),
    )
    return torch.cat([first[..., None], second[..., None], y[..., 2:]], -1)


def ball(y: Tensor) -> Tensor:
    norm = y.norm(dim=-1, keepdim=True)
    return torch.where(norm <= 1, y, y / norm)


def loose(accuracy: float) -> Callable[[Tensor], Tensor]:
    """The box [-1, 1], to an accuracy: what an iteration leaves depends on its start."""
    return lambda y: y.clamp(-1, 1) * (1 + accuracy * torch.sin(1e9 * y.detach()))


def soft(y: Tensor, step: Tensor) -> Tensor:
    return torch.sign(y) * (y.abs() - 0.5 * step).clamp(min=0)


def kinks(term: dict[str, Any], answer: Tensor, target: Tensor, **settings: Any) -> Any:
    layer = il.argmin(
        lambda x, t: 0.5 * ((x - t) ** 2).sum(-1) if x.ndim > 1 else 0.5 * ((x - t) ** 2).sum(),
        lambda f, x, t: answer, step_size=1.0, **term, **settings,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(torch.zeros_like(answer), target.clone().requires_grad_())
    found = layer.records[0].active_set
    return [w.category for w in caught], found


AT_KINKS = {
    "box": ({"constraint": il.sets.Projection(lambda y, t: y.clamp(-1, 1))}, [1.0, 0.3, 5.0], [1.0, 0.3, 1.0], 1),
    "ordered": ({"constraint": il.sets.Projection(lambda y, t: ordered(y))}, [0.5, 0.5, 2.0], [0.5, 0.5, 2.0], 2),
    "ball": ({"constraint": il.sets.Projection(lambda y, t: ball(y))}, [0.6, 0.8], [0.6, 0.8], 2),
    "l1": ({"regularizer": il.Prox(lambda y, step, t: soft(y, step))}, [0.5, 2.0], [0.0, 1.5], 1),
}


@pytest.mark.parametrize("name", AT_KINKS)
def test_a_kink_of_a_projection_of_ones_own_is_told(name: str) -> None:
    term, target, answer, count = AT_KINKS[name]
    categories, found = kinks(term, torch.tensor(answer, dtype=F64), torch.tensor(target, dtype=F64))
    assert categories == [il.KinkWarning] and int(found.num_kinks) == count


def test_a_kink_is_told_in_its_lane_alone() -> None:
    target = torch.tensor([[0.3, 2.0], [1.0, -3.0], [0.0, 0.1]], dtype=F64)
    term = {"constraint": il.sets.Projection(lambda y, t: y.clamp(-1, 1))}
    categories, found = kinks(term, target.clamp(-1, 1), target, batch_dims=1)
    assert categories == [il.KinkWarning] and found.num_kinks.tolist() == [0, 1, 0]


SMOOTH = {
    "box": {"constraint": il.sets.Projection(lambda y, t: y.clamp(-1, 1))},
    "ordered": {"constraint": il.sets.Projection(lambda y, t: ordered(y))},
    "ball": {"constraint": il.sets.Projection(lambda y, t: ball(y))},
    "l1": {"regularizer": il.Prox(lambda y, step, t: soft(y, step))},
    "ridge": {"regularizer": il.Prox(lambda y, step, t: y / (1 + 3 * step))},
    "iteration to 1e-12": {"constraint": il.sets.Projection(lambda y, t: loose(1e-12)(y))},
    "iteration to 1e-7": {"constraint": il.sets.Projection(lambda y, t: loose(1e-7)(y))},
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_away_from_kinks_nothing_is_said_of_a_projection_of_ones_own(name: str, dtype: torch.dtype) -> None:
    for seed in range(30):
        target = (2 * randn(5, seed=seed)).to(dtype)  # none within 1e-3 of a kink, which the distances below show
        term = next(iter(SMOOTH[name].values()))
        answer = term.bind((target,)).prox(target, torch.ones((), dtype=dtype))
        margins = [(target.abs() - b).abs().min() for b in (0.5, 1.0)] + [(target[0] - target[1]).abs()]
        if min(float(m) for m in margins) < 1e-3:
            continue
        assert kinks(SMOOTH[name], answer, target)[0] == [], seed
