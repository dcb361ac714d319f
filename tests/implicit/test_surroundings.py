"""What surrounds a call leaves every layer alone: checkpoints, hooks, autocast, inference mode, compilation."""

# For il.argmin in float64 tests/test_reliability_graph.py has these; here: the other layers, modules with weights,
# second order, and float32 with products that autocast would really shorten.

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from references import F64, newton, randn, relative_error
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import implicitlayer as il

N = 3
MIXING = 3 * torch.eye(N, dtype=F64) + 0.3 * randn(N, N, seed=1)  # not symmetric, condition below 3
GRAM = MIXING.T @ MIXING


def mixing(t: Tensor) -> Tensor:
    """MIXING in the dtype of t, with entries that bfloat16 does not hold."""
    return MIXING.to(t.dtype)


def by_argmin(t: Tensor) -> Tensor:
    layer = il.argmin(lambda x, t: 0.5 * ((mixing(t) @ x - t) ** 2).sum(), solve)
    return layer(torch.zeros_like(t), t)  # type: ignore[no-any-return]


def by_root(t: Tensor) -> Tensor:
    return il.root(lambda x, t: mixing(t) @ x - t, solve)(torch.zeros_like(t), t)  # type: ignore[no-any-return]


def by_fixed_point(t: Tensor) -> Tensor:
    layer = il.fixed_point(lambda x, t: x - 0.3 * (mixing(t) @ x - t), solve)
    return layer(torch.zeros_like(t), t)  # type: ignore[no-any-return]


def by_linear_solve(t: Tensor) -> Tensor:
    return il.linear_solve(lambda u: mixing(t) @ u, t, il.Gmres(), symmetric=False)  # type: ignore[no-any-return]


def by_hessian_operator(t: Tensor) -> Tensor:
    operator = il.hessian_operator(lambda x: 0.5 * ((mixing(t) @ x) ** 2).sum(), torch.zeros_like(t))
    rhs = (mixing(t) * t[:, None]).sum(0)  # A't by sums, which autocast leaves alone
    return il.linear_solve(operator, rhs)  # type: ignore[no-any-return]


def solve(function: Any, x: Tensor, t: Tensor) -> Tensor:
    return torch.linalg.solve(mixing(t), t)


LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "argmin": by_argmin,
    "root": by_root,
    "fixed point": by_fixed_point,
    "linear solve": by_linear_solve,
    "hessian operator": by_hessian_operator,
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def first_and_second(function: Callable[[Tensor], Tensor], seed: int = 2) -> list[Tensor]:
    """Gradients of sum x(t^2)^3, and of their squares: with x = A^-1 t^2 both are known."""
    t = randn(N, seed=seed).requires_grad_()
    (first,) = torch.autograd.grad((function(t**2) ** 3).sum(), t, create_graph=True)
    (second,) = torch.autograd.grad((first**2).sum(), t)
    return [first.detach(), second]


def closed(t: Tensor) -> Tensor:
    return torch.linalg.solve(mixing(t), t)


def check(got: list[Tensor], tolerance: float = 1e-8) -> None:
    # rtol 1e-10, condition below 9; the cube and the second order multiply that by less than 10
    for g, e in zip(got, first_and_second(closed), strict=True):
        assert relative_error(g, e) < tolerance


@every_layer
def test_saved_tensor_hooks_change_no_order_of_derivatives(layer: str) -> None:
    packed = [0]

    def pack(tensor: Tensor) -> Tensor:
        packed[0] += 1
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        check(first_and_second(LAYERS[layer]))
    assert packed[0] > 0
    with save_on_cpu():
        check(first_and_second(LAYERS[layer]))


@every_layer
def test_a_checkpoint_changes_no_order_of_derivatives(layer: str) -> None:
    check(first_and_second(lambda t: checkpoint(LAYERS[layer], t, use_reentrant=False)))
    t = randn(N, seed=2).requires_grad_()
    (checkpoint(lambda t: LAYERS[layer](t**2), t, use_reentrant=True) ** 3).sum().backward()
    assert t.grad is not None and relative_error(t.grad, first_and_second(closed)[0]) < 1e-8


@every_layer
@pytest.mark.parametrize("around", ["forward", "backward", "both"])
def test_autocast_does_not_shorten_the_products_of_a_float32_layer(around: str, layer: str) -> None:
    """A bfloat16 product is off by 1e-3 and float32 ones by 1e-7."""
    t = randn(N, seed=2, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around != "backward"):
        assert around == "backward" or (mixing(t) @ t).dtype == torch.bfloat16
        x = LAYERS[layer](t)
    v = randn(N, seed=3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around != "forward"):
        (gradient,) = torch.autograd.grad(x, t, v)
    assert x.dtype == gradient.dtype == torch.float32
    assert relative_error(x.double(), closed(t.detach().double())) < 1e-4  # rtol 1e-5, condition below 9
    assert relative_error(gradient.double(), torch.linalg.solve(MIXING.T, v.double())) < 1e-4


