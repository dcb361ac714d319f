"""il.linear_solve: the derivative of a solve is a solve, whatever the operator is given as."""

# All systems have condition below 10 (symmetric ones I + S S' / n, others 2 I + W with ||W|| = 0.9) and are solved at
# rtol 1e-13: first derivatives agree with those of torch.linalg.solve to 1e-12, second ones to 1e-11.

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import implicitlayer as il

N = 3
CG, GMRES = il.ConjugateGradient(rtol=1e-13), il.Gmres(rtol=1e-13)


def matrix_of(s: Tensor, symmetric: bool) -> Tensor:
    """A smooth function of s, so that every change of s keeps the matrix symmetric where it has to be."""
    eye = torch.eye(N, dtype=F64)
    return eye + s @ s.mT / N if symmetric else 2 * eye + 0.2 * torch.tanh(s)


def explicit(s: Tensor, b: Tensor, symmetric: bool) -> Tensor:
    return torch.linalg.solve(matrix_of(s, symmetric), b)


def as_matrix(s: Tensor, b: Tensor, symmetric: bool) -> Tensor:
    solver = CG if symmetric else GMRES
    solution: Tensor = il.linear_solve(matrix_of(s, symmetric), b, solver, symmetric=symmetric)
    return solution


def as_function(s: Tensor, b: Tensor, symmetric: bool) -> Tensor:
    solver = CG if symmetric else GMRES
    solution: Tensor = il.linear_solve(lambda u, s: matrix_of(s, symmetric) @ u, b, solver, s, symmetric=symmetric)
    return solution


def as_closure(s: Tensor, b: Tensor, symmetric: bool) -> Tensor:
    solver = CG if symmetric else GMRES
    solution: Tensor = il.linear_solve(lambda u: matrix_of(s, symmetric) @ u, b, solver, symmetric=symmetric)
    return solution


def as_hessian(s: Tensor, b: Tensor, symmetric: bool) -> Tensor:
    """A is the Hessian of x'Ax/2 + sum x^4 at 0."""
    operator = il.hessian_operator(lambda x, s: 0.5 * x @ matrix_of(s, True) @ x + (x**4).sum(), torch.zeros_like(b), s)
    solution: Tensor = il.linear_solve(operator, b, CG)
    return solution


Solve = Callable[[Tensor, Tensor, bool], Tensor]
CASES: dict[str, tuple[Solve, bool]] = {
    "matrix, symmetric": (as_matrix, True),
    "function, symmetric": (as_function, True),
    "closure, symmetric": (as_closure, True),
    "hessian operator": (as_hessian, True),
    "matrix": (as_matrix, False),
    "function": (as_function, False),
    "closure": (as_closure, False),
}
cases = pytest.mark.parametrize(("solve", "symmetric"), CASES.values(), ids=CASES)


def inputs(*lanes: int) -> tuple[Tensor, Tensor]:
    return randn(*lanes, N, N, seed=1), randn(*lanes, N, seed=2)


