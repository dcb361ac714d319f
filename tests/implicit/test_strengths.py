"""Strengths that are matrices, factors, operators, or learned: against the dense (Lambda + H)^-1 Lambda."""

from typing import Any

import pytest
import torch
from references import F64, dense_gradients, newton, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il

N = 5
TIGHT = il.ConjugateGradient(rtol=1e-12)
MATRIX = 2 * spd_matrix(N, 1, 0)
FACTOR = randn(N, 3, seed=1)  # rank 3: positive semidefinite only


def loss(phi: Tensor, weight: Tensor) -> Tensor:
    """Strongly convex with constant 1, so that a semidefinite strength leaves a regular problem."""
    return torch.nn.functional.softplus(weight @ phi).sum() + 0.5 * (phi * phi).sum()


def strengths() -> dict[str, tuple[Any, Tensor, list[Tensor]]]:
    """Strength, its matrix as a differentiable expression, and the tensors that it is made of."""
    matrix, factor, closed = (t.clone().requires_grad_() for t in (MATRIX, FACTOR, MATRIX))
    return {
        "matrix": (il.MatrixStrength(matrix), (matrix + matrix.T) / 2, [matrix]),
        "factor": (il.MatrixStrength(factor=factor), factor @ factor.T, [factor]),
        "operator": (il.OperatorStrength(lambda d: closed @ d), (closed + closed.T) / 2, [closed]),
    }


@pytest.mark.parametrize("kind", ["matrix", "factor", "operator"])
def test_gradients_to_theta_and_strength_match_the_dense_formulas(kind: str) -> None:
    strength, matrix, tensors = strengths()[kind]
    theta, weight, v = randn(N, seed=3).requires_grad_(), randn(8, N, seed=1), randn(N, seed=4)
    layer = il.argmin(il.proximal(loss, strength), newton, linear_solver=TIGHT)
    phi = layer(theta.detach(), theta, weight)
    got = torch.autograd.grad(phi, [theta, *tensors], v)
    at = phi.detach()
    p = torch.sigmoid(weight @ at)
    hessian = weight.T @ ((p * (1 - p))[:, None] * weight) + torch.eye(N, dtype=F64)
    u = torch.linalg.solve(matrix.detach() + hessian, v)
    assert relative_error(got[0], matrix.detach() @ u) < 1e-9  # rtol 1e-12, condition below 1e2

    # Lambda's own: -u' dLambda (phi - theta), through the expression of the matrix in its tensors
    expected = torch.autograd.grad(-(u @ matrix @ (at - theta.detach())), tensors)
    assert relative_error(got[1], expected[0]) < 1e-9


@pytest.mark.parametrize("kind", ["matrix", "factor", "operator"])
def test_the_objective_is_the_written_out_one(kind: str) -> None:
    strength, matrix, _ = strengths()[kind]
    phi, theta, weight = randn(N, seed=2), randn(N, seed=3), randn(8, N, seed=1)
    d = phi - theta
    value = il.proximal(loss, strength)(phi, theta, weight)
    assert torch.allclose(value, loss(phi, weight) + 0.5 * d @ matrix @ d, rtol=1e-14)


def test_zero_steps_with_a_matrix_give_the_cotangent() -> None:
    """First-order MAML: (I + Lambda^-1 H) g = v, not solved at all."""
    theta, v = randn(N, seed=3).requires_grad_(), randn(N, seed=4)
    objective = il.proximal(loss, il.MatrixStrength(MATRIX))
    layer = il.argmin(objective, newton, linear_solver=il.ConjugateGradient(max_steps=0), stationarity_rtol=None)
    (gradient,) = torch.autograd.grad(layer(theta.detach(), theta, randn(8, N, seed=1)), theta, v)
    assert relative_error(gradient, v) < 1e-13  # Lambda Lambda^-1 v, condition 10


def test_truncated_steps_are_those_of_the_preconditioned_system() -> None:
    theta, weight, v = randn(N, seed=3).requires_grad_(), randn(8, N, seed=1), randn(N, seed=4)
    objective = il.proximal(loss, il.MatrixStrength(MATRIX))
    layer = il.argmin(objective, newton, linear_solver=il.ConjugateGradient(max_steps=2))
    phi = layer(theta.detach(), theta, weight)
    (gradient,) = torch.autograd.grad(phi, theta, v)
    p = torch.sigmoid(weight @ phi.detach())
    hessian = weight.T @ ((p * (1 - p))[:, None] * weight) + torch.eye(N, dtype=F64)
    root = torch.linalg.cholesky(MATRIX)
    inverse = torch.linalg.inv(root)
    system = torch.eye(N, dtype=F64) + inverse @ hessian @ inverse.T
    y = il.ConjugateGradient(max_steps=2)(system, inverse @ v).value  # u = L^-T y, g = Lambda u = L y
    assert relative_error(gradient, root @ y) < 1e-12


