"""Checks before a solver's first step, objectives, steps and momentum on leaves [*lanes, ...], forms of a step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch

from implicitlayer import _torch
from implicitlayer._errors import ObjectiveError
from implicitlayer.base._failures import over_lanes
from implicitlayer.base._tree import TreeSpec, flatten, lane_reduce, leaves_like, leaves_norm, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._residual import gauss_newton_of, no_graph, not_floating, pull_back
from implicitlayer.equation._traced import TracedProblem
from implicitlayer.linear._operator import lane_scale


def check_unknowns(leaves: Sequence[Any]) -> None:
    """Raise TypeError unless every leaf of init is a real floating tensor."""
    for leaf in leaves:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, torch.Tensor) else type(leaf).__name__
            raise TypeError(f"init holds {kind}; the unknowns must be real floating tensors. Use torch.as_tensor(...).")


def check_num_steps(max_steps: Any) -> None:
    """Raise TypeError unless ``max_steps`` is a whole number; its sign is for the caller."""
    if isinstance(max_steps, bool) or not isinstance(max_steps, int):
        raise TypeError(f"max_steps={max_steps!r} must be an integer: it counts steps.")


def check_limits(solver: Any) -> None:
    """Raise ValueError for a negative limit or tolerance among those that the solver has."""
    for name in ("max_steps", "rtol", "atol", "batch_dims"):
        if not getattr(solver, name, 0) >= 0:
            raise ValueError(f"{name}={getattr(solver, name)} must be non-negative.")


def check_attached(value: Any, single: bool = False) -> None:
    """Raise ObjectiveError unless autograd can see how ``value`` depends on x (``single``: and it is one number)."""
    if not isinstance(value, torch.Tensor):
        raise not_floating(value)
    if not value.requires_grad:
        raise no_graph()
    if single and value.ndim:
        raise ObjectiveError(
            f"the objective must return a 0-d tensor: this solver sees one problem at a time, and got values of shape "
            f"{tuple(value.shape)}. Sum or average over the data, or let a layer with batch_dims call it lane by lane."
        )


def value_and_gradient(
    objective: Callable[..., Any], x: Leaves, spec: Any, theta: Any, create_graph: bool = False
) -> tuple[torch.Tensor, Leaves]:
    """Value per lane, and gradient of the sum over lanes (lanes are independent).

    An objective that knows its gradient is asked for it: ``objective.value_and_gradient(x, *theta)``, or None.
    """
    if not create_graph and hasattr(objective, "value_and_gradient"):
        known = objective.value_and_gradient(unflatten(x, spec), *theta)
        if known is not None:
            return known[0], flatten(known[1])[0]
    with torch.enable_grad():
        points = x if create_graph else [leaf.detach().requires_grad_() for leaf in x]
        value = objective(unflatten(points, spec), *theta)
        check_attached(value)
        total = value.sum() if value.ndim else value
        gradient = torch.autograd.grad(total, points, create_graph=create_graph, materialize_grads=True)
    return value.detach(), list(gradient)


def lanes_as(per_lane: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """[*lanes] as [*lanes, 1, ...] in the leaf's dtype, to be multiplied with it."""
    return over_lanes(per_lane, leaf).to(leaf.dtype)


def minus(a: Leaves, b: Leaves) -> Leaves:
    return list(_torch.foreach_sub(a, b))


def add(x: Leaves, direction: Leaves, factor: float | torch.Tensor) -> Leaves:
    """x + factor * direction, with one factor for all or one per lane."""
    if isinstance(factor, torch.Tensor):
        return [torch.addcmul(a, lanes_as(factor, a), b) for a, b in zip(x, direction, strict=True)]
    return list(_torch.foreach_add(x, direction, alpha=factor))


def choose(mask: torch.Tensor | None, new: Leaves, old: Leaves) -> Leaves:
    """The new leaves in the lanes of ``mask``, the old ones in all others; all are new where there is no mask."""
    if mask is None:
        return new
    return [torch.where(over_lanes(mask, a), a, b) for a, b in zip(new, old, strict=True)]


class Momentum:
    """The factor m of each step: constant with mu, else Nesterov's sequence with restarts, per lane."""

    STATE = ("t",)

    def __init__(self, strong_convexity: float | None, t: torch.Tensor | None = None) -> None:
        self.mu, self.t = strong_convexity, t  # None: ones

    def next(
        self, uphill: Callable[[], torch.Tensor], curvature: float | torch.Tensor, made: torch.Tensor | None = None
    ) -> float | torch.Tensor:
        """The factor of the step that has been made, in the lanes of ``made`` (None: in all).

        ``uphill()``: lanes, bool, where it led against its gradient.
        """
        if self.mu is not None:
            root = (curvature / self.mu) ** 0.5
            return (root - 1) / (root + 1)
        back = uphill()
        t = torch.ones_like(back, dtype=torch.float64) if self.t is None else self.t
        t_next = (1 + (1 + 4 * t * t).sqrt()) / 2
        after = torch.where(back, 1.0, t_next)
        self.t = after if made is None else torch.where(made, after, t)
        return torch.where(back, 0.0, (t - 1) / t_next)


