"""il.explain_gradient finds no fault with layers whose gradients are right: over every set, and of every kind."""

# Each layer is differentiated at its solution and compared with central differences of its answers first, so that it is
# known to be right. Then nothing may be said against it from any init, and at the solution the outcomes are those of
# the layer, exactly zero or not.

from collections.abc import Callable
from typing import Any

import pytest
import torch
from explanations import SETTINGS, explained, scalar, squares, stay, written
from references import F64
from torch import Tensor, nn

import implicitlayer as il
from implicitlayer.base._tree import flatten
from implicitlayer.explain._explain import explain_gradient

PG = il.solvers.ProximalGradient(rtol=1e-13, max_steps=20_000)
DATA = torch.tensor([0.5, -0.9, 1.2], dtype=F64)
ZERO = torch.zeros(3, dtype=F64)
COUPLED = torch.tensor([[2.0, 1.5, 0.3], [1.5, 2.0, -0.4], [0.3, -0.4, 1.0]], dtype=F64)
Case = tuple[Any, Any, tuple[Any, ...]]


def data() -> Tensor:
    return DATA.clone().requires_grad_()


def near(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
    return ((x - t) ** 2).sum()


def bent(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
    """Coupled and not quadratic: the entries held at zero are not those held at the solution."""
    return x @ COUPLED @ x + torch.cosh(x).sum() - 4 * t @ x


def over(constraint: Any, objective: Any = near) -> Case:
    theta = (data(), scalar(1.0)) if callable(constraint) else (data(),)
    return il.argmin(objective, PG, constraint=constraint), ZERO, theta


def beside(regularizer: Any, objective: Any = near) -> Case:
    theta = (data(), scalar(0.4)) if callable(regularizer) else (data(),)
    return il.argmin(objective, PG, regularizer=regularizer), ZERO, theta


def linear_over_the_simplex() -> Case:
    layer = il.argmin(lambda x, t, u: t @ x, PG, constraint=lambda t, u: il.sets.Simplex(u))
    return layer, torch.full((3,), 1 / 3, dtype=F64), (data(), scalar(1.0))


def pytree_with_a_set_for_each_leaf() -> Case:
    def sets(t: Tensor, u: Tensor) -> dict[str, Any]:
        return {"a": il.sets.Box(-u, u), "b": il.sets.Ball(u)}

    layer = il.argmin(lambda x, t, u: near(x["a"], t) + near(x["b"], t), PG, constraint=sets)
    return layer, {"a": ZERO, "b": ZERO}, (data(), scalar(1.0))


def lanes() -> Case:
    t = torch.stack([DATA, 0.1 * DATA]).requires_grad_()
    layer = il.argmin(
        lambda x, t, u: ((x - t) ** 2).sum(-1), PG, constraint=lambda t, u: il.sets.Simplex(u), batch_dims=1
    )
    return layer, torch.zeros(2, 3, dtype=F64), (t, torch.ones(2, dtype=F64, requires_grad=True))


def steadied(x: Tensor, t: Tensor) -> Tensor:
    """The sum of exponentials with their largest taken off as a constant, as many write it."""
    top = x.detach().max()
    return top + (x - top).exp().sum().log() + near(x, (t - t.detach().mean()) + t.detach().mean())


def projected_inside(x: Tensor, t: Tensor) -> Tensor:
    return near(x, t) + (il.sets.Ball(0.7).project(x) ** 2).sum()


def layer_inside(x: Tensor, t: Tensor) -> Tensor:
    return near(x, t) + (INNER(ZERO, x) ** 2).sum()


INNER = il.argmin(lambda y, x: near(y, x) + (y**4).sum(), il.solvers.NewtonCG(rtol=1e-14))


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * COUPLED)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + u)


