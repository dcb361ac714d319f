"""Dense solves with the KKT matrix of a constrained minimum; multipliers fitted to a point that came without them."""

# Legend: n unknowns x, c constraints (equations first), H [n, n] Hessian of the Lagrangian, J [c, n] gradients of the
# constraints, a_i = 1 where constraint i holds as an equation, 0 where it is inactive.
#
#     K = [H     J'a    ]      one row J_i u_x = b_i for every held constraint, one row -u_i = b_i for every other one.
#         [a J   a - 1  ]
#
# At a minimum where the held gradients are independent (LICQ) and H is positive definite on the directions that they
# leave free (second-order sufficiency), K has n positive and c negative eigenvalues, and so has every D K D. Fast way:
# an LDL' factorisation, whose pivots show the signs (Sylvester). Slow way, where the signs are wrong or a pivot is
# small: the null space of the held gradients by singular values, and the eigenvalues of the Hessian reduced to it,
# which tell a dependent gradient (harmless for a right-hand side in the range) from a flat direction and from negative
# curvature.

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.base._tree import positive
from implicitlayer.linear._common import NOISE, Correction, Limits, Round, lane_norm, refine_direct
from implicitlayer.linear._operator import FlatOperator, LinearSolver, default_rtol

_BALANCED = 1e-6  # of what is left of the rows, as the forces weigh it, where rounding allows no less
_SUSPICIOUS = 1e4  # a pivot below this many times the noise sends the lane the slow way


