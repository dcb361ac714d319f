"""What examples/theory.py measures on: a family of inner problems with exact constants, and the two meters."""

# d: unknowns, M: tasks, s = U' phi: coordinates in the basis of the family; B, L, mu, beta, rho, kappa as in the paper.

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from paper._fit import fit_exponent as fit_exponent  # for theory.py
from torch import Tensor

import implicitlayer as il

F64 = torch.float64

# The family. With U orthogonal and t = U' phi - a,
#     Lhat(phi) = sum_i 1/2 q_i t_i^2 + w_i log(1 + e^t_i),        q, w >= 0,
# has the Hessian U diag(q_i + w_i s'(t_i)) U' with the sigmoid s; s' takes all values in (0, 1/4]. So for
# G(phi, theta) = Lhat(phi) + lambda/2 ||phi - theta||^2
#     mu = lambda + min q_i (infimum, where w_i > 0),      beta = lambda + max (q_i + w_i / 4).
# ||Hess(phi) - Hess(psi)|| = max_i w_i |s'(t_i(phi)) - s'(t_i(psi))| <= max_i w_i max|s''| ||phi - psi||, attained
# along u_i in the limit. s'' = s' (1 - 2 s) with s' = s - s^2; its derivative 1 - 6 s + 6 s^2 = 0 (times s') at
# s = (1 - 1/sqrt 3)/2, where s' = 1/6 and s'' = 1/(6 sqrt 3): rho = max_i w_i / (6 sqrt 3), exactly.
# The outer loss is ell/2 ||phi - target||^2: L = ell, and B = ell (||phi* - target|| + delta) on the ball of radius
# delta around phi*. In the basis U everything is diagonal: phi* by bisection, g* = lambda v / (lambda + q + w s').
MAX_THIRD = 1 / (6 * math.sqrt(3))
INFLECTION = math.log((1 - 1 / math.sqrt(3)) / (1 + 1 / math.sqrt(3)))  # t with s'(t) = 1/6, s''(t) = max


@dataclasses.dataclass(frozen=True)
class Problem:
    """One task, or M of them as lanes (shift and target [M, d], the rest shared); ``basis`` None: the identity."""

    q: Tensor
    w: Tensor
    shift: Tensor
    target: Tensor
    strength: float  # lambda
    outer_smoothness: float = 1.0  # ell
    basis: Tensor | None = None

    @property
    def mu(self) -> float:
        return self.strength + float(self.q.min())

    @property
    def beta(self) -> float:
        return self.strength + float((self.q + self.w / 4).max())

    @property
    def rho(self) -> float:
        return float(self.w.max()) * MAX_THIRD

    def coordinates(self, phi: Tensor) -> Tensor:
        return phi if self.basis is None else phi @ self.basis

    def from_coordinates(self, s: Tensor) -> Tensor:
        return s if self.basis is None else s @ self.basis.T

    def loss(self, phi: Tensor) -> Tensor:
        t = self.coordinates(phi) - self.shift
        return (0.5 * self.q * t * t + self.w * torch.nn.functional.softplus(t)).sum(-1)

    def outer(self, phi: Tensor) -> Tensor:
        return 0.5 * self.outer_smoothness * ((phi - self.target) ** 2).sum(-1)

    def solution(self, theta: Tensor) -> Tensor:
        """phi*(theta), to rounding: the stationarity conditions are one increasing equation per coordinate."""
        s = self.coordinates(theta) + torch.zeros_like(self.shift)

        def equation(at: Tensor) -> Tensor:
            t = at - self.shift
            return self.strength * (at - s) + self.q * t + self.w * t.sigmoid()

        reach = equation(s).abs() / self.strength  # the slope is at least lambda
        low, high = s - reach, s + reach
        for _ in range(64):
            middle = (low + high) / 2
            below = equation(middle) < 0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return self.from_coordinates((low + high) / 2)

    def meta_gradient(self, phi: Tensor) -> Tensor:
        """(I + H/lambda)^-1 grad outer, at phi."""
        sigmoid = (self.coordinates(phi) - self.shift).sigmoid()
        v = self.coordinates(self.outer_smoothness * (phi - self.target))
        return self.from_coordinates(self.strength * v / (self.strength + self.q + self.w * sigmoid * (1 - sigmoid)))

    def lemma_3(self, outer_gradient_bound: float, factor: float = 2) -> float:
        """What delta is multiplied by; B is the argument. Where mu holds everywhere, as here, the factor 1 will do.

        With A = I + H/lambda: ||A(phi)^-1 - A(phi*)^-1|| <= ||A(phi)^-1|| ||H(phi) - H(phi*)|| / lambda ||A(phi*)^-1||,
        at most (lambda/mu)^2 rho delta / lambda; the 2 is for an mu that is known at phi* alone.
        """
        lam, mu = self.strength, self.mu
        return factor * lam * self.rho * outer_gradient_bound / mu**2 + lam * self.outer_smoothness / mu

    def outer_gradient_bound(self, phi: Tensor, radius: float) -> float:
        """B on the ball around phi; of several tasks, the largest."""
        return self.outer_smoothness * (float((phi - self.target).norm(dim=-1).max()) + radius)


