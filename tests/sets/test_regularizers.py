"""Proximal operators of regularisers: the minimiser they claim to be, its derivative, lanes and wrong arguments."""

from typing import Any

import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il
from implicitlayer.sets._regularizers import Regularizer

TERMS: dict[str, Regularizer] = {
    "l1": il.L1(0.6),
    "l1 with strengths": il.L1(torch.tensor([0.2, 0.0, 0.9], dtype=F64)),
    "elastic net": il.ElasticNet(0.4, torch.tensor([0.2, 0.7, 0.9], dtype=F64)),
    "one group": il.GroupL1(0.8),
    "groups": il.GroupL1(0.8, dim=-1),
    "groups with strengths": il.GroupL1(torch.tensor([[0.0], [1.5]], dtype=F64), dim=-1),
}
EACH = pytest.mark.parametrize("name", list(TERMS))
STEP = torch.tensor(0.7, dtype=F64)


@EACH
def test_the_prox_minimises_what_it_claims(name: str) -> None:
    term = TERMS[name]
    for seed in range(6):
        y = randn(2, 3, seed=seed)
        p = term.prox(y, STEP)

        def total(x: Tensor, y: Tensor = y) -> float:
            return float(STEP * term.value(x) + 0.5 * ((x - y) ** 2).sum())

        for other in range(10):
            # strongly convex with constant 1: the value grows by at least half the squared distance
            for size in (1.0, 1e-3):
                direction = size * randn(2, 3, seed=100 + other)
                assert total(p + direction) >= total(p) + 0.4999 * float((direction**2).sum()) - 1e-15


@EACH
def test_the_derivative_in_y_matches_differences_and_is_symmetric(name: str) -> None:
    y, h = 2 * randn(2, 3, seed=30), 1e-6
    prox = lambda flat: TERMS[name].prox(flat.reshape(2, 3), STEP).reshape(-1)  # noqa: E731
    jacobian = torch.func.jacrev(prox)(y.reshape(-1))
    columns = [(prox(y.reshape(-1) + h * e) - prox(y.reshape(-1) - h * e)) / (2 * h) for e in torch.eye(6, dtype=F64)]
    # truncation h^2, rounding 1e-16 / h = 1e-10
    torch.testing.assert_close(jacobian, torch.stack(columns, 1), rtol=0, atol=1e-8)
    torch.testing.assert_close(jacobian, jacobian.T, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("build", "data"),
    [
        (il.L1, (torch.tensor(0.3, dtype=F64),)),
        (il.ElasticNet, (torch.tensor(0.3, dtype=F64), torch.tensor(0.4, dtype=F64))),
        (lambda s: il.GroupL1(s, dim=-1), (torch.tensor(0.5, dtype=F64),)),
    ],
    ids=["l1", "elastic net", "group"],
)
def test_derivatives_in_the_strengths_match_differences(build: Any, data: tuple[Tensor, ...]) -> None:
    y = 2 * randn(2, 3, seed=31)
    leaves = [t.clone().requires_grad_() for t in data]
    assert torch.autograd.gradcheck(lambda *d: build(*d).prox(y, STEP), leaves)
    assert torch.autograd.gradgradcheck(lambda *d: build(*d).prox(y, STEP), leaves)


@EACH
def test_lanes_with_steps_of_their_own_are_solved_alone(name: str) -> None:
    y, steps = randn(4, 2, 3, seed=32), torch.tensor([0.1, 0.5, 1.0, 2.0], dtype=F64)
    alone = torch.stack([TERMS[name].prox(lane, step) for lane, step in zip(y, steps, strict=True)])
    torch.testing.assert_close(TERMS[name].prox(y, steps, lane_dims=1), alone, rtol=0, atol=1e-15)
    torch.testing.assert_close(torch.vmap(TERMS[name].prox)(y, steps), alone, rtol=0, atol=1e-15)
    values = torch.stack([TERMS[name].value(lane) for lane in y])
    torch.testing.assert_close(TERMS[name].value(y, 1), values, rtol=1e-14, atol=0)


