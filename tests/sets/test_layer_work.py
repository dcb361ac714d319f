"""What a layer over a set does once, and that what it keeps changes no derivative."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error, spd_matrix
from torch import Tensor

import implicitlayer as il
from implicitlayer.constrained import _prox_equation
from implicitlayer.constrained._prox_equation import At
from implicitlayer.sets import Affine, Ball, Box, NonNegative, Projection, Simplex

H = spd_matrix(5, 1.0, seed=1)
ZERO = torch.zeros(5, dtype=F64)
PG = il.solvers.ProximalGradient(rtol=1e-13, max_steps=2000)
ROUNDING = 1e-11  # dense solves of condition below 100, sums of a few products


def smooth(x: Tensor, b: Tensor, *_: Any) -> Tensor:
    return 0.5 * x @ H @ x - b @ x + 0.1 * torch.logsumexp(x, 0)


TERMS: dict[str, tuple[str, Any]] = {
    "box": ("constraint", lambda b, s: Box(-s, s)),
    "non-negative": ("constraint", NonNegative()),
    "simplex": ("constraint", lambda b, s: Simplex(s)),
    "ball": ("constraint", lambda b, s: Ball(s)),
    "affine": ("constraint", lambda b, s: Affine(torch.ones(1, 5, dtype=F64), s.reshape(1))),
    "projection": ("constraint", Projection(lambda y, b, s: torch.where(y < s, y, s))),
    "l1": ("regularizer", lambda b, s: il.L1(s)),
    "elastic net": ("regularizer", lambda b, s: il.ElasticNet(s, s)),
    "group": ("regularizer", lambda b, s: il.GroupL1(s)),
}
EACH = pytest.mark.parametrize("name", list(TERMS))


def layer_of(name: str, function: Callable[..., Tensor] = smooth, **settings: Any) -> Any:
    kind, term = TERMS[name]
    return il.argmin(function, PG, **{kind: term}, linear_solver=il.Dense(), **settings)


def theta() -> list[Tensor]:
    return [(1.5 * randn(5, seed=7)).requires_grad_(), torch.tensor(0.4, dtype=F64, requires_grad=True)]


# --- one graph, one eta, and derivatives


@EACH
def test_a_plain_backward_gives_what_the_composable_rules_give(name: str) -> None:
    data = theta()
    value = (layer_of(name)(ZERO, *data) ** 3).sum()
    plain = torch.autograd.grad(value, data, retain_graph=True)
    composable = torch.autograd.grad(value, data, create_graph=True)
    for got, want in zip(plain, composable, strict=True):
        assert relative_error(got, want.detach()) < ROUNDING


@EACH
def test_batched_cotangents_and_lanes_give_what_a_loop_gives(name: str) -> None:
    b, s = theta()
    layer = layer_of(name)
    lanes = torch.stack([b.detach(), -0.7 * b.detach()]).requires_grad_()
    x = torch.vmap(lambda b: layer(ZERO, b, s))(lanes)
    cotangents = randn(3, 2, 5, seed=9)
    together = torch.autograd.grad(x, (lanes, s), cotangents, is_grads_batched=True, retain_graph=True)
    for i, cotangent in enumerate(cotangents):
        plain = torch.autograd.grad(x, (lanes, s), cotangent, retain_graph=True)
        singles = [layer(ZERO, lane, s) for lane in lanes]
        apart = torch.autograd.grad(torch.stack(singles), (lanes, s), cotangent)
        for batched, got, want in zip(together, plain, apart, strict=True):
            assert relative_error(batched[i], want) < ROUNDING
            assert relative_error(got, want) < ROUNDING


def test_a_polished_answer_has_the_derivatives_of_its_own_point() -> None:
    # the curvature, and with it eta, is 100 times larger where the solver stops than at the solution
    layer = il.argmin(
        lambda x, t: ((x - t) ** 4 / 12 + 0.5 * (x - t) ** 2).sum(),
        lambda f, x, t: t + 14.0,
        constraint=NonNegative(),
        polish=20,
        linear_solver=il.Dense(),
    )
    t = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(torch.zeros(2, dtype=F64), t).sum(), t)
    assert relative_error(gradient, torch.ones(2, dtype=F64)) < 1e-10


@EACH
def test_eta_is_found_once_for_a_call_and_its_plain_backwards(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Tensor] = []
    original = _prox_equation.step_of

    def counted(*args: Any) -> Tensor:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(_prox_equation, "step_of", counted)
    data = theta()
    x = layer_of(name)(ZERO, *data)
    assert len(found) == 1
    x.sum().backward(retain_graph=True)
    (2 * x).sum().backward()
    assert len(found) == 1


def test_the_checks_of_a_call_run_the_objective_once_and_a_backward_once_more() -> None:
    runs = [0]

    def counted(x: Tensor, t: Tensor) -> Tensor:
        runs[0] += 1
        return 0.5 * ((x - t) ** 2).sum()

    t = randn(5, seed=3).requires_grad_()
    x = il.argmin(counted, lambda f, x, t: t.clamp_min(0), constraint=NonNegative())(ZERO, t)
    assert runs[0] == 2  # the search for closed-over tensors is the other one; the solver made none
    x.sum().backward()
    assert runs[0] == 2  # the graph of the checks serves it
    assert t.grad is not None and torch.equal(t.grad, (t.detach() > 0).to(F64))


@pytest.mark.parametrize("wanted", [True, False])
def test_a_graph_of_the_checks_outlives_the_call_only_for_the_first_backward(wanted: bool) -> None:
    gc.disable()  # what only the garbage collector would find counts as alive
    try:
        x = layer_of("l1")(ZERO, *(t.requires_grad_(wanted) for t in theta()))
        assert sum(type(o) is At for o in gc.get_objects()) == wanted
        if wanted:
            x.sum().backward()
            assert not [o for o in gc.get_objects() if type(o) is At]
    finally:
        gc.enable()


# --- closed-over tensors


def test_the_solver_runs_the_objective_as_it_is_where_nothing_closed_over_needs_a_gradient() -> None:
    matrix, depths = H.clone(), []

    def objective(x: Tensor, b: Tensor, s: Tensor) -> Tensor:
        depths.append(torch._C._len_torch_function_stack())
        return 0.5 * x @ matrix @ x - b @ x

    layer = layer_of("l1", objective)
    data = theta()
    x = layer(ZERO, *data)
    watched = [depth for depth in depths if depth]
    assert len(watched) == 2 and len(depths) > 10  # by the search for closed-over tensors, and by the checks
    x.sum().backward()
    assert depths[-1] == 1  # and a backward looks whether they are still the same


def test_closed_over_tensors_that_need_a_gradient_reach_the_solver_as_constants() -> None:
    weight = torch.tensor(2.0, dtype=F64, requires_grad=True)
    graphs = []

    def solver(f: Any, x: Tensor, t: Tensor) -> Tensor:
        graphs.append(f(x, t).requires_grad)
        return (t - 0.5 / weight.detach()).clamp_min(0)

    layer = il.argmin(lambda x, t: 0.5 * weight * ((x - t) ** 2).sum(), solver, regularizer=il.L1(0.5))
    t = torch.tensor([1.0, 2.0, 0.1], dtype=F64, requires_grad=True)
    got = torch.autograd.grad(layer(torch.zeros(3, dtype=F64), t).sum(), [t, weight])
    assert graphs == [False]
    torch.testing.assert_close(got[0], torch.tensor([1.0, 1.0, 0.0], dtype=F64), rtol=0, atol=1e-10)
    assert float(got[1]) == pytest.approx(2 * 0.5 / 4, abs=1e-10)  # x = t - 0.5 / w in two entries


@pytest.mark.parametrize("which", ["objective", "constraint"])
def test_a_constant_of_objective_or_set_that_changed_since_the_call_is_refused(which: str) -> None:
    matrix, top = torch.eye(3, dtype=F64), torch.full((3,), 0.5, dtype=F64)
    layer = il.argmin(
        lambda x, t: 0.5 * (x @ matrix @ x) - t @ x, lambda f, x, t: t.minimum(top), constraint=Box(upper=top)
    )
    t = torch.tensor([0.1, 0.2, 3.0], dtype=F64, requires_grad=True)
    x = layer(torch.zeros(3, dtype=F64), t)
    assert torch.autograd.grad(x.sum(), t, retain_graph=True)[0].tolist() == [1.0, 1.0, 0.0]
    (matrix if which == "objective" else top).mul_(2)
    with pytest.raises(il.ClosureError, match="was changed in place"):
        torch.autograd.grad(x.sum(), t)


@pytest.mark.parametrize("which", ["objective", "constraint"])
def test_a_tensor_read_only_at_the_solution_is_refused(which: str) -> None:
    hidden = torch.tensor(1.0, dtype=F64, requires_grad=True)

    def project(y: Tensor, t: Tensor) -> Tensor:
        late = which == "constraint" and bool((y != 0).any())
        return torch.where(y <= 0.5, y, 0.5 * hidden if late else torch.tensor(0.5, dtype=F64))

    def objective(x: Tensor, t: Tensor) -> Tensor:
        late = which == "objective" and bool((x != 0).any())
        return 0.5 * ((x - t) ** 2).sum() * (hidden if late else 1.0)

    layer = il.argmin(objective, lambda f, x, t: t.clamp_max(0.5), constraint=Projection(project))
    with pytest.raises(il.ClosureError, match=r"reads a closed-over tensor of shape \(\) that requires a gradient, in"):
        layer(torch.zeros(3, dtype=F64), torch.tensor([0.1, 0.2, 3.0], dtype=F64, requires_grad=True))
