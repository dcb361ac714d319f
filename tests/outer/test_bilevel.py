"""il.bilevel: the outer optimum against closed forms, the stop by a certified gradient, and what it costs."""

# Ridge: x = (A'A + e^t I)^-1 A'b, so the exact outer gradient comes from autograd through torch.linalg.solve, which
# shares no code with the layer. Where the result is CONVERGED, the exact gradient may exceed the tolerance only by what
# an estimate (not a bound) may be off by; one Newton step squares the distance, so a factor of 1.01 is more than that.

from functools import partial
from typing import Any

import pytest
import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il

N = 12
SCALES = torch.logspace(0, -0.5, N, dtype=F64)
A, A_HELD_OUT = randn(30, N, seed=0) * SCALES, randn(100, N, seed=1) * SCALES
WEIGHTS = randn(N, seed=2)
B, B_HELD_OUT = A @ WEIGHTS + randn(30, seed=3), A_HELD_OUT @ WEIGHTS + randn(100, seed=4)
START = torch.tensor(3.0, dtype=F64)
ADAM = partial(torch.optim.Adam, lr=0.2)


def ridge(x: Tensor, t: Tensor) -> Tensor:
    return ((A @ x - B) ** 2).sum() + t.exp() * (x**2).sum()


def held_out(x: Tensor, t: Tensor) -> Tensor:
    return ((A_HELD_OUT @ x - B_HELD_OUT) ** 2).mean()


def exact_gradient(t: Tensor) -> Tensor:
    leaf = t.detach().clone().requires_grad_()
    x = torch.linalg.solve(A.T @ A + leaf.exp() * torch.eye(N, dtype=F64), A.T @ B)
    return torch.autograd.grad(held_out(x, leaf), leaf)[0]


def search(solver: Any, **settings: Any) -> il.BilevelResult:
    settings = {"init": torch.zeros(N, dtype=F64), "optimizer": ADAM, "rtol": 1e-3} | settings
    return il.bilevel(held_out, il.argmin(ridge, solver), START, **settings)