@pytest.mark.parametrize("kind", ["matrix", "factor", "operator"])
def test_lanes_share_a_strength_by_vmap_and_by_batch_dims(kind: str) -> None:
    strength, matrix, _ = strengths()[kind]
    theta, weights, v = randn(N, seed=3).requires_grad_(), randn(3, 8, N, seed=1), randn(3, N, seed=4)
    alone = il.argmin(il.proximal(loss, strength), newton, linear_solver=TIGHT)
    loop = [torch.autograd.grad(alone(theta.detach(), theta, w), theta, v[i])[0] for i, w in enumerate(weights)]
    by_vmap = torch.func.vmap(lambda w: alone(theta.detach(), theta, w))(weights)
    (got,) = torch.autograd.grad(by_vmap, theta, v)
    assert relative_error(got, sum(loop)) < 1e-9  # type: ignore[arg-type]

    def lane_loss(phi: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.softplus((weight @ phi.unsqueeze(-1))[..., 0]).sum(-1) + 0.5 * (phi**2).sum(-1)

    batched = il.argmin(
        il.proximal(lane_loss, strength),
        lambda f, x, *t: torch.stack(
            [newton(lambda y, w: il.proximal(loss, strength)(y, t[0], w), x[i], t[1][i]) for i in range(3)]
        ),
        linear_solver=TIGHT,
        batch_dims=1,
    )
    (got,) = torch.autograd.grad(batched(theta.detach().expand(3, N), theta, weights), theta, v)
    assert relative_error(got, sum(loop)) < 1e-9  # type: ignore[arg-type]
    assert matrix.shape == (N, N)


def test_a_matrix_counts_the_entries_of_all_leaves_in_their_order() -> None:
    strength = il.MatrixStrength(MATRIX)
    tree = {"a": randn(2, seed=0), "b": randn(3, seed=1)}
    zero = {"a": torch.zeros(2, dtype=F64), "b": torch.zeros(3, dtype=F64)}
    flat = torch.cat([tree["a"], tree["b"]])
    value = il.proximal(lambda phi: 0 * phi["a"].sum(), strength)(tree, zero)
    assert torch.allclose(value, 0.5 * flat @ MATRIX @ flat, rtol=1e-14)
    with pytest.raises(ValueError, match="matrix for 5 entries, but phi has 4"):
        il.proximal(lambda phi: phi.sum(), strength)(torch.zeros(4, dtype=F64), torch.zeros(4, dtype=F64))


@pytest.mark.parametrize(
    "initial",
    [2.0, torch.tensor([0.5, 1e-3, 40.0], dtype=F64), {"a": torch.tensor(3.0, dtype=F64), "b": 0.25}],
    ids=["number", "entries", "tree"],
)
def test_a_learned_strength_starts_at_its_initial_value_and_stays_positive(initial: Any) -> None:
    strength = il.LearnedStrength(initial)
    leaves = torch.utils._pytree.tree_leaves(strength())
    for got, expected in zip(leaves, torch.utils._pytree.tree_leaves(initial), strict=True):
        assert torch.allclose(got.double(), torch.as_tensor(expected).double(), rtol=1e-6)
    optimizer = torch.optim.SGD(strength.parameters(), lr=10.0)
    for _ in range(20):  # pushed down as hard as it goes
        optimizer.zero_grad()
        torch.stack([leaf.sum().double() for leaf in torch.utils._pytree.tree_leaves(strength())]).sum().backward()
        optimizer.step()
    assert all(bool((leaf >= 0).all()) for leaf in torch.utils._pytree.tree_leaves(strength()))


def test_a_learned_matrix_starts_at_its_initial_value() -> None:
    strength = il.LearnedStrength(il.MatrixStrength(MATRIX))
    assert torch.allclose(strength().dense(), MATRIX, rtol=1e-12)
    assert torch.equal(il.LearnedStrength(il.MatrixStrength(factor=FACTOR))().dense(), FACTOR @ FACTOR.T)


def test_a_learned_strength_inside_an_objective_gets_its_gradient() -> None:
    strength = il.LearnedStrength(torch.tensor(0.7, dtype=F64))
    theta, weight, v = randn(N, seed=3), randn(8, N, seed=1), randn(N, seed=4)
    phi = il.argmin(il.proximal(loss, strength), newton, linear_solver=TIGHT)(theta, theta, weight)
    (got,) = torch.autograd.grad(phi, list(strength.parameters()), v)
    raw = next(strength.parameters()).detach()

    def written_out(phi: Tensor, raw: Tensor) -> Tensor:
        return loss(phi, weight) + 0.5 * torch.nn.functional.softplus(raw) * ((phi - theta) ** 2).sum()

    (expected,) = dense_gradients(written_out, phi.detach(), [raw], v)
    assert relative_error(got, expected) < 1e-9


def test_imaml_learns_a_matrix() -> None:
    strength = il.LearnedStrength(il.MatrixStrength(MATRIX))
    method = il.meta.iMAML(
        lambda phi, target: 0.5 * ((phi - target) ** 2).sum(-1),
        il.solvers.GradientDescent(step_size=0.3, max_steps=200),
        strength=strength,
        linear_solver=il.ConjugateGradient(rtol=1e-12),
    )
    theta, support, query = randn(N, seed=3).requires_grad_(), randn(2, N, seed=1), randn(2, N, seed=2)
    losses = method(theta, support, query)
    parameters = method.parameters()
    assert len(parameters) == 1
    got = torch.autograd.grad(losses.sum(), [theta, *parameters])
    # phi = (Lambda + I)^-1 (support + Lambda theta)
    factor = parameters[0].detach().clone().requires_grad_()
    matrix = factor @ factor.T
    start = theta.detach().clone().requires_grad_()
    phi = torch.linalg.solve(matrix + torch.eye(N, dtype=F64), (support + matrix @ start).T).T
    expected = torch.autograd.grad(0.5 * ((phi - query) ** 2).sum(), [start, factor])
    for g, e in zip(got, expected, strict=True):
        assert relative_error(g, e) < 1e-8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give one tensor"),
        ({"matrix": MATRIX, "factor": FACTOR}, "give one tensor"),
        ({"matrix": torch.ones(3, dtype=F64)}, "give one tensor"),
        ({"matrix": FACTOR}, r"shape \(5, 3\); a strength is square"),
        ({"matrix": randn(N, N, seed=0)}, "not symmetric"),
        ({"matrix": -MATRIX}, "has the eigenvalue -"),
        ({"matrix": MATRIX * float("nan")}, "holds NaN or Inf"),
        ({"matrix": torch.ones(2, 2, dtype=torch.int64)}, r"must be floating, got torch\.int64"),
    ],
)
def test_matrices_that_are_no_strength_are_refused(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        il.MatrixStrength(**arguments)


def test_learned_strengths_that_cannot_start_are_refused() -> None:
    with pytest.raises(ValueError, match="must be positive and finite: a learned strength starts above zero"):
        il.LearnedStrength(torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="not positive definite"):
        il.LearnedStrength(il.MatrixStrength(FACTOR @ FACTOR.T))
    with pytest.raises(ValueError, match="must return the structure and shapes of phi - theta"):
        il.proximal(lambda phi: phi.sum(), il.OperatorStrength(lambda d: d.sum()))(torch.ones(2), torch.zeros(2))


def test_a_matrix_of_another_precision_is_cast() -> None:
    phi, theta = randn(N, seed=2), randn(N, seed=3)
    for strength in (il.MatrixStrength(MATRIX.float()), il.MatrixStrength(factor=FACTOR.float())):
        d, matrix = phi - theta, strength.dense().double()
        value = il.proximal(lambda phi: 0 * phi.sum(), strength)(phi, theta)
        assert torch.allclose(value, 0.5 * d @ matrix @ d, rtol=1e-5)


def test_transforms_in_the_matrix_itself_are_right() -> None:
    """phi = (I + Lambda)^-1 (c + Lambda c) = c for theta = c; so vary theta: phi = (I + Lambda)^-1 (c + 2 Lambda c)."""
    c = torch.tensor([1.0, 2.0], dtype=F64)
    matrix = torch.tensor([[1.0, 0.2], [0.2, 2.0]], dtype=F64)
    eye = torch.eye(2, dtype=F64)

    def loss(matrix: Tensor) -> Tensor:
        objective = il.proximal(lambda phi: 0.5 * phi @ phi - c @ phi, il.MatrixStrength(matrix))
        layer = il.argmin(objective, newton, linear_solver=TIGHT)
        return (layer(0 * c, 2 * c) ** 2).sum()  # type: ignore[no-any-return]

    def written_out(matrix: Tensor) -> Tensor:
        symmetric = (matrix + matrix.T) / 2
        return (torch.linalg.solve(eye + symmetric, c + 2 * symmetric @ c) ** 2).sum()

    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        assert torch.allclose(transform(loss)(matrix), transform(written_out)(matrix), rtol=1e-8, atol=1e-10)
    lanes = torch.stack([matrix, 2 * matrix])
    assert torch.allclose(
        torch.func.vmap(torch.func.grad(loss))(lanes), torch.stack([torch.func.grad(written_out)(m) for m in lanes])
    )
