"""Problems of one batch that read one another: refused by name, and right as one problem of all unknowns."""

from typing import Any

import pytest
import torch
from references import F64, randn, relative_error
from torch import Tensor, nn

import implicitlayer as il

T = randn(4, 3, seed=1)


def objective(x: Tensor, t: Tensor) -> Tensor:
    """A value per lane that reads the mean of all lanes."""
    return ((x - t) ** 2).sum(-1) + 0.3 * (x.mean(0) * x).sum(-1) + 0.1 * (x**4).sum(-1)


def residual(x: Tensor, t: Tensor) -> Tensor:
    return x + 0.2 * torch.tanh(x.mean(0)) - t


def image(x: Tensor, t: Tensor) -> Tensor:
    return t - 0.2 * torch.tanh(x.mean(0)) + 0 * x


LAYERS: dict[str, Any] = {
    "argmin": lambda lanes: il.argmin(objective, il.solvers.LBFGS(rtol=1e-11), batch_dims=lanes),
    "argmin, Neumann": lambda lanes: il.argmin(
        objective, il.solvers.LBFGS(rtol=1e-11), batch_dims=lanes, linear_solver=il.Neumann(400, 0.1)
    ),
    "root": lambda lanes: il.root(residual, il.solvers.Newton(rtol=1e-12), batch_dims=lanes),
    "fixed point": lambda lanes: il.fixed_point(image, il.solvers.AndersonAcceleration(rtol=1e-12), batch_dims=lanes),
    "box": lambda lanes: il.argmin(
        objective, il.solvers.ProjectedGradient(rtol=1e-11), constraint=il.sets.Box(-9.0, 9.0), batch_dims=lanes
    ),
    "constrained": lambda lanes: il.constrained_argmin(
        objective, il.solvers.SQP(), equality=lambda x, t: x[..., :1] - 0.1, batch_dims=lanes
    ),
}


@pytest.mark.filterwarnings("ignore")  # such problems are told of by the solvers too
@pytest.mark.parametrize("name", LAYERS)
def test_lanes_that_read_one_another_are_refused(name: str) -> None:
    t = T.clone().requires_grad_()
    with pytest.raises(il.ObjectiveError, match=r"in lane .* other problems .*Use batch_dims=0"):
        LAYERS[name](1)(torch.zeros_like(T), t)


@pytest.mark.parametrize("name", ["root", "fixed point"])
def test_as_one_problem_they_are_right(name: str) -> None:
    """x + 0.2 tanh(mean x) = t: against the dense Jacobian."""
    t = T.clone().requires_grad_()
    x = LAYERS[name](0)(torch.zeros_like(T), t)
    weights = randn(4, 3, seed=2)
    (found,) = torch.autograd.grad((weights * x).sum(), t)
    jacobian = torch.func.jacrev(lambda x: residual(x.reshape(4, 3), T).reshape(-1))(x.detach().reshape(-1))
    expected = torch.linalg.solve(jacobian.mT, weights.reshape(-1)).reshape(4, 3)
    assert relative_error(found, expected) < 1e-9


class Cell(nn.Module):
    """With statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(2, 2, dtype=F64)
        self.norm = nn.BatchNorm1d(2, track_running_stats=False, affine=False)

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return 0.6 * torch.tanh(self.norm(0.3 * self.linear(z) + u))


def test_an_equilibrium_over_statistics_of_the_batch_is_one_problem() -> None:
    cell, u, weights = Cell(), randn(4, 2, seed=3).requires_grad_(), randn(4, 2, seed=4)
    tight = il.solvers.AndersonAcceleration(rtol=1e-13, max_steps=500)
    with pytest.raises(il.ObjectiveError, match=r"BatchNorm.*batch_dims=0"):
        il.DeepEquilibrium(cell, solver=tight)(u)
    z = il.DeepEquilibrium(cell, solver=tight, linear_solver=il.Gmres(), batch_dims=0)(u)
    (found,) = torch.autograd.grad((weights * z).sum(), u)
    unrolled = torch.zeros(4, 2, dtype=F64)
    for _ in range(100):
        unrolled = cell(unrolled, u)
    (expected,) = torch.autograd.grad((weights * unrolled).sum(), u)
    assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("lanes", [1, 2, 7])
def test_lanes_by_themselves_pass(lanes: int) -> None:
    """A mean over theta, or over the unknowns of a problem, couples nothing; nor does a lane of a constant."""
    t = randn(lanes, 3, seed=5).requires_grad_()

    def apart(x: Tensor, t: Tensor) -> Tensor:
        first = torch.arange(lanes).unsqueeze(-1) == 0
        return ((x - torch.where(first, t.detach().mean(), t)) ** 2).sum(-1) + x.mean(-1) ** 2

    x = il.argmin(apart, il.solvers.LBFGS(rtol=1e-11), batch_dims=1)(torch.zeros(lanes, 3, dtype=F64), t)
    x.sum().backward()


def test_two_lanes_that_read_the_next_one_and_pairs_of_lanes() -> None:
    t = randn(2, 3, 2, seed=6).requires_grad_()

    def next_one(x: Tensor, t: Tensor) -> Tensor:
        return ((x - t) ** 2).sum(-1) + 0.1 * (x * x.roll(1, 1)).sum(-1)

    with pytest.raises(il.ObjectiveError, match=r"with batch_dims=2 .*in lane \("):
        il.argmin(next_one, il.solvers.NewtonCG(rtol=1e-11), batch_dims=2)(torch.zeros_like(t), t)


def some_calls(layer: Any, *args: Any) -> None:
    for _ in range(16):
        layer(*args)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("count", "reads", "read"), [(2, 0, 1), (3, 0, 2), (4, 2, 3), (8, 5, 0), (8, 0, 5), (9, 8, 7)])
def test_two_lanes_of_which_one_reads_the_other_are_found_in_some_of_a_few_calls(
    count: int, reads: int, read: int
) -> None:
    link = torch.zeros(count, count, dtype=F64)
    link[reads, read] = 0.4
    layer = il.fixed_point(
        lambda x, t: torch.tanh(0.5 * x + link @ x + t), il.solvers.AndersonAcceleration(rtol=1e-12), batch_dims=1
    )
    t = randn(count, 2, seed=1).requires_grad_()
    with pytest.raises(il.ObjectiveError, match="other problems"):
        some_calls(layer, torch.zeros(count, 2, dtype=F64), t)


def test_tasks_that_share_statistics_are_found_where_no_answer_is_judged() -> None:
    """iMAML's default: the tasks are looked at in a method's first call."""

    def loss(params: dict[str, Tensor], data: Tensor) -> Tensor:
        hidden = torch.tanh(data * params["w"][:, None])
        return ((hidden - hidden.mean((0, 1))) ** 2).mean((1, 2)) + (params["w"] ** 2).sum(1)

    method = il.meta.iMAML(loss, il.solvers.GradientDescent(0.1, max_steps=5), strength=2.0)
    theta = {"w": torch.ones(3, dtype=F64, requires_grad=True)}
    with pytest.raises(il.ObjectiveError, match="other problems"):
        method(theta, randn(4, 5, 3, seed=0), randn(4, 5, 3, seed=1))
