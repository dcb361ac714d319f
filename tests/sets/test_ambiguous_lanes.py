"""One number per lane is never taken for one per entry, or the other way round, because both are as many."""

from typing import Any

import pytest
import torch
from references import F64, randn

import implicitlayer as il


def layer(terms: Any) -> Any:
    value = lambda x, a, t: 0.5 * ((x - t) ** 2).sum(-1)  # noqa: E731
    kind = "regularizer" if terms is l1 or terms is elastic else "constraint"
    return il.argmin(value, il.solvers.ProximalGradient(rtol=1e-12), batch_dims=1, **{kind: terms})


def l1(a: Any, t: Any) -> Any:
    return il.L1(a)


def elastic(a: Any, t: Any) -> Any:
    return il.ElasticNet(0.1, a)


def box(a: Any, t: Any) -> Any:
    return il.sets.Box(-a, a)


def ball(a: Any, t: Any) -> Any:
    return il.sets.Ball(1.0, center=a)


@pytest.mark.parametrize("terms", [l1, elastic, box, ball])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_as_many_lanes_as_entries_are_refused_and_either_spelling_is_taken(terms: Any, needs_grad: bool) -> None:
    a, t = torch.linspace(0.1, 0.9, 4, dtype=F64).requires_grad_(needs_grad), 2 * randn(4, 4, seed=1)
    start = torch.zeros(4, 4, dtype=F64)
    with pytest.raises(ValueError, match=r"of shape \(4,\) may be meant for the lanes or for the entries"):
        layer(terms)(start, a, t)
    by_lane, by_entry = layer(terms)(start, a[:, None], t), layer(terms)(start, a.expand(4, 4), t)
    for lane in range(4):  # three lanes have no doubt
        alone = layer(terms)(start[:3], a[lane].expand(3, 1), t[lane].expand(3, 4))
        assert torch.allclose(by_lane[lane], alone[0], atol=1e-10)
        alone = layer(terms)(start[:3], a, t[lane].expand(3, 4))
        assert torch.allclose(by_entry[lane], alone[0], atol=1e-10)
