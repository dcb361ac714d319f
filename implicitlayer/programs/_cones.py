"""Projections onto products of cones, and their derivatives: half lines, second-order cones, semidefinite matrices."""

# NOTE [spectrum]: in these cones every w has eigenvalues, and its projection has the positive parts of them: w_i itself
# on a half line, t - |v| and t + |v| of w = (t, v) in a second-order cone, those of the matrix in a semidefinite one.
# The projection is smooth where none of them is zero.
#
# NOTE [absolute value]: that of a symmetric matrix, A = |W|, is the solution of A A = W W with A >= 0. Its derivative,
# A dA + dA A = W dW + dW W, is a linear equation whose solution in the basis of eigenvectors is divided by a_i + a_j;
# that through the eigenvectors themselves would be divided by differences of eigenvalues, which may be equal. So with
# the eigenvectors held fixed Newton's steps with the first slope, L,
#     A_{k+1} = A_k + L^-1 ((W W - A_k A_k) - (that at the value of W)),   A_0 = |W| as a number,
# leave the number as it is, and have its derivatives up to order k, as each step is off by the last error times dW.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Cones"]

_ORDERS = 3  # of exact derivatives of the projection: those of a layer go as far


@dataclass(frozen=True)
class Cones:
    """A product of cones: ``lines`` half lines, second-order cones of sizes ``orders``, matrices of sizes ``sides``.

    A second-order cone holds (t, v) with t >= |v|, a matrix is its upper triangle, column by column, in which entries
    off the diagonal are multiplied by the root of 2.
    """

    lines: int
    orders: tuple[int, ...] = ()
    sides: tuple[int, ...] = ()

    def split(self, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The parts of w [..., m], one per cone, the half lines together."""
        parts: tuple[torch.Tensor, ...] = torch.split(w, self.sizes, -1)
        return parts

    @property
    def sizes(self) -> list[int]:
        """Rows of each part."""
        return [self.lines, *self.orders, *(k * (k + 1) // 2 for k in self.sides)]

    def project(self, w: torch.Tensor) -> torch.Tensor:
        """The nearest point, [..., m]; differentiable three times."""
        lines, *others = self.split(w)
        parts = [lines.clamp(min=0), *(_second_order(part) for part in others[: len(self.orders)])]
        for part, k in zip(others[len(self.orders) :], self.sides, strict=True):
            W = _matrix(part, k)
            parts.append(_triangle((W + _absolute(W)) / 2))
        return torch.cat(parts, -1)

    def eigenvalues(self, w: torch.Tensor) -> torch.Tensor:
        """Those of NOTE [spectrum], [..., number of them]."""
        lines, *others = self.split(w)
        parts = [lines]
        for part in others[: len(self.orders)]:
            t, r = part[..., :1], torch.linalg.vector_norm(part[..., 1:], dim=-1, keepdim=True)
            parts += [t - r, t + r]
        for part, k in zip(others[len(self.orders) :], self.sides, strict=True):
            parts.append(torch.linalg.eigvalsh(_matrix(part, k)))
        return torch.cat(parts, -1)

    def for_clarabel(self, clarabel: Any) -> list[Any]:
        """The same in its words."""
        lines = [clarabel.NonnegativeConeT(self.lines)] if self.lines else []
        orders = [clarabel.SecondOrderConeT(size) for size in self.orders]
        return [*lines, *orders, *(clarabel.PSDTriangleConeT(k) for k in self.sides)]


def _second_order(w: torch.Tensor) -> torch.Tensor:
    """w inside, 0 in the polar cone, else (1 + t / |v|) / 2 times (|v|, v)."""
    t, v = w[..., :1], w[..., 1:]
    squares = (v * v).sum(-1, keepdim=True)
    r = torch.where(squares > 0, squares, 1.0).sqrt()  # no derivative at zero, where w or 0 is taken
    half = (1 + t / r) / 2
    r_or_zero = torch.where(squares > 0, r, 0.0)
    between = torch.cat([half * r, half * v], -1)
    return torch.where(r_or_zero <= t, w, torch.where(r_or_zero <= -t, torch.zeros_like(w), between))


def _absolute(W: torch.Tensor) -> torch.Tensor:
    """|W| of symmetric matrices; see NOTE [absolute value]."""
    values, U = torch.linalg.eigh(W.detach())
    a = values.abs()
    A: torch.Tensor = (U * a.unsqueeze(-2)) @ U.mT
    sums = a.unsqueeze(-1) + a.unsqueeze(-2)
    inverse = torch.where(sums > 0, 1 / torch.where(sums > 0, sums, 1.0), 0.0)
    square = W @ W
    for _ in range(_ORDERS):
        change = square - A @ A
        change = change - change.detach()
        A = A + U @ (inverse * (U.mT @ change @ U)) @ U.mT
    return A


def _places(k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of the upper triangle, column by column."""
    columns, rows = torch.tril_indices(k, k, device=device)
    return rows, columns


def _matrix(part: torch.Tensor, k: int) -> torch.Tensor:
    """The symmetric matrix [..., k, k] of a triangle."""
    rows, columns = _places(k, part.device)
    index = torch.zeros(k, k, dtype=torch.int64, device=part.device)
    index[rows, columns] = index[columns, rows] = torch.arange(len(rows), device=part.device)
    scale = torch.full((k, k), 0.5**0.5, dtype=part.dtype, device=part.device).fill_diagonal_(1.0)
    return part[..., index] * scale


def _triangle(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    rows, columns = _places(matrix.shape[-1], matrix.device)
    scale = torch.full(rows.shape, 2.0**0.5, dtype=matrix.dtype, device=matrix.device)
    return matrix[..., rows, columns] * scale.masked_fill(rows == columns, 1.0)
