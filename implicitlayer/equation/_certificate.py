"""How far a computed gradient is from the exact one: a bound under assumptions, an estimate without."""

# Let F(x, theta) = 0 define x*, J = dF/dx, M = dF/dtheta, and g = -M(x)'u with J(x)'u = v - r (r: the residual of the
# linear solve, x: the solver's answer, v: the cotangent as given). The exact gradient is g* = -M(x*)'w*, J(x*)'w* = v*.
#
# BOUND (the two errors of Algorithm 2 put together as in Lemma 3 of Rajeswaran et al. 2019). With ||J^-1|| <= 1/mu on
# the segment from x to x* (f mu-strongly convex there, or F strongly monotone), and w = J(x)^-T v:
#     ||x - x*|| <= delta = ||F(x)|| / mu                                     (inexact inner solve)
#     ||u - w||  <= ||r|| / mu                                                (inexact linear solve)
#     ||w||      <= omega = ||u|| + ||r|| / mu                                (at most B / mu, where ||v|| <= B)
#     w - w* = J(x*)^-T [(J(x*) - J(x))'w + v - v*], so ||w - w*|| <= (rho omega + L) delta / mu
# with J rho-Lipschitz and the cotangent L-Lipschitz in x (the outer loss L-smooth). With ||M|| <= C, M rho_M-Lipschitz:
#     ||g - g*|| <= C ||r||/mu + [C (rho omega + L) / mu + rho_M omega] delta.
# For the proximal objective C = lambda, rho_M = 0, omega <= B/mu: (lambda rho B / mu^2 + lambda L / mu) delta + delta',
# Lemma 3 (whose factor 2 pays for assuming strong convexity at x alone).
#
# ESTIMATE. One Newton step d = J^-1 F(x) gives x~ = x - d, closer to x* by an order. There, to first order in what
# remains, w* = u + e1 + e2 with J~'e1 = r and J~'e2 = (J - J~)'u (the change of J along d), and
#     g - g* = M~'e1 + [M~'e2 - (M - M~)'u]:    the linear part and the inner part.
# The difference of two points along d stands for the directional derivative: it needs no third derivative, and is right
# beyond first order. Three solves, made only when somebody asks.

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from implicitlayer.base._records import GradientError
from implicitlayer.base._status import Status
from implicitlayer.base._surroundings import plain_surroundings
from implicitlayer.base._tree import leaves_norm, positive, ravel, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._jacobian import Jacobian, OperatorFamily, pull_tensors
from implicitlayer.equation._residual import Residual
from implicitlayer.linear._cg import ConjugateGradient
from implicitlayer.linear._common import lane_norm, select
from implicitlayer.linear._gmres import Gmres
from implicitlayer.linear._minres import Minres
from implicitlayer.linear._operator import FlatOperator

_USABLE = int(Status.STAGNATED)


@dataclass(frozen=True)
class Assumptions:
    """What the user knows of a problem near its solution; makes ``record.gradient_error`` a rigorous bound.

    All must hold on the segment from the solver's answer to the exact solution, for every lane. A bound needs
    ``strong_convexity``; where the inner solve is not exact also ``hessian_lipschitz``, ``mixed_bound`` and
    ``mixed_lipschitz``. What is missing makes the record fall back to an estimate that names it.

    Args:
        strong_convexity: mu > 0, smallest eigenvalue of the Hessian of the objective in x, at least; for a root, of
            the symmetric part of the Jacobian.
        hessian_lipschitz: rho >= 0, Lipschitz constant of that Hessian (Jacobian) in x, spectral norm.
        cotangent_lipschitz: L >= 0, Lipschitz constant in x of the cotangent: the outer loss is L-smooth. 0 gives the
            error for the cotangent as it is.
        mixed_bound: C >= 0, bound of the spectral norm of the mixed derivative d^2 f / dtheta dx, for all theta that
            require a gradient. A proximal objective with a fixed strength knows its own (the strength).
        mixed_lipschitz: Lipschitz constant of that mixed derivative in x.

    Raises:
        ValueError: a constant that is negative or NaN, or a ``strong_convexity`` that is not positive.

    Source: Rajeswaran et al. 2019 (arXiv:1909.04630), Lemma 3; the bound B of the outer gradient there is replaced by
    the norms that were met, which are never larger.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.argmin(  # f = x'x - t'x is 2-strongly convex, quadratic, with mixed derivative -1: x = t/2
        ...     lambda x, t: (x**2).sum() - t @ x, lambda f, x, t: 0.5 * t + 1e-6,
        ...     assumptions=il.Assumptions(2.0, hessian_lipschitz=0, mixed_bound=1, mixed_lipschitz=0))
        >>> t = torch.ones(2, dtype=torch.float64, requires_grad=True)
        >>> with il.diagnostics() as records:
        ...     layer(torch.zeros(2, dtype=torch.float64), t).sum().backward()
        >>> records[1].gradient_error.rigorous, f"{float(records[1].gradient_error.distance):.2g}"
        (True, '1.4e-06')
    """

    strong_convexity: float
    hessian_lipschitz: float | None = None
    cotangent_lipschitz: float = 0.0
    mixed_bound: float | None = None
    mixed_lipschitz: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.strong_convexity < math.inf:
            raise ValueError(
                f"strong_convexity={self.strong_convexity} must be positive and finite: without it there is no "
                "bound. Leave the assumptions out for an estimate."
            )
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{field.name}={value} must be non-negative and finite.")


