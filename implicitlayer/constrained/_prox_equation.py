"""The equation behind a layer over a set or with a regulariser: x is the prox of a gradient step from x."""

# x* = argmin f(x, theta) + r(x), with r convex (infinite outside of a set), if and only if
#     x* = prox_{eta r}(x* - eta grad f(x*, theta))    for any step eta > 0.
# So the layer is a root layer of F(x, theta) = x - prox_{eta r}(y),  y = x - eta grad_x f(x, theta). With P the
# derivative of the prox, dF/dx = I - P (I - eta H): the identity where the prox holds an entry, eta H where it lets it
# go, so the linear solve works on the free entries only. x*(theta) does not depend on eta, hence neither does any
# derivative of it: eta is a constant to them. The conditioning does depend on it; eta = 1 / (curvature) makes eta H of
# the size of I.
#
# NOTE [one eta]: J and dF/dtheta must be made with the same eta. The composable rules take it from the explicit tensors
# each time, the same function of the same numbers. A plain backward takes both from one graph, so it may use the eta
# that the checks of the forward solve have found, and pays no product for it.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar

import torch

from implicitlayer import _torch
from implicitlayer.base._tree import TreeSpec, flatten, positive, ravel, unflatten, unravel
from implicitlayer.base._types import FlatFunction, Leaves
from implicitlayer.equation._capture import ClosedOver
from implicitlayer.equation._flat import Reading
from implicitlayer.equation._residual import Attached, Residual, check_value, no_graph, pull_back, pullback
from implicitlayer.equation._state import edges_into
from implicitlayer.sets._term import expand_like, largest_of, resolve, signs

# A solution may be zero, and an answer near it as far from it, or outside of the set, as its solver's rounding:
# distances are then compared with this power of eps times the size of y (6e-6 of it in float64).
FLOOR = 1 / 3

# (x leaves, theta leaves, what is read of closed-over tensors) -> value per lane, or leaves
ReadingFunction = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class ProxProblem:
    """Objective and term on the user's structures, for one lane of every vmap level; to be differentiated at will."""

    function: Callable[..., Any]
    terms: Any
    name: str
    lane_dims: int
    step_size: float | None

    def value(self, x: Any, *theta: Any) -> torch.Tensor:
        """The objective."""
        value = self.function(x, *theta)
        check_value(value, flatten(x)[0][0].shape[: self.lane_dims], self.lane_dims > 0)
        result: torch.Tensor = value
        return result

    def near(self, y: Any, step: torch.Tensor, *theta: Any) -> Any:
        """prox(y), in the structure of y."""
        return resolve(self.terms, theta, self.name).prox(y, step, self.lane_dims)

    def residual(self, x: Any, *theta: Any) -> Any:
        """F = x - prox(x - eta grad f(x))."""
        leaves, spec = flatten(x)
        gradient = self._gradient(spec, theta)
        slope = gradient(leaves)
        step = self._step(gradient, leaves, slope)
        near = flatten(self.near(unflatten(moved(leaves, slope, step), spec), step, *theta))[0]
        return unflatten([v - p for v, p in zip(leaves, near, strict=True)], spec)

    def near_and_diagonal(self, y: Any, step: torch.Tensor, *theta: Any) -> Leaves:
        """Leaves of prox(y) and, where the term tells it, of the diagonal of its derivative."""
        term = resolve(self.terms, theta, self.name)
        leaves, spec = flatten(y)
        with torch.no_grad():
            diagonal = term.diagonal(unflatten([v.detach() for v in leaves], spec), step, self.lane_dims)
        near = flatten(term.prox(y, step, self.lane_dims))[0]
        return near if diagonal is None else [*near, *flatten(diagonal)[0]]

    def report(self, x: Any, y: Any, step: torch.Tensor, *theta: Any) -> Leaves:
        """Masks of active entries, distances from kinks; per lane the size of what matters of y, and the violation."""
        term = resolve(self.terms, theta, self.name)
        held, margins = term.activity(y, step, self.lane_dims)
        sizes = [term.magnitude(y, self.lane_dims), term.violation(x, self.lane_dims)]
        return [*flatten(held)[0], *flatten(margins)[0], *sizes]

    def _gradient(self, spec: TreeSpec, theta: tuple[Any, ...]) -> Callable[[Leaves], Leaves]:
        """x leaves -> grad f leaves (of the sum over lanes, which are independent)."""
        return lambda x: list(torch.func.grad(lambda p: self.value(unflatten(p, spec), *theta).sum())(x))

    def _step(self, gradient: Callable[[Leaves], Leaves], x: Leaves, slope: Leaves) -> torch.Tensor:
        if self.step_size is not None:
            return x[0].new_full(x[0].shape[: self.lane_dims], self.step_size)
        here = [v.detach() for v in x]
        return step_of(here, slope, pullback(gradient, here, signs(here)), self.lane_dims)