NEWTON = il.solvers.NewtonCG(rtol=1e-13)
ANDERSON = il.solvers.AndersonAcceleration(rtol=1e-13)
CASES: dict[str, Callable[[], Case]] = {
    "Box": lambda: over(il.sets.Box(-1.0, 1.0)),
    "Box, coupled": lambda: over(il.sets.Box(-0.4, 0.4), bent),
    "Box of theta": lambda: over(lambda t, u: il.sets.Box(-u, u)),
    "a far Box of theta": lambda: over(lambda t, u: il.sets.Box(5000 * u, 9000 * u)),
    "NonNegative": lambda: over(il.sets.NonNegative()),
    "NonNegative, coupled": lambda: over(il.sets.NonNegative(), bent),
    "Ball": lambda: over(il.sets.Ball(1.0)),
    "Ball of theta": lambda: over(lambda t, u: il.sets.Ball(u, 0.1 * u)),
    "Simplex": lambda: over(il.sets.Simplex()),
    "Simplex of theta": lambda: over(lambda t, u: il.sets.Simplex(u)),
    "Simplex of theta, dim": lambda: over(lambda t, u: il.sets.Simplex(u, dim=-1), bent),
    "linear over the simplex": linear_over_the_simplex,
    "Affine": lambda: over(il.sets.Affine(torch.ones(1, 3, dtype=F64), torch.ones(1, dtype=F64))),
    "Affine of theta": lambda: over(lambda t, u: il.sets.Affine(torch.ones(1, 3, dtype=F64) * u, u[None])),
    "L1": lambda: beside(il.L1(0.4)),
    "L1 of theta": lambda: beside(lambda t, u: il.L1(u), bent),
    "ElasticNet of theta": lambda: beside(lambda t, u: il.ElasticNet(u, u)),
    "GroupL1": lambda: beside(il.GroupL1(0.4)),
    "GroupL1 of theta": lambda: beside(lambda t, u: il.GroupL1(u), bent),
    "a pytree": pytree_with_a_set_for_each_leaf,
    "lanes": lanes,
    "argmin": lambda: (il.argmin(bent, NEWTON), ZERO, (data(),)),
    "proximal": lambda: (il.argmin(il.proximal(near, 2.0), NEWTON), ZERO, (data(), DATA.flip(0))),
    "root": lambda: (il.root(lambda x, t: x + x**3 - t, il.solvers.Broyden(rtol=1e-13)), ZERO, (data(),)),
    "fixed point": lambda: (il.fixed_point(lambda x, t: torch.cos(x + t) / 2, ANDERSON), ZERO, (data(),)),
    "DeepEquilibrium": lambda: (
        il.DeepEquilibrium(Cell(), solver=ANDERSON, linear_solver=il.Gmres()),
        None,
        (DATA[None].clone().requires_grad_(),),
    ),
    "ArgminLayer": lambda: (il.ArgminLayer(bent, PG, init=ZERO, constraint=il.sets.Box(-0.4, 0.4)), None, (data(),)),
    "steadied": lambda: (il.argmin(steadied, NEWTON), ZERO, (data(),)),
    "projected inside": lambda: (il.argmin(projected_inside, NEWTON), ZERO, (data(),)),
    "a layer inside": lambda: (il.argmin(layer_inside, NEWTON), ZERO, (data(),)),
}


def answer(case: Case, theta: tuple[Any, ...]) -> Tensor:
    layer, init, _ = case
    x = layer(*theta) if init is None else layer(init, *theta)
    leaves = [leaf.reshape(-1) for leaf in flatten(x)[0]]
    return torch.stack([leaf @ torch.arange(1.0, 1 + leaf.numel(), dtype=F64) for leaf in leaves]).sum()


def slopes(case: Case) -> list[Tensor]:
    """The gradients of the layer, after they were compared with differences."""
    theta = case[2]
    found = torch.autograd.grad(answer(case, theta), [t for t in theta if t.requires_grad], materialize_grads=True)
    step, k = 1e-5, 0
    for i, t in enumerate(theta):
        if not t.requires_grad:
            continue
        direction = torch.cos(torch.arange(t.numel(), dtype=F64) + 1).reshape(t.shape)
        ends = [answer(case, (*theta[:i], t.detach() + sign * step * direction, *theta[i + 1 :])) for sign in (1, -1)]
        # second-order differences: 1e-10 by the step, and answers good to 1e-12 over it
        difference = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((found[k] * direction).sum(), difference, rtol=1e-5, atol=1e-6)
        k += 1
    return list(found)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_said_against_a_layer_that_is_right(name: str) -> None:
    case = CASES[name]()
    layer, init, theta = case
    found = slopes(case)
    starts = [()] if init is None else [(init,), (torch.utils._pytree.tree_map(lambda x: x + 0.3, init),)]
    for start in starts:
        explanation = explain_gradient(layer, *start, *theta)
        assert [leaf.verdict for leaf in explanation.unknowns] == ["in order."] * len(explanation.unknowns)
        leaves = [leaf for leaf in explanation.leaves if leaf.requires_grad and leaf.role == "theta"]
        for leaf, slope in zip(leaves, found, strict=True):
            if bool((slope != 0).any()):
                assert (leaf.outcome, leaf.verdict) == ("gradient", "gets its gradient."), explanation
        others = [leaf for leaf in explanation.leaves if leaf.requires_grad and leaf.role != "theta"]
        assert all(leaf.verdict == "gets its gradient." for leaf in others), explanation


HELD = torch.tensor([1.5, -1.9, 2.2], dtype=F64)


