"""check_argmin_gradients never calls a right layer wrong: random problems, coarse solvers, derivatives that vanish."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import F64, randn, smooth_objective
from torch import Tensor

import implicitlayer as il
from implicitlayer import testing
from implicitlayer.testing import check_argmin_gradients


@settings(max_examples=4)
@given(problem=testing.quadratic_problems(n=st.integers(1, 5), log10_cond=st.integers(0, 5)), seed=st.integers(0, 999))
def test_no_false_alarm_on_random_quadratics(problem: testing.ArgminProblem, seed: int) -> None:
    report = check_argmin_gradients(problem.objective, problem.solver, problem.init, *problem.theta, seed=seed)
    assert report.verdict in ("passed", "inconclusive")
    if problem.beta <= 101 * problem.mu:  # type: ignore[operator]
        assert report.verdict == "passed"


@settings(max_examples=4)
@given(n=st.integers(1, 5), seed=st.integers(0, 10_000), log_tol=st.integers(-9, -2))
def test_no_false_alarm_with_a_coarse_solver(n: int, seed: int, log_tol: int) -> None:
    solver = il.solvers.SciPyMinimize("BFGS", options={"gtol": 10.0**log_tol})
    theta = (randn(4, n, seed=seed), randn(4, seed=seed + 1), torch.tensor(-0.5, dtype=F64))
    report = check_argmin_gradients(smooth_objective, solver, torch.zeros(n, dtype=F64), *theta, seed=seed)
    assert report.verdict in ("passed", "inconclusive")


def test_no_false_alarm_where_a_derivative_is_zero_by_cancellation() -> None:
    """exp(s) scales the objective, and moves no minimiser: what is left of B in s is rounding, near 1e-17."""

    def objective(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (torch.exp(s) * (torch.cosh(x) - t * x)).sum()

    scales = torch.tensor([0.5, 1.0, 2.0], dtype=F64).log()
    for seed in range(3):
        t, zero = randn(3, seed=seed), torch.zeros(3, dtype=F64)
        report = check_argmin_gradients(objective, lambda f, x, t, s: torch.asinh(t), zero, t, scales)
        assert report.verdict == "passed"
        rows = [row for row in report.rows if row.leaf == "theta[1]" and row.reference == "dense"]
        # and a derivative there of 1e-12, a millionth of a millionth of its natural size, would be seen
        assert rows and max(abs(row.got) for row in rows) < 1e-15 and max(row.tolerance for row in rows) < 1e-12
