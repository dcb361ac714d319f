"""``il.qp`` against the layers of qpth and CVXPYlayers: the same batches of programs, the same gradients."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, relative_error
from solvers.test_interior_point import programs
from torch import Tensor

import implicitlayer as il

LANES, N, E, M = 6, 8, 2, 10


def by_qpth(data: list[Tensor]) -> Tensor:
    qpth = pytest.importorskip("qpth.qp", reason="needs qpth: pip install qpth")
    Q, p, A, b, G, h = data
    x: Tensor = qpth.QPFunction(verbose=-1)(Q, p, G, h, A, b)
    return x


def by_cvxpylayers(data: list[Tensor]) -> Tensor:
    cp = pytest.importorskip("cvxpy", reason="needs CVXPY: pip install cvxpylayers")
    layers = pytest.importorskip("cvxpylayers.torch", reason="needs CVXPYlayers: pip install cvxpylayers")
    x, root = cp.Variable(N), cp.Parameter((N, N))
    p, A, b, G, h = (cp.Parameter(t.shape[1:]) for t in data[1:])
    value = cp.Minimize(0.5 * cp.sum_squares(root @ x) + p @ x)  # x'Qx, whose Q cannot be a parameter
    layer = layers.CvxpyLayer(cp.Problem(value, [A @ x == b, G @ x <= h]), [root, p, A, b, G, h], [x])
    exactly = {"solve_method": "SCS", "eps": 1e-12, "mode": "dense"}
    solved: Tensor = layer(torch.linalg.cholesky(data[0]).mT, *data[1:], solver_args=exactly)[0]
    return solved


# What they leave at their best: qpth takes slacks and multipliers below 1e-8 for 1e-8, which shows as 1e-5 in its
# gradients (docs/benchmarks.md); SCS is asked for 1e-12, and the condition of these programs is below 1e4.
@pytest.mark.parametrize(("layer", "of_x", "of_gradients"), [(by_qpth, 1e-6, 1e-3), (by_cvxpylayers, 1e-7, 1e-6)])
def test_batches_have_the_solutions_and_gradients_of_other_layers(
    layer: Callable[[list[Tensor]], Tensor], of_x: float, of_gradients: float
) -> None:
    data = list(programs(LANES, N, E, M, seed=1))
    x, gradients = solved(lambda leaves: il.qp(*leaves), data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the other packages
        other, others = solved(layer, data)
    active = (data[4] @ x[..., None])[..., 0] > data[5] - 1e-9
    assert bool(active.any()) and not bool(active.all())
    assert relative_error(x, other) < of_x
    for name, got, want in zip("QpAbGh", gradients, others, strict=True):
        assert relative_error(got, want) < of_gradients, name


def solved(layer: Callable[[list[Tensor]], Tensor], data: list[Tensor]) -> tuple[Tensor, Any]:
    leaves = [t.detach().requires_grad_() for t in data]
    x = layer(leaves)
    weights = torch.linspace(-1, 2, N, dtype=F64)
    gradients = list(torch.autograd.grad((weights * x + x**3).sum(), leaves))
    gradients[0] = (gradients[0] + gradients[0].mT) / 2
    return x.detach(), gradients
