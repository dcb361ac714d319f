"""check_argmin_gradients says what is wrong: a solver that does not follow theta, a step that leaves the domain."""

import re
from typing import Any

import pytest
import torch
from references import F64, newton, randn, smooth_objective
from torch import Tensor

import implicitlayer as il
from implicitlayer import testing
from implicitlayer.testing import GradientCheckError, GradientReport, check_argmin_gradients
from implicitlayer.testing._references import Wall

ZEROS = torch.zeros(2, dtype=F64)
T = torch.tensor([1.0, 2.0], dtype=F64)
B = torch.tensor([0.5, 0.7], dtype=F64)


def squares(x: Tensor, *shifts: Tensor) -> Tensor:
    return ((x - sum(shifts)) ** 2).sum()


def report_of(objective: Any, solver: Any, init: Any, *theta: Any, **settings: Any) -> GradientReport:
    with pytest.raises(GradientCheckError) as error:
        check_argmin_gradients(objective, solver, init, *theta, **{"modes": ("vjp",), **settings})
    return error.value.report


# ------------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("polish", [0, 1])
def test_a_solver_may_return_a_solver_result(polish: int) -> None:
    """x = asinh t; the gradient 1 / cosh x is checked as for a bare value."""

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return (torch.cosh(x) - t * x).sum()

    def solver(f: Any, x: Tensor, *theta: Tensor) -> il.SolverResult:
        return il.SolverResult(torch.asinh(theta[0]), il.Status.CONVERGED, aux="aux")

    for has_aux in (False, True):
        report = check_argmin_gradients(objective, solver, ZEROS, T, solver_has_aux=has_aux, polish=polish)
        assert report.verdict == "passed"
    report = check_argmin_gradients(objective, lambda f, x, *t: il.solvers.NewtonCG().run(f, x, *t), ZEROS, T)
    assert report.verdict == "passed"


def test_nothing_passes_the_wall_inside_a_solver_result() -> None:
    def solver(f: Any, x: Tensor, t: Tensor) -> il.SolverResult:
        own = t.clone().requires_grad_()
        return il.SolverResult({"x": own * 2}, num_steps=3, aux=own)

    wall = Wall(solver)
    first = wall(squares, ZEROS, T)
    assert not first.value["x"].requires_grad and not first.aux.requires_grad and first.num_steps == 3
    first.value["x"].zero_()
    assert wall(squares, ZEROS, T).value["x"].tolist() == [2.0, 4.0] and wall.num_solves == 1


@pytest.mark.parametrize("setting", [{"constraint": il.sets.Box(-1.0, 1.0)}, {"regularizer": il.L1(0.5)}])
def test_constraints_and_regularizers_are_refused_with_what_checks_them(setting: dict[str, Any]) -> None:
    name, value = next(iter(setting.items()))

    def solver(f: Any, x: Tensor, t: Tensor) -> Tensor:  # of either problem, in closed form
        return t.clamp(-1, 1) if name == "constraint" else t.sign() * (t.abs() - 0.25).clamp(min=0)

    with pytest.raises(ValueError, match=rf"^{name}=.* cannot be checked .* il\.testing\.check_adjoint") as error:
        check_argmin_gradients(squares, solver, ZEROS, T, **setting)
    layer = il.argmin(squares, solver, **{name: value})
    for remedy in ("check_adjoint", "check_linear_in_cotangent", "check_batch_equals_loop"):
        assert f"il.testing.{remedy}" in str(error.value)
        getattr(testing, remedy)(layer, ZEROS, torch.tensor([2.0, 0.7], dtype=F64))


def test_none_is_no_constraint() -> None:
    report = check_argmin_gradients(squares, lambda f, x, t: t, ZEROS, T, constraint=None, regularizer=None)
    assert report.verdict == "passed"


# ------------------------------------------------------------------------------- solvers that do not follow theta


