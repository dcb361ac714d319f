"""The plain path of ``il.qp`` has the numbers of the general layer, its checks, and few calls."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error
from solvers.test_interior_point import programs

import implicitlayer as il
from implicitlayer.constrained._qp_function import ProvedProgram

ROUNDING = 1e-11  # of two solves with matrices whose condition is below 1e4
PACKAGE = str(Path(il.__file__).parent)


def leaves_of(lanes: int, n: int = 10, e: int = 2, m: int = 10, dtype: torch.dtype = F64, seed: int = 0) -> list[Any]:
    data = programs(max(lanes, 1), n, e, m, seed=seed)
    return [(t if lanes else t[0]).to(dtype).requires_grad_() for t in data]


def gradients(leaves: list[Any], **how: Any) -> tuple[torch.Tensor, ...]:
    """Of a scalar of x and of both multipliers, in all data."""
    x, found = il.qp(*leaves, return_multipliers=True)
    value = (x**3).sum() + (found.equality**2).sum() + (found.inequality**2).sum()
    return torch.autograd.grad(value, leaves, **how)


def test_a_small_program_costs_at_most_250_calls_of_the_package_with_its_gradient() -> None:
    Q, p, _, _, G, h = leaves_of(0, n=10, m=12)

    def once() -> None:
        x = il.qp(Q, p, G=G, h=h)
        torch.autograd.grad((x * x).sum(), (Q, p, G, h))

    calls = 0

    def count(frame: types.FrameType, event: str, _: object) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    once()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        once()
    finally:
        sys.setprofile(before)
    assert 0 < calls <= 250


@pytest.mark.parametrize("lanes", [0, 1, 5])
@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_gradients_are_those_of_the_general_layer(lanes: int, dtype: torch.dtype) -> None:
    leaves = leaves_of(lanes, dtype=dtype)
    found = gradients(leaves)
    with il.diagnostics() as records:  # records are made by the general layer
        expected = gradients(leaves)
    assert [type(record).__name__ for record in records] == ["ForwardRecord", "BackwardRecord"]
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        # float32: the residual of the general layer's solve is that of rounded unknowns
        assert relative_error(got, want) < (ROUNDING if dtype is F64 else 1e-4)


def test_the_plain_path_is_the_one_that_is_taken() -> None:
    for lanes in (0, 5):
        x = il.qp(*leaves_of(lanes))
        assert x.grad_fn is not None and x.grad_fn.name() == f"{ProvedProgram.__name__}Backward"


def test_shared_data_get_the_sum_over_the_programs() -> None:
    leaves = leaves_of(5)
    shared = [t[0].detach().requires_grad_() if k < 2 else t for k, t in enumerate(leaves)]
    found = gradients(shared)
    loop = [t.expand(5, *t.shape) if k < 2 else t for k, t in enumerate(shared)]
    x = [il.qp(*(t[i] for t in loop), return_multipliers=True) for i in range(5)]
    value = sum((one**3).sum() + (two.equality**2).sum() + (two.inequality**2).sum() for one, two in x)
    for got, want in zip(found, torch.autograd.grad(value, shared), strict=True):  # type: ignore[arg-type]
        assert got.shape == want.shape and relative_error(got, want) < ROUNDING


@pytest.mark.parametrize("lanes", [0, 3])
def test_a_graph_of_the_gradient_can_be_had_to_second_order(lanes: int) -> None:
    leaves = leaves_of(lanes, n=3, e=1, m=3, seed=3)
    plain, graph = gradients(leaves), gradients(leaves, create_graph=True)
    for got, want in zip(graph, plain, strict=True):
        assert relative_error(got, want) < ROUNDING
    assert torch.autograd.gradgradcheck(lambda *data: il.qp(*data), leaves)


@pytest.mark.parametrize("lanes", [0, 3])
def test_batched_cotangents_are_a_loop_over_them(lanes: int) -> None:
    leaves = leaves_of(lanes)
    x = il.qp(*leaves)
    vectors = randn(4, *x.shape, seed=1)
    found = torch.autograd.grad(x, leaves, vectors, is_grads_batched=True, retain_graph=True)
    for k, vector in enumerate(vectors):
        for got, want in zip(found, torch.autograd.grad(x, leaves, vector, retain_graph=True), strict=True):
            assert relative_error(got[k], want) < ROUNDING


@pytest.mark.parametrize("lanes", [0, 3])
def test_a_cotangent_of_any_size_has_the_same_relative_accuracy_and_nan_is_an_error(lanes: int) -> None:
    leaves = leaves_of(lanes)
    x = il.qp(*leaves)
    v = randn(*x.shape, seed=2)
    plain = torch.autograd.grad(x, leaves, v, retain_graph=True)
    for scale in (1e-200, 1e200):
        for got, want in zip(torch.autograd.grad(x, leaves, scale * v, retain_graph=True), plain, strict=True):
            assert relative_error(got / scale, want) < ROUNDING
    assert not any(t.any() for t in torch.autograd.grad(x, leaves, 0 * v, retain_graph=True))
    with pytest.raises(il.NonFiniteError, match="cotangent"):
        torch.autograd.grad(x, leaves, v * torch.nan, retain_graph=True)


def test_only_what_is_asked_for_has_a_gradient() -> None:
    leaves = leaves_of(0)
    for t in leaves[:4]:
        t.requires_grad_(False)
    by_G, by_h = torch.autograd.grad(il.qp(*leaves).sum(), leaves[4:])
    assert by_G.shape == leaves[4].shape and bool(by_h.any())
    assert not il.qp(*(t.detach() for t in leaves)).requires_grad


def test_a_solution_changed_in_place_is_an_error_of_autograd() -> None:
    leaves = leaves_of(0)
    x = il.qp(*leaves)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_records_around_the_backward_alone_have_its_record() -> None:
    leaves = leaves_of(3)
    value = il.qp(*leaves).sum()
    plain = torch.autograd.grad(value, leaves, retain_graph=True)
    with il.diagnostics() as records:
        found = torch.autograd.grad(value, leaves)
    assert [record.kind for record in records] == ["backward"]  # type: ignore[union-attr]
    assert float(records[0].gradient_error) < 1e-8  # type: ignore[union-attr]
    for got, want in zip(found, plain, strict=True):
        assert relative_error(got, want) < ROUNDING


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_a_program_has_its_gradients(reentrant: bool) -> None:
    leaves = leaves_of(2)
    expected = torch.autograd.grad(il.qp(*leaves).sum(), leaves)
    value = torch.utils.checkpoint.checkpoint(il.qp, *leaves, use_reentrant=reentrant).sum()  # type: ignore[no-untyped-call]
    value.backward()
    for leaf, want in zip(leaves, expected, strict=True):
        assert relative_error(leaf.grad, want) < ROUNDING
