"""BatchNorm inside an objective: batch statistics and frozen ones differentiate, updated ones are an error."""

# Newton is exact to 1e-15; linear solves at rtol 1e-12, systems of condition below 50. Finite differences of a solution
# with h = 1e-5: truncation 1e-9 (third derivatives up to 10), rounding 1e-10.

from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, central_differences, newton, randn, relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, vmap

import implicitlayer as il

CG = il.ConjugateGradient(rtol=1e-12)
ZEROS = torch.zeros(3, dtype=F64)
DATA = randn(2, 6, 3, seed=1)  # lanes, points, features
POLICIES = ("batch statistics", "frozen statistics")


class Energy(nn.Module):
    """x scales the features of the data; the net mixes the points of a batch through its normalisation."""

    def __init__(self, **batch_norm: Any) -> None:
        super().__init__()
        norm = nn.BatchNorm1d(4, dtype=F64, **batch_norm)
        self.net = nn.Sequential(nn.Linear(3, 4, dtype=F64), norm, nn.Tanh(), nn.Linear(4, 1, dtype=F64))

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        return nn.functional.softplus(self.net(data * (1 + x))).mean() + 0.5 * (x**2).sum()


def energy(policy: str) -> Energy:
    if policy == "batch statistics":
        return Energy(track_running_stats=False)
    made = Energy()
    made.net[1].running_mean.copy_(randn(4, seed=2))
    made.net[1].running_var.copy_(randn(4, seed=3).abs() + 0.5)
    return made.eval()


def solution(objective: Energy, data: Tensor) -> Tensor:
    with torch.no_grad():
        weights = {k: p.detach() for k, p in objective.named_parameters()}
    return newton(lambda x, d: functional_call(objective, weights, (x, d)), ZEROS, data)


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_gives_data_and_all_weights_the_gradients_of_finite_differences(policy: str) -> None:
    objective, v = energy(policy), randn(3, seed=4)
    data = DATA[0].clone().requires_grad_()
    (il.ArgminLayer(objective, newton, init=ZEROS, linear_solver=CG)(data) @ v).backward()
    assert data.grad is not None
    expected = central_differences(lambda d: solution(objective, d) @ v, data, 1e-5)
    assert float((data.grad - expected).abs().max()) < 1e-8
    for name, parameter in objective.named_parameters():

        def response(value: Tensor, name: str = name) -> Tensor:
            weights = {**{k: p.detach() for k, p in objective.named_parameters()}, name: value}
            return newton(lambda x, d: functional_call(objective, weights, (x, d)), ZEROS, DATA[0]) @ v

        assert parameter.grad is not None, name
        assert float((parameter.grad - central_differences(response, parameter, 1e-5)).abs().max()) < 1e-8, name


@pytest.mark.parametrize("policy", POLICIES)
def test_lanes_of_data_are_normalised_apart_and_equal_a_loop(policy: str) -> None:
    layer = il.ArgminLayer(energy(policy), newton, init=ZEROS, linear_solver=CG)
    loss = lambda data: (layer(data) ** 3).sum()  # noqa: E731
    assert relative_error(vmap(layer)(DATA), torch.stack([solution(layer.objective, d) for d in DATA])) < 1e-12
    looped = []
    for lane in DATA:
        leaf = lane.clone().requires_grad_()
        looped.append(torch.autograd.grad(loss(leaf), leaf)[0])
    assert relative_error(vmap(grad(loss))(DATA), torch.stack(looped)) < 1e-9


@pytest.mark.parametrize("policy", POLICIES)
def test_second_order_agrees_with_finite_differences_of_the_gradient(policy: str) -> None:
    layer = il.ArgminLayer(energy(policy), newton, init=ZEROS, linear_solver=CG)
    loss = lambda scale: (layer(DATA[0] * scale) ** 3).sum()  # noqa: E731
    at = torch.tensor([1.0, 0.8, 1.2], dtype=F64)
    expected = torch.stack([central_differences(lambda s, i=i: grad(loss)(s)[i], at, 1e-5) for i in range(3)])
    assert float((hessian(loss)(at) - expected).detach().abs().max()) < 1e-7  # solves good to 1e-12 / 1e-5
    assert float((jacfwd(grad(loss))(at) - expected).detach().abs().max()) < 1e-7
    lanes = vmap(hessian(loss))(torch.stack([at, 2 * at]))
    assert relative_error(lanes, torch.stack([hessian(loss)(at), hessian(loss)(2 * at)])) < 1e-9


def test_the_frozen_statistics_stay_as_they_are() -> None:
    objective = energy("frozen statistics")
    before = {k: b.clone() for k, b in objective.named_buffers()}
    layer = il.ArgminLayer(objective, newton, init=ZEROS)
    layer(DATA[0].clone().requires_grad_()).sum().backward()
    vmap(layer)(DATA)
    assert len(before) == 3 and all(torch.equal(b, before[k]) for k, b in objective.named_buffers())


