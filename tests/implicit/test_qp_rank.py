"""Equations of il.qp that depend on each other, bounds that are none, sparse data."""

from __future__ import annotations

import pytest
import torch

import implicitlayer as il

F64 = torch.float64


def least_norm(p: torch.Tensor, A: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The minimum of |x|^2 / 2 + p'x with A x = b for independent rows, in float64: x = -p + A'(A A')^-1 (b + A p)."""
    p, A, b = p.double(), A.double(), b.double()
    return -p + A.mT @ torch.linalg.solve(A @ A.mT, b + A @ p)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.filterwarnings("ignore::implicitlayer.KinkWarning")
def test_repeated_equations_do_not_move_the_solution(dtype: torch.dtype, batched: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        n, r = 5, 2
        rows = torch.randn(r, n, generator=generator, dtype=dtype)
        point = torch.randn(n, generator=generator, dtype=dtype)
        mix = torch.cat([torch.eye(r, dtype=dtype), torch.randn(2, r, generator=generator, dtype=dtype)])
        A, b = mix @ rows, mix @ (rows @ point)
        p = torch.randn(n, generator=generator, dtype=dtype).requires_grad_()
        given = p.expand(3, n) if batched else p
        x = il.qp(torch.eye(n, dtype=dtype), given, A, b)
        expected = least_norm(p, rows, rows @ point)
        # data with relative errors of eps; the rows' condition number is below 1e2 here
        tolerance = 1e3 * torch.finfo(dtype).eps * (1 + expected.detach().abs().max().item())
        assert (x.detach() - expected).abs().max() <= tolerance
        w = torch.arange(1.0, n + 1, dtype=dtype)
        (found,) = torch.autograd.grad((x * w).sum() / (3 if batched else 1), p)
        (right,) = torch.autograd.grad((expected * w).sum(), p)
        assert (found - right).abs().max() <= 1e3 * torch.finfo(dtype).eps * w.norm()


@pytest.mark.parametrize("gap", [1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7])
@pytest.mark.filterwarnings("ignore::implicitlayer.ConvergenceWarning")
def test_rows_that_differ_by_more_than_rounding_are_two_equations(gap: float) -> None:
    first, other = torch.tensor([0.1, 0.2, 0.3], dtype=F64), torch.tensor([1.0, -1.0, 2.0], dtype=F64)
    point, p = torch.tensor([0.3, 0.5, 1.1], dtype=F64), torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    A = torch.stack([first, 3 * (first + gap * other)])
    x = il.qp(torch.eye(3, dtype=F64), p, A, A @ point)
    expected = least_norm(p, torch.stack([first, other]), torch.stack([first @ point, other @ point]))
    # rounding of A and b, a few eps, is divided by the sine of the angle between the rows, gap |other| / |first|
    assert (x - expected).abs().max() <= 32 * torch.finfo(F64).eps / gap


def test_equations_that_contradict_each_other_are_infeasible() -> None:
    for dtype in (torch.float32, F64):
        A = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.6, 0.9]], dtype=dtype)
        with pytest.raises(il.InfeasibleError, match="right-hand sides that do not"):
            il.qp(torch.eye(3, dtype=dtype), torch.ones(3, dtype=dtype), A, torch.tensor([0.5, 1.6], dtype=dtype))


@pytest.mark.parametrize("none", [1e20, float("inf")])
def test_a_bound_that_is_none_is_no_row_lane_by_lane(none: float) -> None:
    G = torch.cat([torch.eye(2, dtype=F64), -torch.eye(2, dtype=F64)])
    h = torch.tensor([[1.0, 0.7, 0.0, 0.5], [1.0, 0.7, 0.0, none], [none] * 4], dtype=F64, requires_grad=True)
    x = il.qp(torch.eye(2, dtype=F64), torch.tensor([3.0, 4.0], dtype=F64), None, None, G, h)
    assert torch.equal(x, torch.tensor([[0.0, -0.5], [0.0, -4.0], [-3.0, -4.0]], dtype=F64))
    (g,) = torch.autograd.grad(x.sum(), h)
    # dx / dh = -1 for the lower bounds -x_i <= h_i that hold
    assert torch.equal(g + 0.0, torch.tensor([[0.0, 0.0, -1.0, -1.0], [0.0, 0.0, -1.0, 0.0], [0.0] * 4], dtype=F64))
    each = torch.vmap(lambda h: il.qp(torch.eye(2, dtype=F64), torch.tensor([3.0, 4.0], dtype=F64), None, None, G, h))
    assert torch.equal(each(h), x)
    program = il.qp(torch.zeros(2, 2, dtype=F64), torch.tensor([1.0, -2.0], dtype=F64), None, None, G, h[1])
    torch.testing.assert_close(
        program, torch.tensor([0.0, 0.7], dtype=F64), rtol=0, atol=1e-12
    )  # a vertex, to rounding


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_data_are_right_as_theta_and_closed_over(layout: str, closed: bool) -> None:
    torch.manual_seed(0)
    A, b = torch.randn(6, 4, dtype=F64), torch.randn(6, dtype=F64, requires_grad=True)
    S = getattr(A, layout)()
    solve = lambda f, x, *theta: torch.linalg.lstsq(A, theta[-1][:, None]).solution[:, 0]  # noqa: E731
    if closed:
        x = il.argmin(lambda x, b: (S @ x - b).square().sum(), solve)(torch.zeros(4, dtype=F64), b)
    else:
        x = il.argmin(lambda x, S, b: (S @ x - b).square().sum(), solve)(torch.zeros(4, dtype=F64), S, b)
    (g,) = torch.autograd.grad(x.sum(), b)
    torch.testing.assert_close(g, torch.linalg.pinv(A).sum(0), rtol=0, atol=1e-9)  # CG to 1e-10


def test_sparse_data_that_need_a_gradient_are_refused_with_the_remedy() -> None:
    S = torch.eye(2, dtype=F64).to_sparse().requires_grad_()
    layer = il.argmin(lambda x, S: (S @ x - 1).square().sum(), lambda f, x, S: x)
    with pytest.raises(TypeError, match=r"sparse theta.*to_dense"):
        layer(torch.ones(2, dtype=F64), S)


@pytest.mark.filterwarnings("ignore::implicitlayer.KinkWarning")
@pytest.mark.parametrize("bounded", [False, True])
def test_equations_that_contradict_each_other_in_one_program_are_masked(bounded: bool) -> None:
    A = torch.tensor([[1.0, 1.0], [2.0, 2.0]], dtype=F64)
    b = torch.tensor([[1.0, 2.0], [1.0, 3.0], [2.0, 4.0]], dtype=F64, requires_grad=True)
    bounds = {"lb": torch.full((2,), -5.0, dtype=F64)} if bounded else {}
    given = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64), A
    x = il.qp(*given, b, on_failure="mask", **bounds)
    (gradient,) = torch.autograd.grad(x.nansum(), b)
    assert torch.allclose(x[[0, 2]], torch.tensor([[0.5, 0.5], [1.0, 1.0]], dtype=F64))
    assert bool(x[1].isnan().all()) and not bool(gradient[1].any()) and bool(gradient[[0, 2]].all())
    assert bool(il.qp(*given, b[1].detach(), on_failure="mask", **bounds).isnan().all())
    with pytest.raises(il.InfeasibleError, match="in lane 1 of"):
        il.qp(*given, b, **bounds)
