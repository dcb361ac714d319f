"""The terms of the optimality conditions of one quadratic program on the CPU, with NumPy's vectors."""

# What ``Conditions`` (NOTE [scales]) and ``_qp_exact`` say of many programs, for one of them at a tenth of the cost.
# Legend: n unknowns, c rows J x with sides s, e equations first, then m inequalities; x [n]; w [c], multipliers.

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from implicitlayer.programs._interior_point_single import Array, norm, product
from implicitlayer.programs._interior_point_step import Data
from implicitlayer.programs._kkt_active import ABSOLUTE, DEPENDENT, NOISE, ActiveConstraints
from implicitlayer.programs._qp_exact import ROUNDING
from implicitlayer.programs._qp_rank import NEARLY

Mask = npt.NDArray[np.bool_]

_EPS = float(np.finfo(np.float64).eps)


class SingleProgram:
    """The data of one program (one lane) and what does not change with x."""

    def __init__(self, program: Data) -> None:
        self.data, self.lanes = program, program[1].shape[:-1]
        arrays = [t.numpy().reshape(t.shape[t.ndim - rank :]) for t, rank in zip(program, (2, 1) * 3, strict=True)]
        self.Q, self.p, A, b, G, h = arrays
        self.n, self.e = len(self.p), len(b)
        self.rows, self.sides = np.concatenate([A, G]), np.concatenate([b, h])
        self.Qx, self.Jx, self.Jw = product(self.Q), product(self.rows), product(self.rows.T)
        self._measure(np.sqrt(np.einsum("ij,ij->i", self.rows, self.rows)), float(np.abs(self.Q).max()))

    def _measure(self, lengths: Any, curved: float) -> None:
        """The sizes of the data, from the lengths of the rows and the largest entry of Q."""
        self.lengths, self.curved, pull = lengths, curved, float(np.abs(self.p).max())
        # what overflows is not for here
        self.finite = math.isfinite(self.curved + pull + float(self.lengths.sum()) + float(self.sides.sum()))
        self.over, empty = self.lengths, self.lengths == 0
        if empty.any():  # the border of a row of zeros is infinitely far, or here where its side is zero too
            self.over = np.where(empty, 1.0, self.lengths)
            self.sides = np.where(empty & (self.sides != 0), np.copysign(math.inf, self.sides), self.sides)
        offsets = np.abs(self.sides) / self.over
        self.farthest = float(np.where(offsets < math.inf, offsets, 0.0).max()) if len(offsets) else 0.0
        pull = pull / self.curved if self.curved > 0 else 0.0
        self.pull = pull if math.isfinite(pull) else 0.0
        self.noise = ROUNDING * _EPS * (self.n + len(self.sides) - self.e) ** 0.5

    def reach(self, size: float) -> float:
        """A length of the data, where x has this size."""
        return min(self.pull, self.farthest) if self.farthest > 1e-10 * size else self.pull

    def independent(self, held: Mask) -> tuple[bool, bool]:
        """Whether the rows of what holds are independent, and whether its equations are far from being dependent."""
        keep = np.concatenate([np.arange(self.e), self.e + held.nonzero()[0]])
        if not len(keep):
            return True, True
        lengths = self.lengths[keep]
        if not lengths.all():
            return False, bool(lengths[: self.e].all())
        rows = self.rows[keep] / lengths[:, None]
        gram = rows.dot(rows.T)
        gram.flat[:: len(keep) + 1] -= DEPENDENT
        try:
            # the first e pivots are those of the equations alone
            pivots = np.linalg.cholesky(gram).diagonal()[: self.e] ** 2
        except np.linalg.LinAlgError:
            return False, False
        return True, self.e < 2 or bool((pivots > NEARLY).all())

    def lane(self, vector: npt.NDArray[Any]) -> torch.Tensor:
        """As a tensor [*lanes, length]."""
        return torch.from_numpy(vector.reshape((*self.lanes, len(vector))))


