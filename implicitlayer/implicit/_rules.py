"""The implicit function theorem as plain functions: no solver, no Function, testable alone."""

# F(x*(theta), theta) = 0. Differentiating, (dF/dx) dx + (dF/dtheta) dtheta = 0, hence
#     forward:  dx = -(dF/dx)^-1 (dF/dtheta) dtheta
#     reverse:  u = (dF/dx)^-T v,   theta_bar = -(dF/dtheta)' u
# For an argmin F is the gradient of the objective and dF/dx its Hessian H. For the proximal objective
# G = L(phi) + lambda/2 ||phi - theta||^2: dF/dtheta = -lambda, so theta_bar = lambda (lambda + H)^-1 v
# = (I + H/lambda)^-1 v, the meta-gradient of Rajeswaran et al. 2019, Lemma 1.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from implicitlayer._surroundings import plain_surroundings
from implicitlayer._types import Leaves
from implicitlayer.linear._jacobian import Curvature, Jacobian, pull_tensors, push_tensors
from implicitlayer.linear._residual import Residual
from implicitlayer.linear._solve import SolveSpec, solve

Matrix = tuple[Curvature, float]
_HESSIAN: Matrix = ("hessian", 0.0)


def implicit_vjp(
    residual: Residual,
    x: Leaves,
    theta: Leaves,
    cotangent: Leaves,
    needed: tuple[bool, ...],
    matrix: Matrix = _HESSIAN,
    **how: Any,
) -> list[torch.Tensor | None]:
    """Cotangents of the theta leaves that are ``needed``, from the cotangent of x.

    ``matrix``: what stands for dF/dx, as (curvature, damping). ``how``: solver, on_failure, kind and listener of the
    linear solve.
    """
    spec = SolveSpec(Jacobian(residual, len(x), True, *matrix), len(x), **how)
    with plain_surroundings(x):
        u = solve(spec, cotangent, [*x, *theta])
        pulled = pull_tensors(lambda t: residual(x, t), theta, needed, u)
    return [None if t is None else -t for t in pulled]


def implicit_jvp(
    residual: Residual,
    x: Leaves,
    theta: Leaves,
    tangents: tuple[torch.Tensor | None, ...],
    matrix: Matrix = _HESSIAN,
    **how: Any,
) -> Leaves | None:
    """Tangents of x from those of the theta leaves; None if no theta leaf has one."""
    with plain_surroundings(x):
        change = push_tensors(lambda t: residual(x, t), theta, tangents)
        if change is None:
            return None
        spec = SolveSpec(Jacobian(residual, len(x), False, *matrix), len(x), **how)
        return solve(spec, [-c for c in change], [*x, *theta])


def over_batched_cotangents(
    rule: Callable[[Leaves], list[torch.Tensor | None]], cotangents: Leaves
) -> list[torch.Tensor | None]:
    """``rule`` under ``torch.autograd.grad(..., is_grads_batched=True)``.

    That option hands a backward cotangents wrapped by an older batching mechanism that custom Functions do not see;
    here they are unwrapped, mapped over by ``torch.func.vmap``, and wrapped again.
    """
    if not any(torch._C._functorch.is_legacy_batchedtensor(c) for c in cotangents):
        return rule(cotangents)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    wrapped = next(c for c in cotangents if torch._C._functorch.is_legacy_batchedtensor(c))
    size = _legacy_batch_size(wrapped, level)
    plain = [torch._remove_batch_dim(c, level, size, 0).clone() for c in cotangents]
    present: list[bool] = []

    def some(*lane: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = rule(list(lane))
        present[:] = [t is not None for t in result]
        return tuple(t for t in result if t is not None)

    values = iter(torch.vmap(some)(*plain))
    return [torch._add_batch_dim(next(values), 0, level) if there else None for there in present]


def _legacy_batch_size(wrapped: torch.Tensor, level: int) -> int:
    # a wrapped tensor hides its batch dimension; unwrapped with a size of one too many it shows the true one
    return int(torch._remove_batch_dim(wrapped, level, 1, 0).shape[0])
