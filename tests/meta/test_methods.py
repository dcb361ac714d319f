"""The methods of il.meta against dense linear algebra, each other, and finite differences of what they compute."""

import re
from typing import Any

import pytest
import torch
from meta_problem import LAMBDA, B, dense_parts, flat, gradient_of, problem, task_loss

import implicitlayer as il

EXACT = il.solvers.GradientDescent(step_size=0.2, max_steps=1000)


def imaml(**settings: Any) -> il.meta.iMAML:
    defaults: dict[str, Any] = {"strength": LAMBDA, "linear_solver": il.ConjugateGradient(rtol=1e-13)}
    return il.meta.iMAML(task_loss, EXACT, **(defaults | settings))


def test_meta_gradient_is_the_dense_solve_of_lemma_1() -> None:
    theta, support, query = problem()
    method = imaml()
    phi = {name: leaf.detach() for name, leaf in method.adapt(theta, support).items()}
    expected = torch.zeros(9, dtype=torch.float64)
    for i in range(B):
        _, hessian, v = dense_parts(phi, support, query, i)
        expected += torch.linalg.solve(torch.eye(9, dtype=torch.float64) + hessian / LAMBDA, v) / B
    # CG to 1e-13 on a matrix of condition below 1e2: eleven digits remain
    torch.testing.assert_close(gradient_of(method, theta, support, query), expected, rtol=1e-10, atol=1e-12)


def test_meta_gradient_matches_central_differences_of_the_outer_loss() -> None:
    theta, support, query = problem()
    method = imaml()
    expected = torch.zeros(9, dtype=torch.float64)
    h = 1e-5  # error h² of the differences, and 1e-13 / h of the inner solves: 1e-8 in all
    for k in range(9):
        values = []
        for sign in (1, -1):
            vector = flat(theta).detach().clone()
            vector[k] += sign * h
            with torch.no_grad():
                moved = {"u": vector[:3], "w": vector[3:].reshape(3, 2)}
                values.append(method(moved, support, query).mean())
        expected[k] = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close(gradient_of(method, theta, support, query), expected, rtol=1e-6, atol=1e-8)


def test_zero_cg_steps_give_the_first_order_gradient() -> None:
    theta, support, query = problem()
    solver = il.solvers.GradientDescent(step_size=0.1, max_steps=7)
    zero = il.meta.iMAML(task_loss, solver, strength=LAMBDA, linear_solver=il.ConjugateGradient(max_steps=0))
    first = il.meta.FirstOrderMAML(task_loss, solver, strength=LAMBDA)
    a, b = gradient_of(zero, theta, support, query), gradient_of(first, theta, support, query)
    torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)  # the same numbers in another order
    exact = il.meta.iMAML(task_loss, solver, strength=LAMBDA, linear_solver=il.ConjugateGradient(rtol=1e-12))
    assert (a - gradient_of(exact, theta, support, query)).norm() > 0.05 * a.norm()  # and the knob does something


