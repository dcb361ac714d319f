"""What the methods of il.meta are to each other: limits, special cases, and the memory that tells them apart."""

import math
from typing import Any

import pytest
import torch
from meta.lines import Lines
from meta_problem import LAMBDA, B, N, assert_matches_differences, flat, gradient_of, problem, task_loss

import implicitlayer as il

F64 = torch.float64
CG = il.ConjugateGradient(rtol=1e-13)
MATRIX = 1.5 * torch.eye(N, dtype=F64) + 0.5 * torch.ones(N, N, dtype=F64)


@pytest.mark.parametrize(
    "strength",
    [LAMBDA, {"u": torch.tensor(0.5, dtype=F64), "w": torch.full((3, 2), 2.0, dtype=F64)}, il.MatrixStrength(MATRIX)],
    ids=["scalar", "per entry", "matrix"],
)
def test_imaml_with_zero_cg_steps_is_first_order_maml(strength: Any) -> None:
    theta, support, query = problem()
    solver = il.solvers.NewtonCG(max_steps=2, cg_steps=5)
    zero = il.meta.iMAML(task_loss, solver, strength=strength, linear_solver=il.ConjugateGradient(max_steps=0))
    first = il.meta.FirstOrderMAML(task_loss, solver, strength=strength)
    a, b = zero.adapt(theta, support), first.adapt(theta, support)
    assert all(torch.equal(a[name], b[name]) for name in a)
    # the cotangent goes through Λ⁻¹ and Λ: exact but for rounding on matrices of condition 4
    torch.testing.assert_close(
        gradient_of(zero, theta, support, query), gradient_of(first, theta, support, query), rtol=1e-13, atol=1e-14
    )


