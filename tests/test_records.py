"""Records: what they hold, that printing one is readable, and that ``explain`` names the fault and the remedy."""

import math
from typing import Any

import torch
from references import F64, randn, spd_matrix
from torch import Tensor

import implicitlayer as il


def tracking(solver: Any = None, **settings: Any) -> il.ImplicitLayer:
    """argmin of 1/2 |x - t|^2: x = t."""
    return il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), solver or (lambda f, x, t: t.clone()), **settings)


def records_of(layer: il.ImplicitLayer, t: Tensor) -> tuple[il.ForwardRecord, il.BackwardRecord]:
    with il.diagnostics() as records:
        layer(torch.zeros_like(t), t).sum().backward()
    forward, backward = records
    assert isinstance(forward, il.ForwardRecord) and isinstance(backward, il.BackwardRecord)
    return forward, backward


def leaf(n: int) -> Tensor:
    return randn(n, seed=0).requires_grad_()


def test_the_forward_record_holds_the_stationarity_absolute_and_relative() -> None:
    t = torch.tensor([3.0, 4.0], dtype=F64, requires_grad=True)
    forward, _ = records_of(tracking(lambda f, x, t: 1.1 * t, on_failure="ignore"), t)
    assert forward.stationarity_norm is not None and forward.relative_distance is not None
    assert math.isclose(float(forward.stationarity_norm), 0.5, rel_tol=1e-12)  # |0.1 t|
    assert math.isclose(float(forward.relative_distance), 0.5 / 5.5, rel_tol=1e-12)  # H = I: the estimate is exact
    assert forward.stationary is False and forward.rtol == 1e-3


def test_solver_and_polish_steps_are_counted() -> None:
    solver = il.solvers.GradientDescent(step_size=0.5, max_steps=7)
    forward, _ = records_of(tracking(solver, polish=1), leaf(3))
    assert forward.num_steps == 7 and forward.solver_status is il.Status.STEP_LIMIT
    assert forward.num_polish_steps == 1
    assert "7 solver steps, 1 polish step" in str(forward) and forward.stationary


def test_the_backward_record_holds_the_numbers_of_the_solve() -> None:
    matrix = spd_matrix(6, 2, 0)
    layer = il.argmin(lambda x, b: 0.5 * x @ matrix @ x - b @ x, lambda f, x, b: torch.linalg.solve(matrix, b))
    _, backward = records_of(layer, leaf(6))
    solution, values = backward.solution, torch.linalg.eigvalsh(matrix)
    assert backward.status is il.Status.CONVERGED and solution.residual_is_true
    assert float(solution.relative_residual) <= 1e-9
    assert float(values[0]) <= float(solution.smallest_curvature) <= float(values[-1])
    assert abs(float(solution.condition_estimate) / 100 - 1) < 0.05
    text = str(backward)
    assert "backward: Conjugate gradient converged" in text and "condition about 1.00e+02" in text
    # |u - A^-1 b| <= |r| / smallest eigenvalue, estimated from inside the spectrum
    assert float(backward.solution_error) <= 1.01 * float(solution.residual_norm / values[0])


def test_solution_error_estimates_a_truncated_solve() -> None:
    matrix, rhs = spd_matrix(12, 2, 0), randn(12, seed=1)
    layer = il.argmin(
        lambda x, b: 0.5 * x @ matrix @ x - b @ x,
        lambda f, x, b: torch.linalg.solve(matrix, b),
        linear_solver=il.ConjugateGradient(max_steps=8),
    )
    b = rhs.clone().requires_grad_()
    with il.diagnostics() as records:
        (gradient,) = torch.autograd.grad(layer(torch.zeros(12, dtype=F64), b), b, rhs)
    backward = records[1]
    assert isinstance(backward, il.BackwardRecord)
    true = float((gradient - torch.linalg.solve(matrix, rhs)).norm())
    assert true > 1e-4
    assert true <= 2 * float(backward.solution_error)  # the smallest Ritz value is above the smallest eigenvalue
    assert float(backward.solution_error) <= 1.1e2 * true  # condition 100


def test_last_record_is_the_latest_one() -> None:
    layer, t = tracking(), leaf(3)
    assert layer.last_record is None
    x = layer(torch.zeros(3, dtype=F64), t)
    assert isinstance(layer.last_record, il.ForwardRecord)
    x.sum().backward()
    assert isinstance(layer.last_record, il.BackwardRecord) and layer.last_record.kind == "backward"


def test_explain_says_that_there_is_nothing_to_do() -> None:
    forward, backward = records_of(tracking(), leaf(3))
    assert forward.explain().startswith("The solver's answer is stationary")
    assert backward.explain().startswith("The backward solve converged in 1 step to a relative residual of")
    for record in (forward, backward):
        assert record.explain().endswith("There is nothing to do.")


def test_explain_names_an_answer_that_is_not_stationary_and_the_remedy() -> None:
    forward, _ = records_of(tracking(lambda f, x, t: 0.5 * t, on_failure="ignore"), leaf(3))
    assert "not stationary" in forward.explain() and "polish=1" in forward.explain()


