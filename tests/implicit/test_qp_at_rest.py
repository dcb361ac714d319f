"""Programs whose solution is a minimum of the objective alone: every multiplier is zero, and nothing but rounding is
left of the terms of the gradient that the optimality conditions are measured by."""

from __future__ import annotations

import pytest
import torch

import implicitlayer as il

F64 = torch.float64
SIZE = 4


def interpolating(seed: int, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """K, and Q, A, b of ``min ||r||^2`` with ``K x - r = b``: at the solution ``K x = b`` and r = 0."""
    generator = torch.Generator().manual_seed(seed)
    K = scale * (torch.rand(SIZE, SIZE, generator=generator, dtype=F64) + SIZE * torch.eye(SIZE, dtype=F64))
    Q = torch.diag(torch.cat([torch.zeros(SIZE, dtype=F64), torch.full((SIZE,), 2.0, dtype=F64)]))
    A = torch.cat([K, -torch.eye(SIZE, dtype=F64)], 1)
    return K, Q, A, torch.randn(SIZE, generator=generator, dtype=F64)


def box(far: float) -> tuple[torch.Tensor, torch.Tensor]:
    sides = torch.cat([torch.eye(SIZE, dtype=F64), torch.zeros(SIZE, SIZE, dtype=F64)], 1)
    return torch.cat([sides, -sides]), torch.full((2 * SIZE,), far, dtype=F64)


def check(K: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> None:
    """x[:SIZE] = K^-1 b, to the rounding of a solve with K and with the system of all conditions."""
    weights = torch.arange(1.0, SIZE + 1, dtype=F64)
    (found,) = torch.autograd.grad((x[:SIZE] * weights).sum(), b)
    solution, expected = torch.linalg.solve(K, b.detach()), torch.linalg.solve(K.mT, weights)
    inverse = torch.linalg.inv(K)
    rounding = 1e3 * torch.finfo(F64).eps * torch.linalg.cond(K) ** 2
    assert torch.linalg.vector_norm(x[:SIZE] - solution) <= rounding * inverse.norm() * b.norm()
    assert torch.linalg.vector_norm(found - expected) <= rounding * inverse.norm() * weights.norm()


@pytest.mark.parametrize("far", [None, 1e3])
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3, 1e6])
def test_least_squares_that_interpolate_are_solved(scale: float, far: float | None) -> None:
    for seed in range(10):
        K, Q, A, b = interpolating(seed, scale)
        G, h = (None, None) if far is None else box(far / scale)
        b.requires_grad_()
        check(K, il.qp(Q, torch.zeros(2 * SIZE, dtype=F64), A, b, G, h), b)


def test_in_a_batch_they_are_solved_beside_others() -> None:
    _, Q, A, b = interpolating(0)
    G, h = box(50.0)
    p = torch.stack([torch.zeros(2 * SIZE, dtype=F64), torch.linspace(0.5, 1.0, 2 * SIZE, dtype=F64)] * 2)
    sides = torch.stack([b, b, 2 * b, 2 * b]).requires_grad_()
    x = il.qp(Q, p, A, sides, G, h)
    for i in range(4):
        assert torch.allclose(x[i], il.qp(Q, p[i], A, sides[i].detach(), G, h), rtol=1e-9, atol=1e-11)
    lanes = torch.func.vmap(lambda b: il.qp(Q, torch.zeros_like(p[0]), A, b, G, h))(sides.detach())
    assert torch.allclose(lanes[::2], x[::2].detach(), rtol=1e-9, atol=1e-11)


def test_in_float32_they_are_solved() -> None:
    K, Q, A, b = (t.float() for t in interpolating(1))
    x = il.qp(Q, torch.zeros(2 * SIZE), A, b, *(t.float() for t in box(50.0)))
    assert torch.linalg.vector_norm(A @ x - b) <= 16 * torch.finfo(torch.float32).eps * K.norm() * x.norm()


