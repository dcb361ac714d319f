"""The methods of il.meta on the network they are made for: conv4 in float64, two tasks of random images."""

from typing import Any

import pytest
import torch

import implicitlayer as il

F64 = torch.float64
B, WAYS = 2, 3
NETWORK = il.fewshot.conv4(WAYS, num_filters=4)
# Limits need a strength at which no ReLU changes its side on the way: with an ordinary one the inner minimum of this
# network lies on kinks of the loss, where gradients do not vanish and paths have no limit to compare with.
STRONG, STEP = 1000.0, 0.0009
DESCENT = il.solvers.GradientDescent(step_size=STEP, max_steps=30)


def task_loss(params: Any, batch: Any) -> torch.Tensor:
    return il.fewshot.task_cross_entropy(NETWORK(params, batch[0]), batch[1])


def problem() -> tuple[dict[str, torch.Tensor], Any, Any]:
    generator = torch.Generator().manual_seed(2)
    theta = {name: leaf.requires_grad_() for name, leaf in NETWORK.init(generator, dtype=F64).items()}

    def draw(shots: int) -> Any:
        images = torch.rand(B, WAYS * shots, 1, 28, 28, dtype=F64, generator=generator)
        return images, torch.arange(WAYS).repeat(shots).expand(B, -1)

    return theta, draw(2), draw(3)


def gradient_of(method: il.meta.MetaMethod, theta: Any, support: Any, query: Any) -> torch.Tensor:
    gradients = torch.autograd.grad(method(theta, support, query).mean(), list(theta.values()))
    return torch.cat([g.flatten() for g in gradients])


def test_zero_cg_steps_are_first_order_maml_on_conv4() -> None:
    theta, support, query = problem()
    solver = il.solvers.GradientDescent(step_size=0.1, max_steps=3)
    zero = il.meta.iMAML(task_loss, solver, strength=2.0, linear_solver=il.ConjugateGradient(max_steps=0))
    first = il.meta.FirstOrderMAML(task_loss, solver, strength=2.0)
    a, b = gradient_of(zero, theta, support, query), gradient_of(first, theta, support, query)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_maml_and_imaml_adapt_alike_and_agree_in_the_limit_on_conv4() -> None:
    theta, support, query = problem()
    exact = il.meta.iMAML(task_loss, DESCENT, strength=STRONG, linear_solver=il.ConjugateGradient(rtol=1e-12))
    maml = il.meta.MAML(task_loss, step_size=STEP, num_steps=30, strength=STRONG)
    a, b = exact.adapt(theta, support), maml.adapt(theta, support)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-12)
    implicit, unrolled = (gradient_of(method, theta, support, query) for method in (exact, maml))
    # contraction 1 - 0.0009·(1000 + h) with |h| below 100: 0.2^30 = 1e-21; CG to 1e-12 on a condition of about 1
    assert (implicit - unrolled).norm() < 1e-10 * implicit.norm()
    first = gradient_of(il.meta.FirstOrderMAML(task_loss, DESCENT, strength=STRONG), theta, support, query)
    assert (implicit - first).norm() > 1e-3 * implicit.norm()  # the Jacobian is not the identity here


def test_hessian_free_imaml_goes_down_on_conv4_and_costs_one_evaluation_for_each_trial_of_its_line_search() -> None:
    theta, support, query = problem()
    found = []
    for max_steps in (1, 2, 4):
        evaluations = []

        def counted(params: Any, batch: Any, seen: list[None] = evaluations) -> torch.Tensor:
            seen.append(None)
            return task_loss(params, batch)

        solver = il.solvers.NewtonCG(max_steps=max_steps, cg_steps=5)
        method = il.meta.iMAML(counted, solver, strength=2.0)
        with torch.no_grad(), il.diagnostics() as records:
            phi = method.adapt(theta, support)
        # products reuse the graph of the last evaluation: one at the start, then the trials of each step (at most 4 on
        # average here, where Newton's own length is nearly right)
        assert records[0].num_steps == max_steps
        assert 1 + max_steps <= len(evaluations) <= 1 + 4 * max_steps
        start = {name: leaf.detach().expand(B, *leaf.shape) for name, leaf in theta.items()}
        before, after = (method.inner_objective(point, theta, support).detach() for point in (start, phi))
        assert bool((after < before).all())
        found.append(after.mean().item())
    assert found == sorted(found, reverse=True)
    gradients = torch.autograd.grad(method(theta, support, query).mean(), list(theta.values()))
    assert all(bool(g.isfinite().all()) for g in gradients) and any(bool(g.abs().max() > 0) for g in gradients)


def test_hessian_free_and_gradient_descent_come_to_one_meta_gradient_on_conv4() -> None:
    theta, support, query = problem()
    newton = il.solvers.NewtonCG(max_steps=20, cg_steps=5, rtol=1e-12)
    settings: dict[str, Any] = {"strength": STRONG, "linear_solver": il.ConjugateGradient(rtol=1e-12)}
    a, b = (
        gradient_of(il.meta.iMAML(task_loss, solver, **settings), theta, support, query) for solver in (newton, DESCENT)
    )
    # both minima within 1e-12 of the first gradient over a curvature of 1000; the Hessian is Lipschitz between kinks
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10 * b.abs().max().item())


@pytest.mark.parametrize("momentum", [0.5, "nesterov"])
def test_a_task_of_a_batch_gets_the_gradient_that_it_gets_alone(momentum: Any) -> None:
    theta, support, query = problem()
    method = il.meta.MAML(task_loss, step_size=0.1, num_steps=2, strength=1.0, momentum=momentum)
    together = gradient_of(method, theta, support, query)
    alone = [
        gradient_of(method, theta, tuple(t[i : i + 1] for t in support), tuple(t[i : i + 1] for t in query))
        for i in range(B)
    ]
    torch.testing.assert_close(together, torch.stack(alone).mean(0), rtol=1e-9, atol=1e-12)
