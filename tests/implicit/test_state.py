"""What user code may do inside an objective: keep state, take numbers out of tensors, take derivatives of its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from references import cdist_has_second_derivatives
from torch import Tensor, nn

import implicitlayer as il

F64 = torch.float64


def call(objective: Callable[..., Any], solver: Callable[..., Any] | None = None) -> Tensor:
    t = torch.tensor(3.0, dtype=F64, requires_grad=True)
    layer = il.argmin(objective, solver or (lambda f, x, t: (t * t).reshape(1)))
    return torch.autograd.grad(layer(torch.zeros(1, dtype=F64), t).sum(), t)[0]


def cached(make: Callable[[Tensor], Any], extra: float = 0.0) -> Callable[..., Tensor]:
    cache: dict[int, Any] = {}

    def objective(x: Tensor, t: Tensor) -> Tensor:
        if 0 not in cache:
            cache[0] = make(t)
        return 0.5 * ((x - cache[0]) ** 2).sum() + extra * t

    return objective


@pytest.mark.parametrize("make", [lambda t: t * t, lambda t: t, lambda t: t.detach() ** 2 + 0])
@pytest.mark.parametrize("kind", ["argmin", "root", "fixed_point"])
def test_an_objective_that_keeps_what_it_made_of_theta_is_refused(make: Callable[[Tensor], Any], kind: str) -> None:
    cache: dict[int, Any] = {}

    def function(x: Tensor, t: Tensor) -> Tensor:
        value = cache.setdefault(0, make(t)) if 0 not in cache else cache[0]
        return 0.5 * ((x - value) ** 2).sum() if kind == "argmin" else (x - value if kind == "root" else 0 * x + value)

    t = torch.tensor(3.0, dtype=F64, requires_grad=True)
    with pytest.raises(il.ClosureError, match=r"theta\[0\].*cache"):
        getattr(il, kind)(function, lambda f, x, t: make(t).reshape(1))(torch.zeros(1, dtype=F64), t)


def by_backward(f: Callable[..., Tensor], x: Tensor, t: Tensor) -> Tensor:
    """Gradient descent by .backward(), which frees the graph of every value."""
    x = x.clone().requires_grad_()
    for _ in range(60):
        x.grad = None
        f(x, t).backward()
        with torch.no_grad():
            x -= 0.5 * x.grad  # type: ignore[operator]
    return x.detach()


@pytest.mark.parametrize("make", [lambda t: t * t, lambda t: t])
@pytest.mark.parametrize("solver", [None, by_backward])
def test_an_objective_that_was_refused_for_a_cache_is_refused_again(make: Any, solver: Any) -> None:
    objective = cached(make)
    for _ in range(3):  # from the second call on it reads no theta at all
        with pytest.raises(il.ClosureError, match=r"in an earlier (run|call) and has kept"):
            call(objective, solver)


@pytest.mark.parametrize("begin", range(1, 9))
@pytest.mark.parametrize("extra", [0.0, 1.0])
def test_a_cache_that_begins_at_any_evaluation_never_gives_a_wrong_gradient(begin: int, extra: float) -> None:
    cache: list[Tensor] = []
    count = 0

    def objective(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count >= begin and not cache:
            cache.append(t * t)
        return 0.5 * ((x - (cache[0] if cache else t * t)) ** 2).sum() + extra * t

    refused = 0
    for _ in range(6):  # each evaluates the objective twice, the solver never
        try:
            assert call(objective).item() == pytest.approx(6.0, rel=1e-12)
        except il.ClosureError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("keep", [lambda v: v, lambda v: v.detach(), lambda v: v.item()])
def test_what_is_kept_and_not_read_again_or_only_detached_is_fine(keep: Callable[[Tensor], Any]) -> None:
    log: list[Any] = []

    def objective(x: Tensor, t: Tensor) -> Tensor:
        log.append(keep(0.5 * ((x - t * t) ** 2).sum()))
        return 0.5 * ((x - t * t) ** 2).sum()

    assert [call(objective).item() for _ in range(3)] == pytest.approx([6.0] * 3, rel=1e-12)
    assert len(log) > 3


class Square(torch.autograd.Function):
    """Of which torch has a first derivative only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


