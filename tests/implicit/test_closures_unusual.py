"""Objectives that read tensors in unusual ways: on another branch, in C++, under transforms of their own."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from references import F64, newton, randn, relative_error
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

import implicitlayer as il

TIGHT = il.ConjugateGradient(rtol=1e-13)


def positive(*shape: int, seed: int) -> Tensor:
    return randn(*shape, seed=seed).abs() + 0.5


def explicit(a: Tensor, t: Tensor) -> Tensor:
    return (t / a) ** (1 / 3)


def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, t: (function(a, t) ** 2).sum()


def compare(got: Any, expected: Any) -> None:
    got, expected = torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(expected)
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape and relative_error(g, e) < 1e-8  # second order at rtol 1e-13, condition below 20


def test_a_tensor_read_only_on_another_branch_is_differentiated_or_refused_by_name() -> None:
    """At init the objective takes the branch without w; at the solution it reads w."""
    w = positive(3, seed=1).requires_grad_()

    def objective(x: Tensor) -> Tensor:
        return ((x - w**2) ** 2).sum() if float(x.detach().sum()) > 0 else ((x - 1) ** 2).sum()

    refused = False
    try:
        x = il.argmin(objective, lambda f, x: w.detach() ** 2)(torch.zeros(3, dtype=F64))
        (x.sum() + 0 * w.sum()).backward()
    except il.ClosureError:
        refused = True
    assert refused or (w.grad is not None and torch.allclose(w.grad, 2 * w.detach(), rtol=1e-9))


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_weights_of_a_traced_module_are_differentiated_or_refused_by_name() -> None:
    """Their weights are read in C++, where no torch function sees them."""
    net = torch.nn.Linear(2, 1, bias=False).double()
    traced = torch.jit.trace(net, torch.zeros(2, dtype=F64))

    def objective(x: Tensor) -> Tensor:
        return ((x - 1) ** 2).sum() + traced(x).sum()  # x = 1 - w / 2

    refused = False
    try:
        x = il.argmin(objective, lambda f, x: 1 - net.weight.detach()[0] / 2)(torch.zeros(2, dtype=F64))
        (x.sum() + 0 * net.weight.sum()).backward()
    except il.ClosureError:
        refused = True
    gradient = net.weight.grad
    assert refused or (gradient is not None and torch.allclose(gradient, torch.full((1, 2), -0.5, dtype=F64)))


def test_vmap_inside_the_objective_is_fine() -> None:
    a, t = positive(3, seed=1), positive(3, seed=2)

    def run(a: Tensor, t: Tensor) -> Tensor:
        def objective(x: Tensor, a: Tensor, t: Tensor) -> Tensor:
            return torch.vmap(lambda x, a, t: a * x**4 / 4 - t * x)(x, a, t).sum()

        solver = lambda f, x, a, t: (t / a) ** (1 / 3)  # noqa: E731
        return il.argmin(objective, solver, linear_solver=TIGHT)(torch.ones_like(t), a, t)

    leaves = [s.clone().requires_grad_() for s in (a, t)]
    expected = jacrev(lambda a, t: explicit(a, t).sum(), argnums=(0, 1))(a, t)
    compare(torch.autograd.grad(run(*leaves).sum(), leaves), expected)
    compare(grad(lambda a, t: run(a, t).sum(), argnums=(0, 1))(a, t), expected)
    compare(hessian(scalar(run))(a, t), hessian(scalar(explicit))(a, t))
    lanes = (torch.stack([a, t]), torch.stack([t, a]))
    compare(vmap(grad(scalar(run)))(*lanes), vmap(grad(scalar(explicit)))(*lanes))


def test_a_closed_over_tensor_that_the_objective_maps_over_itself_is_differentiated_or_refused() -> None:
    """A leaf stands for itself in a plain backward; nothing else can be followed into the map."""
    leaf = positive(3, seed=2).requires_grad_()
    for t in (leaf, 1 * leaf):
        layer = il.argmin(lambda x, t=t: torch.vmap(lambda x, t: x**4 / 4 - t * x)(x, t).sum(), newton)
        if t is leaf:
            x = layer(torch.ones(3, dtype=torch.float64))
            (gradient,) = torch.autograd.grad(x.sum(), t, retain_graph=True)
            compare(gradient, t.detach() ** (-2 / 3) / 3)
            with pytest.raises(il.ClosureError, match="one more theta"):
                torch.autograd.grad(x.sum(), t, create_graph=True)
        else:
            with pytest.raises(il.ClosureError, match="one more theta"):
                layer(torch.ones(3, dtype=torch.float64))


def test_functional_gradients_inside_the_objective_are_fine() -> None:
    """A gradient penalty: |grad_y (a y^3 / 3) - t|^2 at y = x."""
    a, t = positive(3, seed=1), positive(3, seed=2)

    def run(a: Tensor, t: Tensor) -> Tensor:
        def objective(x: Tensor) -> Tensor:
            return ((grad(lambda y: (a * y**3 / 3).sum())(x) - t) ** 2).sum()

        return il.argmin(objective, lambda f, x: (t.detach() / a.detach()).sqrt(), linear_solver=TIGHT)(
            torch.ones_like(t)
        )

    def direct(a: Tensor, t: Tensor) -> Tensor:
        return (t / a).sqrt()

    leaves = [s.clone().requires_grad_() for s in (a, t)]
    compare(torch.autograd.grad(run(*leaves).sum(), leaves), jacrev(lambda a, t: direct(a, t).sum(), (0, 1))(a, t))


def scripted() -> Callable[..., Tensor]:
    """(x - w^2)^2, whose weights a script reads: no torch function is handed them."""

    def distance(x: Tensor, w: Tensor) -> Tensor:
        return ((x - w**2) ** 2).sum()

    function: Callable[..., Tensor] = torch.jit.script(distance)
    x = torch.zeros(3, dtype=F64, requires_grad=True)
    for _ in range(3):  # the first runs of a script are recorded and not yet optimised
        torch.autograd.grad(function(x, x.detach()), x, create_graph=True)
    return function


def in_another_thread(x: Tensor, w: Tensor) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: ((x - w**2) ** 2).sum()).result()


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize("beside", ["nothing", "a term of theta", "a term that is not differentiated"])
@pytest.mark.parametrize("how", ["scripted", "in another thread"])
def test_weights_that_only_a_script_or_another_thread_reads_are_refused_and_never_missed(how: str, beside: str) -> None:
    distance = scripted() if how == "scripted" else in_another_thread
    w, t = positive(3, seed=1).requires_grad_(), torch.ones(3, dtype=F64, requires_grad=True)
    objectives = {
        "nothing": lambda x: distance(x, w),
        "a term of theta": lambda x, t: distance(x, w) + ((x - t) ** 2).sum(),
        "a term that is not differentiated": lambda x, t: distance(x, w) + 0 * t.detach().sum(),
    }
    layer = il.argmin(objectives[beside], il.solvers.LBFGS(rtol=1e-12))
    theta = () if beside == "nothing" else (t,)
    with pytest.raises(il.ClosureError, match=r"not be followed .*another thread.* as one more theta"):
        layer(torch.zeros(3, dtype=F64), *theta)
    if how == "in another thread" and beside != "nothing":
        return  # what comes out of another thread is not followed at all
    w.requires_grad_(False)  # a constant may be read in any way
    share = 0.5 if beside == "a term of theta" else 1.0
    x = layer(torch.zeros(3, dtype=F64), *(t.detach() for t in theta))
    assert torch.allclose(x, share * w**2 + (1 - share), rtol=1e-9)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize("how", ["scripted", "in another thread"])
def test_weights_that_a_script_or_another_thread_reads_as_a_theta_are_differentiated(how: str) -> None:
    distance = scripted() if how == "scripted" else in_another_thread
    w = positive(3, seed=1).requires_grad_()
    x = il.argmin(distance, il.solvers.LBFGS(rtol=1e-12))(torch.zeros(3, dtype=F64), w)
    compare(torch.autograd.grad(x.sum(), w)[0], 2 * w.detach())


def test_a_leaf_that_the_objective_makes_for_a_derivative_of_its_own_is_no_weight() -> None:
    def objective(x: Tensor) -> Tensor:
        points = torch.linspace(0, 1, 3, dtype=F64).requires_grad_()
        (slope,) = torch.autograd.grad((torch.sin(points) * x).sum(), points, create_graph=True)
        return ((slope - 1) ** 2).sum()  # x cos(points) = 1

    x = il.argmin(objective, il.solvers.LBFGS(rtol=1e-12))(torch.zeros(3, dtype=F64))
    assert torch.allclose(x, 1 / torch.cos(torch.linspace(0, 1, 3, dtype=F64)), rtol=1e-9)


def energy(x: Tensor, t: Tensor, w: Tensor) -> Tensor:
    return (torch.cosh(x - t) + 0.5 * w * x**2).sum()


NESTED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "grad of grad": lambda x, t, w: grad(lambda y: grad(lambda z: energy(z, t, w))(y).sum())(x).sum(),
    "of its argument alone": lambda x, t, w: grad(lambda y: grad(lambda z: (z**4).sum())(y).sum())(x).sum(),
    "hessian": lambda x, t, w: torch.logdet(hessian(lambda y: energy(y, t, w))(x)),
    "jacrev of jacrev": lambda x, t, w: jacrev(jacrev(lambda y: energy(y, t, w)))(x).diagonal().sum(),
    "mapped": lambda x, t, w: vmap(lambda s: grad(grad(lambda r: (torch.sin(r * x) * t).sum()))(s))(t).sum(),
    "in theta": lambda x, t, w: (grad(lambda s: grad(lambda r: energy(x, r, w))(s).sum())(t) ** 2).sum(),
}


@pytest.mark.parametrize("name", NESTED)
def test_derivatives_of_derivatives_that_an_objective_takes_itself(name: str) -> None:
    """Its transforms hand what they have made to one another; nothing of that is closed over."""
    w, t = positive(3, seed=5).requires_grad_(), randn(3, seed=6).requires_grad_()

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return energy(x, t, w) + 0.02 * NESTED[name](x, t, w)

    layer = il.argmin(objective, il.solvers.LBFGS(rtol=1e-12, max_steps=500), linear_solver=TIGHT)
    x = layer(torch.zeros(3, dtype=F64), t)
    slope, at = (
        grad(lambda x, t, v: energy(x, t, v) + 0.02 * NESTED[name](x, t, v)),
        (x.detach(), t.detach(), w.detach()),
    )
    matrix, by_t, by_w = (jacrev(slope, argnums=i)(*at) for i in range(3))
    compare(
        torch.autograd.grad(x.sum(), (t, w)),
        [-torch.linalg.solve(matrix.mT, torch.ones(3, dtype=F64)) @ b for b in (by_t, by_w)],
    )
    compare(jacrev(lambda t: layer(torch.zeros(3, dtype=F64), t))(t.detach()), -torch.linalg.solve(matrix, by_t))
    mapped = vmap(jacrev(lambda t: layer(torch.zeros(3, dtype=F64), t)))(t.detach().expand(2, 3))
    compare(mapped[1], -torch.linalg.solve(matrix, by_t))


@pytest.mark.parametrize("is_leaf", [True, False])
def test_what_is_closed_over_and_handed_to_a_derivative_is_refused(is_leaf: bool) -> None:
    w = positive(3, seed=7).requires_grad_()
    handed = w if is_leaf else w.exp()

    def objective(x: Tensor, t: Tensor) -> Tensor:
        return ((x - t) ** 2).sum() + x.sum() * grad(lambda y: grad(lambda z: (z**3).sum())(y).sum())(handed).sum()

    with pytest.raises(il.ClosureError, match="to a transform of its own"):
        il.argmin(objective, il.solvers.LBFGS())(torch.zeros(3, dtype=F64), randn(3, seed=8).requires_grad_())