def test_explain_tells_an_answer_that_was_not_judged_or_not_checked() -> None:
    forward, _ = records_of(tracking(lambda f, x, t: 0.5 * t, stationarity_rtol=None), leaf(3))
    # 0.5 t is 0.5 |t| from t, and its own size is 0.5 |t|
    assert forward.stationary is None and "distance of 1.00e+00" in forward.explain()
    with il.diagnostics() as records:
        tracking()(torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64))
    assert "was not checked" in records[0].explain() and "not checked" in str(records[0])


def test_explain_names_the_lane_that_is_not_stationary() -> None:
    layer = tracking(lambda f, x, t: t * (1 + (t > 2).to(t.dtype)), on_failure="ignore")
    t = torch.tensor([1.0, 3.0], dtype=F64, requires_grad=True)
    with il.diagnostics() as records:
        torch.func.vmap(lambda t: layer(torch.zeros((), dtype=F64), t))(t).sum().backward()
    assert "not stationary in lane 1 of (2,)" in records[0].explain()


def test_explain_tells_a_truncated_solve_and_a_failed_one() -> None:
    matrix = spd_matrix(6, 2, 0)

    def layer(**settings: Any) -> il.ImplicitLayer:
        return il.argmin(
            lambda x, b: 0.5 * x @ matrix @ x - b @ x, lambda f, x, b: torch.linalg.solve(matrix, b), **settings
        )

    _, backward = records_of(layer(linear_solver=il.ConjugateGradient(max_steps=2)), leaf(6))
    assert "made the 2 steps that were asked for" in backward.explain() and "tolerance" in backward.explain()
    _, backward = records_of(
        layer(linear_solver=il.ConjugateGradient(rtol=1e-12, max_steps=2), on_failure="ignore"), leaf(6)
    )
    assert "failed" in backward.explain() and "Raise max_steps" in backward.explain()


def test_explain_tells_a_remedy() -> None:
    matrix = torch.diag(torch.tensor([1.0, -2.0], dtype=F64))
    for policy, words in (("minres", "MINRES"), ("damp", "damped by up to"), ("truncate", "truncated")):
        layer = il.argmin(
            lambda x, b: 0.5 * x @ matrix @ x - b @ x,
            lambda f, x, b: torch.linalg.solve(matrix, b),
            negative_curvature=policy,  # type: ignore[arg-type]
        )
        _, backward = records_of(layer, leaf(2))
        assert words in backward.explain() and words in str(backward) and "more tightly" in backward.explain()


def test_a_record_of_a_batch_prints_ranges() -> None:
    layer = tracking()
    t = randn(4, 3, seed=0).requires_grad_()
    with il.diagnostics() as records:
        torch.func.vmap(lambda t: layer(torch.zeros(3, dtype=F64), t))(t).sum().backward()
    assert all("over (4,) lanes" in str(record) for record in records)


def test_collecting_without_depth_measures_nothing_more_and_holds_no_tensors() -> None:
    from implicitlayer.base._records import collect

    with collect(in_depth=False) as records:
        tracking(stationarity_rtol=None)(torch.zeros(3, dtype=F64), leaf(3)).sum().backward()
    assert isinstance(records[0], il.ForwardRecord) and records[0].stationarity_norm is None
    assert isinstance(records[1], il.BackwardRecord) and records[1].certificate is None


def test_explain_does_not_hide_a_remedy_that_failed() -> None:
    matrix = torch.diag(torch.tensor([-1.0, 0.0, 2.0], dtype=F64))
    layer = il.argmin(
        lambda x, b: 0.5 * x @ matrix @ x - b @ x,
        lambda f, x, b: torch.zeros_like(b),
        negative_curvature="minres",
        on_failure="ignore",
    )
    _, backward = records_of(layer, leaf(3))
    assert backward.status is il.Status.SINGULAR
    text = backward.explain()
    assert "failed" in text and "found the matrix singular" in text and "solved again by MINRES" in text


def test_a_status_is_printed_by_its_name_everywhere() -> None:
    status = il.Status.MAX_STEPS_REACHED
    assert str(status) == f"{status}" == "{}".format(status) == "MAX_STEPS_REACHED" and int(status) == 3  # noqa: UP032
    assert f"{status:>18}|" == " MAX_STEPS_REACHED|"
    assert il.Status(3) is status and status > il.Status.CONVERGED


def test_the_status_of_a_batch_is_that_of_its_worst_lane() -> None:
    # CG on lanes of condition 1 and 10 with two steps: the first lane converges, the second one does not
    matrices = torch.stack([torch.eye(6, dtype=F64), spd_matrix(6, 1, seed=1)])
    b = randn(2, 6, seed=2)
    solve = il.ConjugateGradient(rtol=1e-10, max_steps=2)
    operator = il.FlatOperator(lambda v: (matrices @ v.unsqueeze(-1)).squeeze(-1))
    solution = solve(operator, b)
    assert solution.codes.tolist() == [int(il.Status.CONVERGED), int(il.Status.MAX_STEPS_REACHED)]
    assert solution.status is il.Status.MAX_STEPS_REACHED and "in lane 1 of (2,)" in solution.describe()
    assert solve(operator, b.flip(0)).status is il.Status.MAX_STEPS_REACHED
