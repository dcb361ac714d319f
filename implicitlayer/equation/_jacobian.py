"""Families of linear operators A(tensors): pure functions of explicit tensors, and their flat form for solvers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal, Protocol

import torch

from implicitlayer.base._tree import ravel, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._capture import plainly_impossible
from implicitlayer.equation._flat import NO_PARTS
from implicitlayer.equation._residual import Attached, Residual, flat_product, pullback, pushforward, vjp
from implicitlayer.linear._operator import FlatOperator

Curvature = Literal["hessian", "gauss_newton"]
Products = tuple[Callable[[torch.Tensor], torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]
Watch = Callable[[Residual, Leaves, Leaves, torch.Tensor], None]


class OperatorFamily(Protocol):
    """What the differentiable solve needs to know of A(tensors)."""

    @property
    def lane_dims(self) -> int:
        """Leading dimensions of u that enumerate independent systems."""

    def transpose(self) -> OperatorFamily:
        """The family of transposes."""

    def with_level(self, has_lanes: tuple[bool, ...], randomness: str) -> OperatorFamily:
        """One more outermost level of lanes, which the tensors marked True have."""

    def always_has_lanes(self, index: int) -> bool:
        """Whether tensor ``index`` needs the lanes of every level."""

    def product(self, u: Leaves, tensors: Leaves) -> Leaves:
        """A(tensors) u by torch.func, differentiable in both."""

    def linearize(self, tensors: Leaves) -> FlatOperator:
        """The flat operator at plain tensors."""

    def gauss_newton(self, tensors: Leaves) -> FlatOperator:
        """The same with the Gauss-Newton matrix, where there is one."""


@dataclass(frozen=True, eq=False)
class Jacobian:
    """A(x, theta) = dF/dx of a :class:`Residual` + damping, or its transpose, as a differentiable family of operators.

    ``curvature="gauss_newton"`` takes the Gauss-Newton matrix in place of the Hessian dF/dx.
    """

    residual: Residual
    num_x: int
    transposed: bool = True
    curvature: Curvature = "hessian"
    damping: float = 0.0
    watch: Watch | None = None  # sees F(x, theta), flat, whenever a solve linearises

    @cached_property
    def lane_dims(self) -> int:
        return self.residual.lane_dims

    def transpose(self) -> Jacobian:
        return self if self.residual.is_gradient else replace(self, transposed=not self.transposed)

    def with_level(self, has_lanes: tuple[bool, ...], randomness: str) -> Jacobian:
        return replace(self, residual=self.residual.with_level(has_lanes[self.num_x :], randomness))

    def always_has_lanes(self, index: int) -> bool:
        """Whether tensor ``index`` needs the lanes of every level (the unknowns do)."""
        return index < self.num_x

    def product(self, u: Leaves, tensors: Leaves) -> Leaves:
        """A(tensors) u by torch.func, differentiable in both."""
        x, theta = tensors[: self.num_x], tensors[self.num_x :]
        if self.curvature == "gauss_newton":
            product = self.residual.gauss_newton(x, theta)(u)
        elif self.transposed or self.residual.is_gradient:
            product = pullback(lambda x_: self.residual(x_, theta), x, u)
        else:
            product = pushforward(lambda x_: self.residual(x_, theta), x, u, like=x)
        return [p + self.damping * v for p, v in zip(product, u, strict=True)] if self.damping else list(product)

    def gauss_newton(self, tensors: Leaves) -> FlatOperator:
        """The flat operator with the Gauss-Newton matrix in place of the Hessian."""
        return replace(self, curvature="gauss_newton").linearize(tensors)

    def linearize(self, tensors: Leaves) -> FlatOperator:
        """The flat operator at plain tensors, its graph built at the first product and kept for all others."""
        x, theta = tensors[: self.num_x], tensors[self.num_x :]
        kept: list[Products] = []

        damping = self.damping

        def prepare() -> None:
            if not kept:
                kept.append(self._products(list(x), list(theta)))

        def times(transposed: bool) -> Callable[[torch.Tensor], torch.Tensor]:
            def product(vector: torch.Tensor) -> torch.Tensor:
                if not kept:
                    prepare()
                flat = kept[0][not transposed](vector)
                return flat + damping * vector if damping else flat

            return product

        pull = times(True)
        if self.residual.is_gradient:
            operator = FlatOperator(pull, pull, symmetric=True, prepare=prepare)
            return operator if self.residual.parts is NO_PARTS else self._with_metric(operator, x, theta)
        push = times(False)
        if self.transposed:
            return FlatOperator(pull, push, symmetric=False, prepare=prepare)
        return FlatOperator(push, pull, symmetric=False)

    def _products(self, x: Leaves, theta: Leaves) -> Products:
        """u -> J'u and u -> J u of flat vectors, from a graph that is kept."""
        lane_dims = self.lane_dims
        if self.curvature == "gauss_newton":
            product = self.residual.gauss_newton(x, theta, self._recordable(x, theta))
            return (flat_product(product, x, lane_dims),) * 2
        at = self._attached(x, theta)
        if at is not None:
            self._show(at.value, x, theta)
            return at.flat_pull(lane_dims), flat_product(lambda u: at.push(u), at.points, lane_dims)
        value, pull_all = vjp(lambda x_: self.residual.kept_graph_gradient(x_, theta), x)
        self._show(value, x, theta)
        push = partial(pushforward, lambda x_: self.residual(x_, theta), x, like=x)
        return flat_product(lambda u: list(pull_all(u)[0]), x, lane_dims), flat_product(push, x, lane_dims)

    def _attached(self, x: Leaves, theta: Leaves) -> Attached | None:
        """F with a plain graph; None where only torch.func is sure to see what is swapped for one lane of a level."""
        return self.residual.attached(x, theta) if self._recordable(x, theta) else None

    def _recordable(self, x: Leaves, theta: Leaves) -> bool:
        """Whether plain autograd sees all that is to be seen."""
        inference = torch.is_inference_mode_enabled() or any(t.is_inference() for t in (*x, *theta))
        return not (inference or plainly_impossible() or self.residual.levels)

    def _show(self, value: Leaves, x: Leaves, theta: Leaves) -> None:
        """Let the watch see F(x, theta)."""
        if self.watch is not None:
            self.watch(self.residual, x, theta, ravel([leaf.detach() for leaf in value], self.lane_dims))

    def _with_metric(self, operator: FlatOperator, x: Leaves, theta: Leaves) -> FlatOperator:
        """``operator`` with the metric that the objective knows."""
        diagonal: torch.Tensor | None = None
        if self.residual.parts.metric is not None:
            leaves = self.residual.over_lanes(self.residual.parts.metric)(x, theta)
            diagonal = inverse_diagonal(leaves, x, self.lane_dims)
        return replace(operator, inverse_metric=diagonal, metric_factor=self._metric_factor(x, theta))

    def _metric_factor(self, x: Leaves, theta: Leaves) -> torch.Tensor | None:
        """The Cholesky factor of a metric that is a full matrix; None where it is not positive definite."""
        if self.residual.parts.metric_matrix is None:
            return None
        found = self.residual.over_lanes(self.residual.parts.metric_matrix)(x, theta)
        if not found:
            return None
        matrix = found[0].to(x[0].dtype)
        factor, info = torch.linalg.cholesky_ex(matrix)
        pivots = factor.diagonal(dim1=-2, dim2=-1) ** 2
        # a semidefinite one has pivots of rounding: its inverse would be noise
        regular = bool((info == 0).all()) and bool(
            (pivots.amin(-1) > 1e3 * torch.finfo(matrix.dtype).eps * pivots.amax(-1)).all()
        )
        return factor if regular else None


