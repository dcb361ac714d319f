"""A direction without curvature: what a theta does that pushes along it is no silent zero."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, central_differences, randn, relative_error
from torch import Tensor

import implicitlayer as il

B = torch.tensor([1.0, 2.0, 2.0], dtype=F64)
ZERO = torch.tensor(0.0, dtype=F64, requires_grad=True)
WORDS = r"one of many.*theta tensor \d pushes along it"


def shrunk(weight: Tensor, **settings: Any) -> Tensor:
    """min 1/2 |x - B|^2 + weight sum t with |x| <= t, which is B shrunk by the weight; at zero any t will do."""
    eye, zeros = torch.eye(3, dtype=F64), torch.zeros(3, 3, dtype=F64)
    Q = torch.block_diag(eye, zeros)
    p = torch.cat([-B.expand(*weight.shape, 3), weight[..., None].expand(*weight.shape, 3)], -1)
    G = torch.cat([torch.cat([eye, -eye], 1), torch.cat([-eye, -eye], 1)])
    return il.qp(Q, p, G=G, h=torch.zeros(6, dtype=F64), **settings)[..., :3]


def by_program(weight: Tensor) -> Tensor:
    return shrunk(weight)


def by_batch(weight: Tensor) -> Tensor:
    return shrunk(torch.stack([weight, weight + 0.1]))[0]


def by_vmap(weight: Tensor) -> Tensor:
    return torch.func.vmap(shrunk)(torch.stack([weight, weight + 0.1]))[0]


def by_constraints(weight: Tensor) -> Tensor:
    def objective(z: dict[str, Tensor], g: Tensor) -> Tensor:
        return 0.5 * ((z["x"] - B) ** 2).sum() + g * z["t"].sum()

    def inside(z: dict[str, Tensor], g: Tensor) -> Tensor:
        return torch.cat([z["x"] - z["t"], -z["x"] - z["t"]])

    layer = il.constrained_argmin(objective, il.solvers.SQP(), inequality=inside)
    return layer({"x": torch.zeros(3, dtype=F64), "t": 5 * torch.ones(3, dtype=F64)}, weight)["x"]


def by_dense(weight: Tensor) -> Tensor:
    """z_1 is free where the weight is zero, and follows z_0 where it is not."""
    layer = il.argmin(
        lambda z, g: 0.5 * (z[0] - 1) ** 2 + g * (z[1] - z[0]) ** 2,
        il.solvers.NewtonCG(rtol=1e-12),
        linear_solver=il.Dense(),
    )
    return layer(torch.tensor([0.2, 0.7], dtype=F64), weight)[:1]


@pytest.mark.parametrize("layer", [by_program, by_batch, by_vmap, by_constraints, by_dense])
def test_a_theta_that_pushes_along_a_flat_direction_is_told(layer: Callable[[Tensor], Tensor]) -> None:
    x = layer(ZERO)
    with pytest.warns(il.KinkWarning, match=WORDS):
        torch.autograd.grad(x.sum(), ZERO)


def test_under_jacrev_and_the_policies() -> None:
    with pytest.warns(il.KinkWarning, match=WORDS):
        torch.func.jacrev(shrunk)(ZERO.detach())
    with pytest.raises(il.KinkError, match=WORDS):
        torch.autograd.grad(shrunk(ZERO, on_failure="raise").sum(), ZERO)
    torch.autograd.grad(shrunk(ZERO, on_failure="ignore").sum(), ZERO)  # silent on request
    with pytest.warns(il.KinkWarning, match=r"one of many in lane 0 of \(2,\)"):
        torch.autograd.grad(shrunk(torch.stack([ZERO, ZERO + 0.1])).sum(), ZERO)


def test_a_norm_of_weight_zero_in_cvxpy_is_told() -> None:
    cp = pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    if not {"OSQP", "CLARABEL"} <= set(cp.installed_solvers()):
        pytest.skip("osqp or clarabel is not installed")
    x, weight = cp.Variable(3), cp.Parameter(nonneg=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # CVXPY's own
        problem = cp.Problem(cp.Minimize(0.5 * cp.sum_squares(x - B.numpy()) + weight * cp.norm(x)))
        layer = il.from_cvxpy(problem, [weight], [x])
    (found,) = layer(ZERO)
    with pytest.warns(il.KinkWarning, match=WORDS):
        torch.autograd.grad(found.sum(), ZERO)


@pytest.mark.filterwarnings("error")
def test_thetas_that_leave_a_solution_in_place_have_the_right_gradient_without_a_word() -> None:
    """Least squares with more unknowns than equations; a classifier whose classes may all be shifted."""
    A, t = randn(3, 5, seed=1).requires_grad_(), randn(3, seed=2).requires_grad_()
    layer = il.argmin(
        lambda x, A, t: 0.5 * ((A @ x - t) ** 2).sum(),
        lambda f, x, A, t: torch.linalg.pinv(A) @ t,
        linear_solver=il.Dense(),
    )
    v = (A.T @ randn(3, seed=3)).detach()
    found = torch.autograd.grad(v @ layer(torch.zeros(5, dtype=F64), A, t), [A, t])
    by_t = torch.linalg.pinv(A.detach()).T @ v
    assert relative_error(found[1], by_t) < 1e-9
    # v is in the range of A', where every solution of the changed equations agrees with that of smallest norm
    expected = central_differences(lambda A: v @ torch.linalg.pinv(A) @ t.detach(), A.detach(), 1e-6)
    projected = expected - expected @ (torch.eye(5, dtype=F64) - torch.linalg.pinv(A.detach()) @ A.detach())
    assert relative_error(found[0], projected) < 1e-7

    X, y = randn(20, 2, seed=4).requires_grad_(), torch.arange(20) % 3
    shifts = il.argmin(
        lambda W, X: torch.nn.functional.cross_entropy(X @ W, y),
        il.solvers.NewtonCG(rtol=1e-10),
        linear_solver=il.Dense(),
    )
    W = shifts(torch.zeros(2, 3, dtype=F64), X)
    (by_X,) = torch.autograd.grad((W[:, 0] - W[:, 1]).sum(), X)

    def direct(X: Tensor) -> Tensor:
        W = shifts(torch.zeros(2, 3, dtype=F64), X)
        return (W[:, 0] - W[:, 1]).sum()

    assert relative_error(by_X, central_differences(direct, X.detach(), 1e-5)) < 1e-6


@pytest.mark.filterwarnings("error")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # CVXPY's own
@pytest.mark.parametrize("on_failure", ["warn", "raise"])
@pytest.mark.parametrize(
    "rows",
    [
        lambda cp, x, r: [cp.abs(x) <= r],
        lambda cp, x, r: [cp.max(x) <= 5, cp.pos(x) <= 5],
        lambda cp, x, r: [cp.norm1(x - 1) <= r],
        lambda cp, x, r: [cp.norm(x) <= r, cp.sum_squares(x) <= 25],
        lambda cp, x, r: [cp.log(x) >= -5, cp.exp(x) <= 50],
        lambda cp, x, r: [cp.lambda_max(cp.diag(x)) <= 50],
        lambda cp, x, r: [cp.abs(x) <= r, cp.sum(x) == 1.5, 2 * cp.sum(x) == 3.0],
    ],
)
def test_variables_that_cvxpy_adds_and_parameters_do_not_reach_are_no_kink(rows: Any, on_failure: Any) -> None:
    """The nearest point to p, which no inequality holds: x = p, where equations do not move it."""
    cp = pytest.importorskip("cvxpy", reason="cvxpy is not installed")
    if not {"OSQP", "CLARABEL"} <= set(cp.installed_solvers()):
        pytest.skip("osqp or clarabel is not installed")
    x, center, radius = cp.Variable(2), cp.Parameter(2), cp.Parameter(nonneg=True)
    rows = rows(cp, x, radius)
    parameters = [center, *([radius] if any(radius in row.parameters() for row in rows) else [])]
    layer = il.from_cvxpy(
        cp.Problem(cp.Minimize(cp.sum_squares(x - center)), rows), parameters, [x], on_failure=on_failure
    )
    p, r = torch.tensor([0.4, 1.1], dtype=F64, requires_grad=True), torch.tensor(3.0, dtype=F64, requires_grad=True)
    (found,) = layer(p, r)[:1] if len(parameters) == 2 else layer(p)
    assert relative_error(found, p) < 1e-7
    slopes = torch.autograd.grad(found[0] + 2 * found[1], [p, r], allow_unused=True)
    equal = torch.ones(2, dtype=F64) / 2 * any(type(row).__name__ == "Equality" for row in rows)
    wanted = torch.tensor([1.0, 2.0], dtype=F64)
    assert relative_error(slopes[0], wanted - 2 * equal * (equal @ wanted)) < 1e-7
    assert slopes[1] is None or abs(slopes[1]) < 1e-9
