"""A primal-dual interior-point method for dense convex quadratic programs, many at a time."""

# Legend: n unknowns, e equations, m inequalities, B lanes (independent programs).
#     minimise 1/2 x'Qx + p'x   subject to   A x = b,   G x + s = h,   s >= 0;   multipliers y of the equations, z >= 0.
# Conditions of optimality, as residuals:
#     r_x = Q x + p + A'y + G'z,   r_y = A x - b,   r_s = G x + s - h,   s_i z_i = 0.
# Newton's step for s_i z_i = t_i instead of zero, with r_c = s z - t and W = diag(z / s):
#     ds = -r_s - G dx,     dz = W G dx + (z r_s - r_c) / s,
#     [Q + G'W G   A'] [dx]   [-r_x - G'((z r_s - r_c) / s)]
#     [A           0 ] [dy] = [-r_y                        ]
# Mehrotra: a step for t = 0 tells how much of the mean mu = s'z / m can be removed, sigma = (mu_affine / mu)^3; the
# second step, with the same factors, aims at t = sigma mu - a^2 ds dz of the first, where a is the length that the
# first could have. (With ds dz itself, as in the paper, about one random program in a hundred runs in a cycle of short
# steps.)
#
# NOTE [certificates]: let v = A'y + G'z and t = -(b'y + h'z) > 0 with z >= 0. For every feasible x and its s = h - Gx,
# b'y + h'z = x'v + s'z >= -||x|| ||v||, so ||x|| >= t / ||v||: no feasible point is smaller. Likewise let
# d be a direction with p'd < 0. With any optimal (x, y, z), -p'd = d'Qx + y'Ad + z'Gd
# <= ||Qd|| ||x|| + ||y|| ||Ad|| + ||z||_1 max(Gd)+: a solution would have to be as large as the ratio of the two sides.
# How large a solution can be is a guess from the data, though. So a lane whose Q is positive definite is never called
# unbounded, and a lane that is not solved is tried again with the other guess: |b| and |h| first, then |p| / |Q| too.
# A border that is meant as none (1e10) is no guess: the near ones are, first, and the far ones are moved in for it. If
# x then comes near them, or there is no solution, the program is solved as it was given.

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from implicitlayer.base._failures import over_lanes
from implicitlayer.base._tree import positive
from implicitlayer.programs._interior_point_single import Until, iterate_single
from implicitlayer.programs._interior_point_step import (
    FARTHEST,
    PATIENCE,
    TO_BOUNDARY,
    Data,
    Newton,
    Point,
    flat_lanes,
    of_each,
    times,
)

_FAR = 1e4  # FARTHEST for a lane that has found no solution either
_FAR_AWAY = 1e6  # a border that is this many times as far as the nearest one tells nothing of the size of x
_MOVED = 1e3  # where such a border is put, in units of the others; x has to stay well inside
_NEARLY = 1e-6  # a lane that ends below this error has a solution: rounding stopped it, or the step limit


class ProgramStatus(enum.IntEnum):
    """How a quadratic program ended; ``help`` says what to do about it."""

    SOLVED = 0
    MAX_STEPS_REACHED = 1
    INFEASIBLE = 2
    UNBOUNDED = 3
    NONFINITE = 4

    @property
    def help(self) -> str:
        """One or two sentences: what happened and what to do."""
        return _HELP[self]


_HELP = {
    ProgramStatus.SOLVED: "The optimality conditions hold to the tolerance.",
    ProgramStatus.MAX_STEPS_REACHED: (
        "The optimality conditions do not hold to the tolerance. Scale the data (entries of very different size), "
        "remove redundant constraints, raise max_steps, or pass another solver."
    ),
    ProgramStatus.INFEASIBLE: (
        "No x satisfies all constraints. Loosen h, check signs (G x <= h) and that A x = b can hold."
    ),
    ProgramStatus.UNBOUNDED: (
        "The objective falls without end inside the constraints. Bound x, or make Q positive definite."
    ),
    ProgramStatus.NONFINITE: (
        "The data hold NaN or Inf. Leave a constraint out in place of giving it an infinite bound."
    ),
}


