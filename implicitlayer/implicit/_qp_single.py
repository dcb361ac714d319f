"""The exact solution of one quadratic program on the CPU: the first rounds of ``_qp_exact`` with NumPy's vectors."""

# Formulas and rules are those of ``_qp_exact`` (NOTE [active set]) and of ``Conditions`` (NOTE [scales]); what is left
# of them for one program costs a tenth of the time. Only what is proved is handed out: where a few rounds do not find
# an active set for which all conditions of optimality hold to TIGHT, the answer is None and the long way is taken.

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch

from implicitlayer._interior_point import Data, QuadraticSolution
from implicitlayer._interior_point_single import Array, product
from implicitlayer.implicit._kkt_active import NOISE
from implicitlayer.implicit._qp_exact import CORRECTIONS, ROUNDING, TIGHT, Exact, factorised

__all__ = ["exact_single"]

_ROUNDS = 4  # active sets that are tried
_EPS = float(np.finfo(np.float64).eps)


def exact_single(program: Data, answer: QuadraticSolution) -> Exact | None:
    """The proved solution next to the answer, for data with one lane on the CPU; None where it was not found."""
    lanes = answer.x.shape[:-1]
    terms = _Terms(program)
    x0, y0, z0 = (t.reshape(-1).numpy() for t in (answer.x, answer.equality, answer.inequality))
    with np.errstate(all="ignore"):
        force, distance = terms.sides(x0, z0)
        held = force > distance
        noise = ROUNDING * _EPS * (len(terms.p) + len(terms.h)) ** 0.5
        for _ in range(_ROUNDS):
            mask = torch.from_numpy(held).reshape((*lanes, -1))
            factors = factorised(program, mask)
            x, y, z = x0, y0, z0 * held
            for _ in range(CORRECTIONS):
                off = torch.from_numpy(terms.off(x, y, z, held)).reshape((*lanes, -1, 1))
                step = factors.solve(off).reshape(-1).numpy()
                x, y, z = x - step[: len(x)], y - step[len(x) : len(x) + len(y)], z - step[len(x) + len(y) :]
            force, distance = terms.sides(x, z)
            wrong = np.where(held, force, distance) < -noise
            if not wrong.any():
                break
            held = held ^ wrong
        else:
            return None
        z = z * held
        error = terms.violation(x, y, z)
    if not error <= TIGHT:
        return None
    parts = (torch.from_numpy(part).reshape((*lanes, -1)) for part in (x, y, z))
    solution = replace(answer, **dict(zip(("x", "equality", "inequality"), parts, strict=True)))
    return Exact(solution, torch.full(lanes, error, dtype=torch.float64), mask, factors)


class _Terms:
    """The data of one program and what does not change with x."""

    def __init__(self, program: Data) -> None:
        arrays = [t.reshape(t.shape[t.ndim - rank :]).numpy() for t, rank in zip(program, (2, 1) * 3, strict=True)]
        self.Q, self.p, self.A, self.b, self.G, self.h = arrays
        self.of_b, self.of_h = (np.sqrt(np.einsum("ij,ij->i", rows, rows)) for rows in (self.A, self.G))
        offsets = [np.abs(v[n > 0]) / n[n > 0] for v, n in ((self.b, self.of_b), (self.h, self.of_h))]
        self.Qx, self.Ax, self.Gx = product(self.Q), product(self.A), product(self.G)
        self.Ay, self.Gz = product(self.A.T), product(self.G.T)
        self.offsets = np.concatenate(offsets)
        curved, pull = float(np.abs(self.Q).max()), float(np.abs(self.p).max())
        pull = pull / curved if curved > 0 else 0.0
        self.pull = pull if math.isfinite(pull) else 0.0

    def _scales(self, x: Array) -> tuple[Array, float, float]:
        """The gradient, the size of its terms, and a length of the program."""
        curved = self.Qx(x)
        slope, size = curved + self.p, _norm(x)
        far = self.offsets[(self.offsets > 1e-10 * size) & (self.offsets < math.inf)]
        farthest = float(far.max()) if len(far) else 0.0
        reach = min(self.pull, farthest) if farthest > 0 else self.pull
        return slope, _norm(slope) + _norm(curved), max(size, NOISE * _EPS * len(x) ** 0.5, reach)

    def _distance(self, x: Array, length: float) -> Array:
        inside = self.h - self.Gx(x)
        distance: Array = np.where(self.of_h > 0, inside / self.of_h, np.where(inside == 0, 0.0, inside * math.inf))
        return distance / length

    def sides(self, x: Array, z: Array) -> tuple[Array, Array]:
        """Forces relative to the terms of the gradient, signed distances relative to a length of the program."""
        _, scale, length = self._scales(x)
        return z * self.of_h / (scale if scale > 0 else 1.0), self._distance(x, length)

    def off(self, x: Array, y: Array, z: Array, held: npt.NDArray[np.bool_]) -> Array:
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


def _norm(vector: Array) -> float:
    return float(np.linalg.norm(vector)) if len(vector) else 0.0
