"""The derivative of a prox that a term writes out is the one that autograd finds."""

from typing import Any

import pytest
import torch
from references import F64, randn

import implicitlayer as il
from implicitlayer.sets import Affine, Ball, Box, NonNegative, Projection, Simplex
from implicitlayer.sets._term import ProximalTerm, resolve

Y = torch.cat([randn(6, seed=1), torch.zeros(1, dtype=F64)])
STRENGTHS = torch.tensor([0.0, 0.1, 0.5, 1.0, 2.0, 0.3, 0.0], dtype=F64)
DIAGONAL: dict[str, ProximalTerm] = {
    "box": Box(-0.5, 0.5),
    "half a box": Box(upper=0.2),
    "fixed entries": Box(0.1, 0.1),
    "non-negative": NonNegative(),
    "l1": il.L1(0.6),
    "strengths per entry, zeros among them": il.L1(STRENGTHS),
    "elastic net": il.ElasticNet(0.4, 2.0),
    "elastic net of strengths": il.ElasticNet(STRENGTHS, STRENGTHS.flip(0)),
}
OTHERS = (Simplex(), Ball(), Affine(torch.ones(1, 7, dtype=F64), torch.ones(1, dtype=F64)), il.GroupL1(1.0))


@pytest.mark.parametrize("name", list(DIAGONAL))
@pytest.mark.parametrize("step", [0.3, 1.7])
def test_a_diagonal_is_the_derivative_of_the_prox(name: str, step: float) -> None:
    term = DIAGONAL[name]
    full = torch.autograd.functional.jacobian(lambda y: term.prox(y, step), Y)
    assert torch.equal(torch.diag(term.diagonal(Y, step)), full)  # the same 0, 1 or 1 / (1 + step l2)


@pytest.mark.parametrize("name", list(DIAGONAL))
def test_lanes_have_their_own_step_in_a_diagonal(name: str) -> None:
    steps = torch.tensor([0.3, 1.7], dtype=F64)
    together = DIAGONAL[name].diagonal(torch.stack([Y, -Y]), steps, 1)
    apart = [DIAGONAL[name].diagonal(y, float(s)) for y, s in zip((Y, -Y), steps, strict=True)]
    assert torch.equal(together, torch.stack(apart))


@pytest.mark.parametrize("name", list(DIAGONAL))
def test_nan_is_let_through_and_not_held(name: str) -> None:
    y = torch.full((7,), torch.nan, dtype=F64)
    assert bool((DIAGONAL[name].diagonal(y, 0.3) > 0).all())


def test_terms_whose_derivative_mixes_entries_write_none() -> None:
    for term in (*OTHERS, Projection(lambda y: y), il.Prox(lambda y, step: y)):
        assert term.diagonal(Y, 0.3) is None, term


def test_parts_write_theirs_together_or_not_at_all() -> None:
    y = {"a": Y, "b": Y, "c": Y}
    terms: dict[str, Any] = {"a": il.L1(0.6), "b": None, "c": NonNegative()}
    found = resolve(terms, ()).diagonal(y, 0.3)
    assert torch.equal(found["a"], il.L1(0.6).diagonal(Y, 0.3)) and torch.equal(found["b"], torch.ones_like(Y))
    assert torch.equal(found["c"], NonNegative().diagonal(Y))
    assert resolve({**terms, "b": Simplex()}, ()).diagonal(y, 0.3) is None
