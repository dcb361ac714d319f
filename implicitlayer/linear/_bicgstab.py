"""Bi-CGSTAB for general systems with short recurrences, one or many at a time."""

# Legend (van der Vorst 1992): r residual, q = r^ the fixed shadow residual, p direction, M the preconditioner.
# BiCG builds residuals r = P(A) r_0 with P orthogonal, in <q, . >, to a Krylov space; CGS-like products avoid A'. Each
# iteration multiplies that polynomial by (1 - omega A) with the omega that makes the new residual smallest:
#     rho = <q, r>,   beta = (rho / rho_old) (alpha / omega),   p = r + beta (p - omega v)
#     v = A M^-1 p,   alpha = rho / <q, v>,   s = r - alpha v            (the BiCG half: one product)
#     t = A M^-1 s,   omega = <t, s> / <t, t>,   r = s - omega t         (the smoothing half: one product)
#     x = x + alpha M^-1 p + omega M^-1 s
# It breaks down where rho, <q, v> or omega vanish; the lane is then started again from its true residual, with the
# residual as the new shadow.

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from implicitlayer.base._status import Status
from implicitlayer.linear._common import (
    CONTINUE,
    LIMIT,
    Correction,
    KrylovSolver,
    Round,
    any_runs,
    lane_norm,
    largest,
    select,
    times,
)
from implicitlayer.linear._operator import FlatOperator, lane_dot
from implicitlayer.linear._preconditioners import Precondition


@dataclass(frozen=True)
class Bicgstab(KrylovSolver):
    """Solve ``A u = b`` for any square A from products ``A v``. It keeps eight vectors, whatever the number of steps.

    Stops a lane when ``||b - A u||_2 <= max(rtol ||b||_2, atol)``, on the residual recomputed at the end. The residual
    is not monotone; after a breakdown the lane is started again from the true one, and ends with status STAGNATED if
    that does not help. Eigenvalues near the imaginary axis (rotations) are its weak side: use :class:`Gmres` there.

    Args:
        rtol, atol: as in :class:`ConjugateGradient`, also for the errors.
        max_steps: limit of steps; a step is one product, so that an iteration makes two. Default ten times the number
            of unknowns of one lane.
        preconditioner: ``v -> approximately A^-1 v`` on flat vectors [*lanes, n], from the right; or a
            :class:`Jacobi` or :class:`Nystrom`, built from the operator. Default: the operator's diagonal metric.

    Source: H. A. van der Vorst, Bi-CGSTAB, SIAM J. Sci. Stat. Comput. 13 (1992). Difference from
    ``scipy.sparse.linalg.bicgstab``: lanes, restarts after breakdowns, the true residual at the end, no dependence on
    scale.
    """

    method: ClassVar[str] = "Bi-CGSTAB"
    systems = "contraction"  # it breaks down where eigenvalues surround zero (rotations)

    def correct(self, operator: FlatOperator, precondition: Precondition, start: Round) -> Correction:
        """The recurrence, run from zero on the right-hand side ``start.residual`` until it breaks down."""
        r = shadow = start.residual
        eps = torch.finfo(r.dtype).eps
        norm = initial = shadow_norm = lane_norm(r)
        running = start.running
        codes = torch.where(running, LIMIT, int(Status.CONVERGED))
        steps = torch.zeros_like(codes)
        x, p, v = (torch.zeros_like(r) for _ in range(3))
        rho = alpha = omega = torch.ones_like(norm)
        growth = torch.zeros_like(norm)

        def settle(mask: torch.Tensor, code: int) -> None:
            nonlocal codes, running
            codes = torch.where(running & mask, code, codes)
            running = running & ~mask

        for step in range((start.max_steps + 1) // 2):
            settle(steps >= start.steps_left, LIMIT)
            if not any_runs(running, step):
                break
            rho, rho_old = lane_dot(shadow, r), rho
            # below this the inner product is rounding noise: <q, r> of two vectors that have become orthogonal; and a
            # residual this much above the first has lost all digits of x
            settle((rho.abs() <= eps * shadow_norm * norm) | (norm > initial / eps), CONTINUE)
            p = select(running, r + times(rho / rho_old * (alpha / omega), p - times(omega, v)))
            p_hat = precondition(p)
            v = operator(p_hat)
            steps = steps + running
            v_norm = lane_norm(v)
            growth = torch.where(running, torch.maximum(growth, largest(v) / largest(p_hat)), growth)
            settle(~v_norm.isfinite(), int(Status.NONFINITE))
            along = lane_dot(shadow, select(running, v))
            settle(along.abs() <= eps * shadow_norm * v_norm, CONTINUE)
            alpha = rho / along
            s = select(running, r - times(alpha, v))
            x = select(running, x + times(alpha, p_hat), x)
            r = select(running, s, r)
            norm = torch.where(running, lane_norm(s), norm)
            settle(norm <= start.stop, int(Status.CONVERGED))
            settle(steps >= start.steps_left, LIMIT)
            if not any_runs(running, step):
                break

            s_hat = precondition(select(running, s))
            t = operator(s_hat)
            steps = steps + running
            t_norm = lane_norm(t)
            settle(~t_norm.isfinite(), int(Status.NONFINITE))
            unit = select(running, times(1 / t_norm, t))
            cosine = lane_dot(unit, s)
            # omega = 0 to working precision: s and A s are orthogonal, the smoothing half has nothing to do
            settle((t_norm == 0) | (cosine.abs() <= eps * norm), CONTINUE)
            omega = cosine / t_norm
            x = select(running, x + times(omega, s_hat), x)
            r = select(running, s - times(omega, t), r)
            norm = torch.where(running, lane_norm(r), norm)
            settle(norm <= start.stop, int(Status.CONVERGED))
        return Correction(x, codes, steps, norm, growth=growth)
