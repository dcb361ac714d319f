"""The implicit function theorem as plain functions: no solver, no Function, testable alone."""

# F(x*(theta), theta) = 0. Differentiating, (dF/dx) dx + (dF/dtheta) dtheta = 0, hence
#     forward:  dx = -(dF/dx)^-1 (dF/dtheta) dtheta
#     reverse:  u = (dF/dx)^-T v,   theta_bar = -(dF/dtheta)' u
# For an argmin F is the gradient of the objective and dF/dx its Hessian H. For the proximal objective
# G = L(phi) + lambda/2 ||phi - theta||^2: dF/dtheta = -lambda, so theta_bar = lambda (lambda + H)^-1 v
# = (I + H/lambda)^-1 v, the meta-gradient of Rajeswaran et al. 2019, Lemma 1.

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch

from implicitlayer.base._surroundings import plain_surroundings
from implicitlayer.base._tree import ravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._capture import derivatives_possible
from implicitlayer.equation._certificate import gradient_error
from implicitlayer.equation._distance import NOTHING_FOUND, Found, Seen
from implicitlayer.equation._jacobian import Graph, Jacobian, OneGraph, Watch, pull_tensors, push_tensors
from implicitlayer.equation._residual import Residual
from implicitlayer.equation._solve import Judge, Settings, SolveSpec, solve


def implicit_vjp(
    residual: Residual,
    x: Leaves,
    theta: Leaves,
    cotangent: Leaves,
    needed: tuple[bool, ...],
    settings: Settings,
    found: Found = NOTHING_FOUND,
    graph: Graph | None = None,
) -> list[torch.Tensor | None]:
    """Cotangents of the theta leaves that are ``needed``, from the cotangent of x.

    ``found``: what the forward pass has found. ``graph``: F by plain autograd, used where nothing else is at work.
    """
    certify = partial(gradient_error, settings.assumptions, tuple(needed))
    watch, judge = _checks(found, settings)
    jacobian = Jacobian(residual, len(x), True, settings.curvature, settings.damping, watch)
    mixed: OneGraph | Callable[[Leaves], Leaves]
    if graph is not None and not derivatives_possible():
        mixed = jacobian = OneGraph(**vars(jacobian), graph=graph)
        cotangent = [ravel(cotangent, residual.lane_dims)]
    else:
        source = residual.restricted_to(needed)
        mixed = lambda t: source(x, t)  # noqa: E731
    spec = SolveSpec(jacobian, len(cotangent), settings, "backward", certify, judge, found.flaw)
    with plain_surroundings(x, derivatives=True):
        u = solve(spec, cotangent, [*x, *theta])
        pulled = pull_tensors(mixed, theta, needed, u)
    return [None if t is None else -t for t in pulled]


def _checks(found: Found, settings: Settings) -> tuple[Watch | None, Judge | None]:
    """What looks at F on the way of a solve, and at its solution; a matrix that is not J says nothing of the answer."""
    answer = found.answer
    if answer is None:
        return None, None
    seen: Seen = []
    is_dfdx = settings.curvature == "hessian" and settings.damping == 0
    return partial(answer.see, seen), partial(answer.judge, seen) if is_dfdx else None


def implicit_jvp(
    residual: Residual,
    x: Leaves,
    theta: Leaves,
    tangents: Sequence[torch.Tensor | None],
    settings: Settings,
    found: Found = NOTHING_FOUND,
) -> Leaves | None:
    """Tangents of x from those of the theta leaves; None if no theta leaf has one."""
    with plain_surroundings(x, derivatives=True):
        change = push_tensors(lambda t: residual(x, t), theta, tangents, like=x)
        if change is None:
            return None
        watch, judge = _checks(found, settings)
        jacobian = Jacobian(residual, len(x), False, settings.curvature, settings.damping, watch)
        spec = SolveSpec(jacobian, len(x), settings, "forward-mode", None, judge, found.flaw)
        return solve(spec, [-c for c in change], [*x, *theta])
