"""il.ArgminLayer: a module like any other, and objectives that are modules, BatchNorm among them."""

# Newton is exact to 1e-15; linear solves at the default rtol of 1e-10, systems of condition below 50: 1e-8.

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, Energy, central_differences, newton, randn, relative_error
from torch import Tensor, nn

import implicitlayer as il

TOLERANCE = 1e-8


def quadratic(x: Tensor, t: Tensor) -> Tensor:
    return ((x - t) ** 2).sum() + (x**2).sum()


def halve(objective: Any, x: Tensor, t: Tensor) -> Tensor:
    """The minimiser of ``quadratic``."""
    return t / 2


def energy_layer(**settings: Any) -> il.ArgminLayer:
    return il.ArgminLayer(Energy(), newton, init=torch.zeros(3, dtype=F64), **settings)


def energy_solution(weight: Tensor, bias: Tensor, t: Tensor) -> Tensor:
    """The same solution without the layer and without the module."""
    objective = lambda x, t: nn.functional.softplus(weight @ x + bias).sum() + 0.5 * ((x - t) ** 2).sum()  # noqa: E731
    return newton(objective, torch.zeros(3, dtype=F64), t)


def check_energy_gradients(layer: il.ArgminLayer) -> None:
    """Gradients of the weights and of t against finite differences."""
    t, v = randn(3, seed=1).requires_grad_(), randn(3, seed=2)
    layer.zero_grad()
    (layer(t) @ v).backward()
    weight, bias = (p.detach() for p in (layer.objective.net.weight, layer.objective.net.bias))
    responses: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = [
        (layer.objective.net.weight, lambda w: energy_solution(w, bias, t.detach()) @ v),
        (layer.objective.net.bias, lambda b: energy_solution(weight, b, t.detach()) @ v),
        (t, lambda t: energy_solution(weight, bias, t) @ v),
    ]
    for tensor, response in responses:
        assert tensor.grad is not None
        # h = 1e-5: truncation 1e-10, rounding 1e-15 / 1e-5
        assert float((tensor.grad - central_differences(response, tensor, 1e-5)).abs().max()) < TOLERANCE


def test_the_weights_of_an_objective_that_is_a_module_get_their_gradients() -> None:
    check_energy_gradients(energy_layer())


def test_parameters_buffers_and_state_dict_hold_the_objective_and_init() -> None:
    layer = energy_layer()
    assert [name for name, _ in layer.named_parameters()] == ["objective.net.weight", "objective.net.bias"]
    assert [name for name, _ in layer.named_buffers()] == ["init"]
    other, t = energy_layer(), randn(3, seed=1)
    assert relative_error(other(t), layer(t)) > 1e-3
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(t), layer(t))
    check_energy_gradients(other)


def test_to_moves_weights_and_init_to_another_dtype() -> None:
    layer = energy_layer().to(torch.float32)
    assert {p.dtype for p in [*layer.parameters(), *layer.buffers()]} == {torch.float32}
    t = randn(3, seed=1, dtype=torch.float32).requires_grad_()
    layer.double()
    x = layer(t.double())
    x.sum().backward()
    assert x.dtype == F64 and t.grad is not None and t.grad.dtype == torch.float32
    single = il.ArgminLayer(quadratic, halve, init=torch.zeros(3, dtype=F64)).float()
    assert single(t).dtype == torch.float32


DUPLICATES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: _saved_and_loaded(layer),
}


def _saved_and_loaded(layer: il.ArgminLayer) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", DUPLICATES)
def test_a_copy_is_equal_and_has_weights_of_its_own(duplicate: str) -> None:
    layer, t = energy_layer(linear_solver=il.ConjugateGradient(rtol=1e-12)), randn(3, seed=1)
    before = layer(t)
    other = DUPLICATES[duplicate](layer)
    assert torch.equal(other(t), before)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    assert torch.equal(layer(t), before)  # the original did not move
    assert relative_error(other(t), before) > 1e-3  # and the copy solves with its own weights
    check_energy_gradients(other)
    assert all(p.grad is None for p in layer.parameters())