def test_a_function_with_one_derivative_is_fine_outside_of_the_objective_and_refused_inside() -> None:
    w, t = (torch.tensor(value, dtype=F64, requires_grad=True) for value in (3.0, 1.0))
    v = Square.apply(w)
    outside = il.argmin(lambda x, t: ((x - v - t) ** 2).sum(), lambda f, x, t: (v + t).detach().reshape(1))
    assert torch.autograd.grad(outside(torch.zeros(1, dtype=F64), t).sum(), w)[0].item() == pytest.approx(6.0)
    inside = il.argmin(lambda x, t: ((x - Square.apply(t)) ** 2).sum(), lambda f, x, t: (t * t).reshape(1))
    with pytest.raises(il.ObjectiveError, match="once_differentiable"):
        inside(torch.zeros(1, dtype=F64), t)


class Counts(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, dtype=F64)
        self.register_buffer("calls", torch.zeros(1, dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        value: Tensor = self.linear(x)
        return value


@pytest.mark.parametrize("make", [Counts, lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(1, 1, dtype=F64))])
def test_a_module_that_changes_its_buffers_is_named_and_evaluation_mode_helps(make: Callable[[], nn.Module]) -> None:
    module = make()
    module.requires_grad_(False)
    slope = float(module(torch.ones(1, dtype=F64)) - module(torch.zeros(1, dtype=F64)))

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return ((x - t) ** 2 + (module(x) - module(torch.zeros_like(x))) ** 2).sum()  # x = t / (1 + slope^2)

    with pytest.raises(il.ClosureError, match=r"objective itself changes a tensor.*\.eval\(\) on the module"):
        call(objective, il.solvers.NewtonCG(rtol=1e-12))
    module.eval()
    assert call(objective, il.solvers.NewtonCG(rtol=1e-12)).item() == pytest.approx(1 / (1 + slope**2), rel=1e-10)


def test_a_cache_is_refused_where_another_term_still_reads_theta() -> None:
    with pytest.raises(il.ClosureError, match=r"made of theta\[0\] in an earlier run"):
        call(cached(lambda t: t * t, extra=1.0))


def test_a_cache_of_constants_and_a_branch_on_x_are_fine() -> None:
    grid: list[Tensor] = []

    def objective(x: Tensor, t: Tensor) -> Tensor:
        if not grid:
            grid.append(torch.ones(1, dtype=F64) * 2)
        # at init (x = 0) another branch reads t: the minimum of the other one is x = 2 t
        return ((x - t) ** 2).sum() if x.sum() < 1 else ((x - grid[0] * t) ** 2).sum()

    assert call(objective, lambda f, x, t: 2 * t.reshape(1)).item() == pytest.approx(2.0, rel=1e-12)
    u = torch.tensor([3.0], dtype=F64, requires_grad=True)
    t = torch.tensor([1.0], dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, t, u: ((x - (t if x.sum() < 1 else u)) ** 2).sum(), lambda f, x, t, u: u)
    gradients = torch.autograd.grad(layer(torch.zeros(1, dtype=F64), t, u).sum(), (t, u), materialize_grads=True)
    assert [g.item() for g in gradients] == [0.0, 1.0]


@pytest.mark.parametrize(
    "take", [lambda t: t.item(), float, lambda t: t.reshape(1).tolist()[0], lambda t: (2 * t).item()]
)
def test_a_number_taken_out_of_theta_is_refused_by_name(take: Callable[[Tensor], float]) -> None:
    with pytest.raises(il.ClosureError, match=r"number out of theta\[0\].*detach"):
        call(lambda x, t: ((x - take(t)) ** 2).sum())
    with pytest.raises(il.ClosureError, match=r"number out of theta\[0\]"):
        call(cached(take))


def test_a_number_for_a_log_is_no_error() -> None:
    log: list[float] = []

    def objective(x: Tensor, t: Tensor) -> Tensor:
        value = 0.5 * ((x - t * t) ** 2).sum()
        log.extend([value.item(), t.item(), x.sum().item()])
        return value

    assert call(objective).item() == pytest.approx(6.0, rel=1e-12)


def test_numpy_inside_an_objective_is_refused_with_the_remedy() -> None:
    for read in (lambda x, t: x.detach().numpy(), lambda x, t: t.detach().numpy()):
        with pytest.raises(il.ClosureError, match=r"NumPy computes has no derivative.*torch operations"):
            call(lambda x, t, read=read: ((x - t) ** 2).sum() * float(read(x, t).sum()))
    frozen = torch.tensor([2.0], dtype=F64)  # data that need no derivative may come from anywhere
    t = torch.tensor([3.0], dtype=F64, requires_grad=True)
    layer = il.argmin(lambda x, t, a: ((x - t * torch.from_numpy(a.numpy())) ** 2).sum(), lambda f, x, t, a: a * t)
    assert torch.autograd.grad(layer(torch.zeros(1, dtype=F64), t, frozen).sum(), t)[0].item() == 2.0


class Sine(torch.autograd.Function):
    """Without setup_context, as Functions were written before torch.func."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


class OnceSine(Sine):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()


def descent(f: Callable[..., Any], x: Tensor, t: Tensor) -> Tensor:
    for _ in range(400):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(f(x, t), x)
        if g.norm() < 1e-12:
            break
        x = x - 0.15 * g
    return x.detach()


def physics(x: Tensor, t: Tensor) -> Tensor:
    points = torch.linspace(0, 1, 4, dtype=F64).requires_grad_()
    u = torch.tanh(points[:, None] * x).sum(1)
    (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    return ((slope - t[0] * u) ** 2).mean() / 4


def modules() -> dict[str, Callable[..., Tensor]]:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(2, 1, batch_first=True).double()
    encoder = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True).double()
    as_tokens = lambda x: x.reshape(1, 3, 2)  # noqa: E731
    return {
        "attention": lambda x, t: F.scaled_dot_product_attention(*[as_tokens(x)] * 2, as_tokens(t)).square().sum(),
        "a module": lambda x, t: attention(*[as_tokens(x)] * 3, need_weights=False)[0].square().sum(),
        "an encoder": lambda x, t: 0.1 * encoder(as_tokens(x + t))[0, 0].square().sum(),
        "a derivative": physics,
        "an old Function": lambda x, t: (Sine.apply(x) * t).sum(),
        "a checkpoint": lambda x, t: torch.utils.checkpoint.checkpoint(
            lambda a, b: torch.tanh(a * b).sum(), x, t, use_reentrant=False
        ),
    }


@pytest.mark.parametrize("name", list(modules()))
def test_what_plain_autograd_can_do_an_objective_may_do(name: str) -> None:
    term = modules()[name]
    objective = lambda x, t: term(x, t) + 2 * ((x - t) ** 2).sum()  # noqa: E731
    t = torch.linspace(-0.5, 0.7, 6, dtype=F64).requires_grad_()
    w, x0 = torch.linspace(-1, 1, 6, dtype=F64), torch.zeros(6, dtype=F64)
    (found,) = torch.autograd.grad(il.argmin(objective, descent)(x0, t) @ w, t)
    # central differences of a solution good to 1e-12 / 4: rounding 1e-12 / 1e-5, truncation of the order of 1e-10
    h, unit = 1e-5, torch.eye(6, dtype=F64)
    ends = [[descent(objective, x0, (t + s * h * e).detach()) @ w for s in (1, -1)] for e in unit]
    torch.testing.assert_close(found, torch.stack([(a - b) / (2 * h) for a, b in ends]), rtol=0, atol=1e-6)


def test_what_torch_cannot_differentiate_twice_is_named_with_a_remedy() -> None:
    index = torch.tensor([[0, 1], [1, 2]])
    cases = {
        "cdist.*vector_norm": lambda x, t: torch.cdist(x.reshape(3, 2), t.reshape(3, 2)).sum(),
        "embedding_bag.*functional.embedding": lambda x, t: F.embedding_bag(index, x.reshape(3, 2)).square().sum(),
        "OnceSine.*once_differentiable": lambda x, t: (OnceSine.apply(x) * t).sum(),
    }
    if cdist_has_second_derivatives():
        del cases["cdist.*vector_norm"]
    t = torch.linspace(-0.5, 0.7, 6, dtype=F64).requires_grad_()
    for match, term in cases.items():
        layer = il.argmin(lambda x, t, term=term: term(x, t) + 2 * ((x - t) ** 2).sum(), lambda f, x, t: t / 2)
        with pytest.raises(il.ObjectiveError, match=match):
            layer(torch.zeros(6, dtype=F64), t)


class NumpySine(torch.autograd.Function):
    """Computed by NumPy from x, and by a number of it, with the derivative in torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(np.sin(x.detach().numpy())) if x.ndim else torch.tensor(math.sin(x.item())).to(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.cos()


@pytest.mark.parametrize("shape", [(), (3,)])
def test_a_function_with_a_derivative_of_its_own_may_use_numpy_and_numbers(shape: tuple[int, ...]) -> None:
    # min x^2 - t sin(x) / 2 is at 2 x = t cos(x) / 2, so dx/dt = (cos(x) / 2) / (2 + t sin(x) / 2)
    t = torch.full(shape, 0.7, dtype=F64, requires_grad=True)

    def objective(x: Tensor, t: Tensor) -> Tensor:
        # sin(t) - sin(t): a number is taken out of theta too
        return (x**2 - t * NumpySine.apply(x) / 2 + NumpySine.apply(t) - t.sin()).sum()

    x = il.argmin(objective, il.solvers.NewtonCG(rtol=1e-13))(torch.zeros(shape, dtype=F64), t)
    (found,) = torch.autograd.grad(x.sum(), t)
    x = x.detach()
    expected = (x.cos() / 2) / (2 + t.detach() * x.sin() / 2)
    assert torch.allclose(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "layer",
    [
        lambda f: il.argmin(f, il.solvers.ProximalGradient(), regularizer=lambda t: il.L1(t.item())),
        lambda f: il.argmin(f, il.solvers.ProjectedGradient(), constraint=lambda t: il.sets.Box(0.0, t.item())),
        lambda f: il.argmin(f, il.solvers.ProjectedGradient(), constraint=lambda t: il.sets.Ball(float(t))),
        lambda f: il.constrained_argmin(f, lambda f, x, t: torch.ones_like(x), equality=lambda x, t: x - t.item()),
        lambda f: il.constrained_argmin(f, lambda f, x, t: torch.ones_like(x), inequality=lambda x, t: x - float(t)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_number_taken_out_of_theta_by_a_set_or_constraint_is_refused_by_name(layer: Any, dtype: torch.dtype) -> None:
    t = torch.ones((), dtype=dtype, requires_grad=True)
    solve = layer(lambda x, t: 0.5 * ((x - 5 * t) ** 2).sum())
    with pytest.raises(il.ClosureError, match=r"takes a Python number out of theta"):
        solve(torch.zeros(1, dtype=dtype), t)


def test_a_set_whose_number_is_for_a_log_is_right() -> None:
    t, log = torch.ones((), dtype=F64, requires_grad=True), list[float]()
    box = lambda t: (log.append(t.item()), il.sets.Box(0.0, t))[1]  # noqa: E731
    layer = il.argmin(lambda x, t: 0.5 * ((x - 5 * t) ** 2).sum(), il.solvers.ProjectedGradient(), constraint=box)
    (found,) = torch.autograd.grad(layer(torch.zeros(1, dtype=F64), t).sum(), t)
    assert found.item() == 1.0 and log


def test_a_number_taken_out_of_a_closed_over_weight_is_refused() -> None:
    w = nn.Parameter(torch.tensor(3.0, dtype=F64))

    def layer(of: Callable[[Tensor], Tensor]) -> Tensor:
        solve = il.argmin(lambda x: 0.5 * ((x - (2 * of(w)).item()) ** 2 + w * x**2).sum(), il.solvers.LBFGS())
        return solve(torch.zeros(1, dtype=F64))

    with pytest.raises(il.ClosureError, match="number out of a tensor that it closes over"):
        layer(lambda w: w)
    # a constant by its owner's word: x = 6 / (1 + w), dx/dw = -6 / (1 + w)^2
    (found,) = torch.autograd.grad(layer(Tensor.detach).sum(), w)
    assert found.item() == pytest.approx(-6 / 16)