@dataclass(frozen=True, eq=False)
class QuadraticSolution:
    """Solutions of quadratic programs and how each lane ended.

    Attributes:
        x: [*lanes, n].
        equality: y, [*lanes, e], multipliers of ``A x = b``.
        inequality: z >= 0, [*lanes, m], multipliers of ``G x <= h``.
        codes: int [*lanes], a :class:`ProgramStatus` per lane.
        steps: int [*lanes], factorisations used.
        error: [*lanes], largest violation of an optimality condition, relative to the size of its terms.
    """

    x: torch.Tensor
    equality: torch.Tensor
    inequality: torch.Tensor
    codes: torch.Tensor
    steps: torch.Tensor
    error: torch.Tensor

    def lanes(self, mask: torch.Tensor) -> QuadraticSolution:
        """Copies of the lanes of a bool mask [*lanes], in a row."""
        return QuadraticSolution(*(getattr(self, name)[mask] for name in self.__dataclass_fields__))

    def filled(self, mask: torch.Tensor, other: QuadraticSolution) -> QuadraticSolution:
        """The same with ``other`` in the lanes of the mask."""
        filled = {name: getattr(self, name).clone() for name in self.__dataclass_fields__}
        for name, values in filled.items():
            values[mask] = getattr(other, name)
        return QuadraticSolution(**filled)

    def reshaped(self, num_dims: int, lanes: tuple[int, ...]) -> QuadraticSolution:
        """The same lanes in other dimensions than the ``num_dims`` that they have."""
        parts = (getattr(self, name) for name in self.__dataclass_fields__)
        return QuadraticSolution(*(t.reshape((*lanes, *t.shape[num_dims:])) for t in parts))


# (step, x [*lanes, n], largest violation of a condition of optimality [*lanes]), once per pass of the first attempt
Report = Callable[[int, torch.Tensor, torch.Tensor], None]


def interior_point(
    data: Data, rtol: float = 1e-9, max_steps: int = 60, report: Report | None = None
) -> QuadraticSolution:
    """Solve every lane of ``data``: Q [*lanes, n, n], p [*lanes, n], A [*lanes, e, n], b, G [*lanes, m, n], h; float64.

    A lane is frozen when all conditions hold to ``rtol`` of the size of their terms, when a certificate shows that it
    has no solution, or when rounding stops its progress; the others go on.
    """
    lanes = data[1].shape[:-1]
    flat = flat_lanes(data)
    finite = torch.stack([t.isfinite().flatten(1).all(-1) for t in flat]).all(0)
    if not bool(finite.all()):
        flat = of_each(lambda t: torch.where(over_lanes(finite, t), t, 0.0), flat)
    by_borders, by_objective, near = _sizes(flat)
    far = by_borders > _FAR_AWAY * near
    first, second = torch.where(far, near, by_borders), torch.where(far, by_borders, by_objective)
    tell = None
    if report is not None:

        def tell(step: int, x: torch.Tensor, error: torch.Tensor) -> None:
            report(step, (x * first[:, None]).reshape((*lanes, -1)), error.reshape(lanes))

    found = _solve(flat, first, rtol, max_steps, tell)
    failed = (found.codes == int(ProgramStatus.UNBOUNDED)) | (
        (found.codes == int(ProgramStatus.MAX_STEPS_REACHED)) & (found.error > _NEARLY)
    )
    moved = far & ((found.codes != int(ProgramStatus.SOLVED)) | (_largest(found.x) > 0.1 * _MOVED * first))
    again = (moved | (failed & (second > first))).nonzero()[:, 0]
    if len(again):
        other = _solve(of_each(lambda t: t[again], flat), second[again], rtol, max_steps)
        solved = moved[again] | (other.codes == int(ProgramStatus.SOLVED)) | (other.error <= _NEARLY)
        for name in QuadraticSolution.__dataclass_fields__:
            getattr(found, name)[again[solved]] = getattr(other, name)[solved]
    codes = torch.where(finite, found.codes, int(ProgramStatus.NONFINITE))
    return replace(found, codes=codes).reshaped(1, lanes)


