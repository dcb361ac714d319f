"""What the layer promises about thetas, what solvers do with them, small shapes and odd objectives."""

# Rows 15-19; rows 1-14 are in test_reliability.py, rows 20-28 in test_reliability_graph.py.

from typing import Any

import pytest
import torch
from log_layer import leaf, log_layer, log_objective, log_solver, zeros
from references import F64, relative_error
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import implicitlayer as il
from implicitlayer import testing


def tracking(solver: Any, **settings: Any) -> il.ImplicitLayer:
    """argmin of 1/2 |x - t^2|^2."""
    return il.argmin(lambda x, t: 0.5 * ((x - t**2) ** 2).sum(), solver, **settings)


def square(objective: Any, x: Tensor, t: Tensor) -> Tensor:
    return t**2


def test_row_15_unused_frozen_integer_bool_and_plain_thetas_pass_through_unchanged() -> None:
    seen: list[Any] = []

    def objective(
        x: Tensor, t: Tensor, unused: Tensor, frozen: Tensor, index: Tensor, mask: Tensor, *rest: Any
    ) -> Tensor:
        seen.append((index.dtype, mask.dtype, *rest))
        return 0.5 * ((x - t * frozen)[index][mask] ** 2).sum() + 0.5 * (x[1] - 3.0 * rest[0]) ** 2

    def solver(f: Any, x: Tensor, t: Tensor, unused: Tensor, frozen: Tensor, *rest: Any) -> Tensor:
        assert rest[2:] == (2, "name", None)
        return torch.stack([(t * frozen)[0], torch.tensor(3.0 * rest[2], dtype=F64)])

    t, unused, frozen = leaf(2), leaf(3, seed=1), leaf(2, seed=2).detach()
    rest = (torch.tensor([0, 1]), torch.tensor([True, False]), 2, "name", None)
    x = il.argmin(objective, solver)(zeros(2), t, unused, frozen, *rest)
    gradients = torch.autograd.grad(x.sum(), (t, unused), allow_unused=True)
    assert torch.allclose(gradients[0], torch.stack([frozen[0], torch.zeros((), dtype=F64)]), rtol=1e-12)
    assert gradients[1] is None or torch.equal(gradients[1], zeros(3))
    assert all(entry == (torch.int64, torch.bool, 2, "name", None) for entry in seen)
    assert frozen.grad is None


def test_row_15_an_unused_theta_does_not_break_the_other_transforms() -> None:
    def run(t: Tensor, unused: Tensor) -> Tensor:
        layer = il.argmin(lambda x, t, u, k: (x.exp() - t * x * k).sum(), lambda f, x, t, u, k: (t * k).log())
        return layer(torch.zeros_like(t), t, unused, 1)

    t, unused = leaf(3).detach(), leaf(2, seed=1).detach()
    for transform in (jacrev, jacfwd):
        jacobians = transform(run, argnums=(0, 1))(t, unused)
        assert relative_error(jacobians[0], torch.diag(1 / t)) < 1e-9 and torch.equal(jacobians[1], zeros(3, 2))
    assert torch.equal(vmap(grad(lambda t, u: run(t, u).sum(), argnums=1))(t[None], unused[None]), zeros(1, 2))


def test_row_16_one_tensor_given_as_two_thetas_gets_the_sum() -> None:
    t = leaf(3)
    layer = il.argmin(lambda x, a, b: (x.exp() - a * b * x).sum(), lambda f, x, a, b: (a * b).log())
    (gradient,) = torch.autograd.grad(layer(zeros(3), t, t).sum(), t)  # x = 2 log t
    assert relative_error(gradient, 2 / t.detach()) < 1e-9


def test_row_16_theta_as_init_contributes_nothing_as_init() -> None:
    t = leaf(3)
    (gradient,) = torch.autograd.grad(log_layer()(t, t).sum(), t)
    assert relative_error(gradient, 1 / t.detach()) < 1e-9
    init = leaf(3, seed=1)
    assert torch.autograd.grad(log_layer()(init, t).sum(), (init, t), allow_unused=True)[0] is None


