"""MINRES for symmetric systems, definite or not, one or many at a time."""

# Legend: A symmetric, M the preconditioner's matrix (identity without one).
# Lanczos (Paige & Saunders 1975, section 5): u_1 = r_0 / beta_1, v_k = M^-1 u_k, and
#     beta_{k+1} u_{k+1} = A v_k - alpha_k u_k - beta_k u_{k-1},   alpha_k = v_k'A v_k,   u_k'v_k = 1,
# so that A V_k = U_{k+1} T_k with T_k tridiagonal, (k+1) x k. MINRES takes x_k = V_k y with the smallest
# ||beta_1 e_1 - T_k y||, the M^-1-norm of the residual. One reflection per step, [c s; s -c], keeps T_k = Q_k [R_k; 0]:
# column k of R_k is (epsilon_k, delta_k, gamma_k), from
#     delta_k = c dbar + s alpha_k,   gbar = s dbar - c alpha_k,   gamma_k = sqrt(gbar^2 + beta_{k+1}^2),
#     epsilon_{k+1} = s beta_{k+1},   dbar <- -c beta_{k+1}    (all with c, s of the last step),
#     c = gbar / gamma_k,   s = beta_{k+1} / gamma_k.
# With W_k = V_k R_k^-1, w_k = (v_k - epsilon_k w_{k-2} - delta_k w_{k-1}) / gamma_k and x_k = x_{k-1} + c phibar w_k;
# phibar_k = s phibar_{k-1} is the norm of the residual. Two more facts (Choi, Paige & Saunders 2011, section 3):
#     r_k = s^2 r_{k-1} - c phibar_k u_{k+1}       (the residual itself, for its 2-norm when M is not the identity)
#     ||A r_{k-1}|| = phibar_{k-1} sqrt(gbar^2 + dbar^2)   (zero at a least-squares solution)
#
# NOTE [inconsistent systems]: with b outside the range of a singular A, that second number falls to about
# sqrt(eps) ||A|| ||r|| (x is then a least-squares solution) and grows again by rounding, while x runs off along the
# null space. So x is kept at the bottom. Where eps ||A|| ||x|| exceeds the residual, the recurrence has lost it: if the
# residual, as long as it could be trusted, has hardly fallen since the bottom, the system is inconsistent; else it is
# ill-conditioned, and a new round may go on.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from implicitlayer.base._status import Status
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