# NOTE [one graph]: a plain backward asks for A and for the derivative in theta once each, at plain tensors. One run of
# the function, with a graph that reaches x and theta, has both: products with A pull back to x, and -(dF/dtheta)'u
# is one more pull-back of the same F. No level of torch.func is needed. The run is that of the forward pass's checks,
# which leave it to the first backward; a later one makes its own.


@dataclass(eq=False)
class Graph:
    """F at plain tensors with its graph: ``held``, or made when it is first asked for."""

    make: Callable[[], Attached]
    held: Attached | None = None

    def get(self) -> Attached:
        if self.held is None:
            self.held = self.make()
        return self.held


@dataclass(frozen=True, eq=False)
class OneGraph(Jacobian):
    """A reverse-mode :class:`Jacobian` at plain tensors whose graph reaches theta too; see NOTE [one graph]."""

    graph: Graph = field(kw_only=True)

    def _attached(self, x: Leaves, theta: Leaves) -> Attached | None:
        return self.graph.get()

    def pull_theta(self, needed: tuple[bool, ...], u: Leaves) -> list[torch.Tensor | None]:
        """(dF/dtheta)' u for the needed theta leaves, None for the others; u is one vector."""
        at = self.graph.get()
        pulled = at.pull_theta(unravel(u[0], at.points, self.lane_dims), needed)
        self.graph.held = None  # a record may hold this object; the graph has served
        return pulled


