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

from implicitlayer._errors import tell_kink
from implicitlayer.base._parts import patternless
from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._surroundings import plain_surroundings
from implicitlayer.base._tree import leaves_norm, name_lanes, ravel, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._capture import derivatives_possible
from implicitlayer.equation._certificate import gradient_error
from implicitlayer.equation._distance import NOTHING_FOUND, Found, Seen
from implicitlayer.equation._jacobian import (
    Graph,
    Jacobian,
    OneGraph,
    OperatorFamily,
    Watch,
    pull_tensors,
    push_tensors,
)
from implicitlayer.equation._residual import Residual
from implicitlayer.equation._solve import Judge, Settings, SolveSpec, solve
from implicitlayer.linear._common import select
from implicitlayer.linear._operator import FlatOperator

_FLAT = 30  # times the root of eps: what rounding makes of a product with a null vector, relative to one with any


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
    doubt = partial(_tell_flat, tuple(needed), settings)
    spec = SolveSpec(jacobian, len(cotangent), settings, "backward", certify, judge, doubt, found.flaw)
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


# NOTE [flat directions]: where J' has a null vector N, J'u = v is solvable if N'(dF/dx)' sees nothing of v, and u + c N
# solves it as well. theta_bar = -(dF/dtheta)'u is the same for all of them in the thetas with (dF/dtheta)'N = 0: those
# that leave some solution near x. Another theta pushes along N: the solution jumps, or there is none, and forward mode,
# whose right-hand side (dF/dtheta) dtheta is not in the range of J, says so. Here u of smallest norm would be a number
# like any other. A vector of numbers without a pattern, less what the solver makes of its product, is such an N.


def _tell_flat(
    needed: tuple[bool, ...],
    settings: Settings,
    family: OperatorFamily,
    tensors: Leaves,
    operator: FlatOperator,
    solution: LinearSolution,
) -> None:
    """Tell of thetas that push along a flat direction; see NOTE [flat directions]."""
    assert isinstance(family, Jacobian) and solution.singular is not None
    singular = solution.singular & (solution.value != 0).any(-1)  # nothing is asked of the others
    if settings.on_failure == "ignore" or not bool(singular.any()):
        return
    some, source = select(singular, patternless(solution.value)), family.residual.restricted_to(needed)
    x, theta = tensors[: family.num_x], tensors[family.num_x :]
    flat = select(singular, some - settings.solver(operator, operator(some)).value)
    pulled = [
        pull_tensors(lambda t: source(x, t), theta, needed, unravel(vector, x, family.lane_dims))
        for vector in (flat, some * (leaves_norm([flat], 0) / leaves_norm([some], 0)).to(some.dtype))
    ]
    noise = _FLAT * torch.finfo(some.dtype).eps ** 0.5
    for index, (along, typical) in enumerate(zip(*pulled, strict=True)):
        if along is not None and settings.varying is not None:
            along = along * settings.varying[index]
        if along is not None and typical is not None and leaves_norm([along], 0) > noise * leaves_norm([typical], 0):
            message = (
                f"the solution is one of many{name_lanes(singular)}: there is a direction without curvature, and theta "
                f"tensor {index} pushes along it. The gradient holds for changes that leave a solution in place; "
                "others move it far at once. Add curvature (a small ridge), or do not differentiate in that theta here."
            )
            tell_kink(message, "flat direction", settings.on_failure)
            return


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
        spec = SolveSpec(jacobian, len(x), settings, "forward-mode", None, judge, None, found.flaw)
        return solve(spec, [-c for c in change], [*x, *theta])
