"""The proximal objective of implicit MAML: gradients against the dense (Lambda + H)^-1 Lambda."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, central_differences, dense_gradients, newton, randn, relative_error, spd_matrix
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, vmap

import implicitlayer as il

N = 5
TIGHT = il.ConjugateGradient(rtol=1e-12)


def loss(phi: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    """Convex, smooth, with a curvature between 0 and about 10."""
    return torch.nn.functional.softplus(weight @ phi + offset).sum()


def data() -> tuple[Tensor, Tensor]:
    return randn(8, N, seed=1).requires_grad_(), randn(8, seed=2).requires_grad_()


def hessian_of_loss(phi: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    p = torch.sigmoid(weight @ phi + offset)
    return weight.T @ ((p * (1 - p))[:, None] * weight)


STRENGTHS: dict[str, Tensor] = {
    "scalar": torch.tensor(0.7, dtype=F64),
    "one entry": torch.tensor([0.7], dtype=F64),
    "per entry": torch.tensor([0.1, 0.5, 1.0, 5.0, 20.0], dtype=F64),
}


@pytest.mark.parametrize("kind", STRENGTHS)
def test_gradients_to_theta_strength_and_data_match_the_dense_formulas(kind: str) -> None:
    strength = STRENGTHS[kind].clone().requires_grad_()
    theta, (weight, offset), v = randn(N, seed=3).requires_grad_(), data(), randn(N, seed=4)
    phi = il.argmin(il.proximal(loss, strength), newton, linear_solver=TIGHT)(theta.detach(), theta, weight, offset)
    got = torch.autograd.grad(phi, (theta, strength, weight, offset), v)
    at = phi.detach()
    diagonal = strength.detach().expand(N)
    inverse = torch.linalg.inv(torch.diag(diagonal) + hessian_of_loss(at, weight.detach(), offset.detach()))
    u = inverse @ v
    assert relative_error(got[0], diagonal * u) < 1e-9  # (Lambda (Lambda + H)^-1)' v; rtol 1e-12, condition below 1e3
    to_entries = -(at - theta.detach()) * u
    expected = to_entries if kind == "per entry" else to_entries.sum().reshape(strength.shape)
    assert relative_error(got[1], expected) < 1e-9

    def written_out(phi: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        return loss(phi, weight, offset) + 0.5 * (diagonal * (phi - theta.detach()) ** 2).sum()

    for g, e in zip(got[2:], dense_gradients(written_out, at, [weight, offset], v), strict=True):
        assert relative_error(g, e) < 1e-9


@pytest.mark.parametrize("strength", [2.0, 3])
def test_a_plain_number_is_a_strength(strength: float) -> None:
    theta, (weight, offset), v = randn(N, seed=3).requires_grad_(), data(), randn(N, seed=4)
    phi = il.argmin(il.proximal(loss, strength), newton)(theta.detach(), theta, weight, offset)
    (gradient,) = torch.autograd.grad(phi, theta, v)
    h = hessian_of_loss(phi.detach(), weight.detach(), offset.detach())
    assert relative_error(gradient, torch.linalg.solve(torch.eye(N, dtype=F64) + h / strength, v)) < 1e-8


def tree_loss(phi: dict[str, Any], weight: Tensor, offset: Tensor) -> Tensor:
    return loss(torch.cat([phi["w"].reshape(-1), phi["b"][0].reshape(1)]), weight, offset)


def tree(flat: Tensor) -> dict[str, Any]:
    return {"w": flat[:4].reshape(2, 2), "b": (flat[4],)}


def flat(phi: dict[str, Any]) -> Tensor:
    return torch.cat([phi["w"].reshape(-1), phi["b"][0].reshape(1)])


def tree_newton(objective: Any, init: Any, theta: Any, *rest: Tensor) -> Any:
    return tree(newton(lambda p, t, *r: objective(tree(p), tree(t), *r), flat(init), flat(theta), *rest))


def test_one_learned_strength_per_tensor_gets_its_gradient() -> None:
    strengths = {
        "w": torch.tensor(0.5, dtype=F64).requires_grad_(),
        "b": (torch.tensor(4.0, dtype=F64).requires_grad_(),),
    }
    theta, (weight, offset), v = randn(N, seed=3).requires_grad_(), data(), randn(N, seed=4)
    layer = il.argmin(il.proximal(tree_loss, strengths), tree_newton, linear_solver=TIGHT)
    phi = flat(layer(tree(theta.detach()), tree(theta), weight, offset))
    got = torch.autograd.grad(phi, (theta, strengths["w"], strengths["b"][0]), v)
    diagonal = torch.tensor([0.5] * 4 + [4.0], dtype=F64)
    u = torch.linalg.solve(torch.diag(diagonal) + hessian_of_loss(phi.detach(), weight.detach(), offset.detach()), v)
    to_entries = -(phi - theta).detach() * u
    assert relative_error(got[0], diagonal * u) < 1e-9
    assert float(got[1]) == pytest.approx(float(to_entries[:4].sum()), rel=1e-9)
    assert float(got[2]) == pytest.approx(float(to_entries[4]), rel=1e-9)


def test_learned_strengths_of_every_kind_are_seen_by_finite_differences() -> None:
    """Neither a tensor, nor a parameter, nor a number made from one, falls into the branch of plain numbers."""
    theta, (weight, offset) = randn(N, seed=3), [t.detach() for t in data()]

    def response(strength: Tensor) -> Tensor:
        return (newton(il.proximal(loss, strength), theta, theta, weight, offset) ** 2).sum()

    expected = float(central_differences(response, torch.tensor(0.7, dtype=F64), 1e-5))  # exact solver: error 1e-10
    leaf = torch.tensor(0.7, dtype=F64, requires_grad=True)
    parameter = torch.nn.Parameter(torch.tensor(0.7, dtype=F64))
    log = torch.tensor(0.7, dtype=F64).log().requires_grad_()
    for source, strength, factor in ((leaf, leaf, 1.0), (parameter, parameter, 1.0), (log, log.exp(), 0.7)):
        phi = il.argmin(il.proximal(loss, strength), newton)(theta, theta, weight, offset)
        (gradient,) = torch.autograd.grad((phi**2).sum(), source)
        assert float(gradient) == pytest.approx(factor * expected, rel=1e-8)


@pytest.mark.parametrize("kind", STRENGTHS)
def test_zero_steps_give_exactly_the_cotangent(kind: str) -> None:
    """First-order MAML: g = v, whatever the strength."""
    theta, (weight, offset), v = randn(N, seed=3).requires_grad_(), data(), randn(N, seed=4)
    layer = il.argmin(il.proximal(loss, STRENGTHS[kind]), newton, linear_solver=il.ConjugateGradient(max_steps=0))
    with il.diagnostics() as records:
        (gradient,) = torch.autograd.grad(layer(theta.detach(), theta, weight, offset), theta, v)
    # lambda * (v / lambda): two roundings
    assert torch.allclose(gradient, v, rtol=4e-16, atol=0)
    assert records[1].status is il.Status.STEP_LIMIT and records[1].solution.num_steps == 0  # type: ignore[union-attr]


def test_a_strength_that_is_a_power_of_two_gives_the_cotangent_to_the_last_bit() -> None:
    theta, (weight, offset), v = randn(N, seed=3).requires_grad_(), data(), randn(N, seed=4)
    layer = il.argmin(il.proximal(loss, 0.5), newton, linear_solver=il.ConjugateGradient(max_steps=0))
    (gradient,) = torch.autograd.grad(layer(theta.detach(), theta, weight, offset), theta, v)
    assert torch.equal(gradient, v)


def test_truncated_steps_work_in_the_well_conditioned_form() -> None:
    """k steps minimise over span{v, (I + H/lambda) v, ...}: what CG on (I + H/lambda) g = v gives."""
    theta, (weight, offset), v = randn(N, seed=3).requires_grad_(), data(), randn(N, seed=4)
    per_entry = STRENGTHS["per entry"]
    for steps in (1, 2, 3):
        layer = il.argmin(il.proximal(loss, 3.0), newton, linear_solver=il.ConjugateGradient(max_steps=steps))
        phi = layer(theta.detach(), theta, weight, offset)
        (gradient,) = torch.autograd.grad(phi, theta, v)
        matrix = torch.eye(N, dtype=F64) + hessian_of_loss(phi.detach(), weight.detach(), offset.detach()) / 3.0
        basis = torch.linalg.qr(torch.stack([torch.linalg.matrix_power(matrix, k) @ v for k in range(steps)], 1))[0]
        expected = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ v)
        assert relative_error(gradient, expected) < 1e-11
    # strengths from 0.1 to 20 with no loss: the preconditioned matrix is the identity, one step is exact
    layer = il.argmin(il.proximal(lambda phi: 0 * phi.sum(), per_entry), lambda f, x, t: t.clone())
    (gradient,) = torch.autograd.grad(layer(theta.detach(), theta), theta, v)
    assert relative_error(gradient, v) < 1e-14
    assert layer.records[1].solution.num_steps == 1  # type: ignore[union-attr]


def test_lanes_of_theta_and_data_match_the_loop() -> None:
    weights, offsets = randn(3, 8, N, seed=5), randn(3, 8, seed=6)
    theta, strength = randn(N, seed=3).requires_grad_(), torch.tensor(0.7, dtype=F64, requires_grad=True)
    objective = il.proximal(loss, strength)
    layer = il.argmin(objective, newton, linear_solver=TIGHT)

    def outer(weight: Tensor, offset: Tensor) -> Tensor:
        return (layer(theta.detach(), theta, weight, offset) ** 2).sum()

    vmapped = torch.autograd.grad(vmap(outer)(weights, offsets).sum(), (theta, strength))
    looped = torch.autograd.grad(sum(outer(w, o) for w, o in zip(weights, offsets, strict=True)), (theta, strength))

    def lane_loss(phi: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
        return torch.nn.functional.softplus((weight @ phi.unsqueeze(-1)).squeeze(-1) + offset).sum(-1)

    batched = il.argmin(
        il.proximal(lane_loss, strength),
        il.solvers.GradientDescent(0.1, max_steps=5000, rtol=1e-12),
        linear_solver=TIGHT,
        batch_dims=1,
    )
    phi = batched(theta.detach().expand(3, N).clone(), theta, weights, offsets)
    native = torch.autograd.grad((phi**2).sum(), (theta, strength))
    for v, n, e in zip(vmapped, native, looped, strict=True):
        assert relative_error(v, e) < 1e-9 and relative_error(n, e) < 1e-9


def test_per_entry_strengths_work_in_lanes() -> None:
    strength, theta = STRENGTHS["per entry"].clone().requires_grad_(), randn(N, seed=3).requires_grad_()
    target = randn(4, N, seed=7)
    layer = il.argmin(
        il.proximal(lambda phi, target: 0.5 * ((phi - target) ** 2).sum(-1), strength),
        lambda f, x, theta, target: (target + strength.detach() * theta) / (1 + strength.detach()),
        linear_solver=TIGHT,
        batch_dims=1,
    )
    phi = layer(torch.zeros(4, N, dtype=F64), theta, target)
    v = randn(4, N, seed=8)
    got = torch.autograd.grad(phi, (theta, strength), v)
    closed = (target + strength * theta) / (1 + strength)
    for g, e in zip(got, torch.autograd.grad(closed, (theta, strength), v), strict=True):
        assert relative_error(g, e) < 1e-10


def test_the_meta_gradient_has_every_order_and_lane() -> None:
    """Quadratic loss 1/2 (phi - c)' A (phi - c): phi = (A + lambda)^-1 (A c + lambda theta)."""
    matrix, c = spd_matrix(N, 1, seed=9), randn(N, seed=10)

    def implicit(theta: Tensor, strength: Tensor) -> Tensor:
        objective = il.proximal(lambda phi: 0.5 * (phi - c) @ matrix @ (phi - c), strength)
        phi = il.argmin(objective, newton, linear_solver=TIGHT, on_failure="ignore")(theta, theta)
        return (phi**3).sum()

    def closed(theta: Tensor, strength: Tensor) -> Tensor:
        phi = torch.linalg.inv(matrix + strength * torch.eye(N, dtype=F64)) @ (matrix @ c + strength * theta)
        return (phi**3).sum()

    theta, strength = randn(N, seed=3), torch.tensor(0.7, dtype=F64)
    arguments: list[Callable[..., Any]] = [
        lambda f: grad(f, argnums=(0, 1))(theta, strength),
        lambda f: hessian(f, argnums=(0, 1))(theta, strength),
        lambda f: vmap(grad(f, argnums=(0, 1)), (0, None))(torch.stack([theta, 2 * theta]), strength),
        lambda f: jacrev(grad(f, argnums=1))(theta, strength),
    ]
    for argument in arguments:
        got, expected = (torch.utils._pytree.tree_leaves(argument(f)) for f in (implicit, closed))
        for g, e in zip(got, expected, strict=True):
            assert relative_error(g, e) < 1e-8