def inverse_diagonal(leaves: Leaves, x: Leaves, lane_dims: int) -> torch.Tensor | None:
    """The inverse of a positive diagonal that broadcasts to x, [*lanes, n] or [*lanes, 1]; None without leaves."""
    if not leaves:
        return None
    if all(leaf.ndim <= lane_dims for leaf in leaves) and all(leaf is leaves[0] for leaf in leaves):
        flat = leaves[0].expand(x[0].shape[:lane_dims]).unsqueeze(-1)
    else:
        flat = ravel([_as_lanes(leaf, like, lane_dims) for leaf, like in zip(leaves, x, strict=True)], lane_dims)
    return torch.where(flat > 0, 1 / flat, torch.ones_like(flat)).to(x[0].dtype)


def _as_lanes(leaf: torch.Tensor, like: torch.Tensor, lane_dims: int) -> torch.Tensor:
    """``leaf`` [*lanes or nothing, ...] expanded to ``like``."""
    if leaf.ndim <= lane_dims:
        leaf = leaf.reshape(*leaf.shape, *[1] * (like.ndim - leaf.ndim)) if leaf.ndim else leaf
    return leaf.expand(like.shape)


def pull_tensors(
    function: Callable[[Leaves], Leaves] | OneGraph, tensors: Leaves, needed: tuple[bool, ...], cotangent: Leaves
) -> list[torch.Tensor | None]:
    """Pull ``cotangent`` back through ``function`` to the floating tensors that need it; None for the others."""
    if isinstance(function, OneGraph):
        return function.pull_theta(needed, cotangent)
    chosen = [i for i, t in enumerate(tensors) if needed[i] and t.is_floating_point()]
    result: list[torch.Tensor | None] = [None] * len(tensors)
    if chosen:
        gradients = pullback(_restrict(function, tensors, chosen), [tensors[i] for i in chosen], cotangent)
        for i, gradient in zip(chosen, gradients, strict=True):
            result[i] = gradient
    return result


def push_tensors(
    function: Callable[[Leaves], Leaves],
    tensors: Leaves,
    tangents: Sequence[torch.Tensor | None],
    like: Leaves,
) -> Leaves | None:
    """Push the tangents that are there through ``function``, whose result is like ``like``; None if there is none."""
    chosen = [i for i, t in enumerate(tangents) if t is not None and tensors[i].is_floating_point()]
    if not chosen:
        return None
    directions = [t for i in chosen if (t := tangents[i]) is not None]
    return pushforward(_restrict(function, tensors, chosen), [tensors[i] for i in chosen], directions, like)


def _restrict(function: Callable[[Leaves], Leaves], tensors: Leaves, chosen: list[int]) -> Callable[[Leaves], Leaves]:
    """``function`` of the chosen tensors only, the others held fixed."""

    def restricted(some: Leaves) -> Leaves:
        full = list(tensors)
        for i, tensor in zip(chosen, some, strict=True):
            full[i] = tensor
        return function(full)

    return restricted
