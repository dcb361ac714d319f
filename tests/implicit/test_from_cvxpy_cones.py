"""``il.from_cvxpy`` of programs over second-order and semidefinite cones: closed forms, finite differences, trouble."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, central_differences, orthogonal, randn, relative_error
from torch import Tensor

import implicitlayer as il
from implicitlayer.constrained._cones import Cones

cp = pytest.importorskip("cvxpy", reason="cvxpy is not installed")
if not {"OSQP", "CLARABEL"} <= set(cp.installed_solvers()):
    pytest.skip("osqp or clarabel is not installed", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:cvxpy", "ignore::DeprecationWarning:cvxpy")

# Newton's steps end at the rounding of matrices of at most 40 rows; the problems are conditioned below 1e3.
EXACT = 1e-11


def ball() -> Any:
    """Onto |x| <= r: q min(1, r / |q|)."""
    x, q, r = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    return il.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(x - q)), [cp.norm(x) <= r]), [q, r], [x])


Q, R = torch.tensor([1.0, 2.0, -2.0], dtype=F64), torch.tensor(1.5, dtype=F64)


def test_the_projection_onto_a_ball_has_its_closed_form_to_second_order_and_in_both_modes() -> None:
    layer = ball()
    found, closed = (lambda q, r: layer(q, r)[0]), (lambda q, r: q * (r / q.norm()))
    assert relative_error(found(Q, R), closed(Q, R)) < EXACT
    for mode in (torch.func.jacrev, torch.func.jacfwd):
        pairs = zip(mode(found, (0, 1))(Q, R), torch.func.jacrev(closed, (0, 1))(Q, R), strict=True)
        assert all(relative_error(a, b) < EXACT for a, b in pairs)
    weights = randn(3, seed=1)
    second = [torch.func.hessian(lambda q, f=f: weights @ f(q, R))(Q) for f in (found, closed)]
    assert relative_error(*second) < EXACT


def test_a_batch_and_vmap_are_a_loop() -> None:
    layer, many = ball(), 2 * randn(6, 3, seed=2)  # some inside, some outside
    r = R.clone().requires_grad_()
    (batched,), loop = layer(many, r), torch.stack([layer(q, r)[0] for q in many])
    mapped = torch.func.vmap(lambda q: layer(q, R)[0])(many)
    assert relative_error(batched, loop) < EXACT and relative_error(mapped, loop) < EXACT
    gradients = [torch.autograd.grad(x.square().sum(), r)[0] for x in (batched, loop)]
    assert relative_error(*gradients) < EXACT
    assert layer(torch.ones(0, 3, dtype=F64), R)[0].shape == (0, 3)


def test_robust_least_squares_agrees_with_finite_differences() -> None:
    """min |F x - g| + s |x|: the worst case of a disturbance of F of norm s."""
    x, F, g, s = cp.Variable(3), cp.Parameter((5, 3)), cp.Parameter(5), cp.Parameter(nonneg=True)
    layer = il.from_cvxpy(cp.Problem(cp.Minimize(cp.norm(F @ x - g) + s * cp.norm(x))), [F, g, s], [x])
    values = [randn(5, 3, seed=3), randn(5, seed=4), torch.tensor(0.3, dtype=F64)]
    (found,) = layer(*values)
    gradient = lambda x: values[0].T @ (values[0] @ x - values[1]) / (values[0] @ x - values[1]).norm()  # noqa: E731
    assert (gradient(found) + values[2] * found / found.norm()).norm() < EXACT
    inputs = [value.clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(lambda *v: layer(*v)[0], inputs, atol=1e-7)
    assert torch.autograd.gradgradcheck(lambda g, s: layer(values[0], g, s)[0], inputs[1:], atol=1e-6)


def correlation(n: int) -> Any:
    S, C = cp.Variable((n, n), symmetric=True), cp.Parameter((n, n))
    return il.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(S - C)), [S >> 0, cp.diag(S) == 1]), [C], [S])


def test_the_nearest_correlation_matrix_satisfies_its_conditions_and_finite_differences() -> None:
    layer, n = correlation(4), 4
    C = randn(n, n, seed=5)
    C = (C + C.T) / 2
    (S,) = layer(C)
    assert (S.diagonal() - 1).abs().max() < EXACT and torch.linalg.eigvalsh(S)[0] > -EXACT
    # S - C = diag(y) + Z with Z >= 0 and Z S = 0 (Higham 2002): y is what makes the rows of (S - C - diag(y)) S zero
    y = ((S - C) @ S).diagonal() / S.diagonal()
    Z = S - C - torch.diag(y)
    assert (Z @ S).abs().max() < 1e-10 and torch.linalg.eigvalsh(Z)[0] > -1e-10
    assert torch.autograd.gradcheck(lambda C: layer(C)[0], (C.clone().requires_grad_(),), atol=1e-6)


def test_the_largest_eigenvalue_has_its_gradient_and_hessian() -> None:
    M, t = cp.Parameter((3, 3)), cp.Variable()
    layer = il.from_cvxpy(cp.Problem(cp.Minimize(t), [t * np.eye(3) - (M + M.T) / 2 >> 0]), [M], [t])
    value = randn(3, 3, seed=6)
    closed = lambda M: torch.linalg.eigvalsh((M + M.T) / 2)[-1]  # noqa: E731
    found = lambda M: layer(M)[0]  # noqa: E731
    assert relative_error(found(value), closed(value)) < EXACT
    assert relative_error(torch.func.grad(found)(value), torch.func.grad(closed)(value)) < EXACT
    assert relative_error(torch.func.hessian(found)(value), torch.func.hessian(closed)(value)) < 1e-10  # gaps of 1


def test_equal_eigenvalues_do_no_harm() -> None:
    """diag(1, 1, -1, -1) in another basis onto the semidefinite matrices; off the kinks the projection is smooth."""
    basis = orthogonal(4, seed=7)
    C = basis @ torch.diag(torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=F64)) @ basis.T
    S, of = cp.Variable((4, 4), symmetric=True), cp.Parameter((4, 4))
    layer = il.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(S - of)), [S >> 0]), [of], [S])
    C = ((C + C.T) / 2).requires_grad_()
    (found,) = layer(C)
    assert relative_error(found, basis[:, :2] @ basis[:, :2].T) < EXACT
    weights = randn(4, 4, seed=8)
    (gradient,) = torch.autograd.grad((weights * found).sum(), C)

    def projected(C: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh((C + C.T) / 2)
        return (weights * ((vectors * values.clamp(min=0)) @ vectors.T)).sum()

    assert relative_error(gradient, central_differences(projected, C, 1e-5)) < 1e-8  # 1e-10 and rounding over the step


def semidefinite(values: Tensor) -> tuple[Any, Tensor]:
    """The nearest semidefinite matrix as a layer, and a matrix with these eigenvalues."""
    S, of = cp.Variable((4, 4), symmetric=True), cp.Parameter((4, 4))
    layer = il.from_cvxpy(cp.Problem(cp.Minimize(cp.sum_squares(S - of)), [S >> 0]), [of], [S])
    basis = orthogonal(4, seed=7)
    C = (basis * values) @ basis.T
    return layer, (C + C.T) / 2


@pytest.mark.parametrize("small", [1e-4, 1e-6, 1e-7, 3e-8])
def test_a_small_eigenvalue_does_not_multiply_rounding(small: float) -> None:
    """Second derivatives against those of the eigenvectors themselves, which are far enough from each other."""
    layer, C = semidefinite(torch.tensor([2.0, 1.0, small, -0.5], dtype=F64))
    weights, direction = randn(4, 4, seed=8), randn(4, 4, seed=9)
    direction = direction + direction.T

    def closed(C: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh((C + C.T) / 2)
        return (vectors * values.clamp(min=0)) @ vectors.T

    def second(nearest: Callable[[Tensor], Tensor]) -> Tensor:
        slope = torch.func.grad(lambda C: (weights * nearest(C)).sum())
        return torch.func.grad(lambda C: (slope(C) * direction).sum())(C)

    # rounding over the small eigenvalue
    assert relative_error(second(lambda C: layer(C)[0]), second(closed)) < 1e-7


def test_at_a_kink_the_derivative_of_a_matrix_is_that_of_the_inside() -> None:
    """A covariance of fewer samples than variables; along what stays semidefinite the derivative is the identity."""
    layer, C = semidefinite(torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=F64))
    C.requires_grad_()
    with pytest.warns(il.KinkWarning, match="sits at a kink"):
        (found,) = layer(C)
    weights, samples = randn(4, 4, seed=10), randn(4, 4, seed=11)
    (gradient,) = torch.autograd.grad((weights * found).sum(), C)
    inside = samples.T @ samples
    assert (gradient * inside).sum() == pytest.approx((weights * inside).sum().item(), rel=1e-9)


def test_derivatives_of_the_projection_are_right_to_third_order() -> None:
    """Against finite differences of the derivative of one order less."""
    cones = Cones(2, (3, 4), (3,))
    w, direction, weights = randn(15, seed=9), randn(15, seed=10), randn(15, seed=11)
    along = lambda s: (weights * cones.project(w + s * direction)).sum()  # noqa: E731
    derivatives = [along]
    for _ in range(3):
        derivatives.append(torch.func.grad(derivatives[-1]))
    zero, step = torch.tensor(0.0, dtype=F64), 1e-5
    for lower, upper in itertools.pairwise(derivatives):
        expected = (lower(zero + step) - lower(zero - step)) / (2 * step)
        assert abs(upper(zero) - expected) < 1e-6 * max(1.0, abs(expected))  # 1e-10 of two orders more, which are large
    nearest = cones.project(w)
    for point in (nearest, nearest - w):  # both in the cone, which is its own dual
        lines, orders, matrices, _ = cones.split(point)
        assert lines.min() >= 0 and all(part[0] - part[1:].norm() > -EXACT for part in orders)
        assert all(torch.linalg.eigvalsh(matrix)[0] > -EXACT for matrix in matrices)
    assert abs(nearest @ (nearest - w)) < EXACT  # Moreau


def test_infeasible_and_unbounded_programs_are_told_or_masked_lane_by_lane() -> None:
    x, r, c = cp.Variable(2), cp.Parameter(), cp.Parameter(2)
    problem = cp.Problem(cp.Minimize(c @ x), [cp.norm(x - 3) <= r, x[0] <= 2.5])
    values = torch.tensor([1.0, 0.1], dtype=F64, requires_grad=True), torch.ones(2, dtype=F64)
    with pytest.raises(il.InfeasibleError, match=r"in lane 1 of \(2,\)"):
        il.from_cvxpy(problem, [r, c], [x])(*values)
    (found,) = il.from_cvxpy(problem, [r, c], [x], on_failure="mask")(*values)
    assert relative_error(found[0], torch.full((2,), 3 - 0.5**0.5, dtype=F64)) < EXACT and found[1].isnan().all()
    (gradient,) = torch.autograd.grad(found[0].sum(), values[0])
    assert relative_error(gradient, torch.tensor([-(2**0.5), 0.0], dtype=F64)) < EXACT
    unbounded = cp.Problem(cp.Minimize(c @ x), [cp.norm(x) <= x[0] + 1])
    with pytest.raises(il.UnboundedError):
        il.from_cvxpy(unbounded, [c], [x])(torch.tensor([-1.0, 0.0], dtype=F64))


@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e6, 1e9])
def test_units_of_constraints_and_objective_do_not_matter(size: float) -> None:
    """Clarabel calls the ball of radius 1e6 empty, and CVXPY with it."""
    x, q, r = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    far = torch.tensor([3.0, 1.0, 0.5], dtype=F64)
    for cost, unit in ((1.0, size), (size, 1.0)):
        problem = cp.Problem(cp.Minimize(cost * cp.sum_squares(x - q)), [cp.norm(x) <= r, x <= 1e10 * unit])
        layer = il.from_cvxpy(problem, [q, r], [x])
        radius = torch.tensor(unit, dtype=F64)
        (found,) = layer(unit * far, radius)
        assert relative_error(found, far * (radius / far.norm())) < EXACT
        slope = torch.func.jacrev(layer)(unit * far, radius)[0]
        assert relative_error(slope, torch.func.jacrev(lambda q: q / q.norm())(far)) < EXACT


def test_a_kink_is_told() -> None:
    """At |q| = r the ball holds q with a multiplier of zero."""
    q = torch.tensor([0.6, 0.8, 0.0], dtype=F64, requires_grad=True)
    one = torch.tensor(1.0, dtype=F64)
    with pytest.warns(il.KinkWarning, match="sits at a kink"):
        ball()(q, one)
    ball()(q.detach(), one)  # nothing is differentiated
    x, p, r = cp.Variable(3), cp.Parameter(3), cp.Parameter(nonneg=True)
    problem = cp.Problem(cp.Minimize(cp.sum_squares(x - p)), [cp.norm(x) <= r])
    with pytest.raises(il.KinkError):
        il.from_cvxpy(problem, [p, r], [x], on_failure="raise")(q, one)


def test_float32_has_its_dtype() -> None:
    (found,) = ball()(Q.float(), R.float())
    assert found.dtype == torch.float32 and relative_error(found, (Q / 2).float()) < 1e-6


def test_derivatives_of_float32_are_those_of_float64() -> None:
    """Beside a small eigenvalue, of which the rounding of the data is 1e-4."""
    layer, C = semidefinite(torch.tensor([2.0, 1.0, 1e-3, -0.5], dtype=F64))
    weights, direction = randn(4, 4, seed=12), randn(4, 4, seed=13)
    derivatives = []
    for dtype in (F64, torch.float32):
        given = C.to(dtype).requires_grad_()
        (slope,) = torch.autograd.grad((weights.to(dtype) * layer(given)[0]).sum(), given, create_graph=True)
        (second,) = torch.autograd.grad((slope * direction.to(dtype)).sum(), given)
        derivatives.append(torch.stack([slope.detach(), second]).double())
    assert relative_error(derivatives[1], derivatives[0]) < 1e-3


@pytest.mark.parametrize("seed", range(6))
def test_in_float32_a_rank_that_rounding_hides_is_a_kink(seed: int) -> None:
    samples = randn(2, 4, seed=20 + seed).float()
    C = (samples.T @ samples).requires_grad_()
    layer, _ = semidefinite(torch.ones(4, dtype=F64))
    with pytest.warns(il.KinkWarning, match="sits at a kink"):
        (found,) = layer(C)
    (gradient,) = torch.autograd.grad(found.sum(), C)
    assert gradient.isfinite().all() and gradient.norm() < 4.1  # a projection makes nothing longer


def test_settings_of_quadratic_programs_are_refused() -> None:
    x = cp.Variable(2)
    with pytest.raises(TypeError, match=r"settings \['at_kink'\] are those of quadratic programs"):
        il.from_cvxpy(cp.Problem(cp.Minimize(cp.norm(x - 1))), [], [x], at_kink="active")