def test_init_may_be_a_buffer_a_function_of_theta_a_pytree_or_the_first_argument() -> None:
    seen: list[Any] = []

    def remember(objective: Any, x: Any, t: Any) -> Any:
        seen.append(x)
        return t / 2 if isinstance(x, Tensor) else {"x": t / 2}

    t = torch.ones(2, dtype=F64)
    buffer, start = torch.full((2,), 7.0, dtype=F64), torch.full((2,), 9.0, dtype=F64)
    il.ArgminLayer(quadratic, remember, init=buffer)(t)
    il.ArgminLayer(quadratic, remember, init=lambda t: 3 * t)(t)
    il.ArgminLayer(quadratic, remember)(start, t)
    il.ArgminLayer(lambda x, t: quadratic(x["x"], t), remember, init={"x": start})(t)
    for got, value in zip([*seen[:3], seen[3]["x"]], (7.0, 3.0, 9.0, 9.0), strict=True):
        assert torch.equal(got, torch.full((2,), value, dtype=F64))
    assert torch.equal(buffer, torch.full((2,), 7.0, dtype=F64))
    with pytest.raises(TypeError, match=r"forward\(init, \*theta\) needs init: none was stored"):
        il.ArgminLayer(quadratic, remember)()


def test_a_function_for_init_gives_theta_no_gradient() -> None:
    t = randn(3, seed=1).requires_grad_()
    il.ArgminLayer(quadratic, halve, init=lambda t: 100 * t)(t).sum().backward()
    assert t.grad is not None and relative_error(t.grad, torch.full((3,), 0.5, dtype=F64)) < 1e-12


def test_settings_and_records_are_those_of_the_layer() -> None:
    layer = il.ArgminLayer(quadratic, lambda f, x, t: t / 2 + 0.1, init=torch.zeros_like, polish=1)
    assert layer.records == [] and layer.last_record is None
    t = randn(3, seed=1).requires_grad_()
    assert relative_error(layer(t), t / 2) < 1e-12  # one Newton step solves a quadratic problem
    layer(t).sum().backward()
    assert [type(r) for r in layer.records] == [il.ForwardRecord, il.BackwardRecord]
    assert layer.last_record is layer.records[1]
    with pytest.raises(ValueError, match="polish=-1 must be non-negative"):
        il.ArgminLayer(quadratic, halve, polish=-1)


