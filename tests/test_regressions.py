"""Bugs found in other libraries of this kind. Each is a fact somewhere else and gets a test here."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from references import F64, central_differences, dense_gradients, newton, randn, relative_error, spd_matrix
from torch import Tensor
from torch.func import grad, vmap

import implicitlayer as il


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)


def quadratic(x: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
    flat = x.reshape(-1)
    return 0.5 * flat @ matrix @ flat - b.reshape(-1) @ flat


def solve(objective: Any, x: Tensor, matrix: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(matrix, b.reshape(-1)).reshape(x.shape)


def test_a_scalar_unknown_does_not_get_gradient_zero() -> None:
    """An iteration limit of sum(shape) is 0 for a 0-d tensor."""
    t = torch.tensor(3.0, dtype=F64, requires_grad=True)
    x = il.argmin(lambda x, t: (x - 2 * t) ** 2, lambda f, x, t: 2 * t)(torch.tensor(0.0, dtype=F64), t)
    (gradient,) = torch.autograd.grad(x, t)
    assert float(gradient) == pytest.approx(2.0, rel=1e-14)


def test_the_iteration_limit_of_a_matrix_shaped_unknown_counts_its_elements() -> None:
    """A limit of sum(shape) = 16 steps is too few for 64 unknowns."""
    matrix, b = spd_matrix(64, 3, seed=1), randn(8, 8, seed=2).requires_grad_()
    layer = il.argmin(quadratic, solve)
    v = randn(8, 8, seed=3)
    (gradient,) = torch.autograd.grad(layer(zeros(8, 8), matrix, b), b, v)
    assert layer.records[-1].solution.num_steps > 16  # type: ignore[union-attr]
    # rtol 1e-10, condition 1e3
    assert relative_error(gradient.reshape(-1), torch.linalg.solve(matrix, v.reshape(-1))) < 1e-7


def test_coupled_leaves_are_not_solved_block_by_block() -> None:
    matrix = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=F64)  # blocks alone: 1/2 in place of (2/3, -1/3)
    b = torch.ones(2, dtype=F64, requires_grad=True)
    layer = il.argmin(
        lambda x, b: quadratic(torch.stack(x), matrix, b), lambda f, x, b: list(torch.linalg.solve(matrix, b))
    )
    (gradient,) = torch.autograd.grad(layer([zeros(), zeros()], b)[0], b)
    assert torch.allclose(gradient, torch.tensor([2.0, -1.0], dtype=F64) / 3, rtol=1e-12)


def test_second_order_is_not_lost_through_copies_of_the_data() -> None:
    t = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
    x = il.argmin(lambda x, t: (x.exp() - t * x).sum(), lambda f, x, t: t.log())(zeros(2), t)
    (first,) = torch.autograd.grad((x**2).sum(), t, create_graph=True)  # 2 log t / t
    (second,) = torch.autograd.grad(first.sum(), t)
    assert relative_error(second, (2 - 2 * t.detach().log()) / t.detach() ** 2) < 1e-9


def test_dictionaries_are_fine_as_unknowns_and_as_theta() -> None:
    theta = {"m": randn(2, seed=1).requires_grad_(), "s": torch.tensor(0.5, dtype=F64, requires_grad=True)}
    layer = il.argmin(
        lambda x, t: 0.5 * ((x["w"] - t["m"] * t["s"]) ** 2).sum(), lambda f, x, t: {"w": t["m"] * t["s"]}
    )
    layer({"w": zeros(2)}, theta)["w"].sum().backward()
    assert theta["s"].grad is not None and float(theta["s"].grad) == pytest.approx(
        float(theta["m"].detach().sum()), rel=1e-12
    )


def test_a_closed_over_tensor_is_not_left_without_gradient() -> None:
    t = torch.tensor(0.7, dtype=F64, requires_grad=True)
    il.argmin(lambda x: (x - t**2) ** 2, lambda f, x: (t**2).detach())(zeros()).backward()
    assert t.grad is not None and float(t.grad) == pytest.approx(1.4, rel=1e-12)


def test_a_solver_that_returns_its_init_has_the_implicit_gradient_and_not_that_of_the_init() -> None:
    """1/2 (x - t)^2 + 3/2 (x - c)^2 at t = c: the start is the solution, the gradient 1/4 and not 1."""
    t = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    c = t.detach().clone()
    layer = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum() + 1.5 * ((x - c) ** 2).sum(), lambda f, x, t: x)
    for init in (t, t * 1, t.detach()):
        (gradient,) = torch.autograd.grad(layer(init, t).sum(), t)
        assert torch.allclose(gradient, torch.full((2,), 0.25, dtype=F64), rtol=1e-12)


def test_a_solver_that_returns_an_init_that_is_no_solution_is_not_passed_over() -> None:
    t = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    with pytest.warns(il.StationarityWarning, match="not stationary"):
        il.argmin(lambda x, t: 2 * ((x - 0.25 * t) ** 2).sum(), lambda f, x, t: x)(t, t)


@pytest.mark.parametrize("settings", [{"max_steps": 1}, {}], ids=["one step", "default"])
def test_one_step_on_an_indefinite_matrix_does_not_return_a_huge_number(settings: dict[str, Any]) -> None:
    """b'Ab = -1e-6: a step without a look at its sign has length 2e6."""
    matrix, v = torch.diag(torch.tensor([1.0, -1.0 - 1e-6], dtype=F64)), torch.ones(2, dtype=F64)
    assert float(v @ matrix @ v) < 0
    b = torch.ones(2, dtype=F64, requires_grad=True)
    layer = il.argmin(quadratic, solve, linear_solver=il.ConjugateGradient(**settings))
    with pytest.raises(il.IndefiniteError):
        torch.autograd.grad(layer(zeros(2), matrix, b), b, v)
    layer = il.argmin(quadratic, solve, linear_solver=il.ConjugateGradient(**settings), on_failure="ignore")
    assert torch.equal(torch.autograd.grad(layer(zeros(2), matrix, b), b, v)[0], v)


