"""What every linear solver promises, whatever its method: true residuals, lanes, scale, zero, empty, messages."""

# What il.testing checks of any solver (float32, bitwise repeats, and more) is in test_conformance.py.

import inspect
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linear_systems import (
    GENERAL,
    SOLVERS,
    Counted,
    condition,
    contraction,
    indefinite_matrix,
    seeds,
    systems,
    true_relative_residual,
)
from references import F64, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer import Status, testing

# Restarted GMRES and Bi-CGSTAB may stagnate on hard systems (their theory gives no bound); the others may not.
SURE = ("minres", "gmres", "normal equations", "dense")


def check_that_the_status_tells_the_truth(name: str, matrix: Tensor, b: Tensor) -> None:
    solution = SOLVERS[name](matrix, b)
    residual = true_relative_residual(matrix, solution.value, b)
    if solution.status is Status.CONVERGED:
        # ten times rtol by definition; the two residuals differ by the rounding of A u, eps n ||u||
        assert residual <= 1e-9 + 1e-14 * float(solution.value.norm() / b.norm())
    else:  # never silent, and the number reported is the true one
        assert solution.residual_is_true
        assert float(solution.relative_residual) == pytest.approx(residual, rel=0.5, abs=1e-8)
    if name in SURE and condition(matrix) <= 101:
        assert solution.status is Status.CONVERGED


@pytest.mark.parametrize("name", SOLVERS)
@given(system=st.one_of(systems("positive definite"), systems("indefinite")))
def test_the_status_of_a_symmetric_solve_tells_the_truth(name: str, system: tuple[Tensor, Tensor]) -> None:
    check_that_the_status_tells_the_truth(name, *system)


@pytest.mark.parametrize("name", GENERAL)
@given(system=systems("general"))
def test_the_status_of_a_general_solve_tells_the_truth(name: str, system: tuple[Tensor, Tensor]) -> None:
    check_that_the_status_tells_the_truth(name, *system)


# The systems that each is surely right on: their kind, size and condition.
DENSE: dict[str, tuple[str, int, int]] = {
    "minres": ("indefinite", 30, 3),
    "gmres": ("general", 30, 4),
    "bicgstab": ("positive definite", 30, 2),
    "normal equations": ("general", 25, 2),
}


@pytest.mark.parametrize("name", DENSE)
@given(data=st.data())
def test_solutions_equal_the_dense_ones(name: str, data: st.DataObject) -> None:
    matrix, b = data.draw(systems(*DENSE[name]))
    solution = SOLVERS[name](matrix, b)
    assert solution.status is Status.CONVERGED and (name != "gmres" or solution.num_steps <= len(b))
    # error <= 10 rtol ||b|| ||A^-1||, and ||u|| >= ||b||
    assert relative_error(solution.value, torch.linalg.solve(matrix, b)) <= 1e-9 * condition(matrix)


@pytest.mark.parametrize("name", GENERAL)
@given(n=st.integers(1, 24), seed=seeds())
def test_every_general_solver_solves_the_system_of_a_contraction(name: str, n: int, seed: int) -> None:
    matrix, b = contraction(n, seed), randn(n, seed=seed + 9)
    solution = GENERAL[name](matrix, b)
    assert solution.status is Status.CONVERGED
    # singular values in [1/2, 3/2]: the error is at most 2 ||b|| 10 rtol, relative to ||u|| >= ||b|| / 1.5
    assert relative_error(solution.value, torch.linalg.solve(matrix, b)) <= 3e-9


@pytest.mark.parametrize("name", SOLVERS)
@given(matrix=testing.singular_matrices(st.integers(1, 11)), seed=seeds())
def test_a_singular_consistent_system_is_solved(name: str, matrix: Tensor, seed: int) -> None:
    b = matrix @ randn(len(matrix), seed=seed)
    solution = SOLVERS[name](matrix, b)
    if name in SURE:  # nonzero |eigenvalues| within a factor of ten
        assert solution.status is Status.CONVERGED
    if solution.status is Status.CONVERGED:
        assert true_relative_residual(matrix, solution.value, b) <= 1e-9 + 1e-14 * float(solution.value.norm())


