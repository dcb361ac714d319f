"""The terms of the optimality conditions of one quadratic program on the CPU, with NumPy's vectors."""

# What ``Conditions`` (NOTE [scales]) and ``_qp_exact`` say of many programs, for one of them at a tenth of the cost.
# Legend: n unknowns, e equations, m inequalities; x [n], y [e], z [m].

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from implicitlayer.programs._interior_point import Data
from implicitlayer.programs._interior_point_single import Array, product
from implicitlayer.programs._kkt_active import ABSOLUTE, DEPENDENT, NOISE, ActiveConstraints
from implicitlayer.programs._qp_exact import ROUNDING, Exact

__all__ = ["Mask", "SingleProgram"]

Mask = npt.NDArray[np.bool_]

_EPS = float(np.finfo(np.float64).eps)


class SingleProgram:
    """The data of one program (one lane) and what does not change with x."""

    def __init__(self, program: Data) -> None:
        self.data, self.lanes = program, program[1].shape[:-1]
        arrays = [t.reshape(t.shape[t.ndim - rank :]).numpy() for t, rank in zip(program, (2, 1) * 3, strict=True)]
        self.Q, self.p, self.A, self.b, self.G, self.h = arrays
        self.finite = math.isfinite(sum(float(array.sum()) for array in arrays))  # what overflows is not for here
        self.of_b, self.of_h = (np.sqrt(np.einsum("ij,ij->i", rows, rows)) for rows in (self.A, self.G))
        offsets = [np.abs(v[n > 0]) / n[n > 0] for v, n in ((self.b, self.of_b), (self.h, self.of_h))]
        self.Qx, self.Ax, self.Gx = product(self.Q), product(self.A), product(self.G)
        self.Ay, self.Gz = product(self.A.T), product(self.G.T)
        self.offsets = np.concatenate(offsets)
        self.curved, pull = float(np.abs(self.Q).max()), float(np.abs(self.p).max())
        pull = pull / self.curved if self.curved > 0 else 0.0
        self.pull = pull if math.isfinite(pull) else 0.0
        self.noise = ROUNDING * _EPS * (len(self.p) + len(self.h)) ** 0.5

    def wrong(self, x: Array, z: Array, held: Mask) -> Mask:
        """Held borders that pull, and others that are crossed."""
        force, distance = self.sides(x, z)
        wrong: Mask = np.where(held, force, distance) < -self.noise
        return wrong

    def _reach(self, size: float) -> float:
        far = self.offsets[(self.offsets > 1e-10 * size) & (self.offsets < math.inf)]
        farthest = float(far.max()) if len(far) else 0.0
        return min(self.pull, farthest) if farthest > 0 else self.pull

    def _scales(self, x: Array) -> tuple[Array, float, float]:
        """The gradient, the size of its terms, and a length of the program."""
        curved, size = self.Qx(x), _norm(x)
        slope = curved + self.p
        return slope, _norm(slope) + _norm(curved), max(size, NOISE * _EPS * len(x) ** 0.5, self._reach(size))

    def _distance(self, x: Array, length: float) -> Array:
        inside = self.h - self.Gx(x)
        distance: Array = np.where(self.of_h > 0, inside / self.of_h, np.where(inside == 0, 0.0, inside * math.inf))
        return distance / length

    def sides(self, x: Array, z: Array) -> tuple[Array, Array]:
        """Forces relative to the terms of the gradient, signed distances relative to a length of the program."""
        _, scale, length = self._scales(x)
        return z * self.of_h / (scale if scale > 0 else 1.0), self._distance(x, length)

    def off(self, x: Array, y: Array, z: Array, held: Mask) -> Array:
        """The conditions with the held inequalities as equations."""
        slope = self.Qx(x) + self.p + self.Ay(y) + self.Gz(z)
        return np.concatenate([slope, self.Ax(x) - self.b, held * (self.Gx(x) - self.h)])

    def violation(self, x: Array, y: Array, z: Array) -> float:
        """The largest violation of a condition of optimality, relative to the size of its terms."""
        slope, scale, length = self._scales(x)
        scale, z = scale if scale > 0 else 1.0, z.clip(min=0)
        still = _norm(slope + self.Ay(y) + self.Gz(z)) / scale
        equations = np.abs(self.Ax(x) - self.b) / np.where(self.of_b > 0, self.of_b, 1.0) / length
        force, distance = z * self.of_h / scale, self._distance(x, length)
        slack = np.minimum(force, distance.clip(min=0))  # complementarity: one of the two is zero
        worst = float(np.concatenate([[still], equations, (-distance).clip(min=0), slack]).max())
        return worst if worst == worst else math.inf

    def active_set(
        self, found: Exact, eps: float, active_rtol: float, hold_kinks: bool
    ) -> tuple[ActiveConstraints, torch.Tensor]:
        """What :meth:`Conditions.active_set` says of a proved solution, for data with this relative error."""
        solution = found.solution
        x, y, z = (t.reshape(-1).numpy() for t in (solution.x, solution.equality, solution.inequality))
        slope, scale, _ = self._scales(x)
        size = _norm(x)
        zero = max(ABSOLUTE, 16 * eps) * self._reach(size)
        size = max(size, NOISE * eps * len(x) ** 0.5)
        tolerance = max(active_rtol * size, zero)
        with np.errstate(all="ignore"):
            distance = self._distance(x, 1.0)
            off = np.concatenate([np.abs(self.Ax(x) - self.b) / self.of_b, (-distance).clip(min=0)])
        off[: len(y)][self.of_b == 0] = np.where(self.b[self.of_b == 0] == 0, 0.0, math.inf)
        near = distance <= tolerance
        active = near & (z * self.of_h > active_rtol * scale)
        kinks = near & ~active
        kept = np.where(active, z, 0.0)
        left = _norm(slope + self.Ay(y) + self.Gz(kept)) / scale if scale > 0 else 0.0
        violation = float(off.max()) if len(off) else 0.0
        held = active | kinks if hold_kinks else active
        numbers = {
            "num_active": int(np.count_nonzero(active)),
            "num_kinks": int(np.count_nonzero(kinks)),
            "tolerance": tolerance,
            "violation": violation,
            "relative_violation": 0.0 if violation <= zero else violation / size,
            "stationarity": left,
            "independent": self._independent(held),
        }
        vectors = {"active": active, "kinks": kinks, "inequality": kept}
        tensors = {name: self.lane(vector) for name, vector in vectors.items()}
        for name, value in numbers.items():
            dtype = torch.float64 if isinstance(value, float) else None
            tensors[name] = torch.full(self.lanes, value, dtype=dtype)
        return ActiveConstraints(kinks_known=True, equality=solution.equality, **tensors), self.lane(held)

    def lane(self, vector: npt.NDArray[Any]) -> torch.Tensor:
        """As a tensor [*lanes, length]."""
        return torch.from_numpy(vector).reshape((*self.lanes, -1))

    def _independent(self, held: Mask) -> bool:
        """Whether the rows of what holds are independent."""
        lengths = np.concatenate([self.of_b, self.of_h[held]])
        if not len(lengths):
            return True
        if not lengths.all():
            return False
        rows = torch.from_numpy(np.concatenate([self.A, self.G[held]]) / lengths[:, None])
        gram = rows @ rows.mT
        gram.diagonal().sub_(DEPENDENT)
        return not torch.linalg.cholesky_ex(gram).info.item()


def _norm(vector: Array) -> float:
    return float(np.linalg.norm(vector)) if len(vector) else 0.0