def compare(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    got, expected = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape and relative_error(g, e) < tolerance


@cases
def test_values_and_both_modes_are_those_of_the_dense_solve(solve: Solve, symmetric: bool) -> None:
    s, b = inputs()
    compare(solve(s, b, symmetric), explicit(s, b, symmetric))
    for transform in (jacrev, jacfwd):
        compare(transform(solve, argnums=(0, 1))(s, b, symmetric), transform(explicit, argnums=(0, 1))(s, b, symmetric))


@cases
def test_gradcheck_holds_in_both_modes_and_orders(solve: Solve, symmetric: bool) -> None:
    s, b = (t.requires_grad_() for t in inputs())
    run = lambda s, b: solve(s, b, symmetric)  # noqa: E731
    # eps = 1e-6 and solves good to 1e-12: differences are good to 1e-6 / 10 (rtol 1e-13 of numbers below 1)
    assert torch.autograd.gradcheck(run, (s, b), atol=1e-6, rtol=0, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(run, (s, b), atol=1e-6, rtol=0, check_fwd_over_rev=True)


@cases
def test_second_derivatives_and_their_lanes_are_those_of_the_dense_solve(solve: Solve, symmetric: bool) -> None:
    def scalar(function: Solve) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda s, b: (function(s, b, symmetric) ** 3).sum()

    s, b = inputs(2)
    # lane by lane: torch's own vmap(hessian) of torch.linalg.solve is wrong by orders of magnitude (torch 2.13)
    expected = torch.stack([hessian(scalar(explicit))(*lane) for lane in zip(s, b, strict=True)])
    compare(vmap(hessian(scalar(solve)))(s, b), expected, 1e-11)
    compare(torch.stack([hessian(scalar(solve))(*lane) for lane in zip(s, b, strict=True)]), expected, 1e-11)
    outer = lambda f: lambda s: (vmap(grad(scalar(f)))(s, b) ** 2).sum()  # noqa: E731
    looped = lambda s: sum((grad(scalar(explicit))(*lane) ** 2).sum() for lane in zip(s, b, strict=True))  # noqa: E731
    compare(grad(outer(solve))(s), grad(looped)(s), 1e-11)


@cases
@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0), (2, 1), (-1, -1)], ids=str)
def test_vmap_over_any_arguments_and_dimensions_equals_a_loop(
    in_dims: tuple[int | None, int | None], solve: Solve, symmetric: bool
) -> None:
    s, b = inputs(3)
    lanes = [(s[0] if in_dims[0] is None else s[i], b[0] if in_dims[1] is None else b[i]) for i in range(3)]
    args = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((s, b), in_dims, strict=True)]
    run = lambda s, b: solve(s, b, symmetric)  # noqa: E731
    compare(vmap(run, in_dims=in_dims)(*args), torch.stack([explicit(*lane, symmetric) for lane in lanes]))
    tangent = randn(N, seed=3)
    push = lambda f: lambda s, b: jvp(lambda b: f(s, b, symmetric), (b,), (tangent,))[1]  # noqa: E731
    compare(vmap(push(solve), in_dims=in_dims)(*args), torch.stack([push(explicit)(*lane) for lane in lanes]))
    pull = lambda f: grad(lambda s, b: (f(s, b, symmetric) ** 2).sum())  # noqa: E731
    compare(vmap(pull(solve), in_dims=in_dims)(*args), torch.stack([pull(explicit)(*lane) for lane in lanes]))


def test_nested_lanes_equal_the_dense_solve() -> None:
    s, b = inputs(2, 3)
    got = vmap(vmap(lambda s, b: as_matrix(s, b, False)))(s, b)
    compare(got, torch.stack([torch.stack([explicit(s[i, j], b[i, j], False) for j in range(3)]) for i in range(2)]))


def test_the_transpose_is_solved_for_only_where_the_operator_is_not_symmetric() -> None:
    """theta_bar of b is A^-T v; told that A is symmetric, a solve uses A again."""
    matrix, v = matrix_of(randn(N, N, seed=1), False), randn(N, seed=3)
    b = randn(N, seed=2).requires_grad_()
    for symmetric, right in ((False, matrix.T), (True, matrix)):
        u = il.linear_solve(matrix, b, GMRES, symmetric=symmetric)
        compare(torch.autograd.grad(u, b, v)[0], torch.linalg.solve(right, v))
    assert relative_error(torch.linalg.solve(matrix, v), torch.linalg.solve(matrix.T, v)) > 1e-2


SYMMETRIC_ONLY = [CG, il.Minres(rtol=1e-13), il.WarmStart(CG)]


@pytest.mark.parametrize("solver", SYMMETRIC_ONLY, ids=lambda solver: type(solver).__name__)
def test_a_solver_for_symmetric_systems_has_the_gradients_of_any_matrix_that_it_solves_with(solver: Any) -> None:
    """All entries of a symmetric matrix are free in a derivative, so that the second one sees matrices that are not."""
    matrix, b = matrix_of(randn(N, N, seed=1), True), randn(N, seed=2)
    cube = lambda run: lambda a, b: (run(a, b) ** 3).sum()  # noqa: E731
    ours = cube(lambda a, b: il.linear_solve(a, b, solver))
    dense = cube(torch.linalg.solve)
    compare(hessian(ours, argnums=(0, 1))(matrix, b), hessian(dense, argnums=(0, 1))(matrix, b), 1e-11)
    # so far from symmetric that A in place of A' is seen, yet these solvers end with a small residual
    skew = matrix + 0.1 * torch.ones(N, N, dtype=F64).triu(1)
    rough = il.ConjugateGradient(rtol=1e-5)
    expected = grad(dense, argnums=1)(skew, b)
    got = [
        grad(cube(lambda a, b, s=s: il.linear_solve(a, b, rough, symmetric=s)), argnums=1)(skew, b)
        for s in (None, True)
    ]
    # 3 u^2 and the solve with it: each to condition * rtol < 1e-4, the first one three times
    assert relative_error(got[0], expected) < 5e-4 and relative_error(got[1], expected) > 1e-2