def test_more_cg_steps_come_closer_to_the_exact_meta_gradient() -> None:
    theta, support, query = problem()
    exact = gradient_of(imaml(), theta, support, query)
    errors = []
    for num_steps in (0, 2, 4, 9):
        method = imaml(linear_solver=il.ConjugateGradient(max_steps=num_steps))
        errors.append(float((gradient_of(method, theta, support, query) - exact).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8  # n = 9 steps are exact but for rounding


@pytest.mark.parametrize("num_steps", [0, 3, None])
def test_a_batch_of_tasks_equals_a_loop_over_tasks(num_steps: int | None) -> None:
    theta, support, query = problem()
    linear_solver = il.ConjugateGradient(rtol=1e-12) if num_steps is None else il.ConjugateGradient(max_steps=num_steps)
    method = imaml(linear_solver=linear_solver)
    together = gradient_of(method, theta, support, query)
    loop = torch.zeros_like(together)
    for i in range(B):
        one = [tuple(part[i : i + 1] for part in batch) for batch in (support, query)]
        losses = method(theta, *one)
        gradient = torch.autograd.grad(losses.sum(), list(theta.values()))
        loop += flat(dict(zip(theta, gradient, strict=True))) / B
    torch.testing.assert_close(together, loop, rtol=1e-9, atol=1e-12)  # CG stops at 1e-12, condition below 1e2


def test_a_learned_strength_gets_its_gradient() -> None:
    theta, support, query = problem()
    strength = torch.tensor(LAMBDA, dtype=torch.float64, requires_grad=True)
    method = imaml(strength=strength)
    assert method.parameters() == [strength]
    (gradient,) = torch.autograd.grad(method(theta, support, query).sum(), strength)
    h = 1e-5
    with torch.no_grad():
        up, down = (imaml(strength=LAMBDA + s * h)(theta, support, query).sum() for s in (1, -1))
    torch.testing.assert_close(gradient, (up - down) / (2 * h), rtol=1e-6, atol=1e-8)


class Softplus(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.raw = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self) -> torch.Tensor:
        return torch.nn.functional.softplus(self.raw)


def test_a_strength_module_is_asked_at_every_call_and_learned() -> None:
    theta, support, query = problem()
    module = Softplus()
    method = imaml(strength=module)
    assert method.parameters() == [module.raw]
    h, values = 1e-5, []
    for shift in (h, -h):
        with torch.no_grad():
            module.raw.copy_(0.3 + shift)
            values.append(method(theta, support, query).sum())
            module.raw.copy_(0.3)
    (gradient,) = torch.autograd.grad(method(theta, support, query).sum(), module.raw)
    torch.testing.assert_close(gradient, (values[0] - values[1]) / (2 * h), rtol=1e-6, atol=1e-8)


def test_a_learned_strength_that_became_negative_is_an_error() -> None:
    theta, support, _ = problem()
    strength = torch.tensor(LAMBDA, dtype=torch.float64, requires_grad=True)
    method = imaml(strength=strength)
    with torch.no_grad():
        strength.fill_(-0.1)
    with pytest.raises(ValueError, match="must be non-negative"):
        method.adapt(theta, support)


@pytest.mark.parametrize("strength", [0.0, LAMBDA])
def test_maml_is_the_gradient_of_its_own_steps(strength: float) -> None:
    theta, support, query = problem()
    method = il.meta.MAML(task_loss, step_size=0.1, num_steps=4, strength=strength)
    gradient = gradient_of(method, theta, support, query)
    h, expected = 1e-6, torch.zeros(9, dtype=torch.float64)
    for k in range(9):
        values = []
        for sign in (1, -1):
            vector = flat(theta).detach().clone()
            vector[k] += sign * h
            with torch.no_grad():
                values.append(method({"u": vector[:3], "w": vector[3:].reshape(3, 2)}, support, query).mean())
        expected[k] = (values[0] - values[1]) / (2 * h)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_long_maml_and_long_truncation_come_to_the_implicit_gradient() -> None:
    theta, support, query = problem()
    exact = gradient_of(imaml(), theta, support, query)
    maml = il.meta.MAML(task_loss, step_size=0.2, num_steps=300, strength=LAMBDA)
    errors = [float((gradient_of(maml, theta, support, query) - exact).norm())]
    for backward in (150, 20, 2):
        method = il.meta.TruncatedMAML(
            task_loss, step_size=0.2, num_steps=300, strength=LAMBDA, num_backward_steps=backward
        )
        errors.append(float((gradient_of(method, theta, support, query) - exact).norm()))
    assert errors[0] < 1e-6 and errors[1] < 1e-6  # the inner problem is contracted by (1 - 0.2·μ)^150
    assert errors[1] < errors[2] < errors[3]


def test_reptile_moves_towards_the_adapted_parameters() -> None:
    theta, support, query = problem()
    method = il.meta.Reptile(task_loss, il.solvers.GradientDescent(step_size=0.1, max_steps=5))
    phi = method.adapt(theta, support)
    expected = flat(theta).detach() - flat(phi, 1).mean(0)
    torch.testing.assert_close(gradient_of(method, theta, support, query), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(method(theta, support, query).detach(), task_loss(phi, query))


def test_every_method_adapts_to_the_same_parameters_on_the_same_problem() -> None:
    theta, support, _ = problem()
    solver = il.solvers.GradientDescent(step_size=0.1, max_steps=6)
    methods = [
        il.meta.iMAML(task_loss, solver, strength=LAMBDA),
        il.meta.FirstOrderMAML(task_loss, solver, strength=LAMBDA),
        il.meta.Reptile(task_loss, solver, strength=LAMBDA),
        il.meta.MAML(task_loss, step_size=0.1, num_steps=6, strength=LAMBDA),
        il.meta.TruncatedMAML(task_loss, step_size=0.1, num_steps=6, strength=LAMBDA, num_backward_steps=2),
    ]
    reference = flat(methods[0].adapt(theta, support), 1)
    for method in methods:
        with torch.no_grad():
            adapted = flat(method.adapt(theta, support), 1)
        torch.testing.assert_close(adapted, reference.detach(), rtol=1e-12, atol=1e-14)
        before = method.inner_objective({k: v.expand(B, *v.shape) for k, v in theta.items()}, theta, support)
        after = method.inner_objective(method.adapt(theta, support), theta, support)
        assert bool((after < before).all())


def test_misuse_is_told_with_its_remedy() -> None:
    theta, support, _ = problem()
    solver = il.solvers.GradientDescent(step_size=0.1, max_steps=2)
    with pytest.raises(ValueError, match=re.escape("strength=-1.0 must be non-negative")):
        il.meta.FirstOrderMAML(task_loss, solver, strength=-1.0)
    with pytest.raises(ValueError, match="num_steps=-1 must be an integer of at least 0"):
        il.meta.MAML(task_loss, step_size=0.1, num_steps=-1)
    with pytest.raises(ValueError, match=re.escape("strength=0.0 must be positive")):
        il.meta.TruncatedMAML(task_loss, step_size=0.1, num_steps=2)
    with pytest.raises(ValueError, match=re.escape("num_backward_steps=3 must be an integer in 1...num_steps=2")):
        il.meta.TruncatedMAML(task_loss, step_size=0.1, num_steps=2, strength=1.0, num_backward_steps=3)
    with pytest.raises(ValueError, match="all must share one, the number of tasks"):
        imaml().adapt(theta, (support[0], support[1][:2]))