@every_layer
def test_tensors_made_in_inference_mode_are_plain_data_for_a_layer(layer: str) -> None:
    with torch.inference_mode():
        t, scale = randn(N, seed=2), torch.full((N,), 2.0, dtype=F64)
        assert relative_error(LAYERS[layer](t), closed(t)) < 1e-9 and not LAYERS[layer](t).requires_grad
    assert relative_error(LAYERS[layer](scale), closed(scale)) < 1e-9
    if layer == "argmin":
        leaf = torch.ones(N, dtype=F64, requires_grad=True)
        implicit = il.argmin(
            lambda x, t, s: 0.5 * ((x - t * s) ** 2).sum(),
            lambda f, x, t, s: t * s,
            linear_solver=il.ConjugateGradient(),
        )
        (gradient,) = torch.autograd.grad(implicit(t, leaf, scale).sum(), leaf)
        assert torch.equal(gradient, torch.full((N,), 2.0, dtype=F64))


@every_layer
def test_anomaly_detection_finds_nothing_and_changes_nothing(layer: str) -> None:
    with pytest.warns(UserWarning, match="Anomaly Detection has been enabled"), torch.autograd.detect_anomaly():
        check(first_and_second(LAYERS[layer]))


@every_layer
def test_forward_in_one_thread_and_backward_in_another_are_those_of_one_thread(layer: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        leaves = [randn(N, seed=i).requires_grad_() for i in range(8)]
        solutions = list(pool.map(LAYERS[layer], leaves))
        v = randn(N, seed=3)
        gradients = list(pool.map(lambda pair: torch.autograd.grad(*pair, v)[0], zip(solutions, leaves, strict=True)))
    expected = torch.linalg.solve(MIXING.T, v)
    assert all(relative_error(g, expected) < 1e-9 for g in gradients)


# ------------------------------------------------------------------------------------------------ modules with weights


class Energy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(N, 4, dtype=F64)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return nn.functional.softplus(self.net(x)).sum() + 0.5 * ((x - t) ** 2).sum()


def model() -> nn.Sequential:
    torch.manual_seed(1)
    layer = il.ArgminLayer(Energy(), newton, init=torch.zeros(N, dtype=F64))
    return nn.Sequential(nn.Linear(2, N, dtype=F64), layer, nn.Linear(N, 1, dtype=F64))


def gradients(network: nn.Module, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(run(randn(2, seed=4)).sum(), list(network.parameters())))


AROUND: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "checkpoint": lambda m: lambda t: checkpoint(m, t, use_reentrant=False),
    "hooks": lambda m: lambda t: _under(saved_tensors_hooks(torch.clone, lambda tensor: tensor), m, t),
    "save_on_cpu": lambda m: lambda t: _under(save_on_cpu(), m, t),
    "compile": lambda m: torch.compile(m, backend="eager"),
}


def _under(context: Any, function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    with context:
        return function(t)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
@pytest.mark.parametrize("around", AROUND)
def test_weights_that_the_objective_closes_over_keep_their_gradients(around: str) -> None:
    network = model()
    expected = gradients(network, network)
    assert len(expected) == 6 and all(float(e.norm()) > 0 for e in expected)
    for g, e in zip(gradients(network, AROUND[around](network)), expected, strict=True):
        assert torch.equal(g, e)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@every_layer
def test_compiled_functions_that_call_a_layer_are_equal(layer: str) -> None:
    compiled = torch.compile(lambda t: LAYERS[layer](t * 1) * 1, backend="eager")
    check(first_and_second(compiled))


@pytest.mark.parametrize("trace", [torch.func.linearize, lambda f, t: make_fx(f)(t)])
def test_tracing_a_layer_is_refused_with_what_takes_its_place(trace: Callable[..., Any]) -> None:
    """A trace would hold one solve's numbers; a solver that looks at none of them gets no further than the checks."""
    layer = il.argmin(lambda x, t: (torch.exp(x) - t * x).sum(), il.solvers.LBFGS(rtol=1e-10))
    t = torch.tensor([2.0, 3.0], dtype=F64)
    with pytest.raises(il.ObjectiveError, match=r"uses values while torch traces it .* torch.func.jvp or vjp take"):
        trace(lambda t: layer(torch.zeros_like(t), t), t)
    _, tangent = torch.func.jvp(lambda t: layer(torch.zeros_like(t), t), (t,), (torch.ones_like(t),))
    assert torch.allclose(tangent, 1 / t, rtol=1e-8)