def test_module_parameters_are_a_theta() -> None:
    torch.manual_seed(0)
    net, inputs, targets = torch.nn.Linear(3, 2).double(), randn(6, 3, seed=11), randn(6, 2, seed=12)

    def fit(phi: dict[str, Tensor]) -> Tensor:
        return ((functional_call(net, phi, (inputs,)) - targets) ** 2).mean()

    theta = dict(net.named_parameters())
    layer = il.argmin(il.proximal(fit, 1.0), il.solvers.GradientDescent(0.2, max_steps=2000, rtol=1e-12))
    phi = layer({k: p.detach() for k, p in theta.items()}, theta)
    (phi["weight"].sum() + phi["bias"].sum()).backward()
    # columns of the design: inputs and ones; both outputs share the Hessian H = 2 X'X / (6 * 2) of the mean
    design = torch.cat([inputs, torch.ones(6, 1, dtype=F64)], 1)
    g = torch.linalg.solve(torch.eye(4, dtype=F64) + design.T @ design / 6, torch.ones(4, dtype=F64))
    assert net.weight.grad is not None and net.bias.grad is not None
    assert relative_error(torch.cat([net.weight.grad, net.bias.grad[:, None]], 1), g.expand(2, 4)) < 1e-8


def test_the_order_of_dictionary_keys_is_irrelevant() -> None:
    phi, theta = {"a": randn(2, seed=1), "b": randn(3, seed=2)}, {"b": randn(3, seed=3), "a": randn(2, seed=4)}
    for strength in (2.0, {"b": 3.0, "a": torch.tensor(0.5, dtype=F64)}):
        s = strength if isinstance(strength, dict) else {"a": strength, "b": strength}
        value = il.proximal(lambda phi: phi["a"].sum(), strength)(phi, theta)
        expected = phi["a"].sum() + sum(0.5 * s[k] * ((phi[k] - theta[k]) ** 2).sum() for k in "ab")
        assert float(value) == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize("strength", [-1.0, torch.tensor([1.0, -1e-3]), {"w": 1.0, "b": -2}, float("nan")])