@pytest.mark.parametrize(
    "solver",
    [
        il.solvers.NewtonCG(max_steps=50, cg_steps=5, rtol=1e-12),
        il.solvers.AcceleratedGradient(max_steps=5000, rtol=1e-12),
        il.solvers.LBFGS(max_steps=500, rtol=1e-12),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_any_solver_that_converges_gives_the_same_meta_gradient(solver: Any) -> None:
    theta, support, query = problem()
    descent = il.solvers.GradientDescent(step_size=0.2, max_steps=5000, rtol=1e-12)
    plain = il.meta.iMAML(task_loss, descent, strength=LAMBDA, linear_solver=CG)
    other = il.meta.iMAML(task_loss, solver, strength=LAMBDA, linear_solver=CG)
    # residuals of 1e-12 times gradients of about 10 over a curvature of at least 0.1: minima within 1e-10
    torch.testing.assert_close(
        gradient_of(other, theta, support, query), gradient_of(plain, theta, support, query), rtol=1e-7, atol=1e-9
    )


@pytest.mark.parametrize("momentum", [0.0, 0.6, "nesterov"])
def test_imaml_with_exact_solves_is_the_limit_of_maml(momentum: Any) -> None:
    # Strongly convex: a linear model. H has eigenvalues in 0...4, so that κ < 1 + 4/λ and both paths contract.
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(B, 6, 4, dtype=F64, generator=generator)
    x = x / torch.linalg.matrix_norm(x, 2)[:, None, None] * 2
    batch = (x, torch.randn(B, 6, dtype=F64, generator=generator))
    other = (torch.randn(B, 6, 4, dtype=F64, generator=generator), torch.randn(B, 6, dtype=F64, generator=generator))
    theta = torch.randn(4, dtype=F64, generator=generator).requires_grad_()

    def linear(w: torch.Tensor, data: Any) -> torch.Tensor:
        return 0.5 * ((data[0] @ w.unsqueeze(-1)).squeeze(-1) - data[1]).square().sum(-1)

    solver = il.solvers.AcceleratedGradient(smoothness=5.0, strong_convexity=1.0, rtol=1e-14, max_steps=1000)
    implicit = il.meta.iMAML(linear, solver, strength=1.0, linear_solver=il.ConjugateGradient(rtol=1e-14))
    (exact,) = torch.autograd.grad(implicit(theta, batch, other).mean(), theta)
    errors = []
    for num_steps in (5, 20, 300):
        maml = il.meta.MAML(linear, step_size=0.2, num_steps=num_steps, strength=1.0, momentum=momentum)
        (gradient,) = torch.autograd.grad(maml(theta, batch, other).mean(), theta)
        errors.append(float((gradient - exact).norm() / exact.norm()))
    assert errors[0] > 1e-4 and errors[1] < 0.5 * errors[0]
    # plain: (1 - 0.2)^300 = 1e-29; "nesterov" without restarts falls like 1/k² at worst and like e^(-k/κ) here
    assert errors[2] < 1e-11


@pytest.mark.parametrize("matrix", [None, MATRIX], ids=["scalar", "matrix"])
def test_reptile_is_first_order_maml_on_the_training_loss_over_the_strength(matrix: torch.Tensor | None) -> None:
    theta, support, query = problem()
    solver = il.solvers.NewtonCG(max_steps=50, rtol=1e-13)
    strength: Any = LAMBDA if matrix is None else il.MatrixStrength(matrix)
    reptile = il.meta.Reptile(task_loss, solver, strength=strength)
    first = il.meta.FirstOrderMAML(task_loss, solver, strength=strength)
    moved = gradient_of(reptile, theta, support, query)  # the mean of θ − φ, whatever the query is
    pulled = LAMBDA * moved if matrix is None else matrix @ moved
    # stationarity Λ(θ − φ) = ∇L̂(φ) holds to 1e-13 times a gradient of about 10
    torch.testing.assert_close(pulled, gradient_of(first, theta, support, support), rtol=1e-10, atol=1e-12)


def test_reptile_returns_the_query_loss_and_its_own_gradient_is_not_that_of_it() -> None:
    theta, support, query = problem()
    solver = il.solvers.GradientDescent(step_size=0.1, max_steps=3)
    method = il.meta.Reptile(task_loss, solver, strength=LAMBDA)
    losses = method(theta, support, query)
    torch.testing.assert_close(losses.detach(), task_loss(method.adapt(theta, support), query), rtol=1e-14, atol=0)


def unrolled(start: Any, theta: Any, support: Any, momentum: Any, num_steps: int, alpha: Any = 0.1) -> Any:
    """Nesterov's steps written out, differentiable; t_k by its own recursion."""
    x = y = {name: leaf.expand(B, *leaf.shape) for name, leaf in start.items()}
    t = 1.0
    for _ in range(num_steps):
        pull = sum(((y[name] - theta[name]) ** 2).flatten(1).sum(1) for name in y)
        total = (task_loss(y, support) + 0.5 * LAMBDA * pull).sum()
        gradients = dict(zip(y, torch.autograd.grad(total, list(y.values()), create_graph=True), strict=True))
        new = {name: y[name] - alpha * gradients[name] for name in y}
        following = (1 + math.sqrt(1 + 4 * t * t)) / 2
        m = (t - 1) / following if momentum == "nesterov" else momentum
        t = following
        y = {name: new[name] + m * (new[name] - x[name]) for name in y}
        x = new
    return x


@pytest.mark.parametrize("momentum", [0.0, 0.7, "nesterov"])
def test_maml_is_autograd_through_its_steps_written_out(momentum: Any) -> None:
    theta, support, query = problem()
    method = il.meta.MAML(task_loss, step_size=0.1, num_steps=5, strength=LAMBDA, momentum=momentum)
    phi = unrolled(theta, theta, support, momentum, 5)
    expected = flat(
        dict(zip(theta, torch.autograd.grad(task_loss(phi, query).mean(), list(theta.values())), strict=True))
    )
    torch.testing.assert_close(gradient_of(method, theta, support, query), expected, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        torch.testing.assert_close(flat(method.adapt(theta, support), 1), flat(phi, 1), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("momentum", [0.0, 0.7, "nesterov"])
def test_truncation_at_the_start_is_maml_without_the_starts_share(momentum: Any) -> None:
    theta, support, query = problem()
    settings: dict[str, Any] = {"step_size": 0.1, "num_steps": 5, "strength": LAMBDA, "momentum": momentum}
    maml = il.meta.MAML(task_loss, **settings)
    truncated = il.meta.TruncatedMAML(task_loss, **settings, num_backward_steps=5)
    start = {name: leaf.detach().clone().requires_grad_() for name, leaf in theta.items()}
    phi = unrolled(start, {name: leaf.detach() for name, leaf in theta.items()}, support, momentum, 5)
    share = flat(dict(zip(start, torch.autograd.grad(task_loss(phi, query).mean(), list(start.values())), strict=True)))
    expected = gradient_of(maml, theta, support, query) - share
    assert share.norm() > 0.01 * expected.norm()
    torch.testing.assert_close(gradient_of(truncated, theta, support, query), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.7, "nesterov"])
def test_truncation_in_the_middle_goes_on_with_the_momentum_it_has(momentum: Any) -> None:
    theta, support, query = problem()
    settings: dict[str, Any] = {"step_size": 0.1, "num_steps": 5, "strength": LAMBDA, "momentum": momentum}
    maml = il.meta.MAML(task_loss, **settings)
    truncated = il.meta.TruncatedMAML(task_loss, **settings, num_backward_steps=2)
    a, b = maml.adapt(theta, support), truncated.adapt(theta, support)
    torch.testing.assert_close(flat(a, 1), flat(b, 1), rtol=1e-13, atol=1e-14)
    assert not torch.allclose(gradient_of(truncated, theta, support, query), gradient_of(maml, theta, support, query))


def test_maml_with_the_momentum_of_known_constants_takes_the_steps_of_accelerated_gradient() -> None:
    theta, support, _ = problem()
    solver = il.solvers.AcceleratedGradient(smoothness=10.0, strong_convexity=0.4, max_steps=6)
    implicit = il.meta.iMAML(task_loss, solver, strength=LAMBDA)
    m = (math.sqrt(25) - 1) / (math.sqrt(25) + 1)
    maml = il.meta.MAML(task_loss, step_size=0.1, num_steps=6, strength=LAMBDA, momentum=m)
    a, b = implicit.adapt(theta, support), maml.adapt(theta, support)
    torch.testing.assert_close(flat(a, 1), flat(b, 1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ["MAML", "TruncatedMAML"])
def test_a_learned_momentum_gets_its_gradient(kind: str) -> None:
    theta, support, query = problem()
    momentum = torch.tensor(0.5, dtype=F64, requires_grad=True)
    more = {} if kind == "MAML" else {"num_backward_steps": 4}
    method: il.meta.MetaMethod = getattr(il.meta, kind)(
        task_loss, step_size=0.1, num_steps=4, strength=LAMBDA, momentum=momentum, **more
    )
    assert [id(t) for t in method.parameters()] == [id(momentum)]
    assert_matches_differences(lambda: method(theta, support, query).sum(), [momentum], rtol=1e-6)


@pytest.mark.parametrize("momentum", [1.0, -0.1, math.nan, "heavy ball", torch.tensor([0.5, 0.5])])
def test_a_momentum_outside_its_range_is_refused(momentum: Any) -> None:
    with pytest.raises(ValueError, match=r'must be one number in 0 <= momentum < 1, or "nesterov"'):
        il.meta.MAML(task_loss, step_size=0.1, num_steps=1, momentum=momentum)


def test_first_order_methods_take_solvers_that_see_one_number() -> None:
    pytest.importorskip("scipy")
    theta, support, query = problem()
    scipy = il.solvers.SciPyMinimize(method="L-BFGS-B", options={"gtol": 1e-10, "ftol": 0.0})
    newton = il.solvers.NewtonCG(max_steps=50, rtol=1e-13)
    for kind in (il.meta.FirstOrderMAML, il.meta.Reptile):
        a, b = (kind(task_loss, solver, strength=LAMBDA) for solver in (scipy, newton))
        # gradients of 1e-10 over a curvature of at least 0.1
        torch.testing.assert_close(
            gradient_of(a, theta, support, query), gradient_of(b, theta, support, query), rtol=1e-7, atol=1e-8
        )


def num_nodes(losses: torch.Tensor) -> int:
    """Nodes of the graph that autograd keeps for ``losses``: a count, not a measurement."""
    found, todo = set(), [losses.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [before for before, _ in node.next_functions]
    return len(found)


def test_the_graph_of_imaml_is_flat_in_the_inner_steps_and_that_of_maml_grows_with_each() -> None:
    theta, support, query = problem()

    def sizes(method_of: Any) -> list[int]:
        return [num_nodes(method_of(num_steps)(theta, support, query)) for num_steps in (2, 4, 8)]

    def descent(num_steps: int) -> il.solvers.GradientDescent:
        return il.solvers.GradientDescent(step_size=0.1, max_steps=num_steps)

    implicit = sizes(lambda k: il.meta.iMAML(task_loss, descent(k), strength=LAMBDA))
    first = sizes(lambda k: il.meta.FirstOrderMAML(task_loss, descent(k), strength=LAMBDA))
    assert len(set(implicit)) == 1 and len(set(first)) == 1
    for momentum in (0.0, "nesterov"):
        maml = sizes(lambda k, m=momentum: il.meta.MAML(task_loss, step_size=0.1, num_steps=k, momentum=m))
        assert maml[2] - maml[1] == 2 * (maml[1] - maml[0]) > 0  # the same for every step
    cut: dict[str, Any] = {"step_size": 0.1, "strength": LAMBDA, "num_backward_steps": 2}
    truncated = sizes(lambda k: il.meta.TruncatedMAML(task_loss, num_steps=k, **cut))
    assert len(set(truncated)) == 1


def test_a_composite_loss_takes_gauss_newton_steps_and_gives_the_same_meta_gradient() -> None:
    """On lines with squared errors the Gauss-Newton matrix is the Hessian, and one Newton step is exact."""

    def lines(params: Any, batch: Any) -> torch.Tensor:
        return params["w"].unsqueeze(-1) * batch[0] + params["b"].unsqueeze(-1)

    def squares(outputs: Any, batch: Any) -> torch.Tensor:
        return (outputs - batch[1]).square().mean(-1)

    support, query = Lines(0).sample(3)
    theta = {name: torch.zeros((), dtype=torch.float64, requires_grad=True) for name in ("w", "b")}
    found = []
    for loss, curvature in (
        (il.composite(squares, lines), "gauss_newton"),
        (lambda params, batch: squares(lines(params, batch), batch), "hessian"),
    ):
        solver = il.solvers.NewtonCG(max_steps=2, cg_steps=2, curvature=curvature)
        losses = il.meta.iMAML(loss, solver, strength=0.5)(theta, support, query)
        found.append([losses, *torch.autograd.grad(losses.mean(), list(theta.values()))])
    # two steps of two exact CG steps each solve 2 x 2 systems of condition ~10: a few hundred roundings of 1e-16
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)
