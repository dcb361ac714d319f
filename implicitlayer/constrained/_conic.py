"""Cone programs as layers: Clarabel finds the solution, the equation of its optimality conditions is differentiated."""

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
from functools import partial
from importlib import import_module
from typing import Any, ClassVar

import torch

from implicitlayer._errors import InfeasibleError, NotConvergedError, UnboundedError
from implicitlayer.base._failures import refuse, standing
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import name_lanes
from implicitlayer.base._types import OnFailure
from implicitlayer.base._warn import tell_kink
from implicitlayer.constrained._exponential_cone import distance_to_kinks, nearest
from implicitlayer.constrained._qp_solve import full_data
from implicitlayer.layer._layer import ImplicitLayer
from implicitlayer.linear._dense import Dense
from implicitlayer.programs._backends import by_clarabel
from implicitlayer.programs._interior_point_step import Data, flat_lanes, norm_of, times

_AT_KINK = 1e-9  # eigenvalues below this, relative to the largest, count as this much: less than what is told as a kink
_ORDERS = 3  # of exact derivatives of the projection: those of a layer go as far


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

    def project(self, w: torch.Tensor, num_orders: int = _ORDERS) -> torch.Tensor:
        """The nearest point, [..., m]; differentiable ``num_orders`` times."""
        lines, orders, matrices, last = self.split(w)
        positive = [_triangle((W + _absolute(W, num_orders)) / 2) for W in matrices]
        on_last = nearest(last, num_orders).flatten(-2) if self.exponentials else last.flatten(-2)
        return torch.cat([lines.clamp(min=0), *map(_second_order, orders), *positive, on_last], -1)

    def to_kinks(self, w: torch.Tensor) -> torch.Tensor:
        """How far the parts of w are from where :meth:`project` bends, [..., number of them]: NOTE [spectrum]."""
        lines, orders, matrices, last = self.split(w)
        parts = [lines]
        for part in orders:
            t, r = part[..., :1], torch.linalg.vector_norm(part[..., 1:], dim=-1, keepdim=True)
            parts += [t - r, t + r]
        parts += map(torch.linalg.eigvalsh, matrices)
        return torch.cat([*parts, distance_to_kinks(last, nearest(last, 0))], -1).abs()

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
    r = torch.where(squares > 0, squares, 1.0).sqrt()  # no derivative at zero, where w or 0 is taken
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


# Legend: minimise 1/2 x'Q x + p'x  subject to  A x = b,  h - G x in K, a product of cones (m rows); multipliers y of
# the equations and z in the dual cone K*.
#
# NOTE [natural residual]: s = h - G x in K, z in K* and s'z = 0 say that s and -z are the projections of w = s - z onto
# K and its polar cone (Moreau). So with s = P(w) and z = P(w) - w the conditions of optimality are the square equation
#     F(x, y, w) = (Q x + p + A'y + G'z,  A x - b,  G x + s - h) = 0
# (the residual map of Agrawal et al. 2019 with the scaling of the homogeneous form taken out): whatever w is, s and z
# are in their cones and complementary. F is smooth where P is; what is differentiated is a layer of its root.

