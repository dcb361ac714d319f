"""A product function and a right-hand side of two dtypes."""

from typing import Any

import pytest
import torch
from references import F64, relative_error

import implicitlayer as il

N = 3


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="Python 3.10 has no notes")
@pytest.mark.parametrize("dtypes", [(torch.float32, F64), (F64, torch.float32)])
def test_a_function_and_a_right_hand_side_of_two_dtypes_are_an_error_with_what_to_do(dtypes: Any) -> None:
    a, b = torch.eye(N, dtype=dtypes[0]), torch.ones(N, dtype=dtypes[1])
    for call in (
        lambda: il.linear_solve(lambda u: a @ u, b),
        lambda: il.linear_solve(lambda u, a: a @ u, b, None, a),
        lambda: il.linear_solve(lambda u: {"x": a @ u["x"]}, {"x": b}),
        lambda: il.ConjugateGradient()(lambda u: a @ u, b),
    ):
        with pytest.raises(RuntimeError, match="same dtype") as info:
            call()
        assert rf"like the right-hand side: ({N},) {dtypes[1]}. " in info.value.__notes__[0]
        assert "A.to(rhs.dtype) or rhs.to(A.dtype)" in info.value.__notes__[0]


@pytest.mark.parametrize("dtypes", [(torch.float32, F64), (F64, torch.float32)])
def test_a_function_may_make_its_products_in_another_dtype(dtypes: Any) -> None:
    a = torch.diag(torch.arange(1.0, N + 1)).to(dtypes[0]).requires_grad_()
    b = torch.ones(N, dtype=dtypes[1], requires_grad=True)
    u = il.linear_solve(lambda u: a @ u.to(a.dtype), b)
    of_a, of_b = torch.autograd.grad(u.sum(), (a, b))
    right = 1 / torch.arange(1.0, N + 1, dtype=F64)
    assert u.dtype is of_b.dtype is dtypes[1] and of_a.dtype is dtypes[0]
    assert relative_error(u.double(), right) < 1e-6 and relative_error(of_b.double(), right) < 1e-6
    assert relative_error(of_a.double(), -right[:, None] * right) < 1e-6
    assert torch.equal(il.ConjugateGradient()(lambda u: a.detach() @ u.to(a.dtype), b.detach()).value, u.detach())
