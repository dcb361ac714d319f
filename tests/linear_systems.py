"""Random systems for the tests of linear solvers, drawn from small integers so that a failure shrinks."""

import torch
from hypothesis import strategies as st
from references import F64, generator, orthogonal, randn, spd_matrix
from torch import Tensor

import implicitlayer as il

KINDS = ("positive definite", "indefinite", "general")

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


def indefinite_matrix(n: int, log10_cond: float, seed: int) -> Tensor:
    """Symmetric, |eigenvalues| log-uniform over [10^-log10_cond, 1], with random signs."""
    return _from_spectrum(n, 10 ** (-log10_cond * _exponents(n, seed)) * randn(n, seed=seed + 5).sign(), seed)


def general_matrix(n: int, log10_cond: float, seed: int) -> Tensor:
    """Not symmetric, singular values log-uniform over [10^-log10_cond, 1]; eigenvalues anywhere in the disc."""
    return (orthogonal(n, seed + 2) * 10 ** (-log10_cond * _exponents(n, seed))) @ orthogonal(n, seed + 3).T


def singular_matrix(n: int, rank: int, seed: int) -> Tensor:
    """Symmetric of this rank, the other |eigenvalues| between 0.1 and 1, with random signs."""
    values = (0.1 + 0.9 * torch.rand(n, dtype=F64, generator=generator(seed))) * randn(n, seed=seed + 5).sign()
    values[rank:] = 0
    return _from_spectrum(n, values, seed)


def contraction(n: int, seed: int, radius: float = 0.5) -> Tensor:
    """I - J with ||J||_2 = radius: the matrix of a fixed point of a contraction."""
    jacobian = randn(n, n, seed=seed)
    return torch.eye(n, dtype=F64) - radius * jacobian / torch.linalg.matrix_norm(jacobian, 2)


def matrix_of(kind: str, n: int, log10_cond: float, seed: int) -> Tensor:
    make = {"positive definite": spd_matrix, "indefinite": indefinite_matrix, "general": general_matrix}[kind]
    return make(n, log10_cond, seed)


def sizes(largest: int = 24) -> st.SearchStrategy[int]:
    return st.integers(1, largest)


def seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 10_000)


def true_relative_residual(matrix: Tensor, value: Tensor, rhs: Tensor) -> float:
    """Computed in float64 from the very entries that the solver saw."""
    residual = rhs.double() - matrix.double() @ value.double()
    return float(residual.norm() / rhs.double().norm())


def _exponents(n: int, seed: int) -> Tensor:
    exponents = torch.rand(n, dtype=F64, generator=generator(seed))
    exponents[0] = 0
    if n > 1:
        exponents[-1] = 1
    return exponents


def _from_spectrum(n: int, values: Tensor, seed: int) -> Tensor:
    basis = orthogonal(n, seed + 1)
    matrix = (basis * values) @ basis.T
    return (matrix + matrix.T) / 2