# "works in place on init", "keeps its graph", and whatever else il.testing knows that must do no harm
HARMLESS = [fault for fault in testing.faults(square) if not (fault.raises or fault.warns)]


@pytest.mark.parametrize("fault", HARMLESS, ids=lambda fault: fault.name)
def test_row_17_a_solver_that_works_in_place_or_keeps_its_graph_is_counted_once(fault: testing.Fault) -> None:
    t, init = leaf(3), zeros(3)
    with fault.expected():
        x = tracking(fault)(init, t)
    (gradient,) = torch.autograd.grad(x.sum(), t)
    assert relative_error(gradient, 2 * t.detach()) < 1e-12 + fault.error
    assert torch.equal(init, zeros(3)) and t.is_leaf and t.grad is None


def test_row_17_a_solver_that_returns_theta_itself_or_a_view_of_it_is_counted_once() -> None:
    # 1/2 |x - t|^2 + 3/2 |x - c|^2 with c = t's value: the answer is t itself, the gradient 1/4
    for view in (lambda t: t, lambda t: t[:], lambda t: t.view(3)):
        t = leaf(3)
        c = t.detach().clone()
        layer = il.argmin(
            lambda x, t, c=c: 0.5 * ((x - t) ** 2).sum() + 1.5 * ((x - c) ** 2).sum(), lambda f, x, t, v=view: v(t)
        )
        x = layer(zeros(3), t)
        (gradient,) = torch.autograd.grad(x.sum(), t)
        assert torch.allclose(gradient, torch.full((3,), 0.25, dtype=F64), rtol=1e-12)
        assert x.data_ptr() != t.data_ptr()


def test_row_17_a_solver_that_changes_theta_in_place_is_an_error() -> None:
    solver = testing.Fault("changes theta in place", square)
    with pytest.raises(il.SolverOutputError, match=r"changed a theta of shape \(3,\) in place"):
        tracking(solver)(zeros(3), leaf(3))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (2, 0)])
def test_row_18_small_shapes_are_right(shape: tuple[int, ...]) -> None:
    t = torch.full(shape, 2.0, dtype=F64, requires_grad=True)
    for solver in (log_solver, il.solvers.GradientDescent(0.3, max_steps=200, rtol=1e-13)):
        x = il.argmin(log_objective, solver)(zeros(*shape), t)
        (gradient,) = torch.autograd.grad(x.sum(), t, create_graph=True)
        assert x.shape == gradient.shape == shape and torch.allclose(gradient, 1 / t, rtol=1e-10)
        (second,) = torch.autograd.grad(gradient.sum(), t)
        assert torch.allclose(second, -1 / t**2, rtol=1e-9)
    lanes = vmap(grad(lambda t: log_layer()(torch.zeros_like(t), t).sum()))(t.detach().expand(3, *shape).clone())
    assert torch.allclose(lanes, (1 / t).expand(3, *shape), rtol=1e-10)


def test_row_19_an_objective_that_is_not_scalar_is_an_error_with_its_shape() -> None:
    layer = il.argmin(lambda x, t: (x - t) ** 2, lambda f, x, t: t.clone())
    with pytest.raises(il.ObjectiveError, match=r"0-d tensor: expected shape \(\), got \(3,\).*batch_dims=1"):
        layer(zeros(3), leaf(3))
    for value in (1.0, None, torch.tensor(1), torch.tensor(1j)):
        layer = il.argmin(lambda x, t, value=value: value, lambda f, x, t: t.clone())
        with pytest.raises(il.ObjectiveError, match="must return a real floating tensor"):
            layer(zeros(3), leaf(3))


def test_row_19_an_objective_detached_from_x_is_an_error() -> None:
    for objective in (
        lambda x, t: ((x.detach() - t) ** 2).sum(),
        lambda x, t: torch.tensor(((x - t) ** 2).sum().item()),
    ):
        for rtol in (1e-3, None):
            layer = il.argmin(objective, lambda f, x, t: t.clone(), stationarity_rtol=rtol)
            with pytest.raises(il.ObjectiveError, match="does not depend on x"):
                layer(zeros(3), leaf(3)).sum().backward()