@pytest.mark.parametrize("solver", SYMMETRIC_ONLY, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("wanted", ["operator", "right-hand side", "lanes", "one entry"])
def test_a_function_that_is_not_symmetric_is_an_error_in_reverse_mode(wanted: str, solver: Any) -> None:
    eye, b = torch.eye(N, dtype=F64), randn(N, seed=2)
    skew = torch.zeros(N, N, dtype=F64)
    skew[1, 2] = 1e-6  # the third unknown's column only: a cotangent of the first does not meet it at once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", il.ConvergenceWarning)  # of a system that they are not for

        def run(a: Tensor, b: Tensor) -> Tensor:
            solution: Tensor = il.linear_solve(lambda u: a @ u, b, solver)
            return solution[0] if wanted == "one entry" else solution.sum()

        if wanted == "lanes":
            differentiated, matrices = vmap(grad(run), in_dims=(0, None)), torch.stack([eye, eye + skew])
        else:
            differentiated, matrices = grad(run, argnums=int(wanted == "right-hand side")), eye + skew
        with pytest.raises(ValueError, match=r"not symmetric.*il.Gmres\(\), il.Bicgstab\(\) or il.Dense\(\)") as error:
            differentiated(matrices, b)
        assert ("in lane 1 of (2,)" in str(error.value)) == (wanted == "lanes")
        compare(run(eye + skew, b), run(eye, b), 1e-5)  # the solution is right, and so is forward mode
        pushed = jvp(lambda a: run(a, b), (eye + skew,), (skew,))[1]
        compare(pushed, -(torch.linalg.solve(eye + skew, skew @ b)).sum() * (wanted != "one entry"), 1e-5)
        assert grad(run)(eye + 1e-4 * skew, b).isfinite().all()  # 1e-10, as rounding leaves it


@pytest.mark.parametrize("solver", [il.ConjugateGradient(rtol=1e-13), il.Minres(rtol=1e-13)], ids=["cg", "minres"])
def test_a_function_that_is_symmetric_at_these_tensors_alone_has_the_second_derivatives_of_any(solver: Any) -> None:
    """Free entries of a symmetric matrix: what changes them need not be symmetric."""
    A, b, w = randn(4, 4, seed=50), randn(4, seed=51), randn(4, seed=52)
    A = A @ A.T + torch.eye(4, dtype=F64)
    by_function = hessian(lambda A: w @ il.linear_solve(lambda u, A: A @ u, b, solver, A))(A)
    compare(by_function, hessian(lambda A: w @ torch.linalg.solve(A, b))(A), 1e-10)
    twice = jacrev(jacrev(lambda A: w @ il.linear_solve(lambda u: A @ u, b, solver)))(A)
    compare(twice, by_function, 1e-10)


def test_pytrees_in_give_pytrees_out() -> None:
    diagonal = torch.tensor([2.0, 4.0, 8.0], dtype=F64, requires_grad=True)
    rhs = {"a": torch.ones((), dtype=F64), "b": [torch.ones(2, dtype=F64)]}
    solution = il.linear_solve(
        lambda u, d, word: {"a": d[0] * u["a"], "b": [d[1:] * u["b"][0]]}, rhs, None, diagonal, "a word"
    )
    compare([solution["a"], solution["b"][0]], [diagonal[0] ** -1, diagonal[1:] ** -1])
    (solution["a"] + solution["b"][0].sum()).backward()
    compare(diagonal.grad, -(diagonal.detach() ** -2))


# ------------------------------------------------------------------------------------------------------------ truncated


def test_a_truncated_solve_has_the_derivative_of_the_system_not_of_its_steps() -> None:
    """u_k by k steps, then b_bar = A^-1 v (again k steps) and A_bar = -b_bar u_k': products are counted."""
    s, b = inputs()
    matrix, v = matrix_of(4 * s, True), randn(N, seed=3)
    for steps in (1, 2):
        count = [0]

        def product(u: Tensor, a: Tensor, count: list[int] = count) -> Tensor:
            count[0] += 1
            return a @ u

        a, rhs = matrix.clone().requires_grad_(), b.clone().requires_grad_()
        truncated = il.ConjugateGradient(max_steps=steps)
        u = il.linear_solve(product, rhs, truncated, a)
        forward = count[0]
        a_bar, b_bar = torch.autograd.grad(u, (a, rhs), v)
        with torch.no_grad():
            u_k, w_k = truncated(matrix, b).value, truncated(matrix, v).value
        compare([u, b_bar, a_bar], [u_k, w_k, -torch.outer(w_k, u_k)])  # rounding only
        assert relative_error(u, torch.linalg.solve(matrix, b)) > 1e-3  # it is truncated indeed
        # one product finds closed-over tensors; backward makes the steps again and one pull-back to a, and one product
        # with A and one with A' show that it is symmetric
        assert forward <= steps + 2 and count[0] - forward <= steps + 4


def test_the_graph_of_a_solve_is_one_node_whatever_the_number_of_steps() -> None:
    s, b = inputs()
    for solver in (il.ConjugateGradient(max_steps=1), CG):
        u = il.linear_solve(matrix_of(s, True).requires_grad_(), b, solver)
        assert type(u.grad_fn).__name__ == "LinearSolveBackward"
        assert {type(node).__name__ for node, _ in u.grad_fn.next_functions if node is not None} == {"AccumulateGrad"}


def test_a_zero_cotangent_costs_no_product_and_gives_zero() -> None:
    matrix = matrix_of(randn(N, N, seed=1), True).requires_grad_()
    u = il.linear_solve(matrix, randn(N, seed=2), CG)
    with il.diagnostics() as records:
        (gradient,) = torch.autograd.grad(u, matrix, torch.zeros(N, dtype=F64))
    assert not gradient.any() and records[0].solution.num_steps == 0  # type: ignore[union-attr]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("shape", [(3, 3, 3), (3, 4), (4, 4), (3,)], ids=str)
def test_a_matrix_that_does_not_fit_is_an_error_with_both_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError,
        match=r"a matrix \[n, n\] needs a right-hand side \[n\] of its dtype, got \(.*\) torch.float64 and \(3,\)",
    ):
        il.linear_solve(torch.ones(shape, dtype=F64), torch.ones(3, dtype=F64))


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda u: u[:2], r"expected shapes \[\(3,\)\], got \[\(2,\)\]"), (lambda u: (u, u), r"got \[\(3,\), \(3,\)\]")],
    ids=["shape", "structure"],
)
def test_a_function_that_does_not_map_the_space_into_itself_is_an_error(change: Any, message: str) -> None:
    with pytest.raises(il.ObjectiveError, match=message):
        il.linear_solve(change, torch.ones(3, dtype=F64))


