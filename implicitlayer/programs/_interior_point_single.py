"""The interior-point method on one program on the CPU: the steps of ``_interior_point`` with NumPy's vectors."""

# An operation on a small tensor costs about a microsecond of dispatch, one on a NumPy array a third, a Python number
# next to nothing. One small program is all dispatch, so it has this loop of its own; legend and formulas, and what the
# constants mean, are those of ``_interior_point`` and ``_interior_point_step``. Factorisations and all that is large
# stay with torch: NumPy's BLAS has threads of its own, which know nothing of ``torch.set_num_threads``.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from implicitlayer.programs._interior_point_step import (
    FARTHEST,
    INDEPENDENT,
    PATIENCE,
    SHIFT,
    TO_BOUNDARY,
    Data,
    Newton,
)

Array = npt.NDArray[np.float64]
Product = Callable[[Array], Array]
# f and r_y -> dx and dy with M dx + A'dy = f, A dx = -r_y: M is Newton's matrix for some weights z / s, factorised
Step = Callable[[Array, Array], tuple[Array, Array]]

_FEW = 4096  # entries of a matrix up to which NumPy's products are cheaper than calls of torch, and use one thread
_SMALL = 64  # unknowns up to which the inverse of a factor is cheaper than calls of triangular solves


@dataclass(frozen=True, eq=False)
class Outcome:
    """The best point that was met, its distance from the conditions of optimality, and a name of a ProgramStatus."""

    x: Array
    y: Array
    z: Array
    error: float
    steps: int
    ended: str


def iterate_single(data: Data, until: Until) -> Outcome:
    """Solve the only lane of ``data`` (finite, normalised, every tensor [1, ...] in float64 on the CPU)."""
    Q, p, A, b, G, h = arrays = tuple(np.ascontiguousarray(t.detach()[0].numpy()) for t in data)
    maps = Maps(*(product(matrix) for matrix in (Q, A, A.T, G, G.T)))
    return iterate((p, b, h), maps, partial(_Step, data, arrays), until)


@dataclass(frozen=True, eq=False)
class Until:
    """When to stop, and who is told.

    ``bounded`` tells whether the objective has a smallest value; it is asked only where a certificate says otherwise.
    ``report`` is given the steps made, x and its error in every pass.
    """

    rtol: float
    max_steps: int
    bounded: Callable[[], bool]
    report: Callable[[int, Array, float], None] | None = None


def iterate(vectors: tuple[Array, Array, Array], maps: Maps, step: Callable[[Array], Step], until: Until) -> Outcome:
    """The same with p, b, h, products with the matrices, and ``step(weights)``, which factorises Newton's matrix."""
    p, b, h = vectors
    with np.errstate(all="ignore"):
        x, y = step(np.ones_like(h))(-p + maps.Gt(h), -b)
        slack = h - maps.G(x)
        s, z = _inside(slack), _inside(-slack)
        best, best_error, since, steps = (x, y, z), math.inf, 0, 0
        solved = infeasible = unbounded = False
        of_x, of_s = np.empty((4, len(p))), np.empty((2, len(h)))  # the terms of r_x and r_s, by rows
        of_x[3], of_s[1] = p, h
        largest_b = _largest(b)
        while True:
            of_x[0], of_x[1], of_x[2], of_s[0] = maps.Q(x), maps.At(y), maps.Gt(z), maps.G(x)
            Ax = maps.A(x)
            r_x, r_y, r_s = np.add.reduce(of_x), Ax - b, of_s[0] + s - h
            px, by, hz = float(p.dot(x)), float(b.dot(y)), float(h.dot(z))
            value = max(abs(float(x.dot(of_x[0]))), abs(px), abs(by), abs(hz))
            error = max(
                _largest(r_x) / (_largest(of_x) + 1e-3),
                _largest(r_y) / (max(_largest(Ax), largest_b) + 1e-3),
                _largest(r_s) / (_largest(of_s) + 1e-3),
                float(s.dot(z)) / (value + 1e-3),
            )
            error = error if error == error else math.inf
            if until.report is not None:
                until.report(steps, x, error)
            since += 1
            if error < best_error:
                best, best_error, since = (x, y, z), error, 0
            # NOTE [certificates], each looked at where its leading term has the sign that it needs
            if -(by + hz) > 0:
                infeasible = -(by + hz) > FARTHEST * norm(of_x[1] + of_x[2]) and -(by + hz) > 1e-8 * (
                    float(np.abs(b * y).sum()) + float(np.abs(h * z).sum())
                )
            if -px > 0:
                against = max(_largest(of_x[0]), _largest(Ax), _largest(of_s[0].clip(min=0)))
                unbounded = -px > FARTHEST * against and -px > 1e-8 * float(np.abs(p * x).sum()) and not until.bounded()
            solved = error <= until.rtol
            if solved or infeasible or unbounded or since >= PATIENCE or steps == until.max_steps:
                break
            x, y, z, s = _moved(step(z / s), maps, (x, y, z, s), (r_x, r_y, r_s))
            steps += 1
    proved = "INFEASIBLE" if infeasible else "UNBOUNDED" if unbounded else "MAX_STEPS_REACHED"
    return Outcome(*best, best_error, steps, "SOLVED" if solved else proved)