_ROUNDED = 16  # times eps of the data: what their rounding makes of a zero
_ENOUGH = 1e-6  # conditions that hold to this, relative to the largest of their data, are those of a solution
_NEWTON = 4  # steps after Clarabel, at least two, while they halve what is left
_SETTINGS = {"verbose": False, "tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
_ERRORS: dict[str, tuple[type[Exception], str]] = {
    "PrimalInfeasible": (InfeasibleError, "has no feasible point. Loosen its constraints"),
    "DualInfeasible": (UnboundedError, "is unbounded: its objective falls without end. Bound its variables"),
}


def cone_program(
    data: Data, cones: Cones, *, derivative: bool, on_failure: OnFailure, active_rtol: float, linear_solver: Any
) -> torch.Tensor:
    """x [*lanes, n] of the programs Q, p, A, b, G, h, whose dimensions in front are lanes.

    Solved and differentiated in float64, whatever the dtype of the data.

    Args:
        derivative: whether one is wanted: then kinks are told.
        on_failure: as of :func:`qp`.
        active_rtol: a distance of w to a kink below this, relative to the largest, counts as zero.
        linear_solver: for the Jacobian of F; None for a dense one.
    """
    dtype = data[1].dtype
    active_rtol = max(active_rtol, _ROUNDED * torch.finfo(dtype).eps)
    exact = [t.double() for t in data]
    p, b, h = exact[1], exact[3], exact[5]
    sizes = p.shape[-1], b.shape[-1], h.shape[-1]
    solver = _Clarabel(cones, on_failure, active_rtol if derivative else None)
    linear = Dense() if linear_solver is None else linear_solver
    layer = ImplicitLayer(
        partial(_conditions, cones=cones), solver, linear, "root", False, False, on_failure, None, 0, p.ndim - 1
    )
    u: torch.Tensor = layer(p.new_zeros(*p.shape[:-1], sum(sizes)), *exact)
    return u[..., : sizes[0]].to(dtype)


def _conditions(u: torch.Tensor, *data: torch.Tensor, cones: Cones, num_orders: int = _ORDERS) -> torch.Tensor:
    """F of NOTE [natural residual], [*lanes, n + e + m]."""
    Q, p, A, b, G, h = data
    x, y, w = u.split([p.shape[-1], b.shape[-1], h.shape[-1]], -1)
    s = cones.project(w, num_orders)
    slope = times(Q, x) + p + times(A.mT, y) + times(G.mT, s - w)
    return torch.cat([slope, times(A, x) - b, times(G, x) + s - h], -1)


@dataclass(frozen=True, eq=False)
class _Clarabel:
    """The solver of F = 0, one program at a time; ``active_rtol`` is None where kinks do not matter."""

    cones: Cones
    on_failure: OnFailure
    active_rtol: float | None
    batched: ClassVar[bool] = True

    def __call__(self, residual: Any, init: torch.Tensor, *data: torch.Tensor) -> SolverResult:
        lanes = init.shape[:-1]
        flat = flat_lanes(full_data(data, lanes))
        answers = [self._one(*(t[i] for t in flat)) for i in range(lanes.numel())]
        found = [u for u, _, _ in answers]
        u = torch.stack(found) if found else init.reshape(0, init.shape[-1]).double()
        for status, (error, words) in _ERRORS.items():
            bad = torch.tensor([said == status for _, said, _ in answers], dtype=torch.bool).reshape(lanes)
            if bool(bad.any()):
                refuse(bad, error(f"the cone program {words}{name_lanes(bad)}."))
        known = torch.tensor([said in _ERRORS for _, said, _ in answers], dtype=torch.bool)
        u, left = self._polished(u, flat, known)
        self._judge(left.reshape(lanes), [said for _, said, _ in answers])
        if self.active_rtol is not None and u.shape[0]:
            self._judge_kinks(u.reshape(*lanes, -1), left.reshape(lanes))
        steps = max((count for _, _, count in answers), default=0)
        return SolverResult(u.reshape(init.shape).to(init), Status.CONVERGED, steps)

    def _one(self, *data: torch.Tensor) -> tuple[torch.Tensor, str, int]:
        """u, Clarabel's word for how it ended, and its iterations."""
        Q, p, A, b, G, h = data
        clarabel = import_module("clarabel")
        zero = [clarabel.ZeroConeT(len(b))] if len(b) else []
        program = [t.cpu().numpy() for t in (Q, p, torch.cat([A, G]), torch.cat([b, h]))]
        found = by_clarabel(clarabel, program, [*zero, *self.cones.for_clarabel(clarabel)], _SETTINGS)
        x, z, s = (torch.tensor(part, dtype=p.dtype, device=p.device) for part in (found.x, found.z, found.s))
        u = torch.cat([x, z[: len(b)], (s - z)[len(b) :]])
        return u.nan_to_num(0.0, 0.0, 0.0), str(found.status), int(found.iterations)

    def _polished(self, u: torch.Tensor, data: Data, failed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """u after steps of Newton's method where they help, and what is left of F relative to its terms, [B]."""
        conditions = partial(_conditions, cones=self.cones, num_orders=1)
        value = conditions(u, *data)
        jacobian = torch.func.vmap(torch.func.jacrev(conditions))
        best, at_best = u, value
        for count in range(_NEWTON if u.numel() else 0):
            step = torch.linalg.pinv(jacobian(u, *data)) @ value.unsqueeze(-1)
            moved = u - step.squeeze(-1)
            after, least = conditions(moved, *data), norm_of(at_best)
            # a step over a kink leaves as much as there was, and the next one nothing
            better, usable = ((norm_of(after) < k * least).unsqueeze(-1) for k in (0.5, 10))
            best, at_best = torch.where(better, moved, best), torch.where(better, after, at_best)
            u, value = torch.where(usable, moved, best), torch.where(usable, after, at_best)
            if count and not bool(better.any()):
                break
        u, value = best, at_best
        Q, p, A, b, G, h = data
        x, y, w = u.split([p.shape[-1], b.shape[-1], h.shape[-1]], -1)
        parts = value.split([p.shape[-1], b.shape[-1] + h.shape[-1]], -1)
        multipliers, size = torch.cat([y, self.cones.project(w) - w], -1), torch.linalg.matrix_norm
        rows = size(torch.cat([A, G], -2))
        terms = [
            norm_of(p) + size(Q) * norm_of(x) + rows * norm_of(multipliers),
            norm_of(torch.cat([b, h], -1)) + rows * norm_of(x),
        ]
        off = [norm_of(part) / torch.where(of > 0, of, 1.0) for part, of in zip(parts, terms, strict=True)]
        return u, torch.where(failed, 0.0, torch.maximum(*off))

    def _judge(self, left: torch.Tensor, words: list[str]) -> None:
        """An answer that is none is an error."""
        bad = ~(left <= _ENOUGH)
        if self.on_failure != "ignore" and bool(bad.any()):
            said = sorted({word for word, is_bad in zip(words, bad.flatten().tolist(), strict=True) if is_bad})
            refuse(
                bad,
                NotConvergedError(
                    f"the cone program was not solved{name_lanes(bad)}: Clarabel ended with {', '.join(said)}, and a "
                    f"condition of optimality is violated by {float(left[bad].max()):.1e} of its terms (allowed "
                    f"{_ENOUGH:.0e}). Scale the data, or write the problem with fewer redundant constraints.",
                    None,
                ),
            )

    def _judge_kinks(self, u: torch.Tensor, left: torch.Tensor) -> None:
        assert self.active_rtol is not None
        values = self.cones.to_kinks(u[..., u.shape[-1] - sum(self.cones.sizes) :])
        if self.on_failure == "ignore" or not values.shape[-1]:
            return
        rtol = torch.maximum(2 * left, torch.full_like(left, self.active_rtol))
        bent = standing(values.amin(-1) <= rtol * values.amax(-1))
        if bool(bent.any()):
            message = (
                f"the solution of the cone program sits at a kink{name_lanes(bent)}: a constraint holds with equality "
                "and has a multiplier of zero. The solution bends there, and its "
                "derivative is that of one side."
            )
            tell_kink(message, "kink", self.on_failure)