def moved(x: Leaves, slope: Leaves, step: torch.Tensor) -> Leaves:
    """y = x - eta grad f."""
    return [v - expand_like(step, v) * g for v, g in zip(x, slope, strict=True)]


def step_of(x: Leaves, slope: Leaves, product: Leaves, lane_dims: int) -> torch.Tensor:
    """eta [*lanes], a constant: ||d|| / ||H d|| from the product of H with a direction d of signs.

    Where the objective is linear along d, any eta will do: the size of x over that of the gradient.
    """
    flat, pull, curved = (ravel([leaf.detach() for leaf in part], lane_dims) for part in (x, slope, product))
    curvature = curved.norm(dim=-1) / max(curved.shape[-1], 1) ** 0.5
    sizes = flat.norm(dim=-1), pull.norm(dim=-1)
    fallback = torch.where((sizes[0] > 0) & (sizes[1] > 0), sizes[0] / torch.where(sizes[1] > 0, sizes[1], 1.0), 1.0)
    bent = (curvature > 0) & curvature.isfinite()
    return torch.where(bent, 1 / torch.where(bent, curvature, 1.0), fallback).detach()


@dataclass(frozen=True, eq=False)
class At(Attached):
    """F at a point, its pieces, and their graph, which several checks share.

    Attributes:
        lane_dims, num_levels: leading dimensions that are lanes, and those of them that the function does not see.
        report_of: ``([*x leaves, *y leaves, step], theta leaves) -> leaves``: see :meth:`ProxProblem.report`.
        x: the tensors that were given.
        detached: whether the objective does not depend on x as far as autograd sees.
        slope, y, near: grad f, x - eta grad f and its prox, leaves with a graph.
        diagonal: of P, the derivative of the prox; None where that is no diagonal matrix, or not written out.
        step: eta [*lanes], a constant.
    """

    lane_dims: int
    num_levels: int
    report_of: FlatFunction
    x: Leaves
    detached: bool
    slope: Leaves
    y: Leaves
    near: Leaves
    diagonal: Leaves | None
    step: torch.Tensor

    @property
    def edges(self) -> dict[int, int]:
        """Those of the objective, and of the prox but for those of its argument."""
        edges, of_prox = edges_into(self.outputs[:1]), edges_into(self.near, stop=self.y)
        return {key: edges.get(key, 0) + of_prox.get(key, 0) for key in {**edges, **of_prox}}

    @cached_property
    def _steps(self) -> Leaves:
        return [expand_like(self.step, leaf) for leaf in self.points]

    @cached_property
    def report(self) -> Leaves:
        """See :meth:`ProxProblem.report`; of all lanes."""
        with torch.no_grad():
            arguments = [*self.x, *(leaf.detach() for leaf in self.y), self.step]
            return list(self.report_of(arguments, self.theta))

    @cached_property
    def size(self) -> torch.Tensor:
        """The size [*lanes] of x and of the part of y that matters."""
        largest = largest_of(ravel(self.x, self.lane_dims))
        return torch.maximum(largest, self.report[2 * len(self.x)])

    def least_size(self) -> torch.Tensor:
        """A part of the size of y: x may be zero."""
        floor: torch.Tensor = torch.finfo(self.size.dtype).eps ** FLOOR * self.size
        return floor

    def project(self, u: Leaves) -> Leaves:
        """P u; P is symmetric."""
        if self.diagonal is None:
            return pull_back(self.near, self.y, u)
        return [d * v for d, v in zip(self.diagonal, u, strict=True)]

    def curve(self, u: Leaves) -> Leaves:
        """eta H u."""
        curved = pull_back(self.slope, self.points, u)
        return [step * leaf for step, leaf in zip(self._steps, curved, strict=True)]

    def pull(self, u: Leaves) -> Leaves:
        """J'u = u - p + eta H p with p = P u."""
        return self._pulled(u, self.project(u))

    def _pulled(self, u: Leaves, p: Leaves) -> Leaves:
        return [a - b + c for a, b, c in zip(u, p, self.curve(p), strict=True)]

    def bend(self) -> torch.Tensor:
        """Cosine [*lanes] between p = P w and J'w; see NOTE [second-order condition]. One product."""
        w = signs(self.x, self.num_levels)
        p = self.project(w)
        flat = [ravel(part, self.lane_dims) for part in (p, self._pulled(w, p))]
        flat = [part / positive(largest_of(part)).unsqueeze(-1) for part in flat]
        cosine = (flat[0] * flat[1]).sum(-1) / positive(flat[0].norm(dim=-1) * flat[1].norm(dim=-1))
        if not bool((cosine < 0).any()):
            return cosine
        # at a corner P is zero, and what is left of p is its rounding: no direction, as P p, a rounding of it, shows
        again = ravel(self.project(unravel(flat[0], self.x, self.lane_dims)), self.lane_dims)
        kept = again.norm(dim=-1) > torch.finfo(again.dtype).eps ** 0.5 * flat[0].norm(dim=-1)
        return torch.where(kept, cosine, 1.0)