def test_a_minimum_within_the_null_space_of_q_is_a_solution() -> None:
    # B x = 0 and C x = d have one solution, the first columns of the inverse of both times d
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        B, C = torch.randn(2, 2, 4, generator=generator, dtype=F64)
        d = torch.randn(2, generator=generator, dtype=F64).requires_grad_()
        both = torch.cat([C, B])
        x = il.qp(1e3 * B.mT @ B, torch.zeros(4, dtype=F64), C, d)
        inverse = torch.linalg.inv(both)
        rounding = 1e3 * torch.finfo(F64).eps * torch.linalg.cond(both) ** 2
        assert torch.linalg.vector_norm(x - inverse[:, :2] @ d) <= rounding * inverse.norm() * d.norm()
        (found,) = torch.autograd.grad(x.sum(), d)
        assert torch.linalg.vector_norm(found - inverse[:, :2].sum(0)) <= rounding * inverse.norm() * 2


@pytest.mark.parametrize("on_top", [0, 3])
def test_a_border_through_such_a_solution_is_a_kink(on_top: int) -> None:
    for seed in range(10):
        K, Q, A, b = interpolating(seed)
        G, h = box(50.0)
        h[on_top] = torch.linalg.solve(K, b)[on_top]
        b.requires_grad_()
        with pytest.warns(il.KinkWarning, match="multiplier of zero"):
            check(K, il.qp(Q, torch.zeros(2 * SIZE, dtype=F64), A, b, G, h), b)


def answer(A: torch.Tensor, b: torch.Tensor, off: float) -> torch.Tensor:
    """The solution, and a point off it that satisfies the equations too."""
    x = torch.linalg.solve(A[:, :SIZE], b) + off
    return torch.cat([x, A[:, :SIZE] @ x - b])


def test_of_a_users_solver_the_solution_is_taken_and_another_point_is_told() -> None:
    K, Q, A, b = interpolating(2)
    p = torch.zeros(2 * SIZE, dtype=F64)
    b.requires_grad_()
    check(K, il.qp(Q, p, A, b, solver=lambda Q, p, A, b, G, h: answer(A, b, 0.0)), b)
    for off in (1e-5, 1e-2):
        with pytest.warns(il.StationarityWarning, match="optimality conditions"):
            x = il.qp(Q, p, A, b, solver=lambda Q, p, A, b, G, h, off=off: answer(A, b, off))
        assert torch.equal(x.detach(), answer(A, b, off).detach())


def test_constrained_argmin_takes_such_a_solution_and_tells_another_point() -> None:
    K, _, A, b = interpolating(3)
    b.requires_grad_()

    def layer(off: float) -> torch.Tensor:
        solve = il.constrained_argmin(
            lambda z, b: (z[SIZE:] ** 2).sum(), lambda f, z, b: answer(A, b, off), equality=lambda z, b: A @ z - b
        )
        return solve(torch.zeros(2 * SIZE, dtype=F64), b)

    check(K, layer(0.0), b)
    for off in (1e-5, 1e-2):
        with pytest.warns(il.StationarityWarning, match="optimality conditions"):
            layer(off)


@pytest.mark.parametrize("lanes", [(), (2,)])
@pytest.mark.parametrize("large", [1e10, 1e13, 1e16])
def test_small_terms_of_a_real_force_are_no_rounding(large: float, lanes: tuple[int, ...]) -> None:
    # large / 2 x1^2 + x2^2 / 2 with x2 >= 1: the force of the border is one, below the rounding of Q
    Q = torch.diag(torch.tensor([large, 1.0], dtype=F64))
    h = torch.tensor([-1.0], dtype=F64, requires_grad=True)
    x = il.qp(Q, torch.zeros(*lanes, 2, dtype=F64), G=torch.tensor([[0.0, -1.0]], dtype=F64), h=h)
    eps = torch.finfo(F64).eps
    assert (x.detach() - torch.tensor([0.0, 1.0], dtype=F64)).abs().max() <= 4 * eps
    lane_count = x.shape[:-1].numel()
    assert abs(torch.autograd.grad(x.sum(), h)[0].item() + lane_count) <= 4 * eps * lane_count