def test_failures_follow_the_policy_and_name_the_linear_solve() -> None:
    b, saddle = torch.ones(2, dtype=F64), torch.diag(torch.tensor([1.0, -2.0], dtype=F64))
    with pytest.raises(il.IndefiniteError, match=r"linear solve: Conjugate gradients? met p'Ap/p'p = -0\.5 <= 0"):
        il.linear_solve(saddle, b)
    with pytest.raises(il.SingularError):
        il.linear_solve(torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), b, il.Minres())
    hard, slow = torch.diag(torch.tensor([1.0, 3.0], dtype=F64)), il.ConjugateGradient(rtol=1e-10, max_steps=1)
    with pytest.warns(il.ConvergenceWarning, match=r"linear solve: .*after 1 steps"):
        il.linear_solve(hard, b, slow)
    with pytest.raises(il.NotConvergedError):
        il.linear_solve(hard, b, slow, on_failure="raise")
    assert il.linear_solve(hard, b, slow, on_failure="ignore").isfinite().all()
    with pytest.raises(il.NonFiniteError, match="right-hand side of the linear solve"):
        il.linear_solve(hard, b * torch.nan)
    compare(il.linear_solve(saddle, b, il.Minres()), torch.tensor([1.0, -0.5], dtype=F64))


@pytest.mark.parametrize("function", [lambda u, a: a @ u + 1, lambda u, a: a @ u + 3 * u * u.abs()])
@pytest.mark.parametrize("solver", [il.ConjugateGradient(), il.Gmres(), il.Bicgstab(), il.Dense()])
def test_a_function_that_is_not_linear_is_an_error_that_says_so(function: Any, solver: Any) -> None:
    a = matrix_of(randn(N, N, seed=1), True)
    with pytest.raises(ValueError, match=r"operator A of the linear solve is not linear: A\(2 v\) / 2 and A v differ"):
        il.linear_solve(function, randn(N, seed=2), solver, a)


@pytest.mark.parametrize("linear", [lambda u, a: a @ u, lambda u, a: (a.float() @ u.float()).double()])
def test_a_linear_function_that_is_not_solved_is_not_called_nonlinear(linear: Any) -> None:
    a, b = torch.diag(torch.logspace(0, 3, 20, dtype=F64)), randn(20, seed=2)
    with pytest.warns(il.ConvergenceWarning, match="^linear solve: "):
        il.linear_solve(linear, b, il.ConjugateGradient(rtol=1e-14, max_steps=12), a)


