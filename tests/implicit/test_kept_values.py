"""Numbers and caches that an objective makes of theta: under any transform, in any layer, from any evaluation on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor

import implicitlayer as il

F64 = torch.float64
T = torch.tensor([0.5, 2.0], dtype=F64)
ZEROS = torch.zeros(2, dtype=F64)
Layer = Callable[[Tensor], Tensor]


def dual(layer: Layer) -> Tensor:
    with fwd.dual_level():
        return fwd.unpack_dual(layer(fwd.make_dual(T, torch.ones_like(T)))).tangent


def summed(layer: Layer) -> Callable[[Tensor], Tensor]:
    return lambda t: layer(t).sum()


# each with its value for x = t ** 2
TRANSFORMS: dict[str, tuple[Callable[[Layer], Tensor], Tensor]] = {
    "grad": (lambda layer: torch.func.grad(summed(layer))(T), 2 * T),
    "jacrev": (lambda layer: torch.func.jacrev(layer)(T), torch.diag(2 * T)),
    "jacfwd": (lambda layer: torch.func.jacfwd(layer)(T), torch.diag(2 * T)),
    "jvp": (lambda layer: torch.func.jvp(layer, (T,), (torch.ones_like(T),))[1], 2 * T),
    "hessian": (lambda layer: torch.func.hessian(summed(layer))(T), 2 * torch.eye(2, dtype=F64)),
    "dual numbers": (dual, 2 * T),
    "vmap": (lambda layer: torch.vmap(layer)(T.expand(3, 2)), (T**2).expand(3, 2)),
    "vmap of grad": (lambda layer: torch.vmap(torch.func.grad(summed(layer)))(T.expand(3, 2)), (2 * T).expand(3, 2)),
}
NUMBERS = [name for name in TRANSFORMS if "vmap" not in name]  # there torch has no numbers


def layer_of(objective: Callable[[Tensor, Tensor], Tensor], given: str) -> Layer:
    if given == "theta":
        return lambda t: il.argmin(objective, il.solvers.NewtonCG())(ZEROS, t)
    return lambda t: il.argmin(lambda x: objective(x, t), il.solvers.NewtonCG())(ZEROS)


@pytest.mark.parametrize("given", ["theta", "closed over"])
@pytest.mark.parametrize("transform", NUMBERS)
def test_a_number_taken_out_of_theta_is_refused_under_a_transform_too(transform: str, given: str) -> None:
    layer = layer_of(lambda x, t: ((x - t.sum().item() * t) ** 2).sum(), given)
    with pytest.raises(il.ClosureError, match=r"takes a Python number out of"):
        TRANSFORMS[transform][0](layer)


@pytest.mark.parametrize("given", ["theta", "closed over"])
@pytest.mark.parametrize("transform", NUMBERS)
def test_a_number_for_a_log_is_fine_under_a_transform(transform: str, given: str) -> None:
    log: list[float] = []

    def objective(x: Tensor, t: Tensor) -> Tensor:
        log.append(t.sum().item())
        return ((x - t**2) ** 2).sum()

    compute, expected = TRANSFORMS[transform]
    # a quadratic is solved to rounding by one Newton step
    torch.testing.assert_close(compute(layer_of(objective, given)), expected, rtol=1e-12, atol=1e-12)
    assert log


@pytest.mark.parametrize("given", ["theta", "closed over"])
@pytest.mark.parametrize("transform", [name for name in TRANSFORMS if "vmap" in name])
def test_a_number_under_vmap_is_an_error_that_says_so(transform: str, given: str) -> None:
    layer = layer_of(lambda x, t: ((x - t.sum().item() * t) ** 2).sum(), given)
    with pytest.raises(il.ObjectiveError, match=r"Python number of a tensor.*under vmap"):
        TRANSFORMS[transform][0](layer)


def kept_from(begin: int, beside: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """An objective that keeps t ** 2 from its ``begin``-th evaluation on."""
    cache: list[Tensor] = []
    count = 0

    def objective(x: Tensor, t: Tensor) -> Tensor:
        nonlocal count
        count += 1
        square = cache[0] if cache else t**2
        if count >= begin and not cache:
            cache.append(square)
        return ((x - square) ** 2).sum() + (((x - t) ** 2).sum() if beside else 0)

    return objective


@pytest.mark.parametrize("begin", [1, 2, 3])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("given", ["theta", "closed over"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_cache_is_refused_under_a_transform_too(transform: str, given: str, beside: bool, begin: int) -> None:
    # torch may be the first to fail, at a tensor of a level that is over
    with pytest.raises((il.ClosureError, RuntimeError), match=r"cache|no longer reads|INTERNAL ASSERT"):
        TRANSFORMS[transform][0](layer_of(kept_from(begin, beside), given))


@pytest.mark.parametrize("begin", [2, 3])
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("given", ["theta", "closed over"])
@pytest.mark.parametrize("lanes", [False, True])
def test_a_cache_that_the_solver_fills_is_refused(lanes: bool, given: str, beside: bool, begin: int) -> None:
    layer = layer_of(kept_from(begin, beside), given)
    with pytest.raises(il.ClosureError, match=r"does not any longer|no longer reads a closed-over"):
        torch.vmap(layer)(T.expand(3, 2).clone().requires_grad_()) if lanes else layer(T.clone().requires_grad_())


Square = Callable[[Tensor], Tensor]
SLSQP = il.solvers.SciPyMinimize("SLSQP")
BOXED = il.solvers.SciPyMinimize("L-BFGS-B")
# x for t = 3, in which every layer reads t in two places; the derivative of its sum is in the second column
LAYERS: dict[str, tuple[Callable[[Square], Any], float]] = {
    # x - t^2 + x - t = 0
    "argmin": (
        lambda k: il.argmin(lambda x, t: ((x - k(t)) ** 2 + (x - t) ** 2).sum(), il.solvers.GradientDescent(0.2)),
        7.0,
    ),
    "root": (lambda k: il.root(lambda x, t: x - k(t) - t, il.solvers.Newton()), 14.0),
    "fixed_point": (lambda k: il.fixed_point(lambda x, t: 0.5 * x + k(t) + t, il.solvers.AndersonAcceleration()), 28.0),
    # the nearest point to t (1, 1) with sum t^2
    "equality": (
        lambda k: il.constrained_argmin(lambda x, t: ((x - t) ** 2).sum(), SLSQP, equality=lambda x, t: x.sum() - k(t)),
        6.0,
    ),
    "inequality": (
        lambda k: il.constrained_argmin(
            lambda x, t: ((x + t) ** 2).sum(), SLSQP, inequality=lambda x, t: k(t) - x.sum()
        ),
        6.0,
    ),
    # both entries at the upper bound t^2 / 30
    "a set": (
        lambda k: il.argmin(
            lambda x, t: ((x - t) ** 2).sum(), BOXED, constraint=lambda t: il.sets.Box(-k(t) / 30, k(t) / 30)
        ),
        0.4,
    ),
}


@pytest.mark.parametrize("begin", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_a_cache_beside_another_use_of_theta_never_gives_a_wrong_gradient(name: str, begin: int) -> None:
    cache: list[Tensor] = []
    count = 0

    def kept(t: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if cache:
            return cache[0]
        value = t * t
        if count >= begin:
            cache.append(value)
        return value

    make, expected = LAYERS[name]
    refused = 0
    for square in (lambda t: t * t, kept, kept):
        t = torch.tensor(3.0, dtype=F64, requires_grad=True)
        try:
            x = make(square)(ZEROS, t)
        except il.ClosureError:
            refused += 1
            continue
        # solvers stop within 1e-6 of the solution
        assert torch.autograd.grad(x.sum(), t)[0].item() == pytest.approx(expected, rel=1e-5)
    assert refused > 0


BEFORE: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference mode": torch.inference_mode,
    "no gradient needed": nullcontext,
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("name", LAYERS)
def test_a_cache_filled_by_an_evaluation_without_derivatives_is_refused_when_they_are_needed(
    name: str, before: str
) -> None:
    """As where a model is evaluated before it is trained."""
    cache: list[Tensor] = []

    def kept(t: Tensor) -> Tensor:
        if not cache:
            cache.append(t * t)
        return cache[0]

    layer = LAYERS[name][0](kept)
    t = torch.tensor(3.0, dtype=F64, requires_grad=True)
    with BEFORE[before]():
        values = [layer(ZEROS, t.detach() if before == "no gradient needed" else t) for _ in range(2)]
    # the second one is right, with what is kept; solvers stop within 1e-6 of the solution
    torch.testing.assert_close(values[1], values[0], rtol=1e-6, atol=1e-8)
    with pytest.raises(il.ClosureError, match=r"made of x or theta in an earlier call.*a cache"):
        layer(ZEROS, t)
    cache.clear()
    with pytest.raises(il.ClosureError, match=r"a cache"):  # of this call now
        layer(ZEROS, t)


def test_what_is_kept_of_one_theta_holds_back_no_gradient_of_another() -> None:
    cache: list[Tensor] = []

    def objective(x: Tensor, data: Tensor, t: Tensor) -> Tensor:
        if not cache:
            cache.append(data**2)
        return ((x - cache[0] * t) ** 2).sum()

    layer = il.argmin(objective, il.solvers.NewtonCG())
    with torch.no_grad():
        layer(ZEROS, T, T)
    t = T.clone().requires_grad_()
    # x = data^2 t
    (found,) = torch.autograd.grad(layer(ZEROS, T, t).sum(), t)
    torch.testing.assert_close(found, T**2, rtol=1e-12, atol=0)
    assert cache


UNREAD: dict[str, Callable[[Tensor], Any]] = {
    "argmin": lambda c: il.argmin(lambda x, t: ((x - c) ** 2).sum(), il.solvers.NewtonCG()),
    "root": lambda c: il.root(lambda x, t: x - c, il.solvers.Newton()),
    "fixed_point": lambda c: il.fixed_point(lambda x, t: 0.5 * x + c, il.solvers.AndersonAcceleration()),
    "a set": lambda c: il.argmin(lambda x, t: ((x - c) ** 2).sum(), BOXED, constraint=il.sets.Box(-1.0, 1.0)),
    "equality": lambda c: il.constrained_argmin(
        lambda x, t: ((x - c) ** 2).sum(), SLSQP, equality=lambda x, t: x.sum() - 1
    ),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_zero_gradient_of_a_function_that_reads_no_theta_is_told(name: str) -> None:
    layer = UNREAD[name](torch.tensor(9.0, dtype=F64))
    t = torch.tensor(3.0, dtype=F64, requires_grad=True)
    with pytest.warns(il.ImplicitLayerWarning, match=r"reads no theta.*the gradient is zero"):
        x = layer(ZEROS, t)
    assert torch.autograd.grad(x.sum(), t)[0].item() == 0.0


def test_a_term_that_is_read_on_one_side_of_a_branch_is_no_cache() -> None:
    def objective(x: Tensor, t: Tensor) -> Tensor:
        return (
            ((x - t) ** 2).sum() + (t * x**2).sum() * (1.0 if x.sum() < 1 else 0.0)
            if x.sum() < 1
            else ((x - t) ** 2).sum()
        )

    t = torch.tensor([3.0, 4.0], dtype=F64, requires_grad=True)
    x = il.argmin(objective, lambda f, x, t: t.clone())(ZEROS, t)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), t)[0], torch.ones(2, dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("solver", [il.solvers.Newton(), il.solvers.Broyden(), il.solvers.AndersonAcceleration()])
def test_the_function_of_a_root_may_take_a_derivative_by_autograd(solver: Any) -> None:
    def slope(x: Tensor, t: Tensor) -> Tensor:
        energy = ((x - t) ** 2).sum() / 2 + (x**4).sum() / 4
        return torch.autograd.grad(energy, x, create_graph=True)[0]

    t = T.clone().requires_grad_()
    if isinstance(solver, il.solvers.AndersonAcceleration):
        x = il.fixed_point(lambda x, t: x - 0.1 * slope(x, t), solver)(ZEROS, t)
    else:
        x = il.root(slope, solver)(ZEROS, t)
    # x + x^3 = t; the solvers stop at 1e-12 of the first residual
    torch.testing.assert_close((x + x**3).detach(), T, rtol=1e-10, atol=0)
    expected = 1 / (1 + 3 * x.detach() ** 2)
    torch.testing.assert_close(torch.autograd.grad(x.sum(), t)[0], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_autograd_inside_a_function_under_a_transform_is_named_with_a_remedy(transform: str) -> None:
    def objective(x: Tensor, t: Tensor) -> Tensor:
        return torch.autograd.grad(((x - t) ** 2).sum(), x, create_graph=True)[0].square().sum()

    with pytest.raises(il.ObjectiveError, match=r"torch\.autograd\.grad.*under a transform.*torch\.func\.grad"):
        TRANSFORMS[transform][0](layer_of(objective, "theta"))


@pytest.mark.parametrize("transform", ["jacfwd", "jvp", "hessian", "dual numbers"])
def test_sparse_data_under_forward_mode_are_named_with_a_remedy(transform: str) -> None:
    data = torch.eye(2, dtype=F64).to_sparse()
    layer = layer_of(lambda x, t: ((data @ x - t) ** 2).sum(), "theta")
    with pytest.raises(il.ObjectiveError, match=r"sparse tensor under forward mode.*to_dense"):
        TRANSFORMS[transform][0](layer)


def number_of(u: Tensor, a: Tensor) -> Tensor:
    return (a**2).item() * u


def cached_of() -> Callable[[Tensor, Tensor], Tensor]:
    cache: list[Tensor] = []

    def product(u: Tensor, a: Tensor) -> Tensor:
        if not cache:
            cache.append(a**2)
        return cache[0] * u

    return product


def test_an_operator_of_linear_solve_keeps_to_the_same_rules() -> None:
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)
    with pytest.raises(il.ClosureError, match=r"takes a Python number out of theta\[0\]"):
        il.linear_solve(number_of, T, None, a)
    with pytest.raises(il.ClosureError, match=r"takes a Python number out of a tensor that it closes over"):
        il.linear_solve(lambda u: number_of(u, a), T)
    with pytest.raises(il.ClosureError, match=r"made of theta\[0\].*a cache"):
        il.linear_solve(cached_of(), T, None, a)
    with pytest.raises(il.ClosureError, match=r"takes a Python number out of theta\[0\]"):
        il.hessian_operator(lambda x, a: a.item() * (x**2).sum(), ZEROS, a)


def test_an_operator_that_logs_a_number_is_solved() -> None:
    log: list[float] = []
    a = torch.tensor(2.0, dtype=F64, requires_grad=True)

    def product(u: Tensor, a: Tensor) -> Tensor:
        log.append(a.item())
        return a**2 * u

    u = il.linear_solve(product, T, None, a)
    # u = T / a^2
    assert torch.autograd.grad(u.sum(), a)[0].item() == pytest.approx(-2 * T.sum().item() / 8, rel=1e-12)
    assert log


@pytest.mark.parametrize("transform", [None, "grad", "jacfwd"])
@pytest.mark.parametrize("given", ["theta", "closed over"])
@pytest.mark.parametrize("number", ["strength", "border", "root", "set", "inequality", "equality"])
def test_a_number_that_does_not_show_at_init_is_refused(number: str, given: str, transform: str | None) -> None:
    """At x = 0 a strength has no effect, inside of its borders a set has none, nor has a penalty of what is outside."""
    newton = il.solvers.NewtonCG()
    pull = lambda x: ((x - 1) ** 2).sum()  # noqa: E731
    makers: dict[str, Callable[[Callable[[], Tensor]], Any]] = {
        "strength": lambda t: il.argmin(lambda x, *_: pull(x) + t(*_).sum().item() * (x**2).sum(), newton),
        "border": lambda t: il.argmin(
            lambda x, *_: pull(x) + ((x - t(*_).sum().item()).clamp(min=0) ** 2).sum(), newton
        ),
        "root": lambda t: il.root(lambda x, *_: x - 1 + t(*_).sum().item() * x, il.solvers.Newton()),
        "set": lambda t: il.argmin(
            lambda x, *_: pull(x), BOXED, constraint=lambda *_: il.sets.Box(-1.0, t(*_).sum().item() / 10)
        ),
        "inequality": lambda t: il.constrained_argmin(
            lambda x, *_: pull(x), SLSQP, inequality=lambda x, *_: t(*_).sum().item() * x - 1
        ),
        "equality": lambda t: il.constrained_argmin(
            lambda x, *_: pull(x), SLSQP, equality=lambda x, *_: t(*_).sum().item() * x.sum()
        ),
    }

    def layer(t: Tensor) -> Tensor:
        if given == "theta":
            return makers[number](lambda *args: args[0])(ZEROS, t)
        return makers[number](lambda *_: t)(ZEROS)

    compute = TRANSFORMS[transform][0] if transform else lambda f: f(T.clone().requires_grad_())
    with pytest.raises(il.ClosureError, match=r"takes a Python number out of"):
        compute(layer)


@pytest.mark.parametrize("init", [0.0, 1.0])
def test_a_number_taken_out_of_x_is_refused(init: float) -> None:
    layer = il.argmin(lambda x, t: ((x - t) ** 2).sum() + x.sum().item() * x.sum(), il.solvers.NewtonCG())
    with pytest.raises(il.ClosureError, match=r"takes a Python number out of x \("):
        layer(torch.full((2,), init, dtype=F64), T.clone().requires_grad_())


@pytest.mark.parametrize("init", [0.0, 1.0])
def test_a_number_of_x_that_changes_nothing_is_fine(init: float) -> None:
    """A shift that keeps exponentials small, and a branch on a number at whose border both sides agree."""

    def objective(x: Tensor, t: Tensor) -> Tensor:
        most = x.max().item()
        soft = (x - most).exp().sum().log() + most
        r = x[0] - t[0]
        return ((x - t) ** 2).sum() + soft + (r**2 / 2 if abs(x[0].item() - t[0].item()) <= 1 else r.abs() - 0.5)

    t = T.clone().requires_grad_()
    x = il.argmin(objective, il.solvers.NewtonCG())(torch.full((2,), init, dtype=F64), t)
    (found,) = torch.autograd.grad(x.sum(), t)
    # at the solution, within 1 of t: 3 r_0 + softmax(x)_0 = 0 and 2 r_1 + softmax(x)_1 = 0
    p = torch.softmax(x.detach(), 0)
    D = torch.diag(torch.tensor([3.0, 2.0], dtype=F64))
    expected = torch.linalg.solve(D + torch.diag(p) - torch.outer(p, p), D).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
