"""A single program takes short ways through ``il.qp``; they lead where the long ones lead."""

from typing import Any

import pytest
import torch
from references import F64, randn, relative_error
from solvers.test_interior_point import Program, programs

import implicitlayer as il
from implicitlayer._interior_point import interior_point
from implicitlayer.implicit import _qp_solve
from implicitlayer.implicit._qp import _scalar, _written_out
from implicitlayer.implicit._qp_exact import TIGHT, exact, violation
from implicitlayer.implicit._qp_single import exact_single

ROUNDING = 1e-9  # of solves with the matrix of a random program, condition below 1e5


@pytest.mark.parametrize(("n", "e", "m"), [(1, 0, 1), (4, 2, 0), (6, 0, 12), (10, 3, 20), (70, 7, 90)])
def test_the_exact_solution_is_that_of_many_programs(n: int, e: int, m: int) -> None:
    data = programs(1, n, e, m, seed=n + e)
    answer = interior_point(data)
    one, many = exact_single(data, answer), exact(data, answer, torch.tensor([True]))
    assert one is not None and bool((one.error <= TIGHT).all()) and bool((one.held == many.held).all())
    # its own error is the violation that the long way measures, up to rounding
    assert float((one.error - violation(data, one.solution)).abs()) < 1e-14
    for name in ("x", "equality", "inequality"):
        assert relative_error(getattr(one.solution, name), getattr(many.solution, name)) < ROUNDING
    rhs = randn(1, n + e + m, 1, seed=0)
    assert relative_error(one.factors.solve(rhs), many.factors.solve(rhs)) < ROUNDING


def test_what_is_not_proved_is_left_to_the_long_way() -> None:
    data = programs(1, 6, 0, 12, seed=1)
    far = interior_point(data, max_steps=0)  # the start of the search: no active set can be told from it
    found = exact_single(data, far)
    assert found is None or bool((violation(data, found.solution) <= TIGHT).all())
    Q, p, A, b, G, h = data
    impossible = Q, p, A, b, torch.cat([G, -G], 1), torch.cat([h, -h - 1], -1)  # G x <= h and G x >= h + 1
    assert exact_single(impossible, interior_point(impossible)) is None


def test_gradients_are_those_of_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (programs(1, 8, 2, 14, seed=2), tuple(t[0] for t in programs(1, 8, 0, 14, seed=4))):
        expected = gradients(data, monkeypatch)
        for got, want in zip(gradients(data), expected, strict=True):
            assert got.shape == want.shape and relative_error(got, want) < ROUNDING


def gradients(data: Program, monkeypatch: pytest.MonkeyPatch | None = None) -> tuple[torch.Tensor, ...]:
    """Of a scalar of x and all multipliers, in all data; with ``monkeypatch`` by the long ways of every kind."""
    leaves = [t.clone().requires_grad_() for t in data]
    if monkeypatch is None:
        return torch.autograd.grad(scalar_of(leaves), leaves)
    with monkeypatch.context() as patch:
        patch.setattr(_qp_solve, "exact_single", lambda program, answer: None)
        # a graph of the gradient is asked for: that of torch.func, not what is written out
        return torch.autograd.grad(scalar_of(leaves), leaves, create_graph=True)


def scalar_of(leaves: list[torch.Tensor]) -> torch.Tensor:
    x, found = il.qp(*leaves, return_multipliers=True)
    value: torch.Tensor = (x**3).sum() + (found.equality**2).sum() + (found.inequality**2).sum()
    return value


def test_the_products_written_out_are_those_of_autograd_with_shared_data_too() -> None:
    lanes, n, e, m = 3, 4, 2, 5
    shapes: list[tuple[int, ...]] = [(lanes, n, n), (1, n), (1, e, n), (lanes, e), (lanes, m, n), (1, m)]
    data = [randn(*shape, seed=k).requires_grad_() for k, shape in enumerate(shapes)]
    held = (randn(lanes, m, seed=9) > 0).double()
    z = [randn(lanes, n, seed=6), randn(lanes, e, seed=7), randn(lanes, m, seed=8), held]
    z = [leaf.requires_grad_() for leaf in z]
    u = [randn(*leaf.shape, seed=10 + k) for k, leaf in enumerate(z)]
    F = torch.autograd.grad(_scalar(unknowns(z), *data).sum(), z, create_graph=True)
    to_z, to_data = _written_out([leaf.detach() for leaf in z], [leaf.detach() for leaf in data])
    for products, inputs in ((to_z(u), z), (to_data(u), data)):
        expected = torch.autograd.grad(F, inputs, u, retain_graph=True, materialize_grads=True)
        for got, want in zip(products, expected, strict=True):
            assert got.shape == want.shape and relative_error(got, want) < 1e-13  # sums of a dozen products


def unknowns(z: list[torch.Tensor]) -> Any:
    from implicitlayer.implicit._kkt_lagrangian import Unknowns

    return Unknowns(*z)


def test_a_shared_argument_of_one_program_keeps_its_shape() -> None:
    Q, p, A, b, G, h = (t[0] for t in programs(1, 5, 1, 6, seed=11))
    p = p[None].requires_grad_()
    (gradient,) = torch.autograd.grad(il.qp(Q, p, A, b, G, h).sum(), p)
    assert gradient.shape == (1, 5)


def test_one_program_in_float32_has_float32_gradients() -> None:
    leaves = [t.float().requires_grad_() for t in programs(1, 5, 1, 6, seed=12)]
    found = torch.autograd.grad(il.qp(*leaves).sum(), leaves)
    exactly = [t.detach().double().requires_grad_() for t in leaves]
    for got, want in zip(found, torch.autograd.grad(il.qp(*exactly).sum(), exactly), strict=True):
        assert got.dtype == torch.float32 and relative_error(got.to(F64), want) < 1e-3  # eps 6e-8, condition 1e4
