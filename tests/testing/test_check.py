"""check_argmin_gradients on layers that are right: it passes, or says inconclusive, and never cries wolf."""

# Every problem has a known solution or a dense Newton solver, exact to rounding; the coarse ones stop early on purpose.

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from references import F64, newton, newton_root, randn
from torch import Tensor

import implicitlayer as il
from implicitlayer.testing._check import check_argmin_gradients
from implicitlayer.testing._differences import central
from implicitlayer.testing._references import Wall
from implicitlayer.testing._report import GradientCheckError

ZEROS = torch.zeros(3, dtype=F64)
LAM = torch.tensor(0.5, dtype=F64)
A, B = randn(8, 3, seed=1), randn(8, seed=2)


def ridge(x: Tensor, lam: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return ((a @ x - b) ** 2).sum() + lam * (x * x).sum()


def ridge_solution(f: Any, x: Tensor, lam: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(a.T @ a + lam * torch.eye(3, dtype=a.dtype), a.T @ b)


def residual(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return 2 * x + w @ torch.tanh(x) - b


W = 0.6 * randn(3, 3, seed=3)


def test_ridge_regression_passes_in_every_mode() -> None:
    report = check_argmin_gradients(ridge, ridge_solution, ZEROS, LAM, A, B)
    assert report.verdict == "passed" and not report.failures
    found = {(row.leaf, row.mode) for row in report.rows}
    assert {(f"theta[{j}]", m) for j in range(3) for m in ("vjp", "jvp", "double", "vmap", "objective")} <= found
    assert {row.reference for row in report.rows} == {"dense", "differences", "adjoint", "loop", "solver"}


def test_differences_of_an_exact_solver_are_tight() -> None:
    """e = 1e-16 gives h = 6e-6 and truncation plus noise of about e^(2/3) = 4e-11: eight digits are asked at least."""
    report = check_argmin_gradients(ridge, ridge_solution, ZEROS, LAM, A, B, modes=("vjp",))
    rows = [row for row in report.rows if row.reference == "differences" and row.mode == "vjp"]
    assert rows and all(row.tolerance < 1e-6 * max(abs(r.expected) for r in rows) for row in rows)


def test_logistic_regression_passes() -> None:
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=F64)

    def objective(x: Tensor, a: Tensor, log_lam: Tensor) -> Tensor:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(a @ x, labels, reduction="sum")
        return loss + 0.5 * log_lam.exp() * (x * x).sum()

    assert check_argmin_gradients(objective, newton, ZEROS, A, LAM).verdict == "passed"


def test_a_nonconvex_problem_passes() -> None:
    """f = (x0^2 - a)^2 / 4 + (x1 - b x0)^2 / 2 has minima at +-sqrt(a) and a saddle at 0."""

    def objective(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x[0] ** 2 - a) ** 2 / 4 + (x[1] - b * x[0]) ** 2 / 2

    init = torch.tensor([1.0, 0.5], dtype=F64)
    theta = (torch.tensor(2.0, dtype=F64), torch.tensor(-0.7, dtype=F64))
    report = check_argmin_gradients(objective, newton, init, *theta)
    assert report.verdict == "passed"
    rows = [row for row in report.rows if (row.leaf, row.mode, row.reference) == ("theta[0]", "jvp", "dense")]
    # d sqrt(a) / da = 1 / (2 sqrt 2), along a direction of 1/2 to 1 times |a| = 2
    assert all(0.35 <= abs(row.expected) <= 0.71 for row in rows if row.entry.startswith("x[0]"))


Point = namedtuple("Point", "weight bias")


def test_pytrees_and_arguments_that_are_no_floats_pass() -> None:
    def objective(x: dict[str, Any], theta: dict[str, Any], power: int, index: Tensor, data: Point) -> Tensor:
        a = x["a"] - theta["shift"][0] * data.weight
        b = x["b"][0] - data.bias[index].sum() - theta["shift"][0]
        return (a * a).sum() + 0.1 * (x["a"] ** 2).sum() + b**power

    def solver(f: Any, x: dict[str, Any], theta: dict[str, Any], power: int, index: Tensor, data: Point) -> Any:
        assert power == 2 and not index.is_floating_point()
        a = theta["shift"][0] * data.weight / 1.1
        return {"b": [data.bias[index].sum() + theta["shift"][0]], "a": a}  # another order of keys than init's

    init = {"a": torch.zeros(2, 2, dtype=F64), "b": [torch.zeros((), dtype=F64)]}
    theta = {"shift": [torch.tensor(0.7, dtype=F64)], "flag": torch.tensor(True)}
    data = Point(randn(2, 2, seed=5), randn(4, seed=6))
    report = check_argmin_gradients(objective, solver, init, theta, 2, torch.tensor([0, 2]), data)
    assert report.verdict == "passed"
    leaves = {row.leaf for row in report.rows if row.leaf.startswith("theta")}
    assert leaves == {"theta[0]['shift'][0]", "theta[3].weight", "theta[3].bias"}


def test_a_root_with_a_jacobian_that_is_not_symmetric_passes() -> None:
    assert check_argmin_gradients(residual, newton_root, ZEROS, W, B[:3], kind="root").verdict == "passed"


def test_a_fixed_point_passes() -> None:
    def iterate(map: Callable[..., Tensor], x: Tensor, *theta: Tensor) -> Tensor:
        for _ in range(100):  # contracts by 0.45 at most
            x = map(x, *theta)
        return x

    w = 0.9 * W / torch.linalg.matrix_norm(W, 2)
    report = check_argmin_gradients(
        lambda x, w, b: 0.5 * (b - w @ torch.tanh(x)), iterate, ZEROS, w, B[:3], kind="fixed_point"
    )
    assert report.verdict == "passed"


def test_float32_passes_with_its_own_tolerances() -> None:
    theta = [t.float() for t in (LAM, A, B)]
    report = check_argmin_gradients(ridge, ridge_solution, ZEROS.float(), *theta)
    assert report.verdict == "passed"
    rows = [row for row in report.rows if row.reference == "differences" and row.mode in ("vjp", "jvp")]
    assert all(row.tolerance > 1e-7 for row in rows)  # nothing finer than float32 is asked


def test_length_one_and_0d_unknowns_pass() -> None:
    for shape in ((), (1,)):
        t = torch.full(shape, 2.0, dtype=F64)
        report = check_argmin_gradients(
            lambda x, t: (torch.exp(x) - t * x).sum(), lambda f, x, t: torch.log(t), torch.zeros_like(t), t
        )
        assert report.verdict == "passed"
        assert next(row.expected for row in report.rows if row.mode == "value") == pytest.approx(0.6931471805599453)


@pytest.mark.parametrize(("tol", "verdict"), [(1e-8, "passed"), (1e-1, "inconclusive")])
def test_powell_passes_when_fine_and_is_inconclusive_when_coarse(tol: float, verdict: str) -> None:
    solver = il.solvers.SciPyMinimize("Powell", options={"xtol": tol, "ftol": tol**1.5})
    report = check_argmin_gradients(ridge, solver, ZEROS, LAM, A, B)
    assert report.verdict == verdict
    if verdict == "inconclusive":
        lines = str(report).splitlines()
        assert lines[0].startswith("‖∇f‖ = ")
        assert any("Solve more tightly" in line for line in lines)
        assert report.relative_error > 1e-3


def test_a_solver_just_good_enough_to_be_stationary_can_still_be_too_coarse_for_a_difference() -> None:
    """An answer off by 3e-4 from call to call: h = 0.07, so the noise of a difference is about 1 % of x, whose own
    change is 10 %; what changes less has no digit."""
    turn = [0]

    def noisy(f: Any, x: Tensor, lam: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        turn[0] += 1
        return ridge_solution(f, x, lam, a, b) * (1 + 3e-4 * (-1) ** turn[0]) + 1e-3 * c

    def objective(x: Tensor, lam: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return ridge(x - 1e-3 * c, lam, a, b)

    report = check_argmin_gradients(objective, noisy, ZEROS, LAM, A, B, randn(3, seed=9), modes=("vjp",))
    assert report.verdict == "inconclusive" and not report.failures
    assert report.notes[0].startswith("No digit in ") and "theta[3] (vjp, differences)" in report.notes[0]
    assert "coarse solver" in report.notes[0]


def test_polish_makes_a_coarse_solver_conclusive_for_the_dense_reference() -> None:
    solver = il.solvers.SciPyMinimize("Powell", options={"xtol": 1e-3, "ftol": 1e-5})
    report = check_argmin_gradients(ridge, solver, ZEROS, LAM, A, B, polish=1)
    assert not report.failures


def test_settings_of_the_layer_are_used() -> None:
    def saddle(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (x[0] ** 2 - x[1] ** 2) - t @ x

    def solver(f: Any, x: Tensor, t: Tensor) -> tuple[Tensor, str]:
        return t * torch.tensor([1.0, -1.0], dtype=F64), "aux"

    theta = torch.tensor([1.0, 2.0], dtype=F64)
    report = check_argmin_gradients(
        saddle, solver, torch.zeros(2, dtype=F64), theta, linear_solver=il.Minres(), solver_has_aux=True
    )
    assert report.verdict == "passed"
    with pytest.raises(GradientCheckError, match="IndefiniteError"):  # conjugate gradients refuse a saddle
        check_argmin_gradients(saddle, solver, torch.zeros(2, dtype=F64), theta, solver_has_aux=True)


def test_lanes_of_the_layer_and_an_objective_with_aux_pass() -> None:
    def objective(x: Tensor, t: Tensor) -> tuple[Tensor, str]:
        return (torch.exp(x) - t * x).sum(-1), "aux"

    t = 1.0 + torch.arange(6, dtype=F64).reshape(2, 3)
    report = check_argmin_gradients(
        objective, lambda f, x, t: torch.log(t), torch.zeros_like(t), t, batch_dims=1, objective_has_aux=True
    )
    assert report.verdict == "passed"


def test_a_batched_solver_passes() -> None:
    solver = il.solvers.GradientDescent(0.2, 500, rtol=1e-12)
    t = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    report = check_argmin_gradients(lambda x, t: (torch.exp(x) - t * x).sum(), solver, ZEROS, t)
    assert report.verdict == "passed"


def test_above_the_limit_of_unknowns_differences_and_the_adjoint_identity_remain() -> None:
    n = 260
    scale = torch.linspace(1.0, 3.0, n, dtype=F64)

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (scale * x * x).sum() - (t * x).sum() + 0.25 * (x**4).sum()

    def solver(f: Any, x: Tensor, t: Tensor) -> Tensor:
        x = torch.zeros_like(t)
        for _ in range(40):  # Newton, diagonal
            x = x - (scale * x - t + x**3) / (scale + 3 * x * x)
        return x

    report = check_argmin_gradients(objective, solver, torch.zeros(n, dtype=F64), randn(n, seed=1))
    assert report.verdict == "passed"
    assert {row.reference for row in report.rows} == {"differences", "adjoint", "loop", "solver"}
    wrong = lambda x, t: objective(x, t) + (t * x).sum() - (t.detach() * x).sum()  # noqa: E731
    with pytest.raises(GradientCheckError):
        check_argmin_gradients(wrong, solver, torch.zeros(n, dtype=F64), randn(n, seed=1))


def test_an_answer_that_is_not_stationary_is_inconclusive_and_says_so() -> None:
    report = check_argmin_gradients(ridge, lambda f, x, *t: x, ZEROS + 1, LAM, A, B)  # returns its init
    assert report.verdict == "inconclusive"
    assert any(note.startswith("The solver's answer is not stationary") for note in report.notes)
    assert any("StationarityWarning" in note for note in report.notes)
    strict = check_argmin_gradients(ridge, lambda f, x, *t: x, ZEROS + 1, LAM, A, B, on_failure="raise")
    assert strict.verdict == "inconclusive"


def test_a_singular_problem_is_inconclusive() -> None:
    """x is free along (1, -1): no derivative exists, and the layer refuses."""
    report = check_argmin_gradients(
        lambda x, t: (x.sum() - t) ** 2,
        lambda f, x, t: (t / 2).expand(2),
        torch.zeros(2, dtype=F64),
        LAM,
        modes=("vjp",),
    )
    assert report.verdict == "inconclusive"
    assert any("singular" in note for note in report.notes)


def test_an_unused_leaf_is_named() -> None:
    report = check_argmin_gradients(
        lambda x, t, unused: ((x - t) ** 2).sum(), lambda f, x, t, unused: t, ZEROS, B[:3], {"w": A}
    )
    assert report.verdict == "passed"
    assert any(note.startswith("theta[1]['w'] is not used by the objective") for note in report.notes)


def test_the_same_seed_gives_the_same_report() -> None:
    first, second = (
        str(check_argmin_gradients(ridge, ridge_solution, ZEROS, LAM, A, B, modes=("vjp",), seed=3)) for _ in range(2)
    )
    assert first == second
    assert first != str(check_argmin_gradients(ridge, ridge_solution, ZEROS, LAM, A, B, modes=("vjp",), seed=4))


def test_nothing_passes_the_wall_with_a_graph() -> None:
    seen = []

    def solver(f: Any, x: Tensor, t: Tensor) -> dict[str, Tensor]:
        seen.append((x.requires_grad, t.requires_grad))
        own = t.clone().requires_grad_()
        return {"x": own * 2}

    wall = Wall(solver)
    t = torch.ones(3, dtype=F64, requires_grad=True)
    answer = wall(ridge, t * 0, t)
    assert seen == [(False, False)] and not answer["x"].requires_grad
    answer["x"].add_(1)  # what is done to an answer does not change the one that is kept
    assert wall(ridge, t * 0, t)["x"].tolist() == [2.0, 2.0, 2.0] and wall.num_solves == 1


def test_inputs_are_left_alone() -> None:
    theta = [t.clone().requires_grad_() for t in (LAM, A, B)]
    check_argmin_gradients(ridge, ridge_solution, ZEROS, *theta)
    assert all(t.grad is None and torch.equal(t, s) for t, s in zip(theta, (LAM, A, B), strict=True))


def test_a_central_difference_knows_its_own_error() -> None:
    """exp at 0: D = 1 + h^2 / 6, and the measured truncation is that h^2 / 6 up to h^4."""
    noise = torch.full((1,), 1e-12, dtype=F64)
    found = central(lambda h: (torch.exp(torch.tensor([h], dtype=F64)), noise), 1e-4, 1e-16)
    assert found is not None and found.resolved
    error = abs(float(found.value) - 1)
    assert error <= float(3 * found.truncation + 2 * found.noise)
    assert float(found.truncation) == pytest.approx(found.step**2 / 6, rel=0.01, abs=1e-11)


def test_a_difference_across_a_pole_is_not_believed() -> None:
    """1 / (1e-9 + h): every step that is tried is beyond the pole, where D(h) = 4 D(2h)."""
    zero = torch.zeros(1, dtype=F64)
    found = central(lambda h: (torch.tensor([1 / (1e-9 + h)], dtype=F64), zero), 1e-2, 1e-16, rounds=2)
    assert found is not None and not found.resolved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modes": ("vjp", "reverse")}, "modes=.* must be a non-empty tuple out of"),
        ({"modes": "vjp"}, "modes='vjp' must be a non-empty tuple"),
        ({"kind": "minimum"}, "kind='minimum' must be one of"),
        ({"rtol": 0.0}, "rtol=0.0 must be positive"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_argmin_gradients(ridge, ridge_solution, ZEROS, LAM, A, B, **change)


def test_misuse_raises_what_the_layer_raises() -> None:
    def failing(f: Any, x: Tensor, *theta: Tensor) -> Tensor:
        raise ZeroDivisionError("no solution today")

    with pytest.raises(ZeroDivisionError, match="no solution today"):
        check_argmin_gradients(ridge, failing, ZEROS, LAM, A, B)
    with pytest.raises(il.SolverOutputError, match=r"shape \(3, 1\)"):
        check_argmin_gradients(ridge, lambda f, x, *t: ridge_solution(f, x, *t)[:, None], ZEROS, LAM, A, B)
    with pytest.raises(il.NonFiniteError, match="NaN or Inf in x"):
        check_argmin_gradients(ridge, lambda f, x, *t: x * torch.nan, ZEROS, LAM, A, B)


def test_numpy_answers_and_empty_leaves_pass() -> None:
    def objective(x: dict[str, Tensor], t: Tensor, empty: Tensor) -> Tensor:
        return (torch.exp(x["a"]) - t * x["a"]).sum() + x["none"].sum() + empty.sum()

    init = {"none": torch.zeros(0, 2, dtype=F64), "a": torch.zeros(2, dtype=F64)}
    t = torch.tensor([2.0, 3.0], dtype=F64)
    report = check_argmin_gradients(
        objective, lambda f, x, t, e: {"a": np.log(t.numpy()), "none": x["none"]}, init, t, torch.zeros(0, dtype=F64)
    )
    assert report.verdict == "passed"


def test_nothing_to_check_is_refused() -> None:
    with pytest.raises(ValueError, match="theta has no floating tensor"):
        check_argmin_gradients(lambda x, k: ((x - k) ** 2).sum(), lambda f, x, k: x + k, ZEROS, 2)
    with pytest.raises(ValueError, match="init has no entries"):
        check_argmin_gradients(lambda x, t: x.sum() * t, lambda f, x, t: x, torch.zeros(0, dtype=F64), LAM)
