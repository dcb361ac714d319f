"""Unknowns of many leaves: one vector for autograd, the same numbers, and little to do for each leaf."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import implicitlayer as il
from implicitlayer.base._tree import FlatOf, LeavesOf, Pieces, points_of

F64 = torch.float64
SHAPES = [torch.Size(shape) for shape in ((), (3,), (0,), (2, 2), (1,), (1, 2, 1))]  # n = 11
N = sum(shape.numel() for shape in SHAPES)
PIECES = Pieces(SHAPES)


def system(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix A [n, n] with a positive definite symmetric part, a matrix M [n, 4] and theta [4]."""
    generator = torch.Generator().manual_seed(seed)
    a, m, t = (torch.randn(*size, dtype=F64, generator=generator) for size in ((N, N), (N, 4), (4,)))
    return a / N**0.5 + 2 * torch.eye(N, dtype=F64), m, t.requires_grad_()


def joined(leaves: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in leaves])


def cut(vector: torch.Tensor) -> list[torch.Tensor]:
    return [part.reshape(shape) for part, shape in zip(vector.split([s.numel() for s in SHAPES]), SHAPES, strict=True)]


@pytest.mark.parametrize("closed", [False, True], ids=["theta", "closed over"])
@pytest.mark.parametrize(
    "linear_solver",
    [
        il.ConjugateGradient(rtol=1e-13),
        il.Dense(),
        il.Minres(rtol=1e-13),
        il.Gmres(rtol=1e-13),
        il.NormalEquations(il.ConjugateGradient(rtol=1e-13)),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_the_gradient_of_a_minimum_of_many_leaves_is_that_of_the_closed_form(linear_solver: Any, closed: bool) -> None:
    # x = H^-1 M t with H = A'A, of condition below 10: the gradient of v'x in t is M'H^-1 v, to the solver's 1e-13
    a, m, t = system()
    h = a.T @ a
    v = torch.linspace(-1, 1, N, dtype=F64)

    def objective(x: list[torch.Tensor], *theta: torch.Tensor) -> torch.Tensor:
        flat, data = joined(x), theta[0] if theta else t
        return 0.5 * flat @ (h @ flat) - flat @ (m @ data)

    def solver(objective: Any, init: Any, *theta: torch.Tensor) -> list[torch.Tensor]:
        return cut(torch.linalg.solve(h, m @ (theta[0] if theta else t.detach())))

    layer = il.argmin(objective, solver, linear_solver=linear_solver)
    x = layer([torch.zeros(shape, dtype=F64) for shape in SHAPES], *([] if closed else [t]))
    (gradient,) = torch.autograd.grad(joined(x) @ v, t)
    torch.testing.assert_close(gradient, m.T @ torch.linalg.solve(h, v), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("linear_solver", [il.Dense(), il.Gmres(rtol=1e-13)], ids=lambda solver: type(solver).__name__)
def test_the_gradient_of_a_root_of_many_leaves_is_that_of_the_closed_form(linear_solver: Any) -> None:
    # A x = M t, where A is not symmetric: the gradient of v'x in t is M'A'^-1 v
    a, m, t = system(1)
    v = torch.linspace(-1, 1, N, dtype=F64)
    layer = il.root(
        lambda x, t: cut(a @ joined(x) - m @ t),
        lambda residual, init, t: cut(torch.linalg.solve(a, m @ t)),
        linear_solver=linear_solver,
    )
    x = layer([torch.zeros(shape, dtype=F64) for shape in SHAPES], t)
    (gradient,) = torch.autograd.grad(joined(x) @ v, t)
    torch.testing.assert_close(gradient, m.T @ torch.linalg.solve(a.T, v), rtol=1e-11, atol=1e-12)


def test_a_leaf_that_the_objective_does_not_read_makes_the_hessian_singular_and_is_told() -> None:
    t = torch.tensor(2.0, dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, t: (x["a"] - t) ** 2 + 0 * t, lambda f, x, t: {"a": t.clone(), "b": x["b"]})
    x = layer({"a": torch.zeros((), dtype=F64), "b": torch.ones(2, dtype=F64)}, t)
    (gradient,) = torch.autograd.grad(x["a"], t, retain_graph=True)
    assert gradient == 1
    with pytest.raises(il.SingularError):
        x["b"].sum().backward()


def test_cutting_and_joining_are_each_others_transposes_to_any_order() -> None:
    generator = torch.Generator().manual_seed(2)
    vector = torch.randn(N, dtype=F64, generator=generator, requires_grad=True)

    def there_and_back(vector: torch.Tensor) -> torch.Tensor:
        leaves = [leaf**3 for leaf in LeavesOf.apply(vector, PIECES, False)]
        joined_: torch.Tensor = FlatOf.apply(PIECES, *leaves)
        return joined_ * vector

    assert torch.autograd.gradcheck(there_and_back, vector)
    assert torch.autograd.gradgradcheck(there_and_back, vector)
    # v^4, whose third derivative is 24 v, entry by entry
    (first,) = torch.autograd.grad(there_and_back(vector).sum(), vector, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), vector, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), vector)
    torch.testing.assert_close(third, 24 * vector.detach(), rtol=1e-14, atol=0.0)


def as_given(*leaves: torch.Tensor) -> bool:
    """Whether derivatives are taken in the leaves themselves."""
    points, seen = points_of(list(leaves), 0)
    for leaf, like in zip(seen, leaves, strict=True):
        assert torch.equal(leaf, like) and leaf.dtype is like.dtype and leaf.stride() == like.stride()
        assert leaf.requires_grad
    return len(points) == len(leaves)


def test_leaves_that_one_vector_cannot_hold_as_they_are_stay_leaves() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.ones(2)
    assert not as_given(a, b)
    assert as_given(a)
    assert as_given(a, b.double())
    assert as_given(a.T, b)
    assert len(points_of([torch.ones(4, 2), torch.ones(4)], 1)[0]) == 2


def test_an_objective_that_writes_into_a_leaf_is_told_how_to_write_it() -> None:
    def objective(x: list[torch.Tensor], t: torch.Tensor) -> torch.Tensor:
        return ((x[0].mul_(2.0) - t) ** 2).sum() + x[1] ** 2

    layer = il.argmin(objective, lambda f, x, t: [t / 2, x[1]])
    with pytest.raises(il.ObjectiveError, match="out of place"):
        layer([torch.zeros(2), torch.zeros(())], torch.ones(2, requires_grad=True))


def num_calls(function: Callable[[], object]) -> int:
    """Calls of Python and C made by one run, of which the first is not counted."""
    function()
    counts: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, arg: counts.update([event]))
    function()
    sys.setprofile(None)
    return counts["call"] + counts["c_call"]


