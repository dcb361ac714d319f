"""Restarted GMRES for general systems, one or many at a time."""

# Legend: A u = b, preconditioned from the right: A M^-1 (M u) = b, so that the residual stays that of A u = b.
# Arnoldi: v_1 = r / ||r||, and h_{k+1,k} v_{k+1} = A M^-1 v_k - sum_i h_{ik} v_i, so A M^-1 V_k = V_{k+1} H_k with H_k
# Hessenberg, (k+1) x k. GMRES takes u = M^-1 V_k y with the smallest || ||r|| e_1 - H_k y ||.
# Givens rotations make Q_k H_k = [R_k; 0] with Q orthogonal. Q itself is accumulated, one batched product in place of a
# loop over the old rotations: column k of R is Q h_k, the new rotation mixes rows k and k+1 of Q, and the residual norm
# is ||r|| |Q[k+1, 0]| because Q acts on ||r|| e_1.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from implicitlayer.base._status import Status
from implicitlayer.base._tree import positive
from implicitlayer.linear._common import (
    CONTINUE,
    LIMIT,
    NOISE,
    Correction,
    KrylovSolver,
    Round,
    any_runs,
    lane_norm,
    largest,
    select,
    times,
)
from implicitlayer.linear._operator import FlatOperator, Precondition, lane_dot
from implicitlayer.linear._traced import TracedSolution, TracedSystem, conjugate_gradient

_FIRST_VECTORS = 15  # room made at the start of a cycle