def test_a_negative_strength_is_refused(strength: Any) -> None:
    with pytest.raises(ValueError, match="must be non-negative and finite: a negative one rewards distance from theta"):
        il.proximal(loss, strength)


@pytest.mark.parametrize("strength", ["strong", None, True])
def test_a_strength_that_is_no_number_is_refused(strength: Any) -> None:
    with pytest.raises(ValueError, match="strength must be a number or a tensor, got"):
        il.proximal(loss, strength)


def test_structures_that_do_not_match_are_refused() -> None:
    phi = {"w": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(ValueError, match="theta must have the structure of phi"):
        il.proximal(lambda phi: phi["w"].sum(), 1.0)(phi, [torch.ones(2), torch.ones(1)])
    with pytest.raises(ValueError, match="strength must be one number or have the structure of phi"):
        il.proximal(lambda phi: phi["w"].sum(), {"w": 1.0})(phi, phi)


def test_a_theta_that_would_broadcast_is_refused() -> None:
    theta = torch.ones(1, dtype=F64, requires_grad=True)
    with pytest.raises(ValueError, match=r"\(3,\).*\(1,\)|\(1,\).*\(3,\)"):
        il.proximal(lambda phi: phi.sum(), 1.0)(torch.ones(3, dtype=F64), theta)


@pytest.mark.parametrize("shape", [(3,), (2, 2), (1, 1, 2)])
def test_a_strength_whose_shape_fits_no_leaf_is_refused(shape: tuple[int, ...]) -> None:
    phi = torch.ones(2, dtype=torch.float64)
    objective = il.proximal(lambda phi: phi.sum(), torch.ones(shape, dtype=torch.float64))
    message = rf"a strength of shape {re.escape(str(shape))} does not broadcast to a leaf of phi of shape \(2,\)"
    with pytest.raises(ValueError, match=message):
        objective(phi, phi)


@pytest.mark.parametrize("strength", [2.0, torch.tensor(0.5, dtype=F64), "leaves", "entries"], ids=str)
@pytest.mark.parametrize("lanes", [(), (3,)], ids=["alone", "lanes"])
def test_what_the_objective_says_of_its_gradient_is_the_gradient_of_its_value(
    strength: Any, lanes: tuple[int, ...]
) -> None:
    shapes = {"a": (2, 3), "b": (4,)}
    phi, theta, entries = (
        {name: randn(*front, *shape, seed=seed + len(shape)) for name, shape in shapes.items()}
        for front, seed in ((lanes, 1), ((), 5), ((), 9))
    )
    scale = randn(*lanes, seed=12)
    known = {"leaves": {"a": 0.3, "b": 2.0}, "entries": {name: e.square() for name, e in entries.items()}}
    objective = il.proximal(
        lambda phi, scale: scale * (phi["a"].flatten(len(lanes)).cos().sum(-1) + phi["b"].exp().sum(-1)),
        known.get(strength, strength) if isinstance(strength, str) else strength,
    )
    found = objective.value_and_gradient(phi, theta, scale)
    assert found is not None
    points = {name: leaf.requires_grad_() for name, leaf in phi.items()}
    value = objective(points, theta, scale)
    expected = dict(zip(points, torch.autograd.grad(value.sum(), list(points.values())), strict=True))
    torch.testing.assert_close(found, (value.detach(), expected))
    assert not found[0].requires_grad


@pytest.mark.parametrize("solver", [il.solvers.GradientDescent(0.1, max_steps=3), il.solvers.LBFGS(max_steps=3)])
def test_solvers_ask_an_objective_for_its_gradient_and_go_the_same_way(solver: Any) -> None:
    weight, offset = data()
    objective = il.proximal(loss, 2.0)
    theta = randn(N, seed=3)
    same = lambda phi, theta, *rest: objective(phi, theta, *rest)  # noqa: E731  # a function that knows nothing
    found, expected = (solver.run(f, theta.clone(), theta, weight, offset) for f in (objective, same))
    # three steps of the same arithmetic in another order
    torch.testing.assert_close(found.value, expected.value, rtol=1e-12, atol=1e-12)
    assert found.num_steps == expected.num_steps