def gradient_error(
    assumptions: Assumptions | None,
    needed: tuple[bool, ...],
    family: OperatorFamily,
    tensors: Leaves,
    u: Leaves,
    v: Leaves,
) -> GradientError:
    """The error of ``g = -M'u`` as the derivative with cotangent v, bounded or estimated.

    ``family``: the matrix that was solved with, whose damping or Gauss-Newton curvature counts as an error too.
    """
    assert isinstance(family, Jacobian)
    exact = Jacobian(family.residual, family.num_x, family.transposed, watch=family.watch)
    with plain_surroundings(tensors), torch.enable_grad():
        point = _Point(exact, needed, [t.detach() for t in tensors], [t.detach() for t in u])
        r = ravel([t.detach() for t in v], exact.lane_dims) - point.applied
        if assumptions is None:
            return _estimate(point, r, "no assumptions were given")
        return _bound(assumptions, point, r)


class _Point:
    """F, J'u and M'u at one point x, for one u."""

    def __init__(self, family: Jacobian, needed: tuple[bool, ...], tensors: Leaves, u: Leaves) -> None:
        self.family, self.needed, self.u = family, needed, u
        k = family.num_x
        self.x, self.theta = tensors[:k], tensors[k:]
        self.residual: Residual = family.residual
        self.lane_dims = family.lane_dims
        transposed: Jacobian = family if family.residual.is_gradient else replace(family, transposed=True)
        self.matrix = transposed.linearize(tensors)
        symmetric = family.residual.is_gradient  # then one linearisation serves both
        self.jacobian = self.matrix if symmetric else replace(family, transposed=False).linearize(tensors)
        self.applied = self.matrix(ravel(u, self.lane_dims))
        self.identities = [(t.data_ptr() or id(t), t.shape, t.stride()) for t in self.theta]

    @property
    def stationarity(self) -> torch.Tensor:
        """F(x), flat [*lanes, n]."""
        return ravel([leaf.detach() for leaf in self.residual(self.x, self.theta)], self.lane_dims)

    def moved(self, step: torch.Tensor) -> _Point:
        """The point x - step."""
        x = unravel(ravel(self.x, self.lane_dims) - step, self.x, self.lane_dims)
        return _Point(replace(self.family, watch=None), self.needed, [*x, *self.theta], self.u)  # F is another there

    def mixed(self, vector: torch.Tensor) -> Leaves:
        """M'vector for one vector per lane, in the theta leaves that are needed."""
        pulled = pull_tensors(
            lambda t: self.residual(self.x, t), self.theta, self.needed, unravel(vector, self.x, self.lane_dims)
        )
        # one tensor given as two thetas has one gradient, the sum
        gradients: dict[Any, torch.Tensor] = {}
        for index, leaf in enumerate(pulled):
            if leaf is not None:
                key = self.identities[index]
                gradients[key] = leaf.detach() + gradients[key] if key in gradients else leaf.detach()
        return list(gradients.values())

    def lane_masks(self) -> Iterator[torch.Tensor]:
        """One mask [*lanes] per lane: lanes may share a theta, so what each sends into it is asked for alone."""
        lanes = self.x[0].shape[: self.lane_dims]
        for lane in range(lanes.numel()):
            mask = torch.zeros(lanes.numel(), dtype=torch.bool, device=self.x[0].device)
            mask[lane] = True
            yield mask.reshape(lanes)

    def per_lane(self, norms: list[torch.Tensor]) -> torch.Tensor:
        """Numbers of all lanes, in their order, as [*lanes] float64."""
        lanes = self.x[0].shape[: self.lane_dims]
        return torch.stack(norms).reshape(lanes) if norms else self.x[0].new_zeros(lanes, dtype=torch.float64)

    @property
    def gradient_norm(self) -> torch.Tensor:
        u = ravel(self.u, self.lane_dims)
        return self.per_lane([_norm(self.mixed(select(mask, u))) for mask in self.lane_masks()])