class Factors(Protocol):
    """What solves with K, as :class:`KktFactors` does."""

    codes: torch.Tensor
    curvature: torch.Tensor
    units: torch.Tensor
    flat: torch.Tensor

    def solve(self, rhs: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class KktMatrices:
    """H [*lanes, n, n], J [*lanes, c, n] and the mask a [*lanes, c], in float64."""

    hessian: torch.Tensor
    rows: torch.Tensor
    held: torch.Tensor


class KktFactors:
    """Factors of K and solves with them.

    Args:
        matrices: of every lane.
        eps: relative error of the entries.

    Attributes:
        codes: int [*lanes]: CONVERGED; INDEFINITE (no minimum); SINGULAR (a flat direction or dependent gradients:
            the solution of smallest norm is returned, right for right-hand sides in the range); NONFINITE.
        curvature: [*lanes], smallest curvature met on the free directions; +inf where the fast way did not look.
        units: [*lanes, n + c], the diagonal D with which no unit of objective or constraints matters in D K D.
        flat: bool [*lanes], whether there is a direction of x without curvature that the constraints leave free.
    """

    def __init__(self, matrices: KktMatrices, eps: float) -> None:
        H, J, held = matrices.hessian, matrices.rows * matrices.held[..., None], matrices.held
        self.n, self.held, self.eps = H.shape[-1], held, eps
        finite = H.isfinite().flatten(-2).all(-1) & J.isfinite().flatten(-2).all(-1)
        H, J = (torch.where(finite[..., None, None], t, 0.0) for t in ((H + H.mT) / 2, J))
        # K~ = D K D with largest entry of H one and rows of J of length one
        size = H.abs().flatten(-2).amax(-1) if self.n else held.new_zeros(held.shape[:-1])
        self.of_x = positive(size).rsqrt()[..., None]
        norms = torch.linalg.vector_norm(J, dim=-1)
        self.of_rows = torch.where(norms > 0, 1 / norms, 1.0) / torch.where(norms > 0, self.of_x, 1.0)
        self.units = torch.cat([self.of_x.expand(*held.shape[:-1], self.n), self.of_rows], -1)
        self.H = H * (self.of_x * self.of_x)[..., None]
        self.J = J * self.of_x[..., None] * self.of_rows[..., None]
        self.curvature = torch.full_like(norms[..., :1].sum(-1), math.inf)
        self.slow: _NullSpace | None = None
        good = self._factorise()
        self.codes = torch.where(good, int(Status.CONVERGED), int(Status.SINGULAR))
        if not bool((good | ~finite).all()):
            self.slow = _NullSpace(self.H, self.J, eps)
            self.codes = torch.where(good, self.codes, self.slow.codes)
            lowest = self.slow.lowest / (self.of_x[..., 0] * self.of_x[..., 0])
            self.curvature = torch.where(good, self.curvature, lowest)
        self.flat = torch.zeros_like(good) if self.slow is None else self.slow.flat & ~good
        self.good = good
        self.codes = torch.where(finite, self.codes, int(Status.NONFINITE))

    def _factorise(self) -> torch.Tensor:
        """LDL' of K~; the lanes in which its signs are those of a minimum, with no small pivot."""
        J, c = self.J, self.J.shape[-2]
        matrix = torch.cat([torch.cat([self.H, J.mT], -1), torch.cat([J, torch.diag_embed(self.held - 1)], -1)], -2)
        self.factor, self.pivots, _ = torch.linalg.ldl_factor_ex(matrix)
        diagonal = self.factor.diagonal(dim1=-2, dim2=-1)
        if not diagonal.shape[-1]:
            return torch.ones(diagonal.shape[:-1], dtype=torch.bool, device=diagonal.device)
        paired = self.pivots < 0  # a 2 x 2 block, one eigenvalue of either sign
        below = torch.nn.functional.pad(self.factor.diagonal(offset=-1, dim1=-2, dim2=-1), (0, 1))
        after = torch.nn.functional.pad(diagonal[..., 1:], (0, 1))
        order = torch.where(paired, paired.cumsum(-1), 0)
        first = paired & (order % 2 == 1)
        determinant = (below * below - diagonal * after).clamp(min=0)
        sizes = torch.where(first, determinant.sqrt(), torch.where(paired, math.inf, diagonal.abs()))
        largest = torch.where(sizes.isfinite(), sizes, 0.0).amax(-1)
        num_negative = ((diagonal < 0) & ~paired).sum(-1) + paired.sum(-1) // 2
        noise = (self.n + c + NOISE) * self.eps
        good: torch.Tensor = (num_negative == c) & (sizes.amin(-1) > _SUSPICIOUS * noise * largest)
        return good

    def solve(self, rhs: torch.Tensor) -> torch.Tensor:
        """K^-1 rhs for [*lanes, n + c, k]; zero in lanes with negative curvature or NaN."""
        scale = self.units[..., None]
        scaled = rhs * scale
        value = torch.linalg.ldl_solve(self.factor, self.pivots, scaled)
        if self.slow is not None:
            other = self.slow.solve(scaled[..., : self.n, :], scaled[..., self.n :, :], self.held)
            value = torch.where(self.good[..., None, None], value, other)
        usable = (self.codes == int(Status.CONVERGED)) | (self.codes == int(Status.SINGULAR))
        return torch.where(usable[..., None, None], value * scale, 0.0)


class PartedFactors:
    """Solves with K by other factors in the lanes of a mask ``rest`` [*lanes], whose lanes these have in a row."""

    def __init__(self, rest: torch.Tensor, most: Factors, others: Factors) -> None:
        self.rest, self.most, self.others = rest, most, others
        names = ("codes", "curvature", "units", "flat")
        pairs = ((getattr(most, name).clone(), getattr(others, name)) for name in names)
        self.codes, self.curvature, self.units, self.flat = (self._filled(*pair) for pair in pairs)

    def _filled(self, values: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        values[self.rest] = others
        return values

    def solve(self, rhs: torch.Tensor) -> torch.Tensor:
        """K^-1 rhs for [*lanes, n + c, k]."""
        return self._filled(self.most.solve(rhs), self.others.solve(rhs[self.rest]))


class _NullSpace:
    """The same by an orthogonal basis V of x: its first columns span the held gradients, the others are free."""

    def __init__(self, H: torch.Tensor, J: torch.Tensor, eps: float) -> None:
        n, c = H.shape[-1], J.shape[-2]
        noise = (n + c + NOISE) * eps
        self.H = H
        # J = U S V', V square; the rows of zeros below J make it so where c < n
        padded = torch.nn.functional.pad(J, (0, 0, 0, max(n - c, 0)))
        left, values, right = torch.linalg.svd(padded, full_matrices=False)
        self.left, self.V = left[..., :c, :], right.mT
        kept = values > noise * values[..., :1].clamp(min=1.0)
        self.kept = kept.to(H.dtype)
        self.inverse = torch.where(kept, 1 / values, 0.0)
        free = 1 - self.kept
        reduced = (self.V.mT @ H @ self.V) * free[..., None] * free[..., None, :] + torch.diag_embed(self.kept)
        curvatures, self.E = torch.linalg.eigh(reduced)
        self.lowest = curvatures.amin(-1) if n else curvatures.sum(-1) + math.inf
        flat = curvatures.abs() <= noise * n
        self.inverse_curvature = torch.where(flat, 0.0, 1 / curvatures)
        dependent = kept.sum(-1) < (torch.linalg.vector_norm(J, dim=-1) > 0).sum(-1)
        self.flat = flat.any(-1)
        singular = dependent | self.flat
        codes = torch.where(singular, int(Status.SINGULAR), int(Status.CONVERGED))
        self.codes = torch.where(self.lowest < -noise * n, int(Status.INDEFINITE), codes)

    def solve(self, b_x: torch.Tensor, b_c: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """u with J u_x = b_c and H u_x + J'u_c = b_x, in the sense of least squares and smallest norm."""
        a, inverse, free = held[..., None], self.inverse[..., None], 1 - self.kept[..., None]
        across = self.V @ (inverse * (self.left.mT @ (a * b_c)))
        rest = free * (self.V.mT @ (b_x - self.H @ across))
        along = self.V @ (free * (self.E @ (self.inverse_curvature[..., None] * (self.E.mT @ rest))))
        x = across + along
        multipliers = self.left @ (inverse * (self.V.mT @ (b_x - self.H @ x)))
        return torch.cat([x, torch.where(a > 0, multipliers, -b_c)], -2)


@dataclass(frozen=True)
class KktSolver(LinearSolver):
    """Solve with the KKT matrix of a :class:`Lagrangian`, dense, by the signs of its pivots or its null space.

    Makes n + 1 products (each serves all lanes) to write H, J and the mask down, none where they are handed over in
    ``prepared``. The answer is improved by solves for its true residual, in units that make all rows alike, while that
    halves it. A lane whose reduced
    Hessian has a negative eigenvalue is INDEFINITE: the point is no minimum.

    Args:
        num_unknowns: n. num_equalities, num_inequalities: constraints of either kind.
        max_size: largest n plus number of constraints that is accepted.
        prepared: a list with the matrices (or their factors) at the solution, filled before the first solve, or empty.
        keeps: whether the first solve leaves its factors there: of a solver that is made for one call of a layer.
        balance: a list with how large the forces of the solution are beside the terms of H, [*lanes] of at least 1, or
            empty: what is left of the rows counts by so much more than what is left of the others (NOTE [repairs] in
            ``_qp_single``).

    Source: Nocedal & Wright, Numerical Optimization, 2nd ed., sections 16.1 (Lemma 16.1 and Theorem 16.3, inertia) and
    16.2 (null space); J. Bunch and L. Kaufman, Math. Comp. 31 (1977).
    """

    num_unknowns: int
    num_equalities: int
    num_inequalities: int
    max_size: int = 4096
    prepared: list[Factors | KktMatrices] = field(default_factory=list, compare=False, repr=False)
    keeps: bool = False
    balance: list[torch.Tensor] = field(default_factory=list, compare=False, repr=False)

    def solve(self, operator: FlatOperator, rhs: torch.Tensor) -> LinearSolution:
        """Solve for a flat right-hand side [*lanes, n + equalities + 2 inequalities]."""
        size = self.num_unknowns + self.num_equalities + self.num_inequalities
        if size > self.max_size:
            raise ValueError(
                f"the dense KKT solve would store {size} x {size} numbers per problem, above max_size={self.max_size}. "
                "Pass linear_solver=il.Minres(), or raise max_size of a KktSolver of your own."
            )
        lanes = rhs.shape[:-1]
        eps = torch.finfo(rhs.dtype).eps
        known = self.prepared[0] if self.prepared else None
        if isinstance(known, KktMatrices):
            known = self.prepared[0] = KktFactors(known, eps)
        if known is not None and lanes[len(lanes) - known.codes.ndim :] == known.codes.shape:
            solution = self._solve(operator, rhs, known)
            # lanes of the same sizes in another order (vmap of jacrev) show in the true residual
            if solution.status.ok:
                return solution
        factors = KktFactors(self.written_down(operator, rhs), eps)
        if self.keeps:
            self.prepared[:] = [factors]
        return self._solve(operator, rhs, factors)

    def by_kept_factors(self, rhs: torch.Tensor) -> torch.Tensor | None:
        """The x part of K^-1 rhs to the accuracy of the factors, at no product; None where there are none that fit."""
        known = self.prepared[0] if self.keeps and self.prepared else None
        if known is None or isinstance(known, KktMatrices) or known.codes.shape != rhs.shape[:-1]:
            return None
        core = self.num_unknowns + self.num_equalities + self.num_inequalities
        return known.solve(rhs[..., :core, None].double())[..., : self.num_unknowns, 0]

    def _solve(self, operator: FlatOperator, rhs: torch.Tensor, factors: Factors) -> LinearSolution:
        lanes = rhs.shape[:-1]
        core = self.num_unknowns + self.num_equalities + self.num_inequalities
        rest, num_extra = rhs.shape[-1] - core, math.prod(lanes[: len(lanes) - factors.codes.ndim])

        # the residual is that of D K D: neither half of K hides the other, whatever its unit
        D = torch.cat([factors.units, torch.ones_like(factors.units[..., :1]).expand(*factors.codes.shape, rest)], -1)
        plain = D
        if self.balance:
            weights, n = self.balance[0], self.num_unknowns
            if weights.shape != factors.codes.shape:  # lanes in another order (vmap of jacrev), which is not known here
                weights = weights.amax() if weights.numel() else weights.new_ones(())
            root = weights.sqrt()[..., None]
            D = torch.cat([D[..., :n] / root, D[..., n:core] * root, D[..., core:]], -1)

        def correct(start: Round) -> Correction:
            b = start.residual / D
            columns = b[..., :core].reshape(num_extra, *factors.codes.shape, core).movedim(0, -1)
            value = factors.solve(columns).movedim(-1, 0).reshape(*lanes, core)
            value = (torch.cat([value, b[..., core:]], -1) / D).to(rhs.dtype)
            codes, curvature = factors.codes.expand(lanes), factors.curvature.expand(lanes)
            refused = (codes != int(Status.CONVERGED)) & (codes != int(Status.SINGULAR))
            value = torch.where(refused[..., None], 0.0, value)
            return Correction(value, codes, torch.full_like(codes, self.num_unknowns + 1), None, curvature)

        def product(vector: torch.Tensor) -> torch.Tensor:
            return (D * operator((D * vector).to(rhs.dtype))).to(rhs.dtype)

        scaled = refine_direct(FlatOperator(product), (D * rhs).to(rhs.dtype), Limits(), correct, "KKT solve")
        value = (D * scaled.value).to(rhs.dtype)
        near = (scaled.codes == int(Status.STAGNATED)) & (scaled.relative_residual <= _BALANCED)
        if self.balance and bool(near.any()):
            # rounding allows no more of what the forces weigh; so the other units decide
            left, size = (lane_norm(plain * t) for t in (rhs - operator(value), rhs))
            near = near & (left <= 2 * default_rtol(rhs.dtype) * size)
            scaled = replace(scaled, codes=torch.where(near, int(Status.CONVERGED), scaled.codes))
        flat = factors.flat.expand(lanes)
        return replace(scaled, value=value, singular=flat if bool(flat.any()) else None)

    def written_down(self, operator: FlatOperator, like: torch.Tensor) -> KktMatrices:
        """H, J and the mask, by products with the unit vectors of x and one with the ones of the inequalities."""
        n, e, m = self.num_unknowns, self.num_equalities, self.num_inequalities
        units = torch.eye(n, like.shape[-1], dtype=like.dtype, device=like.device)
        columns = [operator(unit.expand(like.shape).contiguous()).double() for unit in units]
        matrix = torch.stack(columns, -1) if columns else like.double().new_zeros(*like.shape, 0)
        ones = torch.zeros_like(like)
        ones[..., n + e : n + e + m] = 1
        held = torch.ones_like(like[..., n : n + e + m]).double()
        if m:
            held[..., e:] += operator(ones)[..., n + e : n + e + m].double()
        return KktMatrices(matrix[..., :n, :], matrix[..., n : n + e + m, :], held.round())


Known = tuple[torch.Tensor | None, torch.Tensor | None]  # (lambda [e], mu [m]) of one problem, None where not known


def multipliers_of_lanes(
    gradient: torch.Tensor, rows_h: torch.Tensor, rows_g: torch.Tensor, near: torch.Tensor, known: Sequence[Known]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lambda [*lanes, e], mu [*lanes, m]): those ``known``, one pair per lane, and fitted ones where they are not.

    gradient [*lanes, n], rows_h [*lanes, e, n], rows_g [*lanes, m, n], near bool [*lanes, m].
    """
    lanes = np.ndindex(near.shape[:-1])
    y, z = torch.zeros_like(rows_h[..., 0]), torch.zeros_like(rows_g[..., 0])
    for lane, (known_y, known_z) in zip(lanes, known, strict=True):
        slope, equations, border = gradient[lane], rows_h[lane], near[lane]
        if known_y is not None:
            slope, equations, y[lane] = slope + equations.mT @ known_y, equations[:0], known_y
        if known_z is not None:
            slope, border, z[lane] = slope + rows_g[lane].mT @ known_z, torch.zeros_like(border), known_z
        fit_y, fit_z = multipliers(slope, equations, rows_g[lane], border)
        if known_y is None:
            y[lane] = fit_y
        if known_z is None:
            z[lane] = fit_z
    return y, z


def multipliers(
    gradient: torch.Tensor, rows_h: torch.Tensor, rows_g: torch.Tensor, near: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(lambda, mu) minimising ``||gradient + rows_h' lambda + rows_g' mu||`` with mu >= 0, and mu = 0 unless near.

    One problem: gradient [n], rows_h [e, n], rows_g [m, n], near bool [m]. Of several lambda the smallest is taken.
    """
    # Rows of length one: what is fitted does not depend on the units of a constraint.
    h_norms, g_norms = (positive(torch.linalg.vector_norm(rows, dim=-1)) for rows in (rows_h, rows_g))
    equations = (rows_h / h_norms[:, None]).mT
    forces = (rows_g / g_norms[:, None])[near].mT
    inverse = torch.linalg.pinv(equations) if equations.shape[-1] else equations.mT
    project = lambda v: v - equations @ (inverse @ v)  # noqa: E731  (the part that no lambda can balance)
    mu = torch.zeros_like(g_norms)
    mu[near] = nonnegative_least_squares(project(forces), -project(gradient))
    lam = -inverse @ (gradient + forces @ mu[near])
    return lam / h_norms, mu / g_norms


def nonnegative_least_squares(matrix: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """u >= 0 minimising ``||matrix u - rhs||``; matrix [n, k], rhs [n].

    Source: C. L. Lawson and R. J. Hanson, Solving Least Squares Problems (1974), chapter 23. A column whose entry comes
    out non-positive when it is let in is left out for good: rounding would let it in again and again.
    """
    k = matrix.shape[-1]
    u = rhs.new_zeros(k)
    if not k:
        return u
    inside = torch.zeros(k, dtype=torch.bool, device=rhs.device)
    barred = torch.zeros_like(inside)
    noise = 16 * (k + matrix.shape[0]) * torch.finfo(rhs.dtype).eps * torch.linalg.vector_norm(rhs)
    for _ in range(3 * k):
        pull = torch.where(inside | barred, -torch.inf, matrix.mT @ (rhs - matrix @ u))
        newest = int(pull.argmax())
        if not pull[newest] > noise:
            break
        inside[newest] = True
        for _ in range(k):
            fit = torch.zeros_like(u)
            fit[inside] = torch.linalg.pinv(matrix[:, inside]) @ rhs
            negative = inside & (fit <= 0)
            if not bool(negative.any()):
                u = fit
                break
            if bool(negative[newest]) and u[newest] == 0:
                inside[newest], barred[newest] = False, True
                break
            part = (u[negative] / (u[negative] - fit[negative])).min()
            u = u + part * (fit - u)
            inside &= u > noise * torch.finfo(rhs.dtype).eps
            u = torch.where(inside, u, 0.0)
    return u