def test_in_a_sequential_model_one_step_of_training_changes_all_weights_and_lowers_the_loss() -> None:
    model = nn.Sequential(nn.Linear(2, 3, dtype=F64), energy_layer(), nn.Linear(3, 1, dtype=F64))
    data, target = randn(2, seed=3), torch.ones(1, dtype=F64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = [p.detach().clone() for p in model.parameters()]
    losses = []
    for _ in range(2):
        loss = ((model(data) - target) ** 2).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(before) == 6 and losses[1] < losses[0]
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_copying_a_layer_leaves_its_records_alone() -> None:
    layer = energy_layer()
    layer(randn(3, seed=1))
    before = list(layer.records)
    copy.deepcopy(layer)
    assert len(before) == 1 and layer.records == before


class Misfit(nn.Module):
    """An objective that is a module and knows its parts: 1/2 ||scale x^2 - t||^2, at a point where it is not convex."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=F64))

    def residuals(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * x**2 - t

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0.5 * (self.residuals(x, t) ** 2).sum()

    def as_composite(self) -> il.Composite:
        return il.least_squares(self.residuals)


def test_a_module_that_knows_its_parts_can_have_gauss_newton_curvature() -> None:
    """At x = 0.1, t = 1: d^2 f / dt dx = -2 x and J'J = 4 x^2, so dx/dt = 1 / (2 x) = 5; the Hessian is negative."""
    t = torch.ones(1, dtype=F64, requires_grad=True)
    layer = il.ArgminLayer(
        Misfit(), lambda f, x, t: 0.1 * t, init=torch.zeros_like, curvature="gauss_newton", stationarity_rtol=None
    )
    layer(t).sum().backward()
    assert t.grad is not None and relative_error(t.grad, torch.full((1,), 5.0, dtype=F64)) < TOLERANCE


class Residuals(nn.Module):
    """W x + b - t, which vanishes at W^-1 (t - b)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3).double()
        with torch.no_grad():
            self.net.weight.copy_(torch.eye(3, dtype=F64) + 0.2 * randn(3, 3, seed=11))

    def forward(self, x: Tensor, *data: Tensor) -> Tensor:
        return self.net(x) - sum(data)


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=F64))

    def forward(self, outputs: Tensor, *data: Tensor) -> Tensor:
        value: Tensor = (self.scale * outputs * outputs).sum(-1)
        return value


MADE_OF_PARTS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "least_squares": (lambda: il.least_squares(Residuals()), ["model.net.weight", "model.net.bias"]),
    "composite": (
        lambda: il.composite(Squares(), Residuals()),
        ["loss.scale", "model.net.weight", "model.net.bias"],
    ),
}


@pytest.mark.parametrize("name", MADE_OF_PARTS)
def test_modules_that_an_objective_is_made_of_are_registered_and_keep_the_weights_of_a_call(name: str) -> None:
    make, names = MADE_OF_PARTS[name]
    layer = il.ArgminLayer(make(), il.solvers.NewtonCG(rtol=1e-13), init=torch.zeros(3, dtype=F64))
    assert [name for name, _ in layer.named_parameters()] == [f"parts.{name}" for name in names]
    t, v = randn(3, seed=1), randn(3, seed=2)
    weight, bias = "parts.model.net.weight", "parts.model.net.bias"

    def gradient_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.func.functional_call(layer, weights, (t,))
        return dict(zip(weights, torch.autograd.grad(x @ v, list(weights.values())), strict=True))

    now = {key: p.detach().clone().requires_grad_() for key, p in layer.named_parameters()}
    other = {key: (1.1 * p.detach()).requires_grad_() for key, p in now.items()}
    # a condition below 1e1 and solves to 1e-10 and better
    for weights in (now, other):
        solution = torch.linalg.solve(weights[weight], t - weights[bias]) @ v
        exact = torch.autograd.grad(solution, (weights[weight], weights[bias]))
        found = gradient_of(weights)
        assert relative_error(found[weight], exact[0]) < TOLERANCE and relative_error(found[bias], exact[1]) < TOLERANCE
        assert "loss.scale" not in names or float(found["parts.loss.scale"].norm()) < TOLERANCE  # the misfit is zero
    stacked = {key: torch.stack([now[key], other[key]]).detach() for key in now}
    ensemble = torch.func.grad(lambda weights: torch.func.functional_call(layer, weights, (t,)) @ v)
    for key, rows in torch.vmap(ensemble)(stacked).items():
        right = torch.stack([gradient_of(now)[key], gradient_of(other)[key]])
        assert float((rows - right).norm()) < TOLERANCE * max(1.0, float(right.norm()))
    copied = copy.deepcopy(layer)
    assert copied.parts["model"] is copied.objective.model and copied.parts["model"] is not layer.parts["model"]


def test_a_proximal_objective_has_the_parameters_of_its_loss_and_of_its_strength() -> None:
    """phi = (b + s theta) / (1 + s) for a loss 1/2 |phi - b|^2 whose b is a weight."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.ones(3, dtype=F64))

        def forward(self, phi: Tensor) -> Tensor:
            return 0.5 * ((phi - self.b) ** 2).sum()

    strength = il.LearnedStrength(torch.tensor(0.5, dtype=F64))
    layer = il.ArgminLayer(il.proximal(Loss(), strength), il.solvers.LBFGS(rtol=1e-12), init=torch.zeros_like)
    names = [name for name, _ in layer.named_parameters()]
    assert names[0] == "parts.loss.b" and len(names) == 1 + len(list(strength.parameters()))
    layer(torch.zeros(3, dtype=F64)).sum().backward()
    s = float(strength().detach())
    assert all(p.grad is not None for p in layer.parameters())
    assert relative_error(layer.parts["loss"].b.grad, torch.full((3,), 1 / (1 + s), dtype=F64)) < TOLERANCE