@dataclass(frozen=True, eq=False)
class Maps:
    """Products with Q, A, A', G, G'."""

    Q: Product
    A: Product
    At: Product
    G: Product
    Gt: Product


def product(matrix: Array) -> Product:
    """``v -> matrix v``, by NumPy for a small matrix and by torch for a large one."""
    if matrix.size <= _FEW:
        return matrix.dot
    tensor = torch.from_numpy(matrix)
    return lambda vector: tensor.mv(torch.from_numpy(vector)).numpy()


def _moved(
    step: Step, maps: Maps, point: tuple[Array, Array, Array, Array], left: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Array]:
    """The next point: Mehrotra's two solves with the same factors."""
    (x, y, z, s), (r_x, r_y, r_s) = point, left
    w, product, m = z / s, s * z, len(s)

    def newton(r_c: Array) -> tuple[Array, Array, Array, Array]:
        shifted = (z * r_s - r_c) / s
        dx, dy = step(-r_x - maps.Gt(shifted), r_y)
        Gdx = maps.G(dx)
        return dx, dy, w * Gdx + shifted, -r_s - Gdx

    def length(dz: Array, ds: Array, part: float) -> float:
        # 1 / (largest -change / value) is the way to the boundary
        steepest = -min(np.minimum.reduce(ds / s), np.minimum.reduce(dz / z)) if m else 0.0
        return min(1.0, part / steepest) if steepest > 0 else 1.0

    _, _, dz, ds = newton(product)
    a = length(dz, ds, 1.0)
    mean = float(product.sum()) / max(m, 1)
    sigma = (float((s + a * ds).dot(z + a * dz)) / max(m, 1) / (mean if mean > 0 else 1.0)) ** 3
    target = product + (a * a) * (ds * dz) - min(max(sigma, 0.0), 1.0) * mean
    dx, dy, dz, ds = newton(target)
    a = length(dz, ds, TO_BOUNDARY)
    return x + a * dx, y + a * dy, z + a * dz, s + a * ds


class _Step:
    """The factors of one step's matrix; where Cholesky is not accurate, those of :class:`Newton`."""

    def __init__(self, data: Data, arrays: tuple[Array, ...], weights: Array) -> None:
        Q, _, A, _, G, _ = arrays
        self.e = len(A)
        matrix = torch.mm(torch.from_numpy(G.T), torch.from_numpy(weights[:, None] * G)).numpy()
        matrix += Q
        matrix.flat[:: len(Q) + 1] += SHIFT
        self.other: Newton | None = None
        factor, info = torch.linalg.cholesky_ex(torch.from_numpy(matrix))
        good = not info.item()
        if good:
            self.down, self.up = triangular_solves(factor)
        if good and self.e:
            half = torch.linalg.solve_triangular(factor, torch.from_numpy(A).mT, upper=False)
            schur, info = torch.linalg.cholesky_ex(half.mT @ half)
            pivots = schur.numpy().diagonal()
            good = not info.item() and bool(pivots.min() > INDEPENDENT * pivots.max())
            self.half, self.half_t = product(half.numpy()), product(half.numpy().T)
            self.schur_down, self.schur_up = triangular_solves(schur)
        if not good:
            self.other = Newton(data, torch.from_numpy(weights)[None])

    def __call__(self, f: Array, r_y: Array) -> tuple[Array, Array]:
        if self.other is not None:
            both = self.other.solve_reduced(torch.from_numpy(f)[None], torch.from_numpy(r_y)[None])
            return both[0][0].numpy(), both[1][0].numpy()
        u = self.down(f)
        if not self.e:
            return self.up(u), r_y
        dy = self.schur_up(self.schur_down(self.half_t(u) + r_y))
        return self.up(u - self.half(dy)), dy


def triangular_solves(factor: torch.Tensor) -> tuple[Product, Product]:
    """Solves with L and with L': by its inverse where that is small, for four of them follow."""
    n = factor.shape[-1]
    if n <= _SMALL:
        inverse = torch.linalg.solve_triangular(factor, torch.eye(n, dtype=factor.dtype), upper=False).numpy()
        return inverse.dot, inverse.T.dot

    def solve(matrix: torch.Tensor, upper: bool, rhs: Array) -> Array:
        solved: Array = torch.linalg.solve_triangular(matrix, torch.from_numpy(rhs)[:, None], upper=upper).numpy()
        return solved[:, 0]

    return partial(solve, factor, False), partial(solve, factor.mT, True)


def _inside(values: Array) -> Array:
    """The vector moved by one number until all entries are positive, if they are not."""
    lowest = float(values.min()) if len(values) else 1.0
    return values if lowest > 1e-3 else values - lowest + 1.0


def _largest(values: Array) -> float:
    return float(np.maximum.reduce(np.abs(values), axis=None)) if values.size else 0.0


def norm(values: Array) -> float:
    return math.sqrt(float(values.dot(values)))