@pytest.mark.parametrize(("where", "most"), [("x", 150), ("theta", 110), ("closed over", 90)])
def test_one_leaf_more_costs_few_calls(where: str, most: int) -> None:
    # 113, 72 and 57 on Python 3.11, 131, 99 and less than 75 on 3.10; with each leaf of x by itself in autograd 204
    def call(count: int) -> Callable[[], object]:
        many = [torch.ones(3, dtype=F64, requires_grad=where != "x") for _ in range(count)]
        if where == "x":
            t = torch.ones(3, dtype=F64, requires_grad=True)
            layer = il.argmin(
                lambda x, t: 0.5 * ((torch.stack(x) - t) ** 2).sum(), lambda f, x, t: [t.clone() for _ in x]
            )
            return lambda: torch.autograd.grad(torch.stack(layer(many, t)).sum(), t)
        given = [many] if where == "theta" else []
        layer = il.argmin(
            lambda x, *theta: 0.5 * ((x - torch.stack(theta[0] if theta else many).mean(0)) ** 2).sum(),
            lambda f, x, *theta: torch.stack(theta[0] if theta else many).mean(0).detach(),
        )
        return lambda: torch.autograd.grad(layer(torch.zeros(3, dtype=F64), *given).sum(), many)

    assert num_calls(call(60)) - num_calls(call(40)) <= 20 * most