def cosine(a: Leaves, b: Leaves, sizes: tuple[torch.Tensor, torch.Tensor], lane_dims: int) -> torch.Tensor:
    """Inner product, float64 [*lanes], of leaves over their sizes [*lanes]: it neither overflows nor underflows."""
    found = torch.zeros_like(sizes[0])
    for x, y in zip(a, b, strict=True):
        found = found + lane_reduce(((x / lanes_as(sizes[0], x)) * (y / lanes_as(sizes[1], y))).double(), lane_dims)
    return found


def leads_uphill(gradient: Leaves, change: Leaves, lane_dims: int) -> torch.Tensor:
    """Lanes, bool [*lanes], where the inner product is positive."""
    sizes = leaves_norm(gradient, lane_dims), leaves_norm(change, lane_dims)
    return cosine(gradient, change, sizes, lane_dims) > 0


Curvature = Literal["hessian", "gauss_newton"]
_WHO = 'curvature="gauss_newton"', 'curvature="hessian"'


class Problem(TracedProblem):
    """Values and gradients per lane, in units in which the largest entry of the first gradient is about 1.

    Squares of gradients near 1e-25 vanish in float32 and those near 1e200 overflow in float64, hence the units: a power
    of 2 per lane, which rounds nothing. Lanes are independent, so the gradient of the sum over them holds each one's.

    Args:
        objective, init, theta: as a solver gets them.
        curvature: which products :attr:`product` makes; None for none.
    """

    def __init__(
        self, objective: Callable[..., Any], init: Any, theta: tuple[Any, ...], curvature: Curvature | None = None
    ) -> None:
        leaves, self._spec = flatten(init)
        check_unknowns(leaves)
        self._objective, self.theta, self._curvature = objective, theta, curvature
        self._like = [leaf.detach() for leaf in leaves]
        self._composite = composite_of(objective, *_WHO) if curvature == "gauss_newton" else None
        self._pull: Callable[[Leaves], Leaves] | None = None  # the curvature's products, at the point evaluated last
        value, gradient = self._evaluate(self._like)
        self.lane_dims, self.dtype = value.ndim, value.dtype
        shapes = [tuple(leaf.shape) for leaf in self._like]
        if any(shape[: value.ndim] != tuple(value.shape) for shape in shapes):
            raise ObjectiveError(
                "the objective must return a 0-d tensor, or one value per lane where every leaf of init has leading "
                f"dimensions of lanes: it returned shape {tuple(value.shape)} for leaves of shapes {shapes}. Sum or "
                "average over the data inside the objective."
            )
        self.start = ravel(self._like, self.lane_dims).clone()
        self.first_value, flat = value, ravel(gradient, self.lane_dims)
        self.scale = lane_scale(flat).log2().floor().exp2()  # [*lanes, 1]
        self.first_gradient = flat / self.scale

    def value_and_gradient(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient [*lanes, n] and value [*lanes], without a unit."""
        value, gradient = self._evaluate(unravel(x, self._like, self.lane_dims))
        return ravel(gradient, self.lane_dims), value

    def curvature(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """The Hessian at x times a vector, both [*lanes, n], without a unit."""
        points = [leaf.detach().requires_grad_() for leaf in unravel(x, self._like, self.lane_dims)]
        _, gradient = value_and_gradient(self._objective, points, self._spec, self.theta, create_graph=True)
        return ravel(pull_back(gradient, points, unravel(vector, self._like, self.lane_dims)), self.lane_dims)

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """The curvature at the point evaluated last, times a vector [*lanes, n], in units of :attr:`unit`."""
        assert self._pull is not None
        with torch.enable_grad():
            return ravel(self._pull(unravel(vector, self._like, self.lane_dims)), self.lane_dims) / self.scale

    def _evaluate(self, leaves: Leaves) -> tuple[torch.Tensor, Leaves]:
        parts, theta = self._composite, self.theta
        keep = self._curvature is not None and parts is None
        points = [leaf.detach().requires_grad_(keep) for leaf in leaves]
        value, gradient = value_and_gradient(self._objective, points, self._spec, theta, create_graph=keep)
        if keep:
            self._pull = partial(pull_back, gradient, points)
        elif parts is not None:
            model, loss = lambda x: parts.model(unflatten(x, self._spec), *theta), lambda o: parts.loss(o, *theta)
            self._pull = gauss_newton_of(model, loss, points)
        return value, [g.detach() for g in gradient]


def composite_of(objective: Callable[..., Any], who: str, other: str) -> Any:
    """The loss and the model of an objective that tells them, or an error: ``who`` needs them, ``other`` does not."""
    composite = objective.as_composite() if hasattr(objective, "as_composite") else None
    if composite is None:
        raise ObjectiveError(
            f"{who} needs an objective that says what its model is: il.least_squares(residuals) or "
            f"il.composite(loss, model). With any other, use {other}."
        )
    return composite


# Legend: x <- x - P g with the gradient g; P is a I, a diagonal, or a matrix over the n entries of one problem.

StepSize = Any

# A solver does not import the layers above it: il.MatrixStrength is what has ``dense()``, il.OperatorStrength what has
# ``product``.


def present(step_size: StepSize) -> StepSize:
    """The step size now: a callable without arguments, such as ``il.LearnedStrength``, is asked."""
    return step_size() if callable(step_size) else step_size


def check_step_size(step_size: StepSize) -> None:
    """Raise ValueError unless every number is positive, and every fixed tensor or entry of a tree non-negative.

    Zero freezes what it belongs to. A tensor that requires a gradient may have any sign: Meta-SGD learns it freely.
    """
    if callable(step_size) or hasattr(step_size, "dense") or hasattr(step_size, "product"):
        return
    if isinstance(step_size, int | float):
        if not step_size > 0:
            raise ValueError(f"step_size={step_size} must be positive.")
        return
    leaves = flatten(step_size)[0]
    for leaf in leaves:
        if isinstance(leaf, bool) or not isinstance(leaf, int | float | torch.Tensor):
            raise ValueError(
                f"step_size holds {type(leaf).__name__}; it must be a number, a tensor, a pytree of these like the "
                "unknowns, an il.MatrixStrength, or a callable without arguments that returns one of them."
            )
        if isinstance(leaf, torch.Tensor):
            fine = bool(leaf.isfinite().all()) and (leaf.requires_grad or bool((leaf >= 0).all()))
        else:
            fine = 0 <= leaf < math.inf
        if not fine:
            raise ValueError(f"step_size={leaf} must be finite and non-negative: a negative one goes uphill.")


def moves(step_size: StepSize, gradient: Leaves, spec: TreeSpec, lane_dims: int) -> Leaves:
    """P g, differentiable in a step size that requires a gradient.

    Args:
        step_size: a number or 0-d tensor; a tensor that broadcasts to every leaf; a pytree like the unknowns of these;
            a matrix [n, n] over the entries of one lane, in the order of the leaves; an operator on one lane.
        gradient: leaves [*lanes, ...].
        spec: structure of the unknowns.
        lane_dims: number of lanes' dimensions.

    Raises:
        ValueError: another structure, or a shape that does not fit.
    """
    if isinstance(step_size, int | float):
        return list(_torch.foreach_mul(gradient, float(step_size)))
    if isinstance(step_size, torch.Tensor):
        return [_times(step_size, g) for g in gradient]
    if hasattr(step_size, "dense"):
        flat, matrix = ravel(gradient, lane_dims), step_size.dense()
        if matrix.shape[-1] != flat.shape[-1]:
            raise ValueError(
                f"step_size is a matrix for {matrix.shape[-1]} entries, but there are {flat.shape[-1]} unknowns (per "
                "task)."
            )
        return unravel(flat @ matrix.mT.to(flat.dtype), gradient, lane_dims)
    if hasattr(step_size, "product"):
        product = step_size.product
        for _ in range(lane_dims):
            product = torch.vmap(product)
        moved, moved_spec = flatten(product(unflatten(gradient, spec)))
        if moved_spec != spec or [m.shape for m in moved] != [g.shape for g in gradient]:
            raise ValueError("the product of a step_size must return the structure and shapes of the unknowns.")
        return moved
    tree = unflatten(gradient, spec)
    entries = leaves_like(step_size, tree, "step_size must be one number or have the structure of the unknowns")
    return [_times(a, g) for a, g in zip(entries, gradient, strict=True)]


def _times(factor: float | torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    if not isinstance(factor, torch.Tensor):
        return leaf * factor
    try:
        wide = factor.to(leaf.dtype).expand(leaf.shape)
    except RuntimeError:
        raise ValueError(
            f"step_size of shape {tuple(factor.shape)} does not broadcast to unknowns of shape {tuple(leaf.shape)} "
            "(lanes included). Give a number, or a pytree with one entry per tensor."
        ) from None
    return leaf * wide