@pytest.mark.parametrize("settings", [{"max_steps": 1}, {}], ids=["one step", "default"])
def test_one_step_along_an_almost_flat_direction_is_not_silent(settings: dict[str, Any]) -> None:
    """b'Ab = +1e-6 hides the negative curvature, but the residual grows by 1e6."""
    matrix, v = torch.diag(torch.tensor([1.0, -1.0 + 1e-6], dtype=F64)), torch.ones(2, dtype=F64)
    b = torch.ones(2, dtype=F64, requires_grad=True)
    layer = il.argmin(quadratic, solve, linear_solver=il.ConjugateGradient(**settings))
    with pytest.raises((il.LinearSolveError, il.ConvergenceWarning)):  # warnings are errors here
        torch.autograd.grad(layer(zeros(2), matrix, b), b, v)


def test_conjugate_gradients_return_their_last_iterate() -> None:
    b = randn(4, seed=1)
    assert torch.equal(il.ConjugateGradient(max_steps=1)(torch.eye(4, dtype=F64), b).value, b)


def test_every_further_step_lowers_the_error_in_the_energy_norm() -> None:
    """Using the old residual in the direction update lets the error grow."""
    matrix, b = spd_matrix(20, 2, seed=2), randn(20, seed=3)
    exact = torch.linalg.solve(matrix, b)
    errors = []
    for steps in range(1, 15):
        d = il.ConjugateGradient(max_steps=steps)(matrix, b).value - exact
        errors.append(float(d @ matrix @ d))
    assert all(later < earlier for earlier, later in pairwise(errors))


def test_value_and_residual_take_the_same_step() -> None:
    """A factor on the direction but not on the residual makes the recursive residual a lie."""
    matrix, b = spd_matrix(20, 2, seed=2), randn(20, seed=3)
    for steps in (1, 4, 8):
        solution = il.ConjugateGradient(max_steps=steps)(matrix, b)
        assert float(solution.residual_norm) == pytest.approx(float((b - matrix @ solution.value).norm()), rel=1e-10)


def test_a_theta_shared_over_the_batch_gets_the_sum_and_not_the_mean() -> None:
    t, targets = torch.tensor(2.0, dtype=F64, requires_grad=True), randn(5, 3, seed=4)
    batched = il.argmin(lambda x, t, y: 0.5 * ((x - t * y) ** 2).sum(-1), lambda f, x, t, y: t * y, batch_dims=1)
    single = il.argmin(lambda x, t, y: 0.5 * ((x - t * y) ** 2).sum(), lambda f, x, t, y: t * y)
    native = torch.autograd.grad(batched(zeros(5, 3), t, targets).sum(), t)[0]
    vmapped = torch.autograd.grad(vmap(lambda y: single(zeros(3), t, y))(targets).sum(), t)[0]
    transformed = grad(lambda t: vmap(lambda y: single(zeros(3), t, y))(targets).sum())(t.detach())
    for gradient in (native, vmapped, transformed):
        assert float(gradient) == pytest.approx(float(targets.sum()), rel=1e-12)


