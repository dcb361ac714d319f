"""il.DeepEquilibrium: samples that stop by themselves, exact gradients, Jacobian regularisation, warm starts."""

import math
import pickle
from typing import Any

import pytest
import torch
from references import F64, randn, relative_error
from torch import Tensor, nn

import implicitlayer as il

EXACT = {"solver": il.solvers.AndersonAcceleration(rtol=1e-13), "linear_solver": il.Bicgstab(rtol=1e-13)}


class Cell(nn.Module):
    """z -> tanh(W z + u) with ||W|| = 0.7, a contraction; W is not symmetric."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        weight = randn(width, width, seed=0)
        self.weight = nn.Parameter(0.7 * weight / torch.linalg.matrix_norm(weight, 2))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.mT + u)


def test_gradients_are_those_of_a_dense_solve_for_each_sample() -> None:
    cell, u, c = Cell(), randn(6, 3, seed=1).requires_grad_(), randn(6, 3, seed=2)
    model = il.DeepEquilibrium(cell, **EXACT)
    z = model(u)
    got = torch.autograd.grad((c * z).sum(), [cell.weight, u])
    # z = tanh(a), a = W z + u: with D = diag(1 - z^2) and p = D (I - W'D)^-1 c, the gradients are sum p z' and p
    weight, z = cell.weight.detach(), z.detach()
    p = [
        (1 - zi**2) * torch.linalg.solve(torch.eye(3, dtype=F64) - weight.T * (1 - zi**2), ci)
        for zi, ci in zip(z, c, strict=True)
    ]
    right = [sum(torch.outer(pi, zi) for pi, zi in zip(p, z, strict=True)), torch.stack(p)]
    # both solves to 1e-13 of their right-hand sides, times a condition below (1 + 0.7) / (1 - 0.7) = 6, twice
    assert all(relative_error(a, b) < 1e-11 for a, b in zip(got, right, strict=True))


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("facade", [il.fixed_point, il.root])
def test_a_sample_stops_where_it_would_stop_alone(facade: Any, graph: bool) -> None:
    slope = torch.tensor([[0.1], [1.4]], dtype=F64, requires_grad=graph)  # the second one takes more steps
    if facade is il.fixed_point:
        solver: Any = il.solvers.AndersonAcceleration(rtol=1e-3)
        layer = facade(lambda z, a: a * torch.cos(z) + 1, solver, batch_dims=1, stationarity_rtol=None)
    else:
        solver = il.solvers.Newton(rtol=1e-1)
        layer = facade(lambda z, a: z - a * torch.cos(z) - 1, solver, batch_dims=1, stationarity_rtol=None)
    alone, together = layer(torch.zeros(1, 1, dtype=F64), slope[:1]), layer(torch.zeros(2, 1, dtype=F64), slope)
    # where the first one stops is not where it would be after another step
    assert abs(alone - 0.1 * torch.cos(alone) - 1).item() > 1e-7
    assert abs(together[0] - alone[0]).item() < 1e-14  # rounding: batches of one and two may use other kernels


def test_the_jacobian_norm_is_that_of_the_jacobian_on_average() -> None:
    torch.manual_seed(0)
    cell, z = nn.Linear(4, 4, dtype=F64), randn(2, 4, seed=3)
    model, k = il.DeepEquilibrium(lambda z: cell(z)), 2_000
    value = model.jacobian_norm(z, num_vectors=k)
    # J = W. v'WW'v has variance 2 |WW'|_F^2 (v normal); 2 samples and k vectors; five standard deviations
    weight = cell.weight.detach()
    deviation = math.sqrt(2 / (2 * k)) * (weight @ weight.T).norm().item()
    assert abs(4 * value.item() - weight.square().sum().item()) < 5 * deviation
    # its gradient 2 (v v') W has the mean 2 W; entry (i, j) is 2 v_i (v'w_j), with variance 4 (|w_j|^2 + w_ij^2)
    (gradient,) = torch.autograd.grad(4 * value, cell.weight)
    deviations = (4 * (weight.square().sum(0) + weight**2) / (2 * k)).sqrt()
    assert ((gradient - 2 * weight).abs() < 5 * deviations).all()


def test_regularisation_makes_the_block_more_contractive() -> None:
    torch.manual_seed(0)
    cell, u = Cell(), randn(8, 3, seed=1)
    model = il.DeepEquilibrium(cell)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = torch.linalg.matrix_norm(cell.weight.detach())
    for _ in range(5):
        optimizer.zero_grad()
        model.jacobian_norm(model(u), u).backward()
        optimizer.step()
    assert torch.linalg.matrix_norm(cell.weight.detach()) < before


def test_the_jacobian_norm_leaves_no_graph_where_none_is_wanted() -> None:
    model, u = il.DeepEquilibrium(Cell()), randn(2, 3, seed=1)
    with torch.no_grad():
        assert model.jacobian_norm(model(u), u).grad_fn is None


def test_a_warm_start_takes_fewer_steps_and_gets_no_gradient() -> None:
    model, u = il.DeepEquilibrium(Cell(), **EXACT), randn(6, 3, seed=1)
    z = model(u)
    cold: Any = model.records[0]
    again = model((1 + 1e-6) * u, init=z)
    assert model.records[0].num_steps < cold.num_steps
    (gradient,) = torch.autograd.grad(again.sum(), z, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_a_state_of_several_tensors_is_solved_for() -> None:
    def pyramid(z: dict[str, Tensor], u: Tensor) -> dict[str, Tensor]:
        return {"a": 0.5 * torch.sin(z["b"].mean(1, keepdim=True)) + u, "b": 0.3 * z["a"] * torch.ones(3, dtype=F64)}

    def start(u: Tensor) -> dict[str, Tensor]:
        return {"a": torch.zeros_like(u), "b": u.new_zeros(*u.shape[:-1], 3)}

    u = randn(4, 1, seed=1).requires_grad_()
    model = il.DeepEquilibrium(pyramid, init=start, **EXACT)
    z = model(u)
    # a = sin(0.3 a) / 2 + u: da/du = 1 / (1 - 0.15 cos(0.3 a)), and the Jacobian has the entries 0.3 (three times) and
    # cos(b) / 6 (three times)
    (gradient,) = torch.autograd.grad(z["a"].sum(), u)
    assert relative_error(gradient, 1 / (1 - 0.15 * torch.cos(0.3 * z["a"].detach()))) < 1e-12
    torch.manual_seed(0)
    norm = model.jacobian_norm(z, u, num_vectors=4_000).item()
    exact = (3 * 0.09 + 3 * (torch.cos(z["b"][:, 0].detach()) / 6).square()).mean().item() / 4
    # v'JJ'v varies by no more than sqrt(2) |JJ'|_F <= sqrt(2) |J|_F^2 from vector to vector; five standard deviations
    assert abs(norm - exact) < 5 * math.sqrt(2 / (4_000 * 4)) * 2 * exact


def test_a_sample_without_an_equilibrium_within_the_limit_is_told() -> None:
    model = il.DeepEquilibrium(Cell(), solver=il.solvers.AndersonAcceleration(max_steps=2), stationarity_rtol=1e-6)
    with pytest.warns(il.StationarityWarning, match="allowed 1"):
        model(randn(2, 3, seed=1).requires_grad_())


def test_it_pickles_and_its_weights_are_in_the_state() -> None:
    model, u = il.DeepEquilibrium(Cell()), randn(2, 3, seed=1)
    assert list(model.state_dict()) == ["objective.weight"]
    assert torch.equal(pickle.loads(pickle.dumps(model))(u), model(u))


def test_no_vector_is_refused() -> None:
    model, u = il.DeepEquilibrium(Cell()), randn(2, 3, seed=1)
    with pytest.raises(ValueError, match="num_vectors=0 must be at least 1"):
        model.jacobian_norm(u, u, num_vectors=0)