def _solve(
    data: Data, size: torch.Tensor, rtol: float, max_steps: int, report: Report | None = None
) -> QuadraticSolution:
    """Solve lanes [B] of finite data, whose solutions are taken to be of this size; x in this unit is reported.

    x = size x~, rows divided by their norms, the objective by its cost: no scale of the data matters. Borders that are
    farther away than _MOVED such units are moved there.
    """
    Q, p, A, b, G, h = data
    Q = (Q + Q.mT) / 2
    equality, inequality = (positive(torch.linalg.vector_norm(t, dim=-1)) for t in (A, G))
    A, b, G, h = A / equality[..., None], b / equality, G / inequality[..., None], h / inequality
    Q, p = Q * (size**2)[:, None, None], p * size[:, None]
    cost = positive(torch.maximum(_largest(Q), _largest(p)))
    program = Q / cost[:, None, None], p / cost[:, None], A, b / size[:, None], G, (h / size[:, None]).clamp(max=_MOVED)
    found = _iterate(program, rtol, max_steps, report)
    codes = found.codes.clone()
    lost = (codes == int(ProgramStatus.MAX_STEPS_REACHED)) & (found.error > _NEARLY)
    if bool(lost.any()):
        codes[lost] = _why(of_each(lambda t: t[lost], program), rtol, max_steps)
    unit, force = size[:, None], cost[:, None]
    y, z = found.equality * force / (unit * equality), found.inequality * force / (unit * inequality)
    return QuadraticSolution(found.x * unit, y, z, codes, found.steps.clone(), found.error.clone())