LAYER = il.argmin(ridge, il.solvers.LBFGS())
ZEROS = torch.zeros(N, dtype=F64)
SOLVERS = {
    "quasi-Newton": il.solvers.LBFGS(),
    "first-order": il.solvers.AcceleratedGradient(),
    "not a dataclass": il.solvers.TorchOptimizer(torch.optim.LBFGS, max_steps=200, rtol=1e-3, max_iter=1),
    "SciPy's": il.solvers.SciPyMinimize("BFGS"),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_where_it_says_converged_the_exact_outer_gradient_is_below_the_tolerance(name: str) -> None:
    if name == "SciPy's":
        pytest.importorskip("scipy")
    result = search(SOLVERS[name])
    assert result.status is il.Status.CONVERGED
    assert result.tolerance == pytest.approx(1e-3 * float(exact_gradient(START).abs()), rel=1e-2)
    true = float(exact_gradient(result.theta).abs())
    assert true <= 1.01 * result.tolerance
    assert abs(true - result.gradient_norm) <= 1.01 * result.gradient_error + 1e-12
    assert "There is nothing to do" in result.explain()


def test_the_optimum_is_that_of_the_closed_form() -> None:
    result = search(il.solvers.LBFGS(), rtol=1e-5)
    low, high = torch.tensor(-6.0, dtype=F64), START.clone()
    for _ in range(60):  # bisection on the exact gradient, which changes its sign once here
        middle = (low + high) / 2
        low, high = (middle, high) if exact_gradient(middle) < 0 else (low, middle)
    assert result.status is il.Status.CONVERGED
    curvature = float((exact_gradient(low + 0.1) - exact_gradient(low)) / 0.1)
    assert float((result.theta - low).abs()) < 2 * result.tolerance / curvature


def test_an_inaccurate_solver_of_ones_own_is_made_better_by_newton_steps() -> None:
    def few_steps(f: Any, x: Tensor, t: Tensor) -> Tensor:
        for _ in range(3):
            x = x - 5e-3 * torch.func.grad(f)(x, t)
        return x

    result = search(few_steps)
    assert result.status is il.Status.CONVERGED
    assert float(exact_gradient(result.theta).abs()) <= 1.01 * result.tolerance


def test_it_takes_fewer_inner_steps_than_a_fixed_tight_tolerance_to_an_equal_answer() -> None:
    solver = il.solvers.AcceleratedGradient(rtol=1e-9)
    result = search(solver)
    theta = START.clone().requires_grad_()
    optimizer, layer = ADAM([theta]), il.argmin(ridge, solver)
    x, inner, linear = torch.zeros(N, dtype=F64), 0, 0
    for _ in range(3 * result.num_steps):
        optimizer.zero_grad()
        solution = layer(x, theta)
        held_out(solution, theta).backward()
        x = solution.detach()  # a warm start here too
        inner += layer.records[0].num_steps
        linear += layer.records[1].solution.num_steps
        if float(theta.grad.abs()) <= result.tolerance:
            break
        optimizer.step()
    assert float(exact_gradient(theta).abs()) <= 1.01 * result.tolerance  # an equal answer
    assert result.num_inner_steps < 0.5 * inner
    assert result.num_linear_steps < linear


def test_root_and_fixed_point_are_tuned_as_well() -> None:
    # x = tanh(a x + t) for a = 0.5; the outer optimum x = 0.6 has t = atanh(0.6) - 0.3
    target = torch.full((3,), 0.6, dtype=F64)
    outer = lambda x, t: ((x - target) ** 2).sum()  # noqa: E731
    layers = (
        il.root(lambda x, t: x - torch.tanh(0.5 * x + t), il.solvers.Newton()),
        il.fixed_point(lambda x, t: torch.tanh(0.5 * x + t), il.solvers.AndersonAcceleration()),
    )
    zeros = torch.zeros(3, dtype=F64)
    for layer in layers:
        result = il.bilevel(outer, layer, zeros, init=zeros, optimizer=ADAM, rtol=1e-6)
        assert result.status is il.Status.CONVERGED
        assert torch.allclose(result.theta, torch.atanh(target) - 0.3, atol=1e-5)  # curvature of order 1


def test_lanes_sets_and_a_tree_of_parameters_converge_to_the_closed_form() -> None:
    # x = max(0, t + s) lane by lane; outer asks for x = target, whose entries are positive
    target = torch.tensor([[0.5, 1.0], [2.0, 0.3]], dtype=F64)
    layer = il.argmin(
        lambda x, theta: ((x - theta["t"] - theta["s"]) ** 2).sum(-1),
        il.solvers.ProjectedGradient(),
        constraint=il.sets.NonNegative(),
        batch_dims=1,
    )
    theta = {"t": torch.ones(2, 2, dtype=F64), "s": torch.zeros((), dtype=F64)}
    result = il.bilevel(
        lambda x, theta: ((x - target) ** 2).sum(),
        layer,
        theta,
        init=torch.zeros(2, 2, dtype=F64),
        optimizer=ADAM,
        rtol=1e-6,
    )
    assert result.status is il.Status.CONVERGED
    assert torch.allclose(result.theta["t"] + result.theta["s"], target, atol=1e-5)
    assert torch.equal(theta["t"], torch.ones(2, 2, dtype=F64))  # what was given is untouched


def test_float32_ends_by_its_certificate_or_says_that_it_cannot() -> None:
    layer = il.argmin(
        lambda x, t: ((A.float() @ x - B.float()) ** 2).sum() + t.exp() * (x**2).sum(), il.solvers.LBFGS()
    )
    outer = lambda x, t: ((A_HELD_OUT.float() @ x - B_HELD_OUT.float()) ** 2).mean()  # noqa: E731
    found = [
        il.bilevel(outer, layer, START.float(), init=torch.zeros(N), optimizer=ADAM, rtol=rtol, max_steps=200)
        for rtol in (1e-2, 1e-9)
    ]
    assert found[0].status is il.Status.CONVERGED
    assert float(exact_gradient(found[0].theta.double()).abs()) <= 1.1 * found[0].tolerance  # rounding: 1e-6 of terms
    assert found[1].status is not il.Status.CONVERGED


def test_the_step_limit_is_told_with_the_gradient_and_its_error() -> None:
    result = search(il.solvers.LBFGS(), max_steps=3)
    assert result.status is il.Status.MAX_STEPS_REACHED and result.num_steps == 3
    assert abs(float(exact_gradient(result.theta).abs()) - result.gradient_norm) <= 1.01 * result.gradient_error + 1e-12
    assert "limit of 3 steps" in result.explain() and "max_steps" in result.explain()
    assert len(result.history) == 4 and result.history[0]["gradient_error"] is not None


def test_a_linear_solver_cut_short_is_not_taken_for_converged_and_is_named() -> None:
    layer = il.argmin(ridge, il.solvers.NewtonCG(), linear_solver=il.ConjugateGradient(max_steps=1))
    result = il.bilevel(held_out, layer, START - 4, init=ZEROS, optimizer=ADAM, max_steps=15)
    error = abs(float(exact_gradient(result.theta).abs()) - result.gradient_norm)
    # the Newton step is cut short too: a first-order estimate of an error as large as the gradient
    assert result.status is il.Status.MAX_STEPS_REACHED and error <= 1.2 * result.gradient_error
    assert "raise the max_steps of the layer's solver and linear solver" in result.explain()


def test_an_optimizer_that_no_longer_moves_theta_ends_the_run() -> None:
    result = search(il.solvers.LBFGS(), optimizer=partial(torch.optim.SGD, lr=0.0), max_steps=50)
    assert result.status is il.Status.STAGNATED and result.num_steps == 1
    assert "no longer moves theta" in result.explain()


def test_an_optimizer_over_theta_changes_it_in_place_and_may_search_along_lines() -> None:
    theta = START.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([theta], lr=0.1, max_iter=4)
    result = il.bilevel(held_out, LAYER, theta, init=ZEROS, optimizer=optimizer, rtol=1e-3)
    assert result.status is il.Status.CONVERGED and torch.equal(theta, result.theta)
    assert len(result.history) > result.num_steps + 1  # several gradients a step
    assert float(exact_gradient(theta).abs()) <= 1.01 * result.tolerance


def test_callback_plot_and_bar_show_every_step(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    seen: list[il.solvers.Iteration] = []
    result = search(il.solvers.LBFGS(), callback=seen.append, progress=True)
    assert [i.step for i in seen] == list(range(result.num_steps + 1))
    assert float(seen[-1].value) == result.value and torch.equal(seen[-1].x, result.theta)
    result.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 0 and "gradient norm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layer": lambda init, theta: init}, TypeError, "made by il.argmin, il.root or il.fixed_point, got function"),
        ({"max_steps": -1}, ValueError, "max_steps=-1 must be non-negative"),
        ({"rtol": float("nan")}, ValueError, "rtol=nan must be non-negative"),
        ({"theta": {"t": 3}}, TypeError, r"theta\['t'\] is int; all of theta is optimised"),
        ({"theta": []}, ValueError, "theta has no leaves"),
        ({"optimizer": lambda leaves: None}, TypeError, "optimizer made NoneType"),
        ({"optimizer": torch.optim.SGD([torch.zeros(1)])}, ValueError, "optimizer holds other tensors than theta"),
        ({"outer": lambda x, t: x}, ValueError, "outer.x, theta. must return a 0-d tensor .* shape"),
        ({"outer": lambda x, t: 1.0}, ValueError, "must return a 0-d tensor .* got float"),
        ({"outer": lambda x, t: t * float("inf")}, il.NonFiniteError, "the outer loss is .* Lower the learning rate"),
    ],
)
def test_a_wrong_use_is_named_with_the_remedy(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"outer": held_out, "layer": LAYER, "theta": START} | change
    keywords = {name: given.pop(name) for name in ("max_steps", "rtol", "optimizer") if name in given}
    with pytest.raises(error, match=message):
        il.bilevel(given["outer"], given["layer"], given["theta"], init=ZEROS, **keywords)


def test_a_layer_that_masks_lanes_is_refused() -> None:
    layer = il.argmin(lambda x, t: ((x - t) ** 2).sum(-1), il.solvers.NewtonCG(), batch_dims=1, on_failure="mask")
    with pytest.raises(ValueError, match='no use for a layer with on_failure="mask"'):
        il.bilevel(lambda x, t: x.sum(), layer, torch.zeros(2, 1, dtype=F64), init=torch.zeros(2, 1, dtype=F64))
