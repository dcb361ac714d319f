"""RootLayer and FixedPointLayer: equilibria whose map is a module, against the unrolled iteration."""

import copy

import torch
from references import F64, randn, relative_error
from torch import Tensor, nn

import implicitlayer as il


class Cell(nn.Module):
    """z -> tanh(W z + u) / 2 with ||W|| = 0.9: a contraction with factor 0.45; W is not symmetric."""

    def __init__(self) -> None:
        super().__init__()
        weight = randn(4, 4, seed=0)
        self.weight = nn.Parameter(0.9 * weight / torch.linalg.matrix_norm(weight, 2))

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return 0.5 * torch.tanh(self.weight @ z + u)


def iterate(map: nn.Module, z: Tensor, u: Tensor) -> Tensor:
    for _ in range(60):  # 0.45^60 < 1e-20
        z = map(z, u)
    return z


def subtract(residual: nn.Module, z: Tensor, u: Tensor) -> Tensor:
    for _ in range(60):
        z = z - residual(z, u)
    return z


class Equation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = Cell()

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        return z - self.cell(z, u)


def unrolled(u: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Gradients in u and in the weight, through all iterations."""
    cell = Cell()
    z = iterate(cell, torch.zeros(4, dtype=F64), u)
    return z, list(torch.autograd.grad((z**2).sum(), [u, cell.weight]))


def test_gradients_of_an_equilibrium_are_those_of_the_unrolled_iteration() -> None:
    u = randn(4, seed=1).requires_grad_()
    z, expected = unrolled(u)
    for layer in (
        il.FixedPointLayer(Cell(), iterate, init=torch.zeros_like),
        il.RootLayer(Equation(), subtract, init=torch.zeros_like),
    ):
        assert [name.split(".")[-1] for name, _ in layer.named_parameters()] == ["weight"]
        answer = layer(u)
        assert relative_error(answer, z) < 1e-14
        got = torch.autograd.grad((answer**2).sum(), [u, *layer.parameters()])
        for g, e in zip(got, expected, strict=True):
            assert relative_error(g, e) < 1e-9  # the linear solve stops at 1e-10, its matrix has condition < 3


def test_functional_call_over_an_equilibrium_differentiates_the_weights_that_it_was_given() -> None:
    layer, u = il.FixedPointLayer(Cell(), iterate, init=torch.zeros_like), randn(4, seed=1)
    given = {name: 0.5 * p.detach() for name, p in layer.named_parameters()}
    model = copy.deepcopy(layer)
    model.load_state_dict(given, strict=False)
    expected = torch.autograd.grad((model(u) ** 2).sum(), list(model.parameters()))
    got = torch.func.grad(lambda w: (torch.func.functional_call(layer, w, (u,)) ** 2).sum())(given)
    for g, e in zip(got.values(), expected, strict=True):
        assert relative_error(g, e) < 1e-9


def test_a_batch_of_equilibria_is_one_vmap() -> None:
    layer, u = il.FixedPointLayer(Cell(), iterate, init=torch.zeros_like), randn(3, 4, seed=1)
    together = torch.func.vmap(layer)(u)
    for one, row in zip(together, u, strict=True):
        assert relative_error(one, layer(row)) < 1e-14