def test_a_solver_that_ignores_an_entry_of_theta_fails_at_that_entry() -> None:
    """x = (t0, 2) is exact at t = (., 2) alone; dx/dt is the identity."""
    report = report_of(squares, lambda f, x, t: torch.stack([t[0], torch.full_like(t[0], 2.0)]), ZEROS, T)
    (row,) = report.failures
    assert (row.leaf, row.entry, row.mode, row.reference) == ("theta[0]", "x[1] along [1]", "solver", "dense")
    assert row.dominating == "the solver does not follow theta[0]" and row.got == 0
    assert row.expected == pytest.approx(2.0)  # |theta| times the derivative 1
    assert "does not follow theta[0]" in report.notes[0] and "[1]" in report.notes[0]


def test_a_solver_that_closes_over_a_leaf_fails_at_that_leaf() -> None:
    here = B.clone()
    report = report_of(squares, lambda f, x, t, b: t + here, ZEROS, T, B)
    assert report.worst is not None and report.worst.dominating == "the solver does not follow theta[1]"
    assert {row.leaf for row in report.failures} == {"theta[1]"}
    assert any(note.startswith("The solver does not follow theta[1]: ") for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_iterative_solver_that_ignores_its_argument_fails(dtype: torch.dtype) -> None:
    """Its error at theta is that of its tolerance, 1e-6, where the answers nearby are off by 1e-3 at least."""
    here, solver = B.to(dtype), il.solvers.GradientDescent(0.4, 500, rtol=1e-6)
    report = report_of(squares, lambda f, x, t, b: solver(f, x, t, here), ZEROS.to(dtype), T.to(dtype), B.to(dtype))
    assert {row.dominating for row in report.failures} == {"the solver does not follow theta[1]"}


def test_an_ignored_entry_is_found_among_many_that_are_followed() -> None:
    """H couples the unknowns, so along a random direction every entry of x moves, though not as it should."""
    a, t = randn(8, 6, seed=1), randn(6, seed=2)
    fixed = float(t[3])

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * ((a @ x) ** 2).sum() - t @ x

    def solver(f: Any, x: Tensor, t: Tensor) -> Tensor:
        return torch.linalg.solve(a.T @ a, torch.cat([t[:3], torch.full((1,), fixed, dtype=F64), t[4:]]))

    report = report_of(objective, solver, torch.zeros(6, dtype=F64), t)
    assert all(row.entry.endswith("along [3]") for row in report.failures) and report.failures


def test_a_solver_that_follows_another_problem_is_never_passed() -> None:
    """x = t at theta = t alone, but it moves half as fast; one entry of three, so that the others do have digits."""
    here, slow = torch.tensor([1.0, 2.0, 3.0], dtype=F64), torch.tensor([1.0, 1.0, 0.5], dtype=F64)
    report = check_argmin_gradients(
        squares, lambda f, x, t: here + slow * (t - here), 0 * here, here.clone(), modes=("vjp",)
    )
    assert report.verdict == "inconclusive"
    assert any(row.dominating == "the solver follows another problem" for row in report.rows)


A = randn(9, 4, seed=3)
Y = randn(9, seed=4) + 2.0
STRENGTH = torch.tensor(0.5, dtype=F64)


def with_intercept(x: Tensor, strength: Tensor, y: Tensor) -> Tensor:
    """The last unknown is the intercept, and is not penalised."""
    return ((A @ x[:4] + x[4] - y) ** 2).sum() + strength * (x[:4] ** 2).sum()


def through_tanh(x: Tensor, strength: Tensor, y: Tensor) -> Tensor:
    return ((torch.tanh(A @ x[:4] + x[4]) - y / 8) ** 2).sum() + strength * (x**2).sum()


def without_tanh(x: Tensor, strength: Tensor, y: Tensor) -> Tensor:
    return ((A @ x[:4] + x[4] - y / 8) ** 2).sum() + strength * (x**2).sum()


ANOTHER: dict[
    str, tuple[Any, Any, str]
] = {  # objective, what the solver minimises, how it shows where it takes no start
    "a penalised intercept": (
        with_intercept,
        lambda x, s, y: with_intercept(x, s, y) + s * x[4] ** 2,
        r"its gradient there is zero but for the entry of x\[4\]",
    ),
    "another strength": (
        with_intercept,
        lambda x, s, y: with_intercept(x, 3 * s, y),
        r"the answer is stationary with theta\[0\] = 1\.5 instead",
    ),
    "a mean for a sum": (
        with_intercept,
        lambda x, s, y: with_intercept(x, 9 * s, y) / 9,
        r"the answer is stationary with theta\[0\] = 4\.5 instead",
    ),
    "a forgotten tanh": (through_tanh, without_tanh, ""),
}


@pytest.mark.parametrize("name", ANOTHER)
@pytest.mark.parametrize("takes_its_start", [True, False])
def test_a_solver_of_another_problem_is_not_called_coarse(name: str, takes_its_start: bool) -> None:
    objective, other, shows = ANOTHER[name]
    start, exact = torch.zeros(5, dtype=F64), il.solvers.NewtonCG(rtol=1e-10)

    def solver(f: Any, x: Tensor, *theta: Tensor) -> Tensor:
        return exact(other, x if takes_its_start else start, *theta)

    report = check_argmin_gradients(objective, solver, start, STRENGTH, Y, modes=("vjp",))
    words = {row.dominating for row in report.rows if row.status == "inconclusive"}
    assert report.verdict == "inconclusive" and "polish= do not cure that" in report.notes[0]
    if takes_its_start or shows:
        shows = "started at a solution of it, it comes back to this answer" if takes_its_start else shows
        assert report.notes[0].startswith("The solver solves another problem than the objective states: ")
        assert re.search(shows, report.notes[0]) and words == {"another problem"}
    else:  # it could also be one that ends early: only more steps can tell
        assert "it is the same from every start" in report.notes[0] and words == {"coarse solver or another problem"}


COARSE: dict[str, Any] = {
    "few steps of L-BFGS": lambda f, x, *t: il.solvers.LBFGS(max_steps=4)(f, x, *t),
    "few steps of gradient descent": lambda f, x, *t: il.solvers.GradientDescent(0.01, max_steps=40)(f, x, *t),
    "few steps of Adam": lambda f, x, *t: il.solvers.TorchOptimizer(torch.optim.Adam, lr=0.05, max_steps=60)(f, x, *t),
    "a simplex": il.solvers.SciPyMinimize("Nelder-Mead", options={"xatol": 0.1, "fatol": 0.1}),
    "steps from its own start": lambda f, x, *t: il.solvers.GradientDescent(0.01, max_steps=40)(f, 0 * x, *t),
    "a grid": lambda f, x, *t: (il.solvers.NewtonCG(rtol=1e-10)(f, x, *t) * 8).round() / 8,
    "noise": lambda f, x, *t: il.solvers.NewtonCG(rtol=1e-10)(f, x, *t) + 0.01 * torch.randn_like(x),
}


FROM_EVERY_START = {"steps from its own start", "a grid"}  # the answer is the same: a black box tells no more


@pytest.mark.parametrize("objective", [with_intercept, through_tanh])
@pytest.mark.parametrize("name", COARSE)
def test_a_coarse_solver_is_not_said_to_solve_another_problem(name: str, objective: Any) -> None:
    torch.manual_seed(0)
    start = torch.zeros(5, dtype=F64)
    report = check_argmin_gradients(objective, COARSE[name], start, STRENGTH, Y, modes=("vjp",))
    assert report.verdict == "inconclusive" and "solves another problem" not in str(report)
    words = {row.dominating for row in report.rows if row.status == "inconclusive"}
    assert ("coarse solver or another problem" in words) == (name in FROM_EVERY_START)


@pytest.mark.parametrize("grid", [1e-3, 1e-2])
def test_an_answer_that_is_exact_by_chance_is_not_taken_for_a_solver_that_ignores_theta(grid: float) -> None:
    """An answer rounded to a grid, of which theta is a point: it does not move until theta leaves the cell."""
    report = check_argmin_gradients(
        squares, lambda f, x, t: grid * torch.round(t / grid), ZEROS, T.clone(), modes=("vjp",)
    )
    assert not report.failures


def test_a_warm_start_at_the_solution_is_not_taken_for_a_solver_that_ignores_theta() -> None:
    """A solver that stops below a gradient of 1 stays at an init that is the solution; elsewhere it moves."""

    def solver(f: Any, x: Tensor, t: Tensor) -> Tensor:
        while float((2 * (x - t)).norm()) > 1:
            x = x - 0.1 * (x - t)
        return x

    report = check_argmin_gradients(squares, solver, T.clone(), T.clone(), modes=("vjp",))
    assert report.verdict == "inconclusive"


def test_solvers_that_follow_theta_have_no_such_row() -> None:
    theta = (randn(5, 3, seed=1), randn(5, seed=2), torch.tensor(0.5, dtype=F64))
    for solver in (newton, il.solvers.SciPyMinimize("BFGS", options={"gtol": 1e-4})):
        report = check_argmin_gradients(smooth_objective, solver, torch.zeros(3, dtype=F64), *theta, modes=("vjp",))
        assert not report.failures and all(row.mode != "solver" for row in report.rows)


# ------------------------------------------------------------------------------------- steps that leave the domain


@pytest.mark.parametrize("t", [1e-12, 1e-9, 1e-8, 1e-7])
def test_a_right_layer_close_to_a_barrier_is_not_failed(t: float) -> None:
    """f = x - t log x: x* = t; a step of 6e-6 (the size of init) crosses x = 0."""

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return (x - t * torch.log(x)).sum()

    theta, ones = torch.tensor([t], dtype=F64), torch.ones(1, dtype=F64)
    report = check_argmin_gradients(objective, lambda f, x, t: t.clone(), ones, theta, modes=("vjp",))
    assert not report.failures and report.verdict == "passed"


def test_a_step_across_a_pole_is_inconclusive() -> None:
    """f = x + t^2 / x is finite on both sides of its pole at 0; x* = t."""

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return (x + t**2 / x).sum()

    theta, ones = torch.tensor([1e-9], dtype=F64), torch.ones(1, dtype=F64)
    report = check_argmin_gradients(objective, lambda f, x, t: t.clone(), ones, theta, modes=("vjp",))
    assert not report.failures


def test_an_objective_that_raises_outside_its_domain_has_inconclusive_rows() -> None:
    """At x* = t = 1e-30 every step in x is outside, and so is a tenth of the size of init, in one of two directions."""

    def objective(x: Tensor, t: Tensor) -> Tensor:
        if float(x.detach().min()) <= 0:
            raise ValueError("x must be positive")
        return (x - t * torch.log(x)).sum()

    theta, ones = torch.tensor([1e-30], dtype=F64), torch.ones(1, dtype=F64)
    outside = set()
    for seed in range(3):
        report = check_argmin_gradients(objective, lambda f, x, t: t.clone(), ones, theta, modes=("vjp",), seed=seed)
        rows = [row for row in report.rows if row.dominating == "the step leaves the domain"]
        assert not report.failures and "x" in {row.leaf for row in rows}
        assert all(row.status == "inconclusive" and row.mode == "objective" for row in rows)
        outside |= {row.leaf for row in rows}
    assert outside == {"x", "x (value)"}


# ------------------------------------------------------------------------------------------------ order of the rows


def test_the_row_that_says_why_stands_above_what_follows_from_it() -> None:
    """float(t.detach()): vmap raises an error about numbers, the objective is the culprit."""

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return ((x - float(t.detach())) ** 2).sum()

    report = report_of(
        objective,
        lambda f, x, t: t * torch.ones(2, dtype=F64),
        ZEROS,
        torch.tensor(1.5, dtype=F64),
        modes=("vjp", "jvp", "double", "vmap"),
    )
    modes = [row.mode for row in report.failures]
    assert modes[0] == "objective" and modes[-1] == "vmap"
    assert report.failures[-1].dominating == "the layer raised ObjectiveError"
    text = str(report)
    assert text.index("look for .detach()") < text.index("vmap: ObjectiveError")
