"""Products of convex cones: the nearest point, with its derivatives, and how far it is from where it bends."""

# NOTE [spectrum]: in symmetric cones every w has eigenvalues, and its projection has the positive parts of them: w_i
# itself on a half line, t - |v| and t + |v| of w = (t, v) in a second-order cone, those of the matrix in a semidefinite
# one. The projection is smooth where none of them is zero. For exponential cones see ``_exponential_cone``.
#
# NOTE [absolute value]: that of a symmetric matrix, A = |W|, is the solution of A A = W W with A >= 0. Its derivative,
# A dA + dA A = W dW + dW W, is a linear equation whose solution in the basis of eigenvectors is divided by a_i + a_j;
# that through the eigenvectors themselves would be divided by differences of eigenvalues, which may be equal. So with
# the eigenvectors held fixed, M = U'W U, Newton's steps with the first slope, L,
#     A_{k+1} = A_k + L^-1 ((M M - A_k A_k) - (that at the value of W)),   A_0 = |M| as a number,
# leave the number as it is, and have its derivatives up to order k, as each step is off by the last error times dW.
# As a number M is the diagonal of its eigenvalues w, to the last bit: then L^-1 of (w_i + w_j) dM_ij is at most dM_ij,
# whereas rounding beside the diagonal would be divided by a pair of small ones. Where eigenvalues are zero there is a
# kink, and the derivative is that of the side inside of the cone: they count as a little above zero.

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer.base._tree import positive
from implicitlayer.constrained._exponential_cone import distance_to_kinks, nearest

_AT_KINK = 1e-9  # eigenvalues below this, relative to the largest, count as this much: less than what is told as a kink
ORDERS = 3  # of exact derivatives of the projection: those of a layer go as far


@dataclass(frozen=True)
class Cones:
    """A product of half lines, second-order cones of sizes ``orders``, matrices of sizes ``sides``, and exponentials.

    A second-order cone holds (t, v) with t >= |v|, a matrix is its upper triangle, column by column, in which entries
    off the diagonal are multiplied by the root of 2, and an exponential cone (x, y, z) with y exp(x / y) <= z.
    """

    lines: int
    orders: tuple[int, ...] = ()
    sides: tuple[int, ...] = ()
    exponentials: int = 0

    def split(self, w: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """The half lines of w [..., m], the parts of second-order cones, the matrices, exponentials [..., count, 3]."""
        lines, *others, last = torch.split(w, self.sizes, -1)
        k = len(self.orders)
        matrices = [_matrix(part, side) for part, side in zip(others[k:], self.sides, strict=True)]
        return lines, others[:k], matrices, last.unflatten(-1, (self.exponentials, 3))

    @property
    def sizes(self) -> list[int]:
        """Rows of each part."""
        return [self.lines, *self.orders, *(k * (k + 1) // 2 for k in self.sides), 3 * self.exponentials]

    def project(self, w: torch.Tensor, num_orders: int = ORDERS) -> torch.Tensor:
        """The nearest point, [..., m]; differentiable ``num_orders`` times."""
        lines, orders, matrices, last = self.split(w)
        positive = [_triangle((W + _absolute(W, num_orders)) / 2) for W in matrices]
        on_last = nearest(last, num_orders).flatten(-2) if self.exponentials else last.flatten(-2)
        return torch.cat([lines.clamp(min=0), *map(_second_order, orders), *positive, on_last], -1)

    def largest(self, sizes: torch.Tensor) -> torch.Tensor:
        """The largest number of each cone in the place of all that it has, [..., m]."""
        lines, *others, last = torch.split(sizes, self.sizes, -1)
        last = last.unflatten(-1, (self.exponentials, 3)).amax(-1, keepdim=True).expand(*last.shape[:-1], -1, 3)
        return torch.cat([lines, *(t.amax(-1, keepdim=True).expand_as(t) for t in others), last.flatten(-2)], -1)

    def to_kinks(self, w: torch.Tensor, of_s: torch.Tensor, of_z: torch.Tensor) -> torch.Tensor:
        """How far the parts of w are from where :meth:`project` bends, [..., number of them]: NOTE [spectrum].

        A part above zero is one of the slack, relative to ``of_s`` [..., m], the others of z, relative to ``of_z``;
        these are the same in all rows of a cone.
        """
        lines, orders, matrices, last = self.split(w)
        parts = [lines]
        for part in orders:
            t, r = part[..., :1], torch.linalg.vector_norm(part[..., 1:], dim=-1, keepdim=True)
            parts.append(torch.cat([t - r, t + r], -1))
        parts += map(torch.linalg.eigvalsh, matrices)
        units = [torch.split(of, self.sizes, -1) for of in (of_s, of_z)]
        found = []
        for part, above, below in zip(parts, *(unit[:-1] for unit in units), strict=True):
            if part is not lines:
                above, below = above[..., :1], below[..., :1]
            found.append(torch.where(part > 0, part / above, -part / below))
        above, below = (unit[-1].unflatten(-1, (self.exponentials, 3))[..., 0] for unit in units)
        return torch.cat([*found, distance_to_kinks(last, nearest(last, 0), above, below)], -1)

    def for_clarabel(self, clarabel: Any) -> list[Any]:
        """The same in its words."""
        lines = [clarabel.NonnegativeConeT(self.lines)] if self.lines else []
        orders = [clarabel.SecondOrderConeT(size) for size in self.orders]
        matrices = [clarabel.PSDTriangleConeT(k) for k in self.sides]
        return [*lines, *orders, *matrices, *(clarabel.ExponentialConeT() for _ in range(self.exponentials))]


def _second_order(w: torch.Tensor) -> torch.Tensor:
    """w inside, 0 in the polar cone, else (1 + t / |v|) / 2 times (|v|, v)."""
    t, v = w[..., :1], w[..., 1:]
    squares = (v * v).sum(-1, keepdim=True)
    r = positive(squares).sqrt()  # no derivative at zero, where w or 0 is taken
    half = (1 + t / r) / 2
    r_or_zero = torch.where(squares > 0, r, 0.0)
    between = torch.cat([half * r, half * v], -1)
    return torch.where(r_or_zero <= t, w, torch.where(r_or_zero <= -t, torch.zeros_like(w), between))


def _absolute(W: torch.Tensor, num_orders: int) -> torch.Tensor:
    """|W| of symmetric matrices; see NOTE [absolute value]."""
    values, U = torch.linalg.eigh(W.detach())
    largest = values.abs().amax(-1, keepdim=True)
    above_zero = torch.where(largest > 0, _AT_KINK * largest, 1.0)
    w = torch.where(values.abs() <= above_zero, above_zero, values)
    a = w.abs()
    M = U.mT @ W @ U
    M = torch.diag_embed(w) + (M - M.detach())
    start = A = torch.diag_embed(a)
    sums = a.unsqueeze(-1) + a.unsqueeze(-2)
    for _ in range(num_orders):
        change = M @ M - A @ A
        A = A + (change - change.detach()) / sums
    found: torch.Tensor = (U * values.abs().unsqueeze(-2)) @ U.mT + U @ (A - start) @ U.mT
    return found


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
