"""Random systems of il.testing for the tests of linear solvers, each with its right-hand side; counted products."""

from typing import Any

import torch
from hypothesis import strategies as st
from references import F64, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import implicitlayer as il
from implicitlayer import testing

MATRICES = {
    "positive definite": testing.spd_matrices,
    "indefinite": testing.indefinite_matrices,
    "general": testing.general_matrices,
}

# Solvers of any square system, and of the symmetric ones only; each with its default tolerance.
GENERAL: dict[str, il.LinearSolver] = {
    "gmres": il.Gmres(),
    "gmres restarted": il.Gmres(restart=7),
    "bicgstab": il.Bicgstab(),
    "normal equations": il.NormalEquations(),
    "dense": il.Dense(),
}
SOLVERS: dict[str, il.LinearSolver] = {"minres": il.Minres(), **GENERAL}


class Counted:
    """An operator that counts its products; one product serves all lanes."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.num_products = matrix, 0

    def __call__(self, vector: Tensor) -> Tensor:
        self.num_products += 1
        return torch.linalg.vecdot(self.matrix, vector.unsqueeze(-2))

    def transpose(self, vector: Tensor) -> Tensor:
        self.num_products += 1
        return torch.linalg.vecdot(self.matrix.mT, vector.unsqueeze(-2))

    def operator(self, symmetric: bool = False) -> il.FlatOperator:
        return il.FlatOperator(self, self.transpose, symmetric=symmetric)


class Operations(TorchDispatchMode):
    """Counts the operations that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def indefinite_matrix(n: int, log10_cond: float, seed: int) -> Tensor:
    """That of il.testing, by position."""
    return testing.indefinite_matrix(n, log10_cond=log10_cond, seed=seed)


def general_matrix(n: int, log10_cond: float, seed: int) -> Tensor:
    """That of il.testing, by position."""
    return testing.general_matrix(n, log10_cond=log10_cond, seed=seed)


def contraction(n: int, seed: int, radius: float = 0.5) -> Tensor:
    """I - J with ||J||_2 = radius: the matrix of a fixed point of a contraction."""
    jacobian = randn(n, n, seed=seed)
    return torch.eye(n, dtype=F64) - radius * jacobian / torch.linalg.matrix_norm(jacobian, 2)


def systems(kind: str, n: int = 24, log10_cond: int = 6) -> st.SearchStrategy[tuple[Tensor, Tensor]]:
    """Matrices of a kind up to this size and condition, each with a random right-hand side."""
    drawn = MATRICES[kind](n=st.integers(1, n), log10_cond=st.integers(0, log10_cond))
    return st.tuples(drawn, seeds()).map(lambda pair: (pair[0], randn(len(pair[0]), seed=pair[1])))


def condition(matrix: Tensor) -> float:
    return float(torch.linalg.cond(matrix))


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 10_000)


def true_relative_residual(matrix: Tensor, value: Tensor, rhs: Tensor) -> float:
    """Computed in float64 from the very entries that the solver saw."""
    residual = rhs.double() - matrix.double() @ value.double()
    return float(residual.norm() / rhs.double().norm())


def smallest_residual(matrix: Tensor, b: Tensor, num_steps: int) -> Tensor:
    """argmin ||b - A x|| over span{b, Ab, ...}, by an orthonormal basis and a dense least-squares solve."""
    basis = (b / b.norm()).unsqueeze(1)
    for _ in range(num_steps - 1):
        new = matrix @ basis[:, -1]
        for _ in range(2):
            new = new - basis @ (basis.T @ new)
        basis = torch.cat([basis, (new / new.norm()).unsqueeze(1)], 1)
    return basis @ torch.linalg.lstsq(matrix @ basis, b).solution
