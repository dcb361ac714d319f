"""Strengths and step sizes in all their forms: number, tensor, per tensor, per entry, matrix, operator; learned too."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from meta_problem import LAMBDA, B, N, assert_matches_differences, dense_parts, flat, gradient_of, problem, task_loss
from references import randn

import implicitlayer as il

F64 = torch.float64
EXACT = il.solvers.AcceleratedGradient(smoothness=20.0, max_steps=5000, rtol=1e-13)
CG = il.ConjugateGradient(rtol=1e-13)


def positive(*shape: int, seed: int = 5) -> torch.Tensor:
    return 0.5 + torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def matrix() -> torch.Tensor:
    half = torch.randn(N, N, generator=torch.Generator().manual_seed(6), dtype=F64)
    return torch.eye(N, dtype=F64) + half @ half.mT / N


class Product(torch.nn.Module):
    """Lambda d for d in the structure of the parameters, one task."""

    def __init__(self, dense: torch.Tensor) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.linalg.cholesky(dense))

    def forward(self, d: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        out = self.factor @ (self.factor.mT @ flat(d))
        return {"u": out[:3], "w": out[3:].reshape(3, 2)}


# form -> (value for a method, the diagonal or matrix that it stands for), scaled by s
FORMS: dict[str, Callable[[float], tuple[Any, torch.Tensor]]] = {
    "number": lambda s: (s, s * torch.ones(N, dtype=F64)),
    "tensor": lambda s: (torch.tensor(s, dtype=F64), s * torch.ones(N, dtype=F64)),
    "per tensor": lambda s: (
        {"w": torch.tensor(2 * s, dtype=F64), "u": s},  # the order of keys does not matter
        torch.cat([s * torch.ones(3, dtype=F64), 2 * s * torch.ones(6, dtype=F64)]),
    ),
    "per entry": lambda s: (
        {"u": s * positive(3), "w": s * positive(3, 2, seed=8)},
        torch.cat([s * positive(3), s * positive(3, 2, seed=8).flatten()]),
    ),
    "matrix": lambda s: (il.MatrixStrength(s * matrix()), s * matrix()),
    "factor": lambda s: (il.MatrixStrength(factor=s**0.5 * torch.linalg.cholesky(matrix())), s * matrix()),
    "operator": lambda s: (il.OperatorStrength(Product(s * matrix()).requires_grad_(False)), s * matrix()),
    "callable": lambda s: (lambda: s, s * torch.ones(N, dtype=F64)),
}


def as_matrix(value: torch.Tensor) -> torch.Tensor:
    return value.diag() if value.ndim == 1 else value


@pytest.mark.parametrize("form", FORMS)
def test_the_jacobian_of_imaml_is_the_dense_solve_with_every_strength(form: str) -> None:
    theta, support, query = problem()
    strength, values = FORMS[form](LAMBDA)
    dense = as_matrix(values)
    method = il.meta.iMAML(task_loss, EXACT, strength=strength, linear_solver=CG)
    phi = method.adapt(theta, support)
    expected = torch.zeros(N, dtype=F64)
    for i in range(B):
        slope, hessian, v = dense_parts(phi, support, query, i)
        pull = dense @ (flat(phi, 1)[i] - flat(theta)).detach()
        # stationary for this very strength: an inner residual of 1e-13 times the first gradient (below 10)
        torch.testing.assert_close(slope + pull, torch.zeros_like(slope), rtol=0, atol=1e-11)
        expected += dense @ torch.linalg.solve(dense + hessian, v) / B  # (Λ + H)⁻¹Λ, transposed
    # CG to 1e-13 on a matrix of condition below 1e2, and an inner error of 1e-11: nine digits remain
    torch.testing.assert_close(gradient_of(method, theta, support, query), expected, rtol=1e-9, atol=1e-10)


def descended(
    start: Any, support: Any, num_steps: int, move: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Any:
    """Gradient descent written out: ``move(phi, gradient)``, flat, is taken off at each step."""
    phi = start
    for _ in range(num_steps):
        point = {name: leaf.clone().requires_grad_() for name, leaf in phi.items()}
        gradients = torch.autograd.grad(task_loss(point, support).sum(), list(point.values()))
        moved = flat(phi, 1) - move(flat(phi, 1), torch.cat([g.flatten(1) for g in gradients], 1))
        phi = {"u": moved[:, :3], "w": moved[:, 3:].reshape(B, 3, 2)}
    return phi


@pytest.mark.parametrize("form", FORMS)
def test_every_method_takes_every_strength_and_adapts_alike(form: str) -> None:
    theta, support, _ = problem()
    strength, values = FORMS[form](LAMBDA)
    dense = as_matrix(values)
    solver = il.solvers.GradientDescent(step_size=0.1, max_steps=4)
    steps: dict[str, Any] = {"step_size": 0.1, "num_steps": 4}
    methods = [
        il.meta.iMAML(task_loss, solver, strength=strength),
        il.meta.FirstOrderMAML(task_loss, solver, strength=strength),
        il.meta.Reptile(task_loss, solver, strength=strength),
        il.meta.MAML(task_loss, **steps, strength=strength),
        il.meta.TruncatedMAML(task_loss, **steps, strength=strength, num_backward_steps=2),
    ]
    phi = {name: leaf.detach().expand(B, *leaf.shape) for name, leaf in theta.items()}
    phi = descended(phi, support, 4, lambda phi, g: 0.1 * (g + (phi - flat(theta).detach()) @ dense))
    for method in methods:
        adapted = method.adapt(theta, support)
        torch.testing.assert_close(flat(adapted, 1).detach(), flat(phi, 1), rtol=1e-12, atol=1e-13)
        penalty = 0.5 * ((flat(phi, 1) - flat(theta).detach()) @ dense * (flat(phi, 1) - flat(theta).detach())).sum(1)
        value = method.inner_objective(phi, theta, support).detach()
        torch.testing.assert_close(value, task_loss(phi, support) + penalty, rtol=1e-12, atol=1e-13)


def learned(form: str, scale: float) -> tuple[Any, list[torch.Tensor]]:
    """A strength or step size in this form, and its tensors, which require a gradient."""
    if form == "operator":
        product = Product(scale * matrix())
        return il.OperatorStrength(product), [product.factor]
    if form.startswith("LearnedStrength of "):
        module = il.LearnedStrength(FORMS[form.removeprefix("LearnedStrength of ")](scale)[0])
        return module, list(module.parameters())
    value = FORMS[form](scale)[0]
    if isinstance(value, il.MatrixStrength):
        return value, [t.requires_grad_() for t in value.tensors]
    tensors = [t for t in ([value] if form == "tensor" else value.values()) if isinstance(t, torch.Tensor)]
    return value, [t.requires_grad_() for t in tensors]


LEARNED = ["tensor", "per tensor", "per entry", "factor", "operator", "LearnedStrength of per entry"]


@pytest.mark.parametrize("form", LEARNED)
@pytest.mark.parametrize("name", ["iMAML", "MAML", "TruncatedMAML"])
def test_a_learned_strength_gets_its_gradient_in_every_form(name: str, form: str) -> None:
    theta, support, query = problem()
    strength, tensors = learned(form, LAMBDA)
    steps: dict[str, Any] = {"step_size": 0.1, "num_steps": 3, "strength": strength}
    method: il.meta.MetaMethod = {
        "iMAML": lambda: il.meta.iMAML(task_loss, EXACT, strength=strength, linear_solver=CG),
        "MAML": lambda: il.meta.MAML(task_loss, **steps),
        "TruncatedMAML": lambda: il.meta.TruncatedMAML(task_loss, **steps, num_backward_steps=3),
    }[name]()
    assert [id(t) for t in method.parameters()] == [id(t) for t in tensors]
    # inner solves of iMAML to 1e-13 leave 1e-12 / h = 1e-7 in the differences
    assert_matches_differences(lambda: method(theta, support, query).sum(), tensors, rtol=1e-5)


@pytest.mark.parametrize("form", LEARNED)
@pytest.mark.parametrize("momentum", [0.0, "nesterov"])
def test_maml_learns_its_step_size_in_every_form(form: str, momentum: Any) -> None:
    theta, support, query = problem()
    step_size, tensors = learned(form, 0.1)
    method = il.meta.MAML(task_loss, step_size=step_size, num_steps=3, momentum=momentum)
    assert [id(t) for t in method.parameters()] == [id(t) for t in tensors]
    assert_matches_differences(lambda: method(theta, support, query).sum(), tensors, rtol=1e-6)


def test_truncated_maml_learns_the_step_size_of_its_last_steps() -> None:
    theta, support, query = problem()
    alpha = torch.tensor(0.1, dtype=F64, requires_grad=True)
    settings: dict[str, Any] = {"strength": LAMBDA, "num_steps": 5, "num_backward_steps": 2}
    method = il.meta.TruncatedMAML(task_loss, step_size=alpha, **settings)
    before = il.meta.MAML(task_loss, step_size=0.1, num_steps=3, strength=LAMBDA)
    with torch.no_grad():
        start = before.adapt(theta, support)

    def value() -> torch.Tensor:  # two steps from a start that is kept
        phi = start
        for _ in range(2):
            with torch.enable_grad():
                point = {name: leaf.clone().requires_grad_() for name, leaf in phi.items()}
                total = method.inner_objective(point, theta, support).sum()
                gradients = torch.autograd.grad(total, list(point.values()))
            phi = {name: leaf.detach() - alpha * g for (name, leaf), g in zip(point.items(), gradients, strict=True)}
        return task_loss(phi, query).sum()

    assert_matches_differences(
        lambda: method(theta, support, query).sum(), [alpha], rtol=1e-6, value_under_differences=value
    )


@pytest.mark.parametrize("form", [form for form in FORMS if form != "callable"])
def test_gradient_descent_takes_every_step_size(form: str) -> None:
    theta, support, _ = problem()
    step_size, values = FORMS[form](0.1)
    dense = as_matrix(values)
    init = {name: leaf.detach().expand(B, *leaf.shape) for name, leaf in theta.items()}
    phi = descended(init, support, 3, lambda phi, g: g @ dense)
    for settings in ({"max_steps": 3}, {"max_steps": 3, "rtol": 1e-9}):
        solver = il.solvers.GradientDescent(step_size=step_size, **settings)
        got = solver(task_loss, init, support)
        torch.testing.assert_close(flat(got, 1), flat(phi, 1), rtol=1e-13, atol=1e-14)
    with torch.no_grad():
        got = il.meta.MAML(task_loss, step_size=step_size, num_steps=3).adapt(theta, support)
    torch.testing.assert_close(flat(got, 1), flat(phi, 1), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("form", LEARNED)
@pytest.mark.parametrize("name", ["iMAML", "FirstOrderMAML"])
def test_the_last_step_gives_the_step_size_exactly_the_gradient_that_it_says(name: str, form: str) -> None:
    theta, support, query = problem()
    step_size, tensors = learned(form, 0.1)
    solver = il.solvers.GradientDescent(step_size=step_size, max_steps=4)
    kind: Any = getattr(il.meta, name)
    method = kind(task_loss, solver, strength=LAMBDA, step_size_gradient="last_step")
    assert [id(t) for t in method.parameters()] == [id(t) for t in tensors]
    # the definition: three steps with the present step size, kept; then one step that moves with it
    shorter = il.meta.MAML(task_loss, step_size=step_size, num_steps=3, strength=LAMBDA)
    with torch.no_grad():
        start = shorter.adapt(theta, support)
        start = {key: leaf.requires_grad_() for key, leaf in start.items()}
    total = method.inner_objective(start, theta, support).sum()
    slope = torch.autograd.grad(total, list(start.values()))
    point = flat(start, 1).detach()

    def value() -> torch.Tensor:
        now = step_size() if callable(step_size) else step_size
        if isinstance(now, il.MatrixStrength):
            move = torch.cat([g.flatten(1) for g in slope], 1) @ now.dense()
        elif isinstance(now, il.OperatorStrength):
            factor = now.product.factor
            move = torch.cat([g.flatten(1) for g in slope], 1) @ factor @ factor.mT
        else:
            now = now if isinstance(now, dict) else {"u": now, "w": now}
            move = flat({"u": now["u"] * slope[0], "w": now["w"] * slope[1]}, 1)
        moved = point - move
        return task_loss({"u": moved[:, :3], "w": moved[:, 3:].reshape(B, 3, 2)}, query).sum()

    # the value is that of the method, too: four steps
    torch.testing.assert_close(method(theta, support, query).sum().detach(), value().detach(), rtol=1e-12, atol=1e-13)
    assert_matches_differences(
        lambda: method(theta, support, query).sum(), tensors, rtol=1e-6, value_under_differences=value
    )


def test_the_last_step_changes_no_gradient_but_that_of_the_step_size() -> None:
    theta, support, query = problem()
    alpha = torch.tensor(0.1, dtype=F64, requires_grad=True)
    learning = il.solvers.GradientDescent(step_size=alpha, max_steps=4)
    fixed = il.solvers.GradientDescent(step_size=0.1, max_steps=4)
    for kind in (il.meta.iMAML, il.meta.FirstOrderMAML):
        a = kind(task_loss, learning, strength=LAMBDA, step_size_gradient="last_step")
        b = kind(task_loss, fixed, strength=LAMBDA)
        torch.testing.assert_close(
            gradient_of(a, theta, support, query), gradient_of(b, theta, support, query), rtol=1e-12, atol=1e-14
        )


def test_a_learned_step_size_lowers_the_query_loss_where_the_inner_problem_is_stopped_early() -> None:
    theta, support, _ = problem()
    step_size = il.LearnedStrength(0.01)
    solver = il.solvers.GradientDescent(step_size=step_size, max_steps=3)
    method = il.meta.iMAML(task_loss, solver, strength=0.1, step_size_gradient="last_step")
    optimizer = torch.optim.Adam(method.parameters(), lr=0.1)
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = method(theta, support, support).mean()  # the support set in place of the query: the longer the better
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]
    assert step_size().item() > 0.02


def test_step_sizes_that_would_stay_untrained_are_refused() -> None:
    theta, support, _ = problem()
    alpha = torch.tensor(0.1, dtype=F64, requires_grad=True)
    for form in (
        alpha,
        {"u": alpha, "w": 0.1},
        il.LearnedStrength(0.1),
        il.MatrixStrength(factor=matrix().requires_grad_()),
    ):
        solver = il.solvers.GradientDescent(step_size=form, max_steps=2)
        for kind in (il.meta.iMAML, il.meta.FirstOrderMAML):
            with pytest.raises(ValueError, match="the solution does not depend on it, and the path"):
                kind(task_loss, solver, strength=1.0)
        with pytest.raises(ValueError, match="Reptile has no gradient for it"):
            il.meta.Reptile(task_loss, solver)
        init = {name: leaf.detach().expand(B, *leaf.shape) for name, leaf in theta.items()}
        for settings in ({}, {"rtol": 1e-3}):
            bare = il.solvers.GradientDescent(step_size=form, max_steps=2, **settings)
            with pytest.raises(ValueError, match="none passes through a solver: it would never be trained"):
                bare(task_loss, init, support)
    with pytest.raises(ValueError, match="a first-order method does not differentiate the inner problem"):
        il.meta.FirstOrderMAML(task_loss, EXACT, strength=alpha)
    with pytest.raises(ValueError, match="a first-order method does not differentiate the inner problem"):
        il.meta.Reptile(task_loss, EXACT, strength=il.OperatorStrength(Product(matrix())))


@pytest.mark.parametrize(
    "solver",
    [
        EXACT,
        il.solvers.GradientDescent(step_size=0.1, max_steps=3, rtol=1e-3),
        il.solvers.GradientDescent(step_size=0.1, max_steps=3, line_search="armijo"),
        il.solvers.GradientDescent(step_size=0.1, max_steps=0),
    ],
)
def test_the_last_step_of_a_solver_without_a_known_one_is_refused(solver: Any) -> None:
    with pytest.raises(ValueError, match="the last step must be known"):
        il.meta.iMAML(task_loss, solver, step_size_gradient="last_step")


def test_a_step_by_a_matrix_that_is_not_symmetric_is_one_by_its_products() -> None:
    P, theta, data = torch.tensor([[0.1, 0.4], [-0.3, 0.2]], dtype=F64), randn(2, seed=1), randn(3, 2, seed=2)
    with pytest.raises(ValueError, match=r"As a step size, .* pass il.OperatorStrength\(lambda g: P @ g\)"):
        il.MatrixStrength(P)
    step = il.OperatorStrength(lambda g: P @ g)
    method = il.meta.MAML(lambda phi, t: ((phi - t) ** 2).sum(-1), step_size=step, num_steps=1)
    gradients = 2 * (theta - data)  # one row for each task
    torch.testing.assert_close(method.adapt(theta, data), theta - gradients @ P.T, rtol=1e-14, atol=1e-14)


def test_misuse_of_step_sizes_is_told_with_its_remedy() -> None:
    theta, support, query = problem()

    def maml(step_size: Any) -> il.meta.MAML:
        return il.meta.MAML(task_loss, step_size=step_size, num_steps=1)

    with pytest.raises(ValueError, match=re.escape("step_size=0.0 must be positive")):
        maml(0.0)
    with pytest.raises(ValueError, match=re.escape("step_size=-1.0 must be finite and non-negative")):
        maml({"u": -1.0, "w": 1.0})
    with pytest.raises(ValueError, match="must be finite and non-negative"):
        maml(torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match="step_size holds str; it must be a number, a tensor"):
        maml("large")
    with pytest.raises(ValueError, match=re.escape("step_size of shape (4,) does not broadcast to unknowns of shape")):
        maml(torch.ones(4, dtype=F64)).adapt(theta, support)
    with pytest.raises(ValueError, match="or have the structure of the unknowns: expected"):
        maml({"u": 0.1}).adapt(theta, support)
    with pytest.raises(ValueError, match="step_size is a matrix for 2 entries, but there are 9 unknowns"):
        maml(il.MatrixStrength(torch.eye(2, dtype=F64))).adapt(theta, support)
    with pytest.raises(ValueError, match="must return the structure and shapes of the unknowns"):
        maml(il.OperatorStrength(lambda d: d["u"])).adapt(theta, support)
    with pytest.raises(ValueError, match="must be a number with a line search"):
        il.solvers.GradientDescent(step_size=torch.tensor(0.1), line_search="armijo")
    with pytest.raises(ValueError, match=re.escape("step_size_gradient='yes' must be \"last_step\" or None")):
        il.meta.iMAML(task_loss, EXACT, step_size_gradient="yes")  # type: ignore[arg-type]
    solver = il.solvers.GradientDescent(step_size=torch.tensor(0.1, dtype=F64, requires_grad=True), max_steps=2)
    method = il.meta.iMAML(task_loss, solver, step_size_gradient="last_step")
    with pytest.raises(ValueError, match="Give all tasks as one batch in place of vmap"):
        torch.func.vmap(lambda t: method(t, support, query))({k: v.detach()[None] for k, v in theta.items()})


def test_a_step_size_of_zero_in_a_tree_freezes_its_tensor() -> None:
    theta, support, _ = problem()
    phi = il.meta.MAML(task_loss, step_size={"u": 0.1, "w": 0.0}, num_steps=3).adapt(theta, support)
    assert torch.equal(phi["w"], theta["w"].expand(B, 3, 2)) and not torch.equal(phi["u"], theta["u"].expand(B, 3))