@pytest.mark.parametrize(
    ("constraint", "centre", "outcomes"),
    [
        (lambda t, u: il.sets.Box(-u, u), HELD, ["zero", "gradient"]),
        (lambda t, u: il.sets.Box(-u, u), 0.1 * HELD, ["gradient", "zero"]),
        (lambda t, u: il.sets.Box(-u, u), DATA, ["gradient", "gradient"]),
        (lambda t, u: il.sets.Ball(u), 0.1 * HELD, ["gradient", "zero"]),
        (lambda t, u: il.sets.Ball(u), HELD, ["gradient", "gradient"]),
        (lambda t, u: il.sets.Simplex(u), 3 * HELD, ["zero", "gradient"]),
        (lambda t, u: il.sets.Affine(torch.eye(3, dtype=F64), u.expand(3)), DATA, ["zero", "gradient"]),
        (lambda t, u: il.sets.NonNegative(), -HELD.abs(), ["zero", "zero"]),
    ],
)
def test_at_the_solution_outcomes_are_those_of_the_layer(constraint: Any, centre: Tensor, outcomes: list[str]) -> None:
    t, u = centre.clone().requires_grad_(), scalar(1.0)
    layer = il.argmin(near, PG, constraint=constraint)
    x = layer(ZERO, t, u).detach()
    at_the_solution = explained(layer, x, t, u, **{"theta[0]": t, "theta[1]": u})
    assert [leaf.outcome for leaf in at_the_solution.leaves] == outcomes
    zeros = [leaf.verdict for leaf in at_the_solution.leaves if leaf.outcome == "zero"]
    assert all(("Entries of x that are held" in zero) != ("never reads it" in zero) for zero in zeros)


def test_a_regulariser_that_holds_every_entry_is_told_at_the_solution() -> None:
    t, u = (0.1 * DATA).requires_grad_(), scalar(1.0)
    layer = il.argmin(near, PG, regularizer=lambda t, u: il.L1(u))
    for leaf in explained(layer, ZERO, t, u, **{"theta[0]": t, "theta[1]": u}).leaves:
        assert leaf.outcome == "zero" and "Entries of x that are held do not follow the objective" in leaf.verdict


def test_a_bound_that_leaves_its_graph_is_pointed_at() -> None:
    u, w = scalar(1.0), scalar(2.0)
    layer = il.argmin(near, PG, constraint=lambda t, u: il.sets.Box(-u.detach(), w))
    explanation = explain_gradient(layer, ZERO, data(), u)
    assert (
        f"its gradient is zero: it is detached at {written('u.detach()', '.detach()')}"
        in explanation["theta[1]"].verdict
    )
    assert explanation["w"].verdict == "gets its gradient." and explanation["x"].verdict == "in order."
    layer = il.argmin(near, PG, constraint=lambda t, u: il.sets.Box(-u.detach(), 2 * u))
    assert "that part is missing" in explain_gradient(layer, ZERO, data(), u)["theta[1]"].verdict
    layer = il.argmin(near, PG, regularizer=il.L1(w))
    assert explain_gradient(layer, ZERO, data())["regularizer.strength"].verdict == "gets its gradient."


def test_an_objective_that_is_detached_from_x_is_an_error_over_a_set_too() -> None:
    t, layer = data(), il.argmin(lambda x, t: near(x.detach(), t), stay, constraint=il.sets.Box(-1.0, 1.0))
    explanation = explained(layer, ZERO, t, **{"theta[0]": t})
    assert "ObjectiveError" in explanation["theta[0]"].verdict and "detached at" in explanation["x"].verdict


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_part_that_is_missing_is_told_from_a_constant_that_is_taken_off(dtype: torch.dtype) -> None:
    t, start = torch.tensor(1.3, dtype=dtype, requires_grad=True), torch.tensor([1.1, 0.7], dtype=dtype)

    def verdicts(objective: Any) -> list[str]:
        explanation = explain_gradient(il.argmin(objective, stay, **SETTINGS), start, t)
        return [explanation[name].verdict for name in ("theta[0]", "x")]

    right = ["gets its gradient.", "in order."]
    assert verdicts(lambda x, t: (t - t.detach() + t.detach()) * (squares(x) + squares(x - x.detach()) * 0)) == right
    of_theta, of_x = (
        verdicts(lambda x, t: t.detach() * t * squares(x)),
        verdicts(lambda x, t: t * (x.detach() * x).sum()),
    )
    assert "that part is missing" in of_theta[0] and of_theta[1] == "in order."
    assert of_x[0] == "gets its gradient." and "every gradient is wrong" in of_x[1]
    # right at first order: the gradient is 2 t x either way, but its own derivative is not
    assert "every gradient is wrong" in verdicts(lambda x, t: t * (2 * x.detach() * x - x.detach() ** 2).sum())[1]