@dataclass(eq=False)
class _Bottom:
    """Where ``||A r||`` was smallest, lane by lane, and the residual there; see NOTE [inconsistent systems]."""

    x: torch.Tensor
    slope: torch.Tensor
    phi: torch.Tensor
    trusted: torch.Tensor
    eps: float

    def look(
        self,
        running: torch.Tensor,
        x: torch.Tensor,
        slope: torch.Tensor,
        phi: torch.Tensor,
        rounding: torch.Tensor,
        norm: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The lanes that have lost their residual, those that are singular, and those that still run."""
        root = math.sqrt(self.eps)
        lower = running & (slope < self.slope) & (rounding <= root * norm)
        self.slope, self.phi = torch.where(lower, slope, self.slope), torch.where(lower, phi, self.phi)
        self.x = select(lower, x, self.x)
        flat = running & ~(slope > NOISE * self.eps)  # gamma = 0 among them, and size = 0
        self.trusted = torch.where(running & (rounding <= self.eps**0.25 * norm), phi, self.trusted)
        lost = running & (rounding > norm)
        inconsistent = lost & (self.slope < root) & (self.trusted > 0.25 * self.phi)
        return lost, flat | inconsistent, running & ~(flat | lost)


@dataclass(frozen=True)
class Minres(KrylovSolver):
    """Solve ``A u = b`` for symmetric A, positive definite or not, from products ``A v`` alone.

    Stops a lane when ``||b - A u||_2 <= max(rtol ||b||_2, atol)``, on the residual recomputed at the end. The residual
    never grows, unlike that of conjugate gradients. A singular A with b in its range is solved; with b outside it,
    the least-squares residual is reached and the status is SINGULAR.

    Args:
        rtol, atol, max_steps: as in :class:`ConjugateGradient`, also for the errors; a step is a product.
        preconditioner: ``v -> approximately |A|^-1 v``, symmetric positive definite (or a ValueError), on flat vectors
            [*lanes, n]; or a :class:`Jacobi` or :class:`Nystrom`. Default: the operator's diagonal metric.

    Source: C. C. Paige and M. A. Saunders, Solution of sparse indefinite systems of linear equations, SIAM J. Numer.
    Anal. 12 (1975). Difference from ``scipy.sparse.linalg.minres``: lanes, a stopping test on the residual alone (not
    relative to ``||A|| ||x||``), the true residual at the end, a status for inconsistent systems, no dependence on
    scale.

    Example:
        >>> import torch, implicitlayer as il
        >>> saddle = torch.diag(torch.tensor([1.0, -4.0]).double())
        >>> solution = il.Minres()(saddle, torch.ones(2).double())
        >>> [round(v, 12) for v in solution.value.tolist()], solution.status.name, solution.num_steps
        ([1.0, -0.25], 'CONVERGED', 2)
    """

    method: ClassVar[str] = "MINRES"
    systems = "symmetric"

    def correct(self, operator: FlatOperator, precondition: Precondition, start: Round) -> Correction:
        """The recurrence, run from zero on the right-hand side ``start.residual``."""
        r = start.residual
        v = precondition(r)
        preconditioned = v is not r
        eps = torch.finfo(r.dtype).eps
        running, norm = start.running, lane_norm(r)
        codes = torch.where(running, LIMIT, int(Status.CONVERGED))
        steps = torch.zeros_like(codes)
        x, w, w_old, u_old = (torch.zeros_like(r) for _ in range(4))
        beta = lane_norm(r, v)
        finite = v.isfinite().all(-1) & (beta > 0)
        codes = torch.where(running & ~finite, int(Status.NONFINITE), codes)
        running, phibar = running & finite, beta
        u, v = times(1 / beta, r), times(1 / beta, v)
        zero = torch.zeros_like(beta)
        dbar, epsilon, c, s, size, beta_old, curvature = zero, zero, zero - 1, zero, zero, zero, zero + math.inf
        bottom, growth = _Bottom(x, zero + math.sqrt(eps), phibar, phibar, eps), zero
        for step in range(start.max_steps):
            running = running & (steps < start.steps_left)
            if not any_runs(running, step):
                break
            v = select(running, v)
            new = operator(v)
            steps = steps + running
            growth = torch.where(running, torch.maximum(growth, largest(new) / largest(v)), growth)
            new = new - times(beta_old, u_old)
            alpha = lane_dot(v, new)
            new = new - times(alpha, u)
            z = precondition(new)
            beta = lane_norm(new, z)
            codes = torch.where(running & ~beta.isfinite(), int(Status.NONFINITE), codes)
            running = running & beta.isfinite()
            curvature = torch.where(running, torch.minimum(curvature, alpha), curvature)
            size = torch.where(running, torch.maximum(size, alpha.abs() + beta + beta_old), size)

            epsilon_old, delta, gbar = epsilon, c * dbar + s * alpha, s * dbar - c * alpha
            epsilon, dbar = s * beta, -c * beta
            slope = torch.hypot(gbar, dbar) / size  # ||A r|| / (||A|| ||r||) at x
            rounding = eps * growth * largest(x)  # of the residual, by the size of x
            lost, singular, running = bottom.look(running, x, slope, phibar, rounding, norm)
            codes = torch.where(lost, CONTINUE, codes)
            codes = torch.where(singular, int(Status.SINGULAR), codes)
            x = select(singular, bottom.x, x)
            gamma = torch.hypot(gbar, beta)
            c, s = gbar / gamma, beta / gamma
            w, w_old = times(1 / gamma, v - times(epsilon_old, w_old) - times(delta, w)), w
            x = select(running, x + times(c * phibar, w), x)
            phibar = s * phibar
            u, u_old, v, beta_old = times(1 / beta, new), u, times(1 / beta, z), beta
            if preconditioned:
                r = times(s * s, r) - times(c * phibar, u)
                r = select(beta > 0, r)  # beta = 0: the Krylov space is exhausted and the residual zero
                norm = torch.where(running, lane_norm(r), norm)
            else:
                norm = torch.where(running, phibar, norm)
            reached = running & (norm <= start.stop)
            codes = torch.where(reached, int(Status.CONVERGED), codes)
            running = running & ~reached
        return Correction(x, codes, steps, norm, curvature, growth)