@dataclass(frozen=True)
class Gmres(KrylovSolver):
    """Solve ``A u = b`` for any square A from products ``A v`` alone, with the smallest residual per step.

    Stops a lane when ``||b - A u||_2 <= max(rtol ||b||_2, atol)``, on the true residual, recomputed at every restart.
    A cycle keeps one vector per step, ``restart`` at most; one that does not lower the residual ends the lane with
    status STAGNATED (more restarts would repeat it: raise ``restart``). If the vectors are exhausted with a residual
    left, the status is SINGULAR.

    Args:
        rtol, atol, max_steps: as in :class:`ConjugateGradient`, also for the errors; a step is a product.
        preconditioner: as in :class:`Bicgstab`, from the right.
        restart: steps of one cycle, at least 1; never more than n are made, so that small systems are solved in full.

    Source: Y. Saad and M. H. Schultz, GMRES, SIAM J. Sci. Stat. Comput. 7 (1986). Difference from
    ``scipy.sparse.linalg.gmres``: lanes; orthogonalisation twice by classical Gram-Schmidt, which is as good as
    Householder's (Giraud, Langou & Rozloznik 2005) and vectorises; statuses; no dependence on scale.

    Example:
        >>> import torch, implicitlayer as il
        >>> rotation = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
        >>> solution = il.Gmres()(rotation, torch.tensor([1.0, 2.0]).double())
        >>> solution.value.tolist(), solution.status.name, solution.num_steps
        ([2.0, -1.0], 'CONVERGED', 2)
    """

    restart: int = 100

    method: ClassVar[str] = "GMRES"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart < 1:
            raise ValueError(f"restart={self.restart} must be at least 1: it is the number of steps of one cycle.")

    def traced(self, system: TracedSystem) -> TracedSolution:
        """The same for a compiler, whose systems are symmetric: by conjugate gradients, to the same tolerance."""
        return conjugate_gradient(system, self.limits)

    def correct(self, operator: FlatOperator, precondition: Precondition, start: Round) -> Correction:
        """One cycle, run from zero on the right-hand side ``start.residual``."""
        r = start.residual
        lanes, n = r.shape[:-1], r.shape[-1]
        size = min(self.restart, n, start.max_steps)
        noise = NOISE * torch.finfo(r.dtype).eps
        beta = norm = lane_norm(r)
        running = start.running & (beta > 0)
        codes = torch.where(running, CONTINUE, int(Status.CONVERGED))
        steps = torch.zeros_like(codes)
        rank = torch.zeros_like(codes)  # columns of R that the lane uses
        top = growth = torch.zeros_like(beta)  # largest entries of R; largest ||A v|| / ||v||
        curvature = torch.full_like(beta, math.inf)
        basis = r.new_zeros(min(size, _FIRST_VECTORS) + 1, *lanes, n)
        basis[0] = select(running, times(1 / beta, r))
        rotation = torch.eye(size + 1, dtype=beta.dtype, device=r.device).repeat(*lanes, 1, 1)
        triangle = torch.zeros_like(rotation)
        for k in range(size):
            running = running & (steps < start.steps_left)
            if not any_runs(running, k):
                break
            z = precondition(select(running, basis[k]))
            w = select(running, operator(z))
            steps = steps + running
            finite = w.isfinite().all(-1)
            codes = torch.where(running & ~finite, int(Status.NONFINITE), codes)
            running = running & finite
            w = select(running, w)
            growth = torch.where(running, torch.maximum(growth, largest(w) / largest(z)), growth)
            column = torch.zeros_like(triangle[..., 0])  # [*lanes, size + 1]
            w, column[..., : k + 1], column[..., k + 1] = _orthogonal(w, basis[: k + 1], noise)
            after = column[..., k + 1].clone()
            curvature = torch.where(running, torch.minimum(curvature, column[..., k]), curvature)
            column = (rotation @ column.unsqueeze(-1))[..., 0]
            pivot = torch.hypot(column[..., k], column[..., k + 1])
            top = torch.where(running, torch.maximum(top, largest(column)), top)
            # nothing new in the image of the basis: the small problem is singular
            flat = running & (pivot <= noise * top)
            codes = torch.where(flat, int(Status.SINGULAR), codes)
            running = running & ~flat
            safe = torch.where(running, pivot, 1.0)
            c, s = (column[..., k] / safe).unsqueeze(-1), (column[..., k + 1] / safe).unsqueeze(-1)
            column[..., k], column[..., k + 1] = pivot, 0.0
            triangle[..., k] = select(running, column)
            upper, lower = rotation[..., k, :].clone(), rotation[..., k + 1, :].clone()
            rotation[..., k, :] = select(running, c * upper + s * lower, upper)
            rotation[..., k + 1, :] = select(running, c * lower - s * upper, lower)
            rank = rank + running
            norm = torch.where(running, beta * rotation[..., k + 1, 0].abs(), norm)
            reached = running & (norm <= start.stop)
            codes = torch.where(reached, int(Status.CONVERGED), codes)
            running = running & ~reached
            if k + 1 == len(basis):  # most solves end before a full cycle: grow by doubling
                basis = torch.cat([basis, torch.zeros_like(basis)])[: size + 1]
            basis[k + 1] = select(running, times(1 / positive(after), w))
        codes = torch.where((codes == CONTINUE) & (steps >= start.steps_left), LIMIT, codes)
        size = min(size, len(basis))
        value = _combine(basis[:size], triangle[..., :size, :size], beta.unsqueeze(-1) * rotation[..., :size, 0], rank)
        return Correction(precondition(value), codes, steps, norm, curvature, growth)


def _orthogonal(w: torch.Tensor, basis: torch.Tensor, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``w`` without its parts along the basis [k, *lanes, n], these parts [*lanes, k], and its norm."""
    before, parts = lane_norm(w), torch.zeros((), dtype=torch.float64, device=w.device)
    for _ in range(2):
        h = lane_dot(basis, w)  # [k, *lanes]
        w = w - times(h, basis).sum(0)
        parts = parts + h.movedim(0, -1)
    after = lane_norm(w)
    return w, parts, torch.where(after > noise * before, after, 0.0)


def _combine(basis: torch.Tensor, triangle: torch.Tensor, rhs: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """``V y`` with ``R y = rhs`` in the first ``rank`` columns of each lane."""
    size = triangle.shape[-1]
    used = torch.arange(size, device=rank.device) < rank.unsqueeze(-1)
    unit = torch.eye(size, dtype=triangle.dtype, device=rank.device)
    triangle = torch.where(used.unsqueeze(-2) & used.unsqueeze(-1), triangle, unit)
    y = torch.linalg.solve_triangular(triangle, torch.where(used, rhs, 0.0).unsqueeze(-1), upper=True)[..., 0]
    return times(y.movedim(-1, 0), basis).sum(0)