@dataclass(eq=False)
class OfCall:
    """The eta that the checks of a call leave for its plain backwards; see NOTE [one eta]."""

    step: torch.Tensor | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class ProxResidual(Residual):
    """F with its pieces, for checks and backwards that no transform sees.

    Attributes:
        objective: the objective of one lane.
        near: ``([*y leaves, step], theta leaves, reading) -> leaves`` of prox(y) and of the diagonal, of one lane.
        report: ``([*x leaves, *y leaves, step], theta leaves) -> leaves``, of one lane.
        closed: what objective and term close over.
        step_size: eta, where the user has fixed it.
    """

    objective: ReadingFunction
    near: ReadingFunction
    report: FlatFunction
    closed: ClosedOver
    step_size: float | None
    of_call: OfCall = field(default_factory=OfCall)

    is_fixed_point: ClassVar[bool] = True

    def attached(self, x: Leaves, theta: Leaves) -> At:
        """F and its pieces at plain tensors."""
        with torch.enable_grad():
            return self._at([leaf.detach().requires_grad_() for leaf in x], theta, x)

    def leaves_piece(self, x: Leaves, theta: Leaves, step: Leaves) -> torch.Tensor:
        """Whether the term holds other entries at x - step."""
        moved_x = [a - b for a, b in zip(x, step, strict=True)]
        with torch.enable_grad():
            here, there = (self._at([v.detach().requires_grad_() for v in at], theta, at) for at in (x, moved_x))
        changed = [a != b for a, b in zip(here.report[: len(x)], there.report[: len(x)], strict=True)]
        return ravel(changed, self.lane_dims).any(-1)

    def kept_graph_gradient(self, x: Leaves, theta: Leaves) -> Leaves:
        """F by plain autograd from points that require a gradient."""
        at = self._at(x, theta, x)
        refuse_detached(at)
        return at.value

    def _at(self, points: Leaves, theta: Leaves, x: Leaves) -> At:
        reading = Reading(self.closed)
        values: torch.Tensor = self.over_lanes(partial(self.objective, reading=reading))(points, theta)
        # an objective that does not depend on x is refused by :func:`refuse_detached`, where a derivative is wanted
        slopes: Sequence[torch.Tensor | None] = [None] * len(points)
        if values.requires_grad:
            slopes = torch.autograd.grad(values.sum(), points, create_graph=True, allow_unused=True)
        slope = [torch.zeros_like(v) if leaf is None else leaf for v, leaf in zip(points, slopes, strict=True)]
        step = self._step(points, slope)
        y = moved(points, slope, step)
        told: Leaves = self.over_lanes(partial(self.near, reading=reading))([*y, step], theta)
        near, diagonal = told[: len(y)], told[len(y) :] or None
        reading.finish()
        value = [v - p for v, p in zip(points, near, strict=True)]
        # no reference to this residual: a circle would keep the tensors until the garbage collector comes
        lanes = self.lane_dims, len(self.levels), self.over_lanes(self.report)
        detached = all(leaf is None for leaf in slopes)
        # nor to x, which may become the layer's output and hold the graph that holds this
        here = [leaf.detach() for leaf in x]
        return At(points, theta, value, [values, *near], *lanes, here, detached, slope, y, near, diagonal, step)

    def _step(self, points: Leaves, slope: Leaves) -> torch.Tensor:
        lanes, kept = points[0].shape[: self.lane_dims], self.of_call.step
        if self.step_size is not None:
            return points[0].detach().new_full(lanes, self.step_size)
        if kept is not None and kept.shape == lanes and not _torch.transforms_active():
            return kept
        product = pull_back(slope, points, signs(points, len(self.levels)))
        return step_of(points, slope, product, self.lane_dims)


def refuse_detached(at: At) -> None:
    """A gradient that autograd cannot see would make every point of the set a solution."""
    if at.detached:
        raise no_graph()