def through_the_layer(p: Problem, theta: Tensor, solver: Callable, linear_solver: Any) -> tuple[Tensor, Tensor, Any]:
    """Meta-gradient and phi as the library computes them, one lane per row of theta, and its two records."""
    layer = il.argmin(
        il.proximal(p.loss, p.strength),
        solver,
        linear_solver=linear_solver,
        batch_dims=theta.ndim - 1,
        on_failure="ignore",  # early stopping is what is studied here
    )
    theta = theta.detach().requires_grad_()
    with il.diagnostics() as records:
        phi = layer(theta.detach(), theta)
        (gradient,) = torch.autograd.grad(p.outer(phi).sum(), theta)
    return gradient, phi.detach(), records


def random_problem(d: int, generator: torch.Generator) -> Problem:
    """kappa about 50; curvature that changes by as much as it is."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=F64, generator=generator)

    q = torch.logspace(-1, 2, d, dtype=F64)
    w = 8 * torch.rand(d, dtype=F64, generator=generator)
    basis = torch.linalg.qr(draw(d, d))[0]
    return Problem(q, w, 2 * draw(d), draw(d), strength=2.0, outer_smoothness=0.7, basis=basis)


def aligned_problem(d: int, generator: torch.Generator) -> tuple[Problem, Tensor]:
    """All that the lemma fears in one direction u_0: least curvature, steepest change of it, the outer gradient."""
    basis = torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=generator))[0]
    q, w = torch.linspace(0, 50, d, dtype=F64), torch.zeros(d, dtype=F64)
    w[0] = 0.2
    lam, phi = 2.0, torch.zeros(d, dtype=F64)
    shift = torch.zeros(d, dtype=F64)
    shift[0] = -INFLECTION
    target = 50 * basis[:, 0]  # the outer gradient at phi* = 0 points along -u_0: both terms of the error add up there
    p = Problem(q, w, shift, target, lam, 0.1, basis)
    slope = p.q * (p.coordinates(phi) - shift) + w * torch.sigmoid(-shift)
    return p, phi + p.from_coordinates(slope / lam)  # theta = phi* + grad Lhat(phi*) / lambda


def ill_conditioned(kappa: float, n: int, generator: torch.Generator) -> tuple[Problem, Tensor]:
    """mu = lambda = 1, beta = kappa, eigenvalues spread evenly in the logarithm.

    The basis is the identity: all three methods give the same iterates in every orthonormal basis.
    """
    q = torch.logspace(0, math.log10(kappa - 0.25), n, dtype=F64) - 1
    shift, target = (torch.randn(n, dtype=F64, generator=generator) / math.sqrt(n) for _ in range(2))
    q[-1] = kappa - 1.25
    return Problem(q, torch.ones(n, dtype=F64), shift, 4 * target, strength=1.0), torch.zeros(n, dtype=F64)


def peak_kib(function: Callable[[], object]) -> float:
    function()  # what is made once and kept shall not count
    return il.meta.peak_memory(function) / 2**10