def _sizes(data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Guesses of the size of x, [B]: from the distances of the borders, from the objective too, of near borders alone.

    A side that is to mean none, such as 1e10, tells nothing of x.
    """
    Q, p, A, b, G, h = data
    norms = [torch.linalg.vector_norm(t, dim=-1) for t in (A, G)]
    right = torch.cat([t.abs() / positive(r) for t, r in zip((b, h), norms, strict=True)], -1)
    borders, largest_q, largest_p = _largest(right), _largest(Q), _largest(p)
    objective = torch.where((largest_q > 0) & (largest_p > 0), largest_p / largest_q, 0.0)
    objective = torch.where(objective.isfinite(), objective, 0.0)
    both = positive(torch.maximum(borders, objective))
    borders = torch.where(borders > 0, borders, both)
    if not right.shape[-1]:
        return borders, both, both
    nearest = torch.where(right > 0, right, torch.inf).amin(-1, keepdim=True)
    near = torch.maximum(torch.where(right <= _FAR_AWAY * nearest, right, 0.0).amax(-1), objective)
    return borders, both, torch.where(near > 0, near, both)


def _largest(tensor: torch.Tensor) -> torch.Tensor:
    """Largest magnitude per lane, [B]; zero where there are no entries."""
    flat = tensor.flatten(1)
    return flat.abs().amax(-1) if flat.shape[-1] else flat.new_zeros(flat.shape[0])


def _iterate(data: Data, rtol: float, max_steps: int, report: Report | None = None) -> QuadraticSolution:
    if data[1].shape[0] != 1 or data[1].device.type != "cpu":
        return _iterate_lanes(data, rtol, max_steps, report)
    tell = None
    if report is not None:
        tell = lambda step, x, error: report(step, torch.from_numpy(x)[None], data[1].new_tensor([error]))  # noqa: E731
    found = iterate_single(data, Until(rtol, max_steps, lambda: bool(_definite(data[0]).all()), tell))
    x, y, z = (torch.from_numpy(part)[None] for part in (found.x, found.y, found.z))
    code, steps = (torch.tensor([int(number)]) for number in (ProgramStatus[found.ended], found.steps))
    return QuadraticSolution(x, y, z, code, steps, x.new_tensor([found.error]))


def _iterate_lanes(data: Data, rtol: float, max_steps: int, report: Report | None = None) -> QuadraticSolution:
    Q, p, _, b, _, h = data
    lanes, m = p.shape[0], h.shape[-1]
    bounded = _definite(Q)
    ones = torch.ones_like(h)
    start = Newton(data, ones).solve((p, -b, -h), torch.zeros_like(h), ones, ones)
    # The start minimises 1/2 x'Qx + p'x + 1/2 ||s||^2 under the equations; its s = -z is then moved inside.
    slack = -start.z
    point = Point(start.x, start.y, _inside(-slack), _inside(slack))
    best, best_error = point, torch.full_like(p[:, 0], torch.inf)
    codes = torch.full((lanes,), int(ProgramStatus.MAX_STEPS_REACHED), device=p.device)
    steps, since = torch.zeros_like(codes), torch.zeros_like(codes)
    running = torch.ones_like(codes, dtype=torch.bool)
    for step in range(max_steps + 1):
        known = _products(data, point)
        *left, error = _residuals(data, point, known)
        if report is not None:
            report(step, point.x, error)
        better = running & (error < best_error)
        best, best_error = point.where(better, best), torch.where(better, error, best_error)
        since = torch.where(better, 0, since + 1)
        infeasible, unbounded = _certificates(data, point, known)
        unbounded = unbounded & ~bounded
        codes = torch.where(running & unbounded, int(ProgramStatus.UNBOUNDED), codes)
        codes = torch.where(running & infeasible, int(ProgramStatus.INFEASIBLE), codes)
        codes = torch.where(running & (error <= rtol), int(ProgramStatus.SOLVED), codes)
        running = running & (error > rtol) & ~infeasible & ~unbounded & (since < PATIENCE)
        if step == max_steps or not bool(running.any()):
            break
        newton = Newton(data, point.z / point.s)
        product = point.s * point.z
        first = newton.solve(left, product, point.z, point.s)
        mean = product.sum(-1) / max(m, 1)
        length = _length(point, first, 1.0)
        moved = point.moved(first, length)
        sigma = ((moved.s * moved.z).sum(-1) / max(m, 1) / positive(mean)) ** 3
        target = product + (length**2)[:, None] * first.s * first.z - (sigma.clamp(0, 1) * mean)[:, None]
        second = newton.solve(left, target, point.z, point.s)
        point = point.moved(second, _length(point, second, TO_BOUNDARY)).where(running, point)
        steps = torch.where(running, steps + 1, steps)
    return QuadraticSolution(best.x, best.y, best.z, codes, steps, best_error)


def _definite(Q: torch.Tensor) -> torch.Tensor:
    """Lanes whose Q is positive definite beyond rounding: their objective has a smallest value."""
    noise = 1e2 * Q.shape[-1] * torch.finfo(Q.dtype).eps * _largest(Q)
    _, info = torch.linalg.cholesky_ex(Q - torch.diag_embed(noise[:, None].expand(Q.shape[:-1])))
    definite: torch.Tensor = (info == 0) & (noise > 0)
    return definite


def _inside(values: torch.Tensor) -> torch.Tensor:
    """The vector moved by one number per lane until all entries are positive, if they are not."""
    if not values.shape[-1]:
        return values
    lowest = values.amin(-1, keepdim=True)
    return torch.where(lowest > 1e-3, values, values - lowest + 1.0)


def _length(point: Point, step: Point, part: float) -> torch.Tensor:
    """Largest step of at most 1 that goes ``part`` of the way to the boundary of s, z >= 0."""
    values, changes = torch.cat([point.s, point.z], -1), torch.cat([step.s, step.z], -1)
    if not values.shape[-1]:
        return point.x.new_ones(point.x.shape[0])
    ratio = torch.where(changes < 0, -values / torch.where(changes < 0, changes, -1.0), torch.inf)
    return (part * ratio.amin(-1)).clamp(max=1.0)


def _products(data: Data, at: Point) -> tuple[torch.Tensor, ...]:
    """What residuals and certificates share: Q x, A'y, G'z, A x, G x."""
    Q, _, A, _, G, _ = data
    return times(Q, at.x), times(A.mT, at.y), times(G.mT, at.z), times(A, at.x), times(G, at.x)


def _residuals(data: Data, at: Point, known: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """r_x, r_y, r_s, and the largest violation relative to the size of the terms."""
    (_, p, _, b, _, h), (Qx, Ay, Gz, Ax, Gx) = data, known
    r_x, r_y, r_s = Qx + p + Ay + Gz, Ax - b, Gx + at.s - h
    gap = (at.s * at.z).sum(-1)
    value = torch.stack([(at.x * Qx).sum(-1), (p * at.x).sum(-1), (b * at.y).sum(-1), (h * at.z).sum(-1)]).abs().amax(0)

    def relative(residual: torch.Tensor, *terms: torch.Tensor) -> torch.Tensor:
        return residual / (torch.stack([_largest(t) for t in terms]).amax(0) + 1e-3)

    errors = [
        relative(_largest(r_x), Qx, p, Ay, Gz),
        relative(_largest(r_y), Ax, b),
        relative(_largest(r_s), Gx, h),
        gap / (value + 1e-3),
    ]
    return r_x, r_y, r_s, torch.stack(errors).amax(0).nan_to_num(torch.inf)


def _certificates(
    data: Data, at: Point, known: tuple[torch.Tensor, ...], farthest: float = FARTHEST
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lanes that are infeasible, lanes that are unbounded; see NOTE [certificates]."""
    (_, p, _, b, _, h), (Qx, Ay, Gz, Ax, Gx) = data, known
    by, hz = b * at.y, h * at.z
    t = -(by.sum(-1) + hz.sum(-1))
    sure = t > 1e-8 * (by.abs().sum(-1) + hz.abs().sum(-1))
    v = torch.linalg.vector_norm(Ay + Gz, dim=-1)
    infeasible = (t > farthest * v) & sure
    slope = -(p * at.x).sum(-1)
    against = torch.stack([_largest(Qx), _largest(Ax), _largest(Gx.clamp(min=0))])
    steep = slope > 1e-8 * (p * at.x).abs().sum(-1)
    unbounded = (slope > farthest * against.amax(0)) & steep
    return infeasible, unbounded


def _why(data: Data, rtol: float, max_steps: int) -> torch.Tensor:
    """Codes of lanes that did not come near a solution: two programs that have one tell if there is a certificate.

    The smallest violation, min v + tiny ||x||^2 / 2 under A x - b in [-v, v], G x - h <= v, v >= 0, has multipliers
    that prove that no x is feasible, if none is. The steepest direction, min p'd under Q d = 0, A d = 0, G d <= 0 and
    -1 <= d <= 1, shows whether the objective falls for ever.
    """
    Q, p, A, b, G, h = data
    lanes, n, e, m = p.shape[0], p.shape[-1], b.shape[-1], h.shape[-1]
    column, zero, one = p.new_ones(lanes, 1), p.new_zeros(lanes, n), torch.eye(n, dtype=p.dtype, device=p.device)
    rows = torch.cat([A, -A, G, p.new_zeros(lanes, 1, n)], -2)
    relaxed: Data = (
        torch.diag_embed(torch.cat([zero + 1e-10, 0 * column], -1)),
        torch.cat([zero, column], -1),
        p.new_zeros(lanes, 0, n + 1),
        p.new_zeros(lanes, 0),
        torch.cat([rows, -p.new_ones(lanes, 2 * e + m + 1, 1)], -1),
        torch.cat([b, -b, h, 0 * column], -1),
    )
    z = _iterate(relaxed, rtol, max_steps).inequality
    proof = Point(zero, z[:, :e] - z[:, e : 2 * e], z[:, 2 * e : 2 * e + m], torch.zeros_like(h))
    infeasible, _ = _certificates(data, proof, _products(data, proof), _FAR)
    box = one.expand(lanes, n, n)
    falling: Data = (
        torch.zeros_like(Q),
        p,
        torch.cat([Q, A], -2),
        p.new_zeros(lanes, n + e),
        torch.cat([G, box, -box], -2),
        torch.cat([torch.zeros_like(h), p.new_ones(lanes, 2 * n)], -1),
    )
    direction = _iterate(falling, rtol, max_steps).x
    ray = Point(direction, torch.zeros_like(b), torch.zeros_like(h), torch.zeros_like(h))
    _, unbounded = _certificates(data, ray, _products(data, ray), _FAR)
    unbounded = unbounded & ~_definite(Q)
    codes = torch.where(unbounded, int(ProgramStatus.UNBOUNDED), int(ProgramStatus.MAX_STEPS_REACHED))
    return torch.where(infeasible, int(ProgramStatus.INFEASIBLE), codes)