@pytest.mark.parametrize("size", [1e-12, 1e-100])
def test_a_tiny_cotangent_gives_no_garbage(size: float) -> None:
    """An absolute tolerance takes it for converged before the first step."""
    matrix, b, v = spd_matrix(10, 2, seed=5), randn(10, seed=6).requires_grad_(), randn(10, seed=7)
    x = il.argmin(quadratic, solve)(zeros(10), matrix, b)
    (gradient,) = torch.autograd.grad(x, b, size * v)
    assert relative_error(gradient / size, torch.linalg.solve(matrix, v)) < 1e-8  # rtol 1e-10, condition 100


def test_a_float32_cotangent_near_1e_13_gives_no_nan() -> None:
    b, curvature = torch.ones(3, requires_grad=True), torch.tensor([1.0, 2.0, 4.0])
    layer = il.argmin(lambda x, b: (0.5 * curvature * x * x - b * x).sum(), lambda f, x, b: b / curvature)
    x = layer(torch.zeros(3), b)
    (gradient,) = torch.autograd.grad(x, b, torch.full((3,), 1e-13))
    assert torch.allclose(gradient, torch.tensor([1e-13, 5e-14, 2.5e-14]), rtol=1e-5, atol=0)


def test_hyperparameters_that_are_no_leaves_pass_the_gradient_to_their_leaf() -> None:
    leaf = torch.tensor(0.3, dtype=F64, requires_grad=True)
    x = il.argmin(lambda x, s: (x.exp() - s * x).sum(), lambda f, x, s: s.log().reshape(1))(zeros(1), (2 * leaf).exp())
    (gradient,) = torch.autograd.grad(x.sum(), leaf)  # x = 2 leaf
    assert float(gradient) == pytest.approx(2.0, rel=1e-12)


def test_logistic_regression_agrees_with_finite_differences() -> None:
    data, labels = randn(30, 4, seed=8), (randn(30, seed=9) > 0).double()

    def objective(x: Tensor, strengths: Tensor) -> Tensor:
        loss = torch.nn.functional.binary_cross_entropy_with_logits(data @ x, labels)
        return loss + 0.5 * (strengths * x * x).sum()

    strengths, v = torch.tensor([0.01, 0.1, 1.0, 0.05], dtype=F64), randn(4, seed=10)
    leaf = strengths.clone().requires_grad_()
    x = il.argmin(objective, il.solvers.SciPyMinimize("BFGS", options={"gtol": 1e-9}))(zeros(4), leaf)
    (gradient,) = torch.autograd.grad(x, leaf, v)
    # Newton is exact to 1e-14 (smallest curvature 0.01): h = 1e-5 leaves 1e-9; the entries are of size 1 to 100
    differences = central_differences(lambda s: newton(objective, zeros(4), s) @ v, strengths, 1e-5)
    assert relative_error(gradient, differences) < 1e-6
    (dense,) = dense_gradients(objective, newton(objective, zeros(4), strengths), [strengths], v)
    assert relative_error(gradient, dense) < 1e-6


def batch_norm_problem(track: bool) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, track_running_stats=track), torch.nn.Tanh()
    ).double()
    if track:
        net.eval()  # frozen running statistics

    def objective(x: Tensor, data: Tensor) -> Tensor:
        return (net(data * x) ** 2).mean() + ((x - 1) ** 2).sum()

    return net, objective


@pytest.mark.parametrize("track", [False, True], ids=["batch statistics", "frozen statistics"])
def test_batch_norm_in_the_objective_is_right_under_vmap(track: bool) -> None:
    _, objective = batch_norm_problem(track)
    data = randn(2, 6, 3, seed=11)
    layer = il.argmin(objective, newton, on_failure="ignore", linear_solver=il.ConjugateGradient(rtol=1e-12))
    run = lambda d: (layer(zeros(3), d) ** 2).sum()  # noqa: E731
    looped = torch.stack([grad(run)(d) for d in data])
    exact = [newton(objective, zeros(3), d) for d in data]
    expected = torch.stack([dense_gradients(objective, x, [d], 2 * x)[0] for x, d in zip(exact, data, strict=True)])
    assert relative_error(looped, expected) < 1e-8
    batched = vmap(grad(run))(data)
    assert relative_error(batched, expected) < 1e-8