def test_the_solve_behind_a_first_derivative_is_called_by_its_mode() -> None:
    a, b = torch.diag(torch.tensor([1.0, 3.0], dtype=F64)), torch.ones(2, dtype=F64, requires_grad=True)

    def solved(b: Tensor) -> Tensor:
        u: Tensor = il.linear_solve(a, b, il.ConjugateGradient(), symmetric=True)
        return u

    with il.diagnostics() as records:
        jvp(solved, (b.detach(),), (b.detach(),))
        (g,) = torch.autograd.grad(solved(b).square().sum(), b, create_graph=True)
        torch.autograd.grad(g.sum(), b)
    kinds = [r.kind for r in records if isinstance(r, il.BackwardRecord)]
    higher = ["higher-order backward linear", "backward linear"]  # of the solve behind g, and of the first
    assert kinds[:4] == ["linear", "forward-mode linear", "linear", "backward linear"] and set(kinds[4:]) == set(higher)


@pytest.mark.parametrize("dtypes", [(torch.float32, F64), (F64, torch.float32)])
def test_a_matrix_and_a_right_hand_side_of_two_dtypes_are_an_error_with_both(dtypes: Any) -> None:
    a, b = torch.eye(N, dtype=dtypes[0]), torch.ones(N, dtype=dtypes[1])
    for call in (lambda: il.linear_solve(a, b), lambda: il.ConjugateGradient()(a, b)):
        with pytest.raises(ValueError, match=f"of its dtype.* got .* {dtypes[0]} and .* {dtypes[1]}"):
            call()


@pytest.mark.parametrize("dtypes", [(torch.float32, F64), (F64, torch.float32)])
def test_a_hessian_solves_for_a_right_hand_side_of_another_dtype_in_its_own(dtypes: Any) -> None:
    x, b = torch.ones(N, dtype=dtypes[0]), torch.arange(1.0, N + 1, dtype=dtypes[1], requires_grad=True)
    operator = il.hessian_operator(lambda x: (x**4).sum(), x)  # 12 I
    u = il.linear_solve(operator, b)
    (g,) = torch.autograd.grad(u.sum(), b)
    assert u.dtype is dtypes[0] and g.dtype is dtypes[1]
    assert torch.allclose(u.double(), b.double() / 12, rtol=1e-6) and torch.allclose(g, torch.ones_like(g) / 12)


def test_complex_and_integer_systems_are_refused_with_the_real_system_that_is_the_same() -> None:
    R, S, b = randn(2, 2, seed=1) + 3 * torch.eye(2, dtype=F64), randn(2, 2, seed=2), randn(2, seed=3)
    A, rhs = torch.complex(R, S), torch.complex(b, 2 * b)
    refused = r"has dtype torch.complex128; systems are real .* a matrix R \+ iS as \[\[R, -S\], \[S, R\]\]"
    operator = il.hessian_operator(lambda x: (x**2).sum(), b)
    for call in (
        lambda: il.linear_solve(A, b, GMRES),
        lambda: il.linear_solve(A, rhs),
        lambda: il.linear_solve(R, rhs, GMRES),
        lambda: il.linear_solve(lambda u: A @ u, rhs, GMRES),
        lambda: il.linear_solve(operator, rhs),
        lambda: operator(rhs),
        lambda: il.hvp(lambda x: (x**2).sum(), b, rhs),
    ):
        with pytest.raises(TypeError, match=refused):
            call()
    with pytest.raises(TypeError, match=r"has dtype torch.int64; systems are real and floating. Use .double\(\)"):
        il.linear_solve(R, torch.ones(2, dtype=torch.int64))
    whole = torch.cat([torch.cat([R, -S], 1), torch.cat([S, R], 1)])
    u = il.linear_solve(whole, torch.cat([rhs.real, rhs.imag]), GMRES)  # the remedy
    assert relative_error(torch.complex(u[:2], u[2:]), torch.linalg.solve(A, rhs)) < 1e-12


def test_no_gradient_is_lost_in_a_complex_tensor() -> None:
    c, b = torch.complex(randn(2, seed=4), randn(2, seed=5)).requires_grad_(), randn(2, seed=6)
    for call in (
        lambda: il.linear_solve(lambda u, c: c.abs() ** 2 * u, b, CG, c),
        lambda: il.linear_solve(lambda u: c.abs() ** 2 * u, b, CG),
        lambda: il.hessian_operator(lambda x, c: (c.abs() ** 2 * x**2).sum(), b, c),
    ):
        with pytest.raises(TypeError, match=r"a complex theta of shape .* requires a gradient"):
            call()
    right = il.linear_solve(lambda u, c: c.abs() ** 2 * u, b, CG, c.detach())  # as data it may stay complex
    torch.testing.assert_close(right, b / c.detach().abs() ** 2, rtol=1e-12, atol=0)
