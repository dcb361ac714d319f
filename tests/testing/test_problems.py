"""The problems of il.testing: exact solutions, valid constants, and references that agree with independent ones."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import F64, central_differences, relative_error
from torch import Tensor

import implicitlayer as il
from implicitlayer import testing

FAMILIES: dict[str, Callable[..., Any]] = {
    "quadratic": testing.quadratic_problem,
    "smooth convex": testing.smooth_convex_problem,
    "nonconvex": testing.nonconvex_problem,
    "root": testing.root_problem,
}
SCALES = [(F64, k) for k in (-200, -12, 12, 200)] + [(torch.float32, k) for k in (-25, 25)]


every_family = pytest.mark.parametrize("make", FAMILIES.values(), ids=list(FAMILIES))


def layer_of(problem: Any, **settings: Any) -> Callable[..., Tensor]:
    if isinstance(problem, testing.RootProblem):
        return il.root(problem.residual, problem.solver, linear_solver=il.Gmres(rtol=1e-12), **settings)
    return il.argmin(problem.objective, problem.solver, linear_solver=il.ConjugateGradient(rtol=1e-12), **settings)


@every_family
@given(n=st.integers(1, 6), log10_cond=st.integers(0, 3), seed=st.integers(0, 999))
def test_the_solution_is_stationary_to_rounding(make: Any, n: int, log10_cond: int, seed: int) -> None:
    problem = make(n, log10_cond=log10_cond, seed=seed)
    x = problem.solution(*problem.theta)
    assert x.dtype == F64 and not x.requires_grad and x.shape == problem.init.shape == (n,)
    # terms of size at most 10, some n of them, each rounded to 1e-16; a backward stable solve adds n eps ||A|| ||x||
    assert float(problem.stationarity(x, *problem.theta).detach().norm()) <= 1e-14 * (10 + n * float(x.norm()))
    assert torch.equal(problem.solver(problem.function, problem.init, *problem.theta), x)
    assert float((problem.init - x).norm()) > 1e-3 * float(x.norm())  # init is not the answer
    assert all(t.is_leaf and t.requires_grad for t in problem.theta)


@every_family
@settings(max_examples=10)
@given(n=st.integers(1, 4), log10_cond=st.integers(0, 1), seed=st.integers(0, 99))
def test_the_dense_gradient_matches_differences_of_the_solution(make: Any, n: int, log10_cond: int, seed: int) -> None:
    problem = make(n, log10_cond=log10_cond, seed=seed)
    v = testing.normal_tensor((n,), seed=seed + 1)
    gradients = problem.dense_gradient(v)
    size = max(float(g.norm()) for g in gradients)
    fixed = [t.detach() for t in problem.theta]
    for i, gradient in enumerate(gradients):

        def response(t: Tensor, i: int = i) -> Tensor:
            return v @ problem.solution(*fixed[:i], t, *fixed[i + 1 :])

        # h = 1e-5: rounding 1e-15 cond / h = 1e-9, truncation h^2 x''' with x''' of the order cond^3 <= 1e3 (1e-7)
        expected = central_differences(response, fixed[i], 1e-5)
        assert gradient.dtype == F64 and gradient.shape == fixed[i].shape
        assert float((gradient - expected).norm()) <= 1e-6 * max(size, float(v.norm()))


@given(n=st.integers(1, 6), log10_cond=st.integers(0, 4), seed=st.integers(0, 999))
def test_the_dense_gradient_of_a_quadratic_is_its_closed_form(n: int, log10_cond: int, seed: int) -> None:
    problem, v = testing.quadratic_problem(n, log10_cond=log10_cond, seed=seed), testing.normal_tensor((n,), seed=1)
    matrix, b = (t.detach() for t in problem.theta)
    inverse = torch.linalg.inv(matrix)
    x, u = inverse @ b, inverse @ v
    for_matrix, for_b = problem.dense_gradient(v)
    # an inverse and a solve agree to cond * eps each, up to n times that
    assert relative_error(for_b, u) <= 1e-13 * 10**log10_cond
    assert relative_error(for_matrix, -(torch.outer(u, x) + torch.outer(x, u)) / 2) <= 1e-13 * 10**log10_cond


@every_family
@settings(max_examples=10)
@given(n=st.integers(1, 6), log10_cond=st.integers(0, 2), seed=st.integers(0, 999))
def test_layers_have_the_dense_gradient(make: Any, n: int, log10_cond: int, seed: int) -> None:
    problem = make(n, log10_cond=log10_cond, seed=seed)
    v = testing.normal_tensor((n,), seed=seed + 2)
    got = torch.autograd.grad(layer_of(problem)(problem.init, *problem.theta), problem.theta, v)
    right = problem.dense_gradient(v)
    size = max(float(r.norm()) for r in right)
    for g, r in zip(got, right, strict=True):  # rtol 1e-12 (up to ten times that) times the condition, 100 at most * 4
        assert float((g - r).norm()) <= 1e-8 * size


@pytest.mark.parametrize(
    "make", [testing.quadratic_problem, testing.smooth_convex_problem], ids=["quadratic", "smooth"]
)
@given(n=st.integers(1, 6), log10_cond=st.integers(0, 3), log10_scale=st.integers(-9, 9), seed=st.integers(0, 999))
def test_mu_and_beta_bound_the_curvature_and_rho_its_change(
    make: Any, n: int, log10_cond: int, log10_scale: int, seed: int
) -> None:
    problem = make(n, log10_cond=log10_cond, log10_scale=log10_scale, seed=seed)
    theta = [t.detach() for t in problem.theta]

    def hessian(x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        gradient = problem.stationarity(x, *theta)
        return torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in gradient])

    x, y = (testing.normal_tensor((n,), seed=seed + i) for i in (3, 4))
    values = torch.linalg.eigvalsh(hessian(x))
    noise = 1e-13 * problem.beta
    assert problem.mu - noise <= float(values[0]) and float(values[-1]) <= problem.beta + noise
    change = float(torch.linalg.matrix_norm(hessian(x) - hessian(y), 2))
    assert change <= problem.rho * float((x - y).norm()) + noise
    if make is testing.quadratic_problem:
        assert float(values[0]) == pytest.approx(problem.mu, rel=1e-9)
        assert float(values[-1]) == pytest.approx(problem.beta, rel=1e-9)
    else:
        assert problem.beta / problem.mu == pytest.approx(2 * 10**log10_cond)


def test_the_bounds_of_a_smooth_convex_problem_are_not_idle() -> None:
    """Each bound is reached within a factor of 30 somewhere: it would be useless, though valid, if it were far off."""
    problem = testing.smooth_convex_problem(1, log10_cond=1, seed=3)
    theta = [t.detach() for t in problem.theta]
    points = torch.linspace(-8, 8, 400, dtype=F64)
    slopes = [problem.stationarity(p[None].requires_grad_(), *theta) for p in points]
    curvature = torch.stack(slopes).detach().flatten().diff() / points.diff()
    assert float(curvature.max()) > problem.beta / 30 and float(curvature.min()) < 30 * problem.mu
    assert float((curvature.diff() / points.diff()[1:]).abs().max()) > problem.rho / 30


@given(n=st.integers(1, 6), log10_cond=st.integers(0, 3), seed=st.integers(0, 999))
def test_a_nonconvex_problem_has_its_minimum_and_another_stationary_point(n: int, log10_cond: int, seed: int) -> None:
    problem = testing.nonconvex_problem(n, log10_cond=log10_cond, seed=seed)
    assert problem.mu is None and problem.beta is None and problem.rho is None
    values = torch.linalg.eigvalsh(problem.dense_jacobian())
    # M is orthogonal, so the eigenvalues are depth_i (3 y_i^2 - 1) with depths in [10^-cond, 1] and 0.86 < 3 y^2 - 1
    assert float(values[0]) >= 0.86 * 10.0**-log10_cond * (1 - 1e-9)
    saddle = problem.saddle.clone().requires_grad_()
    gradient = problem.stationarity(saddle, *problem.theta)
    assert float(gradient.detach().norm()) <= 1e-13
    hessian = torch.stack([torch.autograd.grad(entry, saddle, retain_graph=True)[0] for entry in gradient])
    assert (torch.linalg.eigvalsh(hessian) < 0).sum() == 1
    f = problem.objective
    x = problem.solution(*problem.theta)
    assert float(f(x, *problem.theta).detach()) < float(f(problem.init, *problem.theta).detach())


@given(n=st.integers(2, 6), seed=st.integers(0, 999))
def test_the_jacobian_of_a_root_problem_is_neither_symmetric_nor_near_singular(n: int, seed: int) -> None:
    jacobian = testing.root_problem(n, log10_cond=2, seed=seed).dense_jacobian()
    assert float((jacobian - jacobian.T).norm()) > 1e-3
    assert float(torch.linalg.svdvals(jacobian)[-1]) >= 0.5e-2 * (1 - 1e-9)


@pytest.mark.parametrize(("dtype", "log10_scale"), SCALES)
@every_family
def test_huge_and_tiny_scales_build_without_overflow(make: Any, dtype: torch.dtype, log10_scale: int) -> None:
    plain, scaled = (make(4, log10_cond=2, log10_scale=k, seed=5, dtype=dtype) for k in (0, log10_scale))
    v = testing.normal_tensor((4,), seed=6)
    assert all(bool(t.isfinite().all()) and t.dtype == dtype for t in (*scaled.theta, scaled.init))
    x = scaled.solver(scaled.function, scaled.init, *scaled.theta)
    value = scaled.function(scaled.init + 1, *scaled.theta).detach()
    assert x.dtype == dtype and bool(value.isfinite().all()) and bool((value != 0).all())
    gradients = scaled.dense_gradient(v)
    if (
        make is testing.quadratic_problem
    ):  # its thetas carry the scale: x = A^-1 b and the gradients are of size 1/scale
        unit, tolerance = 10.0**-log10_scale, 100 * 20 * torch.finfo(dtype).eps  # condition, rounding of the entries
    else:
        unit, tolerance = 1.0, 1e-9
    for g, r in zip(gradients, plain.dense_gradient(v), strict=True):
        assert relative_error(g / unit, r) <= tolerance


@every_family
def test_float32_problems_are_solved_for_the_entries_that_they_hold(make: Any) -> None:
    problem = make(5, log10_cond=2, seed=7, dtype=torch.float32)
    x = problem.solution(*problem.theta)
    theta = [t.detach().double() for t in problem.theta]
    assert x.dtype == F64 and float(problem.stationarity(x, *theta).detach().norm()) <= 1e-13
    assert problem.solver(problem.function, problem.init, *problem.theta).dtype == torch.float32


@every_family
def test_a_problem_prints_the_call_that_makes_it_again(make: Any) -> None:
    problem = make(3, log10_cond=1, log10_scale=-2, seed=9, dtype=torch.float32)
    again = eval(repr(problem), {**vars(testing), "torch": torch})
    assert repr(problem).startswith(f"{make.__name__}(3, log10_cond=1, log10_scale=-2, seed=9")
    assert all(torch.equal(a, b) for a, b in zip(problem.theta, again.theta, strict=True))


def test_an_unread_theta_has_a_zero_gradient() -> None:
    problem = testing.ArgminProblem(
        lambda x, t, unread: ((x - t) ** 2).sum(),
        torch.zeros(2, dtype=F64),
        (torch.ones(2, dtype=F64, requires_grad=True), torch.ones(3, dtype=F64, requires_grad=True)),
        lambda t, unread: t.detach().clone(),
        "tracking",
    )
    got = problem.dense_gradient(torch.ones(2))
    assert torch.allclose(got[0], torch.ones(2, dtype=F64)) and torch.equal(got[1], torch.zeros(3, dtype=F64))


# ----------------------------------------------------------------------------------------------------------- matrices

MATRICES: dict[str, Callable[..., Tensor]] = {
    "spd": testing.spd_matrix,
    "indefinite": testing.indefinite_matrix,
    "general": testing.general_matrix,
}


@pytest.mark.parametrize("kind", MATRICES)
@given(n=st.integers(1, 12), log10_cond=st.integers(0, 6), log10_scale=st.integers(-9, 9), seed=st.integers(0, 999))
def test_matrices_have_the_spectrum_that_they_claim(
    kind: str, n: int, log10_cond: int, log10_scale: int, seed: int
) -> None:
    matrix = MATRICES[kind](n, log10_cond=log10_cond, log10_scale=log10_scale, seed=seed)
    values = torch.linalg.svdvals(matrix) / 10.0**log10_scale
    assert float(values[0]) == pytest.approx(1, rel=1e-12)
    # eps n ||A|| absolute, so relative to the smallest value 1e-15 * 12 * 1e6
    assert float(values[-1]) == pytest.approx(10.0**-log10_cond if n > 1 else 1, rel=2e-8)
    if kind == "general":
        assert n == 1 or not torch.equal(matrix, matrix.T)
        return
    assert torch.equal(matrix, matrix.T)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert (float(eigenvalues[0]) > 0) == (kind == "spd")
    assert n == 1 or float(eigenvalues[-1]) > 0


@pytest.mark.parametrize("kind", ["positive semidefinite", "symmetric", "general"])
@given(n=st.integers(1, 10), data=st.data(), seed=st.integers(0, 999))
def test_singular_matrices_have_the_rank_that_they_claim(kind: str, n: int, data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(0, n - 1))
    matrix = testing.singular_matrix(n, rank, kind=kind, seed=seed)
    values = torch.linalg.svdvals(matrix)
    assert all(v >= 0.1 * (1 - 1e-9) for v in values[:rank].tolist())
    assert all(v <= 1e-14 for v in values[rank:].tolist())
    assert kind == "general" or torch.equal(matrix, matrix.T)
    if kind == "positive semidefinite":
        assert float(torch.linalg.eigvalsh(matrix)[0]) >= -1e-14


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize(("dtype", "log10_scale"), SCALES)
def test_scaled_matrices_are_finite_and_their_smallest_values_survive(
    kind: str, dtype: torch.dtype, log10_scale: int
) -> None:
    matrix = MATRICES[kind](6, log10_cond=6, log10_scale=log10_scale, dtype=dtype)
    assert matrix.dtype == dtype and bool(matrix.isfinite().all())
    values = torch.linalg.svdvals(matrix.double() / 10.0**log10_scale)
    # rounding of the entries to the dtype moves singular values by n eps at most: 7e-7 of 1e-6 in float32
    assert float(values[-1]) == pytest.approx(1e-6, abs=6 * torch.finfo(dtype).eps)


BAD_MATRICES: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, r"n=0 must be an int of at least 1\. It counts the unknowns"),
    ({"n": 2.0}, r"n=2\.0 must be an int of at least 1"),
    ({"n": True}, r"n=True must be an int"),
    ({"n": 2, "seed": -1}, r"seed=-1 must be an int of at least 0\. Any int"),
    ({"n": 2, "dtype": torch.float16}, r"dtype=torch\.float16 must be torch\.float32 or torch\.float64\. Cast"),
    ({"n": 2, "log10_cond": -1}, r"log10_cond=-1 must be a number from 0 to 20\. It is the exponent"),
    ({"n": 2, "log10_cond": math.nan}, r"log10_cond=nan must be a number"),
    ({"n": 2, "log10_cond": "3"}, r"log10_cond='3' must be a number"),
    ({"n": 2, "log10_scale": 201}, r"log10_scale=201 must be a number from -200 to 200\. It is the exponent"),
    ({"n": 2, "log10_scale": -26, "dtype": torch.float32}, r"log10_scale=-26 must be a number from -25 to 25.*float32"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_MATRICES, ids=[str(a) for a, _ in BAD_MATRICES])
@pytest.mark.parametrize("make", [*MATRICES.values(), *FAMILIES.values()])
def test_arguments_outside_their_range_are_refused(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_ranks_and_kinds_of_singular_matrices_are_checked() -> None:
    with pytest.raises(ValueError, match=r"rank=3 must be below n=3\. For a nonsingular matrix"):
        testing.singular_matrix(3, 3)
    with pytest.raises(ValueError, match=r"rank=-1 must be an int of at least 0"):
        testing.singular_matrix(3, -1)
    with pytest.raises(
        ValueError, match=r"kind='psd' must be one of \('positive semidefinite', 'symmetric', 'general'\)"
    ):
        testing.singular_matrix(3, 1, kind="psd")


def test_the_range_of_a_general_singular_matrix_is_not_that_of_its_transpose() -> None:
    matrix = testing.singular_matrix(5, 4, kind="general", seed=2)
    left, _, right = torch.linalg.svd(matrix)
    assert abs(float(left[:, -1] @ right[-1])) < 0.99


def test_normal_tensors_have_the_shape_asked_for_and_refuse_bad_seeds() -> None:
    assert testing.normal_tensor(()).shape == () and testing.normal_tensor((2, 0)).shape == (2, 0)
    sample = testing.normal_tensor((10_000,), seed=1)
    assert abs(float(sample.mean())) < 0.05 and abs(float(sample.std()) - 1) < 0.05  # five standard errors of 0.01
    with pytest.raises(ValueError, match=r"seed=-1 must be an int of at least 0"):
        testing.normal_tensor((2,), seed=-1)
    with pytest.raises(ValueError, match=r"dtype=torch\.int64 must be"):
        testing.normal_tensor((2,), dtype=torch.int64)