def test_the_branch_of_a_learned_strength_is_reached() -> None:
    """`type(x) == a or b` is always true: the learned strength got no gradient."""
    for strength in (
        torch.tensor(2.0, dtype=F64, requires_grad=True),
        torch.nn.Parameter(torch.tensor(2.0, dtype=F64)),
        torch.nn.Parameter(torch.full((3,), 2.0, dtype=F64)),
    ):
        target, theta = randn(3, seed=12), randn(3, seed=13)
        objective = il.proximal(lambda phi, y: 0.5 * ((phi - y) ** 2).sum(), strength)
        phi = il.argmin(objective, lambda f, x, t, y: (y + 2 * t) / 3)(zeros(3), theta, target)
        phi.sum().backward()
        entries = (theta - target) / 9  # d/ds (y + s t) / (1 + s) = (t - y) / (1 + s)^2
        expected = entries if strength.ndim else entries.sum()
        assert strength.grad is not None and torch.allclose(strength.grad, expected, rtol=1e-9)


def test_a_callable_with_an_unrelated_run_attribute_is_still_called_as_a_solver() -> None:
    class Solver:
        def run(self) -> str:
            return "not for us"

        def __call__(self, objective: Any, x: Tensor, t: Tensor) -> Tensor:
            return t.clone()

    t = randn(3, seed=14).requires_grad_()
    x = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), Solver())(zeros(3), t)
    assert torch.equal(x, t)


def test_the_order_of_dictionary_keys_is_irrelevant_in_residuals_and_operators() -> None:
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    zeros = {"x": torch.zeros((), dtype=F64), "y": torch.zeros((), dtype=F64)}
    layer = il.root(lambda z, a: {"y": z["y"] - 3 * a, "x": z["x"] - a}, lambda r, z, a: {"y": 3 * a, "x": a})
    answer = layer(zeros, a)
    (answer["x"] + 10 * answer["y"]).backward()
    assert a.grad is not None and float(a.grad) == 31.0

    def objective(z: dict[str, Tensor]) -> Tensor:
        return z["x"] ** 2 + 2 * z["y"] ** 2

    operator = il.hessian_operator(objective, zeros)
    rhs = {"y": torch.tensor(4.0, dtype=F64), "x": torch.tensor(6.0, dtype=F64)}
    assert {k: float(v) for k, v in operator(rhs).items()} == {"x": 12.0, "y": 16.0}
    solution = il.linear_solve(operator, rhs)
    assert abs(float(solution["x"]) - 3) < 1e-12 and abs(float(solution["y"]) - 1) < 1e-12


def test_a_solver_that_reports_nan_but_returns_its_init_is_not_passed_over() -> None:
    layer = il.argmin(
        lambda x, t: ((x - t) ** 2).sum(), il.solvers.GradientDescent(0.5, rtol=1e-8), stationarity_rtol=None
    )
    with pytest.raises(il.NonFiniteError, match="met NaN or Inf and says so"):
        layer(torch.zeros(2, dtype=F64), torch.tensor([float("nan"), 4.0], dtype=F64))


def test_a_solver_sees_the_model_of_the_objective_also_under_vmap_and_with_closures() -> None:
    solver = il.solvers.NewtonCG(curvature="gauss_newton", rtol=1e-10)
    layer = il.argmin(il.least_squares(lambda x, t: torch.sinh(x) - t), solver)
    t = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=F64)
    x = torch.func.vmap(lambda t: layer(torch.zeros(2, dtype=F64), t))(t)
    assert torch.allclose(x, torch.asinh(t), rtol=1e-9)
    shift = torch.tensor(0.5, dtype=F64, requires_grad=True)
    closing = il.argmin(il.least_squares(lambda x: torch.sinh(x) - shift), solver)
    x = closing(torch.zeros(2, dtype=F64))
    x.sum().backward()
    assert shift.grad is not None and abs(float(shift.grad) - 2 / (1 + 0.25) ** 0.5) < 1e-8


def test_an_empty_batch_of_several_leaves_has_a_backward() -> None:
    layer = il.argmin(
        lambda x, t: ((x["a"] - t) ** 2).sum(-1) + ((x["b"] - 2 * t[..., :1]) ** 2).sum(-1),
        lambda f, x, t: {"a": t.clone(), "b": 2 * t[..., :1]},
        batch_dims=1,
    )
    t = torch.zeros(0, 3, dtype=F64, requires_grad=True)
    x = layer({"a": torch.zeros(0, 3, dtype=F64), "b": torch.zeros(0, 1, dtype=F64)}, t)
    (x["a"].sum() + x["b"].sum()).backward()
    assert t.grad is not None and t.grad.shape == (0, 3)
