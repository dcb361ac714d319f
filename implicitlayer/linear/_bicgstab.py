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
    Keep,
    KrylovSolver,
    Round,
    any_runs,
    lane_norm,
    select,
)
from implicitlayer.linear._operator import FlatOperator, Precondition, lane_dot


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
        norm = lane_norm(r)
        noise, blown = eps * norm, norm / eps
        lanes = _Lanes(start)
        x, p, v = (torch.zeros_like(r) for _ in range(3))
        rho = alpha = omega = torch.ones_like(norm)
        growth = zero = torch.zeros_like(norm)

        for step in range((start.max_steps + 1) // 2):
            if not lanes.go_on(step):
                break
            rho, rho_old = lane_dot(shadow, r), rho
            # below this the inner product is rounding noise: <q, r> of two vectors that have become orthogonal; and a
            # residual this much above the first has lost all digits of x
            lanes.settle((rho.abs() <= noise * norm) | (norm > blown), CONTINUE)
            p = torch.addcmul(p, _column(omega, p), v, value=-1)
            p = lanes.live(torch.addcmul(r, _column(rho / rho_old * (alpha / omega), p), p))
            p_hat = precondition(p)
            v = operator(p_hat)
            v_norm = lane_norm(v)
            growth = lanes.keep(torch.maximum(growth, v_norm / lane_norm(p_hat)), growth)
            along = lane_dot(shadow, v)
            lanes.after_product(v_norm, along.abs() > noise * v_norm)
            alpha = lanes.keep(rho / along, zero)
            s = torch.addcmul(r, _column(alpha, r), v, value=-1)
            x = lanes.keep.vectors(torch.addcmul(x, _column(alpha, x), p_hat), x)
            norm = lanes.keep(lane_norm(s), norm)
            lanes.settle(norm <= start.stop, int(Status.CONVERGED))
            if not lanes.go_on(step):
                break

            s_hat = precondition(lanes.live(s))
            t = operator(s_hat)
            t_norm = lane_norm(t)
            unit = t * _column(lanes.keep(1 / t_norm, zero), t)
            cosine = lane_dot(unit, s)
            # omega = 0 to working precision: s and A s are orthogonal, the smoothing half has nothing to do
            lanes.after_product(t_norm, cosine.abs() > eps * norm)
            omega = cosine / t_norm
            x = lanes.keep.vectors(torch.addcmul(x, _column(omega, x), s_hat), x)
            r = torch.addcmul(s, _column(cosine, s), unit, value=-1)
            norm = lanes.keep(lane_norm(r), norm)
            lanes.settle(norm <= start.stop, int(Status.CONVERGED))
        steps = torch.where(lanes.keep.running, lanes.products, lanes.steps)
        return Correction(x, lanes.codes, steps, norm, growth=growth)


class _Lanes:
    """Which lanes run, and how and after how many products the others have ended.

    On the CPU a look at a mask is nearly free, and nothing is done for lanes that go on. A lane that has ended keeps x;
    its p, v and t are zero, and nobody reads its r.
    """

    def __init__(self, start: Round) -> None:
        self.keep, self._start, self.products = Keep(start.running), start, 0
        self._on_host = start.running.device.type == "cpu"
        self._least = int(start.steps_left.min()) if self._on_host else 0
        self.codes = torch.where(start.running, LIMIT, int(Status.CONVERGED))
        self.steps = torch.zeros_like(self.codes)

    def settle(self, mask: torch.Tensor, code: int) -> None:
        """The running lanes of ``mask`` end with ``code``."""
        mask = mask if self.keep.all else mask & self.keep.running
        if self._on_host and not bool(mask.any()):
            return
        self.codes, self.steps = self.codes.masked_fill(mask, code), self.steps.masked_fill(mask, self.products)
        self.keep = Keep(self.keep.running & ~mask)

    def after_product(self, norm: torch.Tensor, fine: torch.Tensor) -> None:
        """One more product, of this norm; where it is not ``fine``, which NaN is not, the method has broken down."""
        self.products += 1
        if not (self._on_host and bool(fine.all())):
            self.settle(~norm.isfinite(), int(Status.NONFINITE))
            self.settle(~fine, CONTINUE)

    def go_on(self, step: int) -> bool:
        """Whether a lane runs, after the end of those that have made their last step."""
        if self.products >= self._least:
            self.settle(self._start.steps_left <= self.products, LIMIT)
        return self.keep.all or any_runs(self.keep.running, step)

    def live(self, vector: torch.Tensor) -> torch.Tensor:
        """The vector [*lanes, n] with zeros in lanes that have ended."""
        return vector if self.keep.all else select(self.keep.running, vector)


def _column(coefficient: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """One float64 number per lane, as a column in the dtype of a vector."""
    return coefficient.to(vector.dtype).unsqueeze(-1)