@pytest.mark.parametrize("name", SOLVERS)
@given(matrix=testing.singular_matrices(), seed=seeds())
def test_a_right_hand_side_outside_the_range_is_never_success(name: str, matrix: Tensor, seed: int) -> None:
    null = torch.linalg.eigh(matrix)[1][:, torch.linalg.eigvalsh(matrix).abs().argmin()]
    b = randn(len(matrix), seed=seed)
    b = b + null * torch.copysign(b.norm(), null @ b)  # at least half of b is outside the range
    solution = SOLVERS[name](matrix, b)
    assert not solution.status.ok
    if solution.status.usable:
        assert float(solution.relative_residual) > 0.4  # and not less by the rounding of a huge A u


# -------------------------------------------------------------------------------------------------------------- lanes


def mixed_batch(n: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric positive definite and indefinite systems of condition 1 to 1e3 in one batch of six."""
    matrices = [(spd_matrix if i % 2 else indefinite_matrix)(n, 3 * i / 5, seed=10 * i) for i in range(6)]
    return torch.stack(matrices), randn(6, n, seed=99)


@pytest.mark.parametrize("name", SOLVERS)
def test_batched_equals_looped(name: str) -> None:
    matrices, b = mixed_batch()
    batched = SOLVERS[name](matrices, b)
    assert batched.codes.shape == (6,)
    for i in range(6):
        single = SOLVERS[name](matrices[i], b[i])
        assert int(batched.codes[i]) == int(single.codes)
        if single.status is Status.CONVERGED:
            # both within 10 rtol of b; times the condition 1e3, for each of the two
            assert relative_error(batched.value[i], single.value) <= 2e-6
            assert true_relative_residual(matrices[i], batched.value[i], b[i]) <= 1.01e-9


@pytest.mark.parametrize("trouble", ["nan matrix", "inf matrix", "nan rhs", "inf rhs", "zero matrix", "zero rhs"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_lane_in_trouble_changes_no_bit_of_the_others(name: str, trouble: str) -> None:
    matrices, b = mixed_batch()
    clean = SOLVERS[name](matrices, b)
    value, where = trouble.split()
    (matrices if where == "matrix" else b)[3] = {"nan": math.nan, "inf": math.inf, "zero": 0.0}[value]
    solution = SOLVERS[name](matrices, b)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(solution.value[others], clean.value[others])
    assert torch.equal(solution.codes[others], clean.codes[others])
    assert torch.equal(solution.steps[others], clean.steps[others])
    code = Status(int(solution.codes[3]))
    if trouble == "zero rhs":
        assert code is Status.CONVERGED and not solution.value[3].any()
    elif trouble == "zero matrix":
        assert code in (Status.SINGULAR, Status.DIVERGED)
    else:
        assert code is Status.NONFINITE
        with pytest.raises(il.NonFiniteError, match=r"in lane 3 of \(6,\)"):
            solution.enforce("ignore")


@pytest.mark.parametrize("name", SOLVERS)
def test_nested_lanes_are_independent_systems(name: str) -> None:
    matrices, b = mixed_batch()
    flat = SOLVERS[name](matrices, b)
    nested = SOLVERS[name](matrices.reshape(2, 3, 14, 14), b.reshape(2, 3, 14))
    assert torch.equal(nested.value.reshape(6, 14), flat.value) and torch.equal(nested.codes.flatten(), flat.codes)


@pytest.mark.parametrize("name", ["minres", "gmres", "normal equations"])
def test_every_lane_stops_at_its_own_step(name: str) -> None:
    # lane i has i + 1 distinct eigenvalues, so a Krylov method needs i + 1 steps in exact arithmetic
    rows = [torch.tensor([1.0 + (j % (i + 1)) for j in range(6)], dtype=F64) for i in range(4)]
    solution = SOLVERS[name](torch.stack([torch.diag(row) for row in rows]), randn(4, 6, seed=8))
    assert solution.steps.tolist() == [1, 2, 3, 4] and solution.num_steps == 4


# -------------------------------------------------------------------------------------------------------------- scale


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(("dtype", "power"), [(F64, 664), (torch.float32, 83)], ids=["1e200", "1e25"])
@pytest.mark.parametrize("role", ["rhs", "matrix"])
def test_scaling_by_a_power_of_two_scales_the_answer_exactly(
    name: str, dtype: torch.dtype, power: int, role: str
) -> None:
    matrix, b = indefinite_matrix(7, 1, seed=1).to(dtype), randn(7, seed=2, dtype=dtype)
    plain = SOLVERS[name](matrix, b)
    assert plain.status is Status.CONVERGED
    for sign in (1, -1):
        factor = 2.0 ** (sign * power)
        if role == "rhs":
            scaled, expected = SOLVERS[name](matrix, b * factor), plain.value * factor
        else:
            scaled, expected = SOLVERS[name](matrix * factor, b), plain.value / factor
        # powers of two round nothing, so the solve may round nothing else either
        assert scaled.status is Status.CONVERGED
        assert relative_error(scaled.value / scaled.value.abs().max(), expected / expected.abs().max()) <= 1e-15


# ---------------------------------------------------------------------------------------------- zero, empty, messages


@pytest.mark.parametrize("name", [*SOLVERS, "neumann"])
def test_a_zero_right_hand_side_gives_exact_zero_without_a_product(name: str) -> None:
    solver = SOLVERS.get(name, il.Neumann(5))
    counted = Counted(spd_matrix(4, 1, seed=0))
    solution = solver(counted.operator(), torch.zeros(4, dtype=F64))
    assert not solution.value.any() and counted.num_products == 0
    assert solution.status is Status.CONVERGED and float(solution.relative_residual) == 0


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", [*SOLVERS, "neumann"])
def test_no_lanes_and_no_unknowns_are_no_trouble(name: str, shape: tuple[int, ...]) -> None:
    operator = il.FlatOperator(lambda v: v, lambda v: v)
    solution = SOLVERS.get(name, il.Neumann(5))(operator, torch.zeros(shape, dtype=F64))
    assert solution.status is Status.CONVERGED and solution.value.shape == shape and solution.num_steps == 0


@pytest.mark.parametrize("name", SOLVERS)
def test_one_unknown_and_a_scalar_unknown_are_solved(name: str) -> None:
    assert SOLVERS[name](torch.tensor([[-4.0]], dtype=F64), torch.tensor([2.0], dtype=F64)).value.tolist() == [-0.5]
    scalar = SOLVERS[name](lambda v: -4 * v, torch.tensor(2.0, dtype=F64))
    assert scalar.value.shape == () and float(scalar.value) == -0.5


@pytest.mark.parametrize("name", SOLVERS)
def test_a_pytree_right_hand_side_gives_a_pytree(name: str) -> None:
    rhs = {"a": torch.ones(2, 3, dtype=F64), "b": torch.tensor(4.0, dtype=F64)}
    solution = SOLVERS[name](lambda v: {"a": -2 * v["a"], "b": 8 * v["b"]}, rhs)
    assert relative_error(solution.value["a"], -0.5 * rhs["a"]) <= 1e-9
    assert float(solution.value["b"]) == pytest.approx(0.5, rel=1e-9)


KRYLOV = [il.Minres, il.Gmres, il.Bicgstab]


@pytest.mark.parametrize("kind", KRYLOV)
def test_negative_tolerances_and_limits_are_refused(kind: Any) -> None:
    for name in ("rtol", "atol"):
        with pytest.raises(ValueError, match=rf"{name}=-0.001 must be non-negative.*pass max_steps only"):
            kind(**{name: -1e-3})
    with pytest.raises(ValueError, match=r"max_steps=-1 must be non-negative"):
        kind(max_steps=-1)


@pytest.mark.parametrize("kind", KRYLOV)
def test_a_step_limit_alone_is_success_and_exact_in_its_number_of_products(kind: Any) -> None:
    counted, b = Counted(spd_matrix(20, 2, seed=1)), randn(20, seed=2)
    for steps in (1, 2, 5):
        counted.num_products = 0
        solution = kind(max_steps=steps)(counted.operator(symmetric=True), b)
        assert solution.status is Status.STEP_LIMIT and solution.num_steps == steps == counted.num_products
        assert not solution.residual_is_true
        true = float((b - counted.matrix @ solution.value).norm())
        assert float(solution.residual_norm) == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize("kind", KRYLOV)
def test_a_step_limit_beside_a_tolerance_is_no_success(kind: Any) -> None:
    solution = kind(rtol=1e-10, max_steps=3)(spd_matrix(20, 2, seed=1), randn(20, seed=2))
    assert solution.status is Status.MAX_STEPS_REACHED and solution.num_steps == 3 and solution.residual_is_true
    with pytest.warns(il.ConvergenceWarning, match=r"after 3 steps \(true relative residual"):
        solution.enforce("warn")


@pytest.mark.parametrize("kind", KRYLOV)
def test_zero_steps_return_the_right_hand_side_over_the_metric(kind: Any) -> None:
    counted = Counted(torch.eye(3, dtype=F64))
    operator = il.FlatOperator(counted, inverse_metric=torch.tensor([0.5, 0.25, 0.125], dtype=F64))
    solution = kind(max_steps=0)(operator, torch.ones(3, dtype=F64))
    assert solution.value.tolist() == [0.5, 0.25, 0.125] and counted.num_products == 0
    assert solution.status is Status.STEP_LIMIT
    assert kind(max_steps=0, rtol=1e-3)(operator, torch.ones(3, dtype=F64)).status is Status.MAX_STEPS_REACHED
    scaled = kind(max_steps=0)(operator, 2.0**40 * torch.tensor([1.0, -3.0, 8.0], dtype=F64))  # powers of two are exact
    assert scaled.value.tolist() == [2.0**39, -3 * 2.0**38, 2.0**40]


@pytest.mark.parametrize("kind", [*KRYLOV, il.ConjugateGradient])
def test_the_default_tolerance_is_that_of_the_documentation(kind: Any) -> None:
    for dtype, rtol in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        matrix = spd_matrix(20, 2, seed=1).to(dtype)
        rhs = randn(20, seed=2).to(dtype)
        solution = kind()(matrix, rhs)
        assert solution.rtol == rtol and solution.status is Status.CONVERGED
        residual = rhs.double() - matrix.double() @ solution.value.double()
        # up to ten times the tolerance counts as reached, and products of 20 terms round by 20 eps
        allowed = 10 * rtol + 20 * torch.finfo(dtype).eps * float(solution.value.norm() / rhs.norm())
        assert float(residual.norm() / rhs.double().norm()) <= allowed


@pytest.mark.parametrize("kind", KRYLOV)
def test_the_absolute_tolerance_is_in_units_of_the_right_hand_side(kind: Any) -> None:
    matrix, b = spd_matrix(30, 2, seed=7), 1e6 * randn(30, seed=8)
    loose, tight = kind(atol=1e4)(matrix, b), kind(atol=1e-2)(matrix, b)
    assert float((b - matrix @ loose.value).norm()) <= 2e4 and float((b - matrix @ tight.value).norm()) <= 2e-2
    assert loose.num_steps < tight.num_steps and loose.status is tight.status is Status.CONVERGED


@pytest.mark.parametrize("kind", KRYLOV)
def test_the_operators_metric_is_the_default_preconditioner(kind: Any) -> None:
    # diagonal matrix, exact metric: one step solves it
    scales = torch.logspace(0, 4, 30, dtype=F64)
    operator = il.FlatOperator(lambda v: scales * v, inverse_metric=1 / scales)
    solution = kind()(operator, randn(30, seed=3))
    assert solution.num_steps == 1 and solution.status is Status.CONVERGED
    explicit = kind(preconditioner=lambda v: v / scales)(torch.diag(scales), randn(30, seed=3))
    assert explicit.num_steps == 1


def test_solvers_are_hashable_and_comparable_as_settings() -> None:
    assert il.Gmres(restart=3) == il.Gmres(restart=3) != il.Gmres(restart=4)
    assert len({il.Minres(), il.Minres(), il.Bicgstab(), il.NormalEquations(), il.Dense(), il.Neumann(3)}) == 5


@pytest.mark.parametrize("kind", KRYLOV)
@pytest.mark.parametrize("settings", [{}, {"max_steps": 5}], ids=["tolerance", "steps"])
def test_asking_rarely_whether_a_lane_runs_changes_no_bit(
    kind: Any, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what happens on an accelerator: up to seven steps are made after the last lane has finished
    matrices, b = mixed_batch()
    often = kind(**settings)(matrices, b)
    rarely = lambda running, step: step % 8 != 0 or bool(running.any())  # noqa: E731
    monkeypatch.setattr(inspect.getmodule(kind), "any_runs", rarely)
    solution = kind(**settings)(matrices, b)
    assert torch.equal(solution.value, often.value) and torch.equal(solution.codes, often.codes)
    assert torch.equal(solution.steps, often.steps) and torch.equal(solution.residual_norm, often.residual_norm)