class Terms:
    """The terms of the conditions at x and w, and what they say.

    Attributes:
        left: what is left of the gradient of the Lagrangian, [n]; ``scale`` is the size of its terms.
        off: J x - s, [c]; ``away`` the same as lengths, positive where an inequality is violated.
        force: of the inequalities, [m].
        size, length: of x, and of the program; distances are relative to these.
    """

    def __init__(self, of: SingleProgram, x: Array, w: Array) -> None:
        self.of, self.x, self.w = of, x, w
        curved = of.Qx(x)
        gradient = curved + of.p
        self.left, self.off = gradient + of.Jw(w), of.Jx(x) - of.sides
        self.away, self.force = self.off / of.over, w[of.e :] * of.lengths[of.e :]
        scale, self.size = norm(gradient) + norm(curved), norm(x)
        self.scale = scale if scale != 0 else 1.0
        self.length = max(self.size, NOISE * _EPS * of.n**0.5, of.reach(self.size))

    def wrong(self, held: Mask) -> Mask:
        """Held borders that pull, and others that are crossed."""
        wrong: Mask = np.where(held, self.force / self.scale, self.away[self.of.e :] / -self.length) < -self.of.noise
        return wrong

    def violation(self) -> float:
        """The largest violation of a condition of optimality, relative to the size of its terms.

        Of an inequality with force a and distance b, the conditions a >= 0, b >= 0 and a b = 0 are min(a, b) = 0.
        """
        both = np.minimum(self.force / self.scale, self.away[self.of.e :] / -self.length)
        equations = np.abs(self.away[: self.of.e]) / self.length
        parts = norm(self.left) / self.scale, _largest(equations), _largest(np.abs(both))
        return max(parts) if sum(parts) < math.inf else math.inf  # NaN is not below inf

    def at_rest(self) -> bool:
        """Whether the terms of the gradient are rounding: NOTE [at rest] in ``_qp_exact``."""
        return self.scale <= NOISE * _EPS * self.of.curved * self.size

    def borders(self, eps: float, active_rtol: float) -> tuple[float, float, float, Mask, Mask]:
        """For data with this relative error: the size of x, distances that are zero and at the border, and who is.

        The masks [m] are that of the inequalities at their border, and that of those with a force too.
        """
        zero, size = max(ABSOLUTE, 16 * eps) * self.of.reach(self.size), max(self.size, NOISE * eps * self.of.n**0.5)
        tolerance = max(active_rtol * size, zero)
        near = -self.away[self.of.e :] <= tolerance
        return size, zero, tolerance, near, near & (self.force > active_rtol * self.scale)

    def farthest_outside(self) -> float:
        """The largest distance from a constraint."""
        return max(_largest(np.abs(self.away[: self.of.e])), _largest(self.away[self.of.e :]))

    def settled(self, held: Mask, eps: float, active_rtol: float, rtol: float) -> bool:
        """Whether ``held`` is all there is to say of a proved solution.

        No kink, rows that are independent, x inside of the constraints to ``rtol`` of its size.
        """
        size, zero, _, near, active = self.borders(eps, active_rtol)
        if not (np.array_equal(near, held) and np.array_equal(active, held)):
            return False
        return self.farthest_outside() <= max(zero, rtol * size) and all(self.of.independent(held))

    def active_set(self, eps: float, active_rtol: float, hold_kinks: bool) -> tuple[ActiveConstraints, torch.Tensor]:
        """What :meth:`Conditions.active_set` says of a proved solution, for data with this relative error."""
        of, e = self.of, self.of.e
        size, zero, tolerance, near, active = self.borders(eps, active_rtol)
        kinks = near & ~active
        kept = np.where(active, self.w[e:], 0.0)
        left = self.left - of.Jw(np.concatenate([np.zeros(e), self.w[e:] - kept]))
        violation = self.farthest_outside()
        held = active | kinks if hold_kinks else active
        numbers = {
            "num_active": int(np.count_nonzero(active)),
            "num_kinks": int(np.count_nonzero(kinks)),
            "tolerance": tolerance,
            "violation": violation,
            "relative_violation": 0.0 if violation <= zero else violation / size,
            "stationarity": norm(left) / self.scale,
            "independent": of.independent(held)[0],
        }
        vectors = {"active": active, "kinks": kinks, "equality": self.w[:e], "inequality": kept}
        tensors = {name: of.lane(vector) for name, vector in vectors.items()}
        tensors |= {name: torch.from_numpy(np.full(of.lanes, value)) for name, value in numbers.items()}
        return ActiveConstraints(kinks_known=True, **tensors), of.lane(held)  # type: ignore[arg-type]


def _largest(vector: Array) -> float:
    return float(np.maximum.reduce(vector, initial=0.0))