def _estimate(point: _Point, r: torch.Tensor, reason: str) -> GradientError:
    eps = torch.finfo(r.dtype).eps
    step, solved = _roughly(point.jacobian, point.stationarity, point.residual.is_gradient)
    there = point.moved(step)
    e1, solved1 = _roughly(there.matrix, r, point.residual.is_gradient)
    e2, solved2 = _roughly(there.matrix, point.applied - there.applied, point.residual.is_gradient)
    u = ravel(point.u, point.lane_dims)

    # M' is linear: three pull-backs per lane make all four norms
    sizes, inners, linears, totals = [], [], [], []
    for mask in point.lane_masks():
        here = point.mixed(select(mask, u))
        linear = there.mixed(select(mask, e1))
        inner = [a - b for a, b in zip(there.mixed(select(mask, e2 + u)), here, strict=True)]
        sizes.append(_norm(here))
        inners.append(_norm(inner))
        linears.append(_norm(linear))
        totals.append(_norm([a + b for a, b in zip(linear, inner, strict=True)]))
    size = point.per_lane(sizes)
    known = solved & solved1 & solved2
    total = point.per_lane(totals) + eps * size  # what rounding alone does
    return GradientError(
        total=torch.where(known, total, math.inf),
        inner=torch.where(known, point.per_lane(inners), math.inf),
        linear=torch.where(known, point.per_lane(linears), math.inf),
        distance=torch.where(solved, lane_norm(step), math.inf),
        relative=torch.where(known, total / positive(size), math.inf),
        rigorous=False,
        note=f"an estimate by one Newton step, because {reason}"
        + ("" if bool(known.all()) else "; infinite where the systems behind it could not be solved"),
    )


def _bound(given: Assumptions, point: _Point, r: torch.Tensor) -> GradientError:
    mu = given.strong_convexity
    residual_norm = lane_norm(r) + _rounding(point, r)
    distance = lane_norm(point.stationarity) / mu
    mixed_bound, mixed_lipschitz = given.mixed_bound, given.mixed_lipschitz
    strength = _known_strength(point)
    if strength is not None:
        mixed_bound = strength if mixed_bound is None else mixed_bound
        mixed_lipschitz = 0.0 if mixed_lipschitz is None else mixed_lipschitz
    lipschitz = given.hessian_lipschitz
    missing = ["mixed_bound"] if mixed_bound is None else []
    if bool((distance > 0).any()):
        missing += ["hessian_lipschitz"] if lipschitz is None else []
        missing += ["mixed_lipschitz"] if mixed_lipschitz is None else []
    if missing or mixed_bound is None:
        return _estimate(point, r, f"il.Assumptions lacks {', '.join(missing)}")
    omega = lane_norm(ravel(point.u, point.lane_dims)) + residual_norm / mu
    linear = mixed_bound * residual_norm / mu
    slope = (
        mixed_bound * ((lipschitz or 0.0) * omega + given.cotangent_lipschitz) / mu + (mixed_lipschitz or 0.0) * omega
    )
    size = point.gradient_norm
    # an exact inner solve has no inner part, whatever the constants
    inner = torch.where(distance > 0, slope * distance, 0.0)
    # the constants are for the stacked gradients; where one tensor stands in k places, its gradient is their sum
    counted = Counter(key for key, needed in zip(point.identities, point.needed, strict=True) if needed)
    repeated = max(counted.values(), default=1) ** 0.5
    inner, linear = repeated * inner, repeated * linear
    return GradientError(
        total=inner + linear,
        inner=inner,
        linear=linear,
        distance=distance,
        relative=(inner + linear) / positive(size),
        rigorous=True,
        note="a bound under the layer's il.Assumptions, up to rounding",
    )


def _known_strength(point: _Point) -> float | None:
    """||Lambda|| where theta acts through a proximal term 1/2 |x - theta|^2_Lambda alone: the mixed derivative."""
    parts, over_lanes = point.residual.parts, point.residual.over_lanes
    if parts.coupling is None or any(point.needed[parts.num_coupled :]):
        return None
    matrix = over_lanes(parts.metric_matrix)(point.x, point.theta) if parts.metric_matrix is not None else []
    if matrix:
        return float(torch.linalg.matrix_norm(matrix[0].double(), 2).max())
    diagonal = over_lanes(parts.metric)(point.x, point.theta) if parts.metric is not None else []
    return max((float(leaf.max()) for leaf in diagonal if leaf.numel()), default=None)


def _norm(leaves: Leaves) -> torch.Tensor:
    """Euclidean norm of all leaves together, 0-d float64."""
    return leaves_norm(leaves, 0) if leaves else torch.zeros((), dtype=torch.float64)


def _rounding(point: _Point, r: torch.Tensor) -> torch.Tensor:
    """What rounding may hide in a recomputed residual: eps (||v|| + ||J'u||), a few times over."""
    eps = torch.finfo(r.dtype).eps
    return 4 * eps * (2 * lane_norm(point.applied) + lane_norm(r))


def _roughly(operator: FlatOperator, rhs: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A solution with a few digits, and where there is one; [*lanes, n] and bool [*lanes]."""
    rtol = max(1e-6, math.sqrt(torch.finfo(rhs.dtype).eps))
    if not symmetric:
        solution = Gmres(rtol=rtol)(operator, rhs)
        return solution.value, solution.codes <= _USABLE
    solution = ConjugateGradient(rtol=rtol)(operator, rhs)
    good = solution.codes <= _USABLE
    if bool(good.all()):
        return solution.value, good
    other = Minres(rtol=rtol)(operator, rhs)
    return select(good, solution.value, other.value), good | (other.codes <= _USABLE)