def test_an_entry_without_penalty_is_free_and_has_no_kink() -> None:
    y, strength = torch.tensor([0.0, -2.0, 0.0], dtype=F64, requires_grad=True), torch.tensor([0.0, 0.0, 1.0])
    x = il.L1(strength).prox(y, 1.0)
    assert torch.autograd.grad(x.sum(), y)[0].tolist() == [1.0, 1.0, 0.0]
    held, margin = il.L1(strength).activity(y, 1.0)
    assert held.tolist() == [False, False, True]
    assert margin.tolist() == [float("inf"), float("inf"), 1.0]


def test_activity_of_groups_is_that_of_the_whole_group() -> None:
    y = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=F64)
    held, margin = il.GroupL1(1.0, dim=-1).activity(y, 2.0)
    assert held.tolist() == [[False, False], [True, True]]
    assert margin.tolist() == [[3.0, 3.0], [1.5, 1.5]]


def test_groups_of_one_number_in_lanes_are_absolute_values() -> None:
    y = torch.tensor([-3.0, 0.5], dtype=F64)  # two lanes, each one 0-d unknown
    assert il.GroupL1(1.0).prox(y, 1.0, lane_dims=1).tolist() == [-2.0, 0.0]


def test_a_prox_of_the_user_sees_step_and_theta() -> None:
    term = il.Prox(lambda y, step, s: torch.where(y.abs() > step * s, y - step * s * y.sign(), 0.0)).bind((0.6,))
    y = randn(5, seed=33)
    torch.testing.assert_close(term.prox(y, STEP), il.L1(0.6).prox(y, STEP), rtol=0, atol=1e-15)
    assert float(term.violation(y)) == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: il.L1(-0.1), r"strength=-0\.1 must be non-negative"),
        (lambda: il.L1(float("nan")), r"strength=nan must be non-negative"),
        (lambda: il.ElasticNet(0.1, -1.0), r"l2=-1\.0 must be non-negative"),
        (lambda: il.ElasticNet(-0.1, 1.0), r"l1=-0\.1 must be non-negative"),
        (lambda: il.GroupL1(-1.0), r"strength=-1\.0 must be non-negative"),
        (lambda: il.GroupL1(1.0, dim=1), r"dim=1 must be negative"),
        (lambda: il.GroupL1(1.0, dim=-2).prox(torch.ones(3)), r"dim=-2 is out of range for a leaf of shape \(3,\)"),
        (lambda: il.L1(torch.ones(2)).prox(torch.ones(3)), r"strength of shape \(2,\) does not broadcast to a leaf"),
        (lambda: il.Prox(lambda y, s: 1.0).prox(torch.ones(3)), r"the proximal operator must return the shapes"),
    ],
)
def test_wrong_arguments_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [il.L1, lambda s: il.ElasticNet(s, 0.5)], ids=["L1", "ElasticNet"])
def test_the_derivative_in_a_strength_of_zero_is_the_one_from_above_on_both_sides_of_zero(make: Any) -> None:
    # x = sign(y) (|y| - step s) / (1 + step l2): the limit of strengths that fall to zero
    y, strength = torch.tensor([2.0, 0.5, -3.0], dtype=F64), torch.zeros(3, dtype=F64, requires_grad=True)
    (at_zero,) = torch.autograd.grad(make(strength).prox(y, 2.0).sum(), strength)
    small = torch.full((3,), 1e-3, dtype=F64, requires_grad=True)
    (near,) = torch.autograd.grad(make(small).prox(y, 2.0).sum(), small)
    assert torch.equal(at_zero, near) and at_zero.sign().tolist() == [-1.0, -1.0, 1.0]


def test_a_layer_learns_a_strength_that_begins_at_zero() -> None:
    y = torch.tensor([2.0, 0.5, -3.0], dtype=F64)
    strength = torch.zeros((), dtype=F64, requires_grad=True)
    layer = il.argmin(
        lambda x, s: 0.5 * ((x - y) ** 2).sum(), il.solvers.ProximalGradient(rtol=1e-13), regularizer=lambda s: il.L1(s)
    )
    jacobian = torch.func.jacrev(lambda s: layer(torch.zeros(3, dtype=F64), s))(strength)
    assert jacobian.tolist() == [-1.0, -1.0, 1.0]