def test_running_statistics_in_train_mode_are_an_error_that_names_the_remedies() -> None:
    layer = il.ArgminLayer(Energy(), newton, init=ZEROS)
    message = r"BatchNorm in train mode.*track_running_stats=False.*\.eval\(\)"
    with pytest.raises(il.ClosureError, match=message):
        layer(DATA[0].clone().requires_grad_()).sum().backward()
    with pytest.raises(il.ClosureError, match=message):
        layer(DATA[0])  # only the weights require a gradient
    with pytest.raises(il.ClosureError, match=message):
        vmap(layer)(DATA)
    for transform in (grad, hessian):
        with pytest.raises(il.ClosureError, match=message):
            vmap(transform(lambda data: layer(data).sum()))(DATA)
    layer.eval()
    assert layer(DATA[0]).requires_grad


NORMALISATIONS = {
    "layer norm": lambda z: nn.functional.layer_norm(z, (4,)),
    "torch.layer_norm": lambda z: torch.layer_norm(z, (4,)),
    "torch.batch_norm": lambda z: torch.batch_norm(z, None, None, None, None, True, 0.1, 1e-5, False),
    "torch.instance_norm": lambda z: (
        torch.instance_norm(z.T[None], None, None, None, None, True, 0.1, 1e-5, False)[0].T
    ),
    "group norm": lambda z: nn.functional.group_norm(z, 2),
    "instance norm": lambda z: nn.functional.instance_norm(z.T[None])[0].T,
    "rms norm": lambda z: nn.functional.rms_norm(z, (4,)),
    "frozen batch norm": lambda z: nn.functional.batch_norm(z, ZEROS.new_ones(4), 2 * ZEROS.new_ones(4)),
}


def normalised(kind: Callable[[Tensor], Tensor], proximal: bool = False) -> Callable[[Tensor], Tensor]:
    """A loss of a scale of the data, through a layer whose objective normalises."""
    first, second = randn(3, 4, seed=5), randn(4, seed=6)

    def objective(x: Tensor, data: Tensor) -> Tensor:
        hidden = torch.tanh(kind((data * (1 + x)) @ first))
        return nn.functional.softplus(hidden @ second).mean() + (0 if proximal else 2 * (x**2).sum())

    made = il.argmin(il.proximal(objective, 4.0) if proximal else objective, newton, linear_solver=CG)
    given = (ZEROS, ZEROS) if proximal else (ZEROS,)
    return lambda scale: (made(*given, DATA[0] * scale) ** 3).sum()


AT = torch.tensor([1.0, 0.8, 1.2], dtype=F64)


@pytest.mark.parametrize("proximal", [False, True], ids=["", "proximal"])
@pytest.mark.parametrize("kind", NORMALISATIONS)
def test_second_order_through_other_normalisations_agrees_with_finite_differences(kind: str, proximal: bool) -> None:
    """A layer's second order needs third derivatives of its objective."""
    loss = normalised(NORMALISATIONS[kind], proximal)
    expected = torch.stack([central_differences(lambda s, i=i: grad(loss)(s)[i], AT, 1e-5) for i in range(3)])
    assert float((hessian(loss)(AT) - expected).abs().max()) < 1e-7  # solves good to 1e-12 / 1e-5


def test_second_order_of_attention_with_layer_norm_agrees_with_finite_differences() -> None:
    def block(z: Tensor) -> Tensor:
        z = nn.functional.layer_norm(z, (4,))
        return nn.functional.scaled_dot_product_attention(z[None], z[None] * 0.7, z[None])[0]

    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):  # newton takes second derivatives itself
        loss = normalised(block, proximal=True)
        expected = torch.stack([central_differences(lambda s, i=i: grad(loss)(s)[i], AT, 1e-5) for i in range(3)])
        assert float((hessian(loss)(AT) - expected).abs().max()) < 1e-7


@pytest.mark.parametrize(
    "kernel",
    [
        lambda z: torch.native_layer_norm(z, (4,), None, None, 1e-5)[0],
        lambda z: torch.ops.aten.layer_norm.default(z, [4]),
        lambda z: torch.native_batch_norm(z, None, None, None, None, True, 0.1, 1e-5)[0],
    ],
)
def test_second_order_through_a_kernel_that_torch_differentiates_wrongly_is_refused(
    kernel: Callable[[Tensor], Tensor],
) -> None:
    loss, scale = normalised(kernel), AT.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(scale), scale, create_graph=True)  # the first derivative is right
    assert float((gradient - central_differences(lambda s: loss(s).detach(), AT, 1e-5)).detach().abs().max()) < 1e-8
    for second in (lambda: torch.autograd.grad(gradient.sum(), scale), lambda: hessian(loss)(AT)):
        with pytest.raises(il.UnsupportedTransformError, match=r"third derivative.*wrong in torch.*torch\.nn"):
            second()


def test_running_statistics_of_instance_norm_are_an_error_too() -> None:
    norm = nn.InstanceNorm1d(3, track_running_stats=True, dtype=F64)
    objective = lambda x, data: (norm((data * (1 + x)).T[None]) ** 3).mean() + 0.5 * (x**2).sum()  # noqa: E731
    with pytest.raises(il.ClosureError, match="running statistics"):
        il.argmin(objective, newton)(ZEROS, DATA[0].clone().requires_grad_())
    norm.eval()
    assert il.argmin(objective, newton)(ZEROS, DATA[0].clone().requires_grad_()).requires_grad
