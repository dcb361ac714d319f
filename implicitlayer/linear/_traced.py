"""Linear solvers in code that a compiler can follow: no host reads a number, and doubtful lanes are only marked."""

# A compiled layer solves again, by the solvers of this package, whatever is marked here. So nothing is repaired: a lane
# is sure where every check of the other solver would pass at once.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from implicitlayer import _torch
from implicitlayer.linear._common import BLOWN_UP, NOISE, SLACK, SUSPICIOUS_RESIDUAL, Limits, lane_norm
from implicitlayer.linear._operator import lane_dot, lane_scale

# With the default tolerance: NOTE [a small residual is no small error] of _cg.py.
AIM = 0.1
FURTHER = 1e-4


@dataclass(frozen=True, eq=False)
class TracedSystem:
    """A symmetric system A u = b.

    Attributes:
        product: ``v -> A v``, both [*lanes, n].
        rhs: b, [*lanes, n].
        inverse_metric: of a :class:`FlatOperator`; None is the identity.
        gradient: F, [*lanes, n], of which ``||A^-1 F||`` is asked for.
    """

    product: Callable[[torch.Tensor], torch.Tensor]
    rhs: torch.Tensor
    inverse_metric: torch.Tensor | None
    gradient: torch.Tensor


@dataclass(frozen=True, eq=False)
class TracedSolution:
    """u [*lanes, n], where it is sure, bool [*lanes], and an estimate of ``||A^-1 F||`` from above, [*lanes]."""

    value: torch.Tensor
    sure: torch.Tensor
    reach: torch.Tensor


def _norm(vector: torch.Tensor) -> torch.Tensor:
    """The norm of a vector of moderate entries."""
    return lane_dot(vector, vector).sqrt()


def conjugate_gradient(system: TracedSystem, limits: Limits) -> TracedSolution:
    """The recurrence of :class:`ConjugateGradient`, all lanes at once."""
    scale = lane_scale(system.rhs)
    b = system.rhs / scale
    norm, eps = _norm(b), torch.finfo(b.dtype).eps
    inverse = system.inverse_metric
    precondition = (lambda r: r) if inverse is None else (lambda r: r * inverse)
    rtol, asked = limits.relative(b.dtype), limits.has_tolerance
    tolerance, most = limits.absolute(rtol, norm, scale), limits.most_steps(b)
    stop = torch.maximum(tolerance, eps * norm)
    unit = torch.ones_like(norm)  # what curvatures p'Ap / p'Mp are multiplied with to be those of A
    known = inverse is None or inverse.shape[-1] == 1
    if inverse is not None and known:
        unit = unit / inverse[..., 0].double()
    goes_on = rtol is not None and limits.rtol is None and limits.atol == 0 and known
    low = torch.maximum(FURTHER * tolerance, 4 * eps * norm) if goes_on else stop
    most_error = AIM * (0.0 if rtol is None else rtol) ** 0.5 * unit

    def going(step: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
        return (step < most) & state[-2].any()

    def body(step: torch.Tensor, *state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, r, p, rz, pdp, smallest, largest, rnorm, running, sure = state
        ap = system.product(p)
        curvature = lane_dot(p, ap) / pdp
        seen = running & curvature.isfinite()
        smallest = torch.where(seen, torch.minimum(smallest, curvature), smallest)
        largest = torch.where(seen, torch.maximum(largest, curvature), largest)
        fine = seen & (curvature > NOISE * eps * largest) & (rz > 0)
        sure = sure & (fine | ~running)
        alpha = torch.where(fine, rz / (curvature * pdp), 0.0).to(x.dtype).unsqueeze(-1)
        x, r = x + alpha * p, r - alpha * ap
        z = precondition(r)
        rz_new = lane_dot(r, z)
        rnorm = torch.where(fine, _norm(r), rnorm)
        reached = rnorm <= stop
        if goes_on:
            reached = reached & (rnorm <= torch.maximum(low, most_error * smallest * lane_norm(x)))
        beta = torch.where(fine, rz_new / rz, 0.0)
        pdp = torch.where(fine, rz_new + beta * beta * pdp, pdp)
        rz = torch.where(fine, rz_new, rz)
        p = torch.where(fine.unsqueeze(-1), z + beta.to(x.dtype).unsqueeze(-1) * p, p)
        return (step + 1, x, r, p, rz, pdp, smallest, largest, rnorm, fine & ~reached, sure)

    z = precondition(b)
    rz = lane_dot(b, z)
    far = torch.full_like(norm, torch.inf)
    step = torch.zeros((), dtype=torch.int64, device=b.device)
    begun = (step, torch.zeros_like(b), b.clone(), z.clone(), rz, rz.clone(), far, torch.zeros_like(norm), norm.clone())
    state: tuple[torch.Tensor, ...] = (*begun, norm > stop, norm.isfinite())
    found = _torch.while_loop(going, body, state) if most else state
    x, smallest, rnorm, sure = found[1], found[6], found[8], found[10]
    size = lane_norm(x)
    if asked:
        true = _norm(b - system.product(x))
        sure = sure & (true <= SLACK * tolerance)
        if known:  # a small residual is no small error
            sure = sure & ((norm == 0) | (true / unit <= SUSPICIOUS_RESIDUAL * smallest * size))
    else:
        sure = sure & (rnorm <= BLOWN_UP * norm)
        if most == 0:
            x = z
    return TracedSolution(x * scale, sure, _reach(system, smallest, unit if known else None))


def _reach(system: TracedSystem, smallest: torch.Tensor, unit: torch.Tensor | None) -> torch.Tensor:
    """||A^-1 F|| from above, by the smallest curvature p'Ap / p'Mp; without a unit, in that of M's smallest entry."""
    if unit is None:
        assert system.inverse_metric is not None
        unit = 1 / system.inverse_metric.double().amax(-1)
    return torch.where(smallest.isinf(), 0.0, lane_norm(system.gradient) / (unit * smallest))


def dense(system: TracedSystem, limits: Limits, suspicious: float) -> TracedSolution:
    """The matrix by n products side by side, a Cholesky factor, and one solve more for the true residual."""
    scale = lane_scale(system.rhs)
    b = (system.rhs / scale).double()
    n, eps = b.shape[-1], torch.finfo(system.rhs.dtype).eps
    unit = torch.eye(n, dtype=system.rhs.dtype, device=b.device).reshape(n, *[1] * (b.ndim - 1), n)
    matrix = torch.vmap(system.product)(unit.expand(n, *b.shape)).double().movedim(0, -1)
    matrix = (matrix + matrix.mT) / 2
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
    sure = (info == 0) & (pivots.amin(-1) > suspicious * (n + NOISE) * eps * pivots.amax(-1))

    def solve(v: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(v.unsqueeze(-1), factor)[..., 0]

    def residual(x: torch.Tensor) -> torch.Tensor:
        return b - (matrix @ x.unsqueeze(-1))[..., 0]

    x = solve(b)
    x = x + solve(residual(x))
    rtol = limits.relative(system.rhs.dtype)
    sure = sure & (_norm(residual(x)) <= SLACK * (0.0 if rtol is None else rtol) * _norm(b))
    return TracedSolution((x * scale).to(system.rhs.dtype), sure, lane_norm(solve(system.gradient.double())))
