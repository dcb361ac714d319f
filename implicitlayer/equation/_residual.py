"""The equation F(x, theta) = 0 behind a layer, as a pure function of flat lists of tensors, and its products."""

# F is the gradient of the objective (argmin) or the user's residual (root). `Attached` holds a plain graph of it, for
# first derivatives outside transforms; all else is written with torch.func only, so it can be differentiated and
# vmapped to any order.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, ClassVar

import torch

from implicitlayer._errors import ObjectiveError
from implicitlayer.base._tree import as_points, flatten, points_of, ravel, unflatten, unravel
from implicitlayer.base._types import FlatFunction, Leaves
from implicitlayer.equation._capture import plainly_impossible
from implicitlayer.equation._flat import NO_PARTS, Parts
from implicitlayer.equation._state import (
    edges_into,
    ends_of,
    leaves_of,
    other_leaves,
    refuse_backward_without_graph,
    refuse_hidden_tensors,
    unseen,
)

Randomness = str
# torch annotates its results as two or three values
vjp: Callable[..., Any] = torch.func.vjp


@dataclass(frozen=True, eq=False)
class Attached:
    """F at detached points, with a graph that reaches the points, and what requires a gradient of theta.

    Attributes:
        points: the leaves of x, detached, which require a gradient; of many leaves NOTE [one vector].
        theta: the leaves that the function was given.
        value: F, in the form of the points.
        outputs: what the function itself returned.
    """

    points: Leaves
    theta: Leaves
    value: Leaves
    outputs: Leaves

    @cached_property
    def ends(self) -> tuple[list[torch.Tensor], str, list[Any]]:
        """The leaves of the graph of the outputs, a flaw of its third derivative, and its custom Functions."""
        return ends_of(self.outputs)

    @property
    def edges(self) -> dict[int, int]:
        """The edges of one run's graph into each leaf, by id."""
        return edges_into(self.outputs)

    def pull(self, u: Leaves) -> Leaves:
        """(dF/dx)' u; the graph is kept."""
        return pull_back(self.value, self.points, u)

    def flat_pull(self, lane_dims: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """:meth:`pull` of flat vectors [*lanes, n]."""
        if type(self) is Attached and len(self.value) == 1 and self.value[0].requires_grad:
            value, points = self.value[0], self.points
            same = value.ndim == lane_dims + 1 and value.dtype is points[0].dtype

            def pull(vector: torch.Tensor) -> torch.Tensor:
                u = vector if same else vector.reshape(value.shape).to(value.dtype)
                (found,) = torch.autograd.grad(value, points, u, retain_graph=True, materialize_grads=True)
                return found if same else found.reshape(vector.shape)

            return pull
        return flat_product(self.pull, self.points, lane_dims)

    @cached_property
    def push(self) -> Callable[[Leaves], Leaves]:
        """u -> (dF/dx) u; made when it is first asked for."""
        with torch.enable_grad():
            return pushed(self.value, self.points)

    def pull_theta(self, u: Leaves, needed: Sequence[bool]) -> list[torch.Tensor | None]:
        """(dF/dtheta)' u for the needed leaves, None for the others; the graph is kept."""
        reached = [i for i, leaf in enumerate(self.theta) if needed[i] and leaf.requires_grad]
        found: list[torch.Tensor | None] = [None] * len(self.theta)
        if reached:
            pulled = pull_back(self.value, [self.theta[i] for i in reached], u)
            for i, leaf in zip(reached, pulled, strict=True):
                found[i] = leaf
        return found

    def least_size(self) -> torch.Tensor | None:
        """The least size [*lanes], in units of x, that a distance is compared with; None where none is known."""
        return None


WrittenOut = Callable[[Leaves, Leaves], Attached]


@dataclass(frozen=True, eq=False)
class Residual:
    """F(x, theta) with lanes.

    Attributes:
        function: objective ``(x leaves, theta leaves) -> tensor`` or residual ``-> leaves like x``, for one lane of
            every level of ``levels``.
        is_gradient: whether F is the gradient of ``function`` (then its Jacobian is symmetric).
        lane_dims_of_function: leading dimensions that ``function`` itself treats as lanes (``batch_dims``).
        levels: one entry per vmap level, outermost first: for each theta leaf whether it has that level's lanes. The
            leaves of x have the lanes of every level.
        parts: what the objective tells about itself.
        num_fixed: leaves at the end of theta that have no other values than those of the call.
        written_out: the products of F's derivatives at plain tensors, where somebody has written them out; only used
            without levels.
    """

    function: FlatFunction
    is_gradient: bool
    lane_dims_of_function: int = 0
    levels: tuple[tuple[tuple[bool, ...], Randomness], ...] = ()
    parts: Parts = NO_PARTS
    num_fixed: int = 0
    written_out: WrittenOut | None = None

    is_fixed_point: ClassVar[bool] = False  # whether x - F(x) is nearer to the solution than x, or as near

    @cached_property
    def lane_dims(self) -> int:
        """Leading dimensions of every leaf of x that enumerate independent problems."""
        return len(self.levels) + self.lane_dims_of_function

    def with_level(self, theta_has_lanes: tuple[bool, ...], randomness: Randomness) -> Residual:
        """The same equation with one more (outermost) level of lanes."""
        return replace(self, levels=((theta_has_lanes, randomness), *self.levels))

    def over_lanes(self, function: FlatFunction) -> FlatFunction:
        """``function`` of one lane, vectorised over all levels."""
        for theta_has_lanes, randomness in reversed(self.levels):
            in_dims = (0, [0 if has else None for has in theta_has_lanes])
            function = torch.vmap(function, in_dims=in_dims, randomness=randomness)
        return function

    def values(self, x: Leaves, theta: Leaves) -> torch.Tensor:
        """The objective of every lane, [*lanes]; only for gradients."""
        function = self.over_lanes(self.function) if self.levels else self.function
        values: torch.Tensor = function(x, theta)
        check_value(values, x[0].shape[: self.lane_dims], self.lane_dims_of_function > 0)
        return values

    def restricted_to(self, needed: Sequence[bool]) -> Residual:
        """The same equation for derivatives in the ``needed`` theta leaves, without terms that read none of them."""
        if self.parts.coupling is None or any(needed[self.parts.num_coupled :]):
            return self
        return replace(self, function=self.parts.coupling)

    def outputs(self, x: Leaves, theta: Leaves) -> Leaves:
        """What ``function`` returns for all lanes: the value of the objective, or the residuals."""
        return [self.values(x, theta)] if self.is_gradient else self(x, theta)

    def __call__(self, x: Leaves, theta: Leaves) -> Leaves:
        """F(x, theta), leaves like x."""
        if self.is_gradient:
            # Lanes are independent, so the gradient of their sum holds the gradient of each.
            return list(torch.func.grad(lambda x_: self.values(x_, theta).sum())(list(x)))
        return list(self.over_lanes(self.function)(list(x), theta))

    def attached(self, x: Leaves, theta: Leaves) -> Attached:
        """F at plain tensors x, with a graph that reaches x, and what requires a gradient of theta."""
        with torch.enable_grad():
            points, leaves = points_of(x, self.lane_dims)
            outputs = self.outputs(leaves, theta)
            value = gradient_of(outputs[0], points) if self.is_gradient else as_points(outputs, points)
            return Attached(points, theta, value, outputs)

    def for_derivatives(self, x: Leaves, theta: Leaves) -> Attached:
        """F at plain tensors for products and derivatives; no more of its value than these need."""
        if self.written_out is None or self.levels:
            return self.attached(x, theta)
        return self.written_out(x, theta)

    def run(self, x: Leaves, theta: Leaves) -> Attached:
        """One run of the function with a graph, and nothing made of it."""
        if not self.is_gradient:
            return self.attached(x, theta)
        points = [leaf.detach().requires_grad_() for leaf in x]
        with torch.enable_grad():
            return Attached(points, theta, [], self.outputs(points, theta))

    def leaves_piece(self, x: Leaves, theta: Leaves, step: Leaves) -> torch.Tensor:
        """Lanes, bool [*lanes], where x - step is on another piece of F than x; of a smooth F nowhere."""
        return torch.zeros(x[0].shape[: self.lane_dims], dtype=torch.bool, device=x[0].device)

    def refuse_hidden(self, x: Leaves, theta: Leaves, at: Attached, closed: Leaves) -> bool:
        """Raise ClosureError where the function reads a tensor that requires a gradient and is no argument.

        ``at``: its run at x. Returns whether a plain graph holds every derivative: it does not where a custom Function
        reads one of ``closed``, which is swapped, where only torch.func sees it.
        """

        def again() -> Leaves:
            return self.run(x, theta).outputs

        if not plainly_impossible():
            others = other_leaves(at.ends[0], [*at.points, *theta], again)
            if at.ends[2] and at.outputs[0].ndim == self.lane_dims:  # an objective, whose gradient F is made of
                refuse_backward_without_graph(at.ends[2], at.outputs[0], at.points)
            if not others:
                return True
            for leaf in other_leaves(others, leaves_of(closed), again):
                raise unseen(leaf)
        self.refuse_unseen(x, theta)
        return False

    def refuse_unseen(self, x: Leaves, theta: Leaves) -> None:
        """The same by torch.func, of what no mode sees."""
        refuse_hidden_tensors(self.outputs, [leaf.detach() for leaf in x], [leaf.detach() for leaf in theta])

    def gauss_newton(self, x: Leaves, theta: Leaves, plainly: bool = False) -> Callable[[Leaves], Leaves]:
        """u -> J' (d^2 loss / d outputs^2) J u with J = d model / dx: the Hessian without the curvature of the model.

        Positive semidefinite for a loss that is convex in the outputs. ``plainly``: from graphs that are built once.
        """
        if self.parts.model is None or self.parts.loss is None:
            raise ObjectiveError(
                'curvature="gauss_newton" needs an objective that says what its model is: il.least_squares(residuals) '
                "or il.composite(loss, model)."
            )
        model, loss = self.over_lanes(self.parts.model), self.over_lanes(self.parts.loss)
        if plainly:
            return gauss_newton_of(lambda x_: model(x_, theta), lambda o: loss(o, theta), x)
        outputs = list(model(list(x), theta))
        gradient = torch.func.grad(lambda o: loss(o, theta).sum())

        def product(u: Leaves) -> Leaves:
            moved = pushforward(lambda x_: model(x_, theta), x, u, like=outputs)
            return pullback(lambda x_: model(x_, theta), x, pullback(gradient, outputs, moved))

        return product

    def kept_graph_gradient(self, x: Leaves, theta: Leaves) -> Leaves:
        """F with one level of autograd fewer than ``torch.func.grad``: for one pull-back inside ``torch.func.vjp``."""
        return gradient_of(self.values(x, theta), x) if self.is_gradient else self(x, theta)


def gradient_of(values: torch.Tensor, x: Leaves) -> Leaves:
    """The gradient of the sum of ``values``, with a graph."""
    value = values.sum()
    found: Sequence[torch.Tensor | None] = ()
    if value.requires_grad:
        found = torch.autograd.grad(value, x, create_graph=True, allow_unused=True)
    if not any(map(torch.is_tensor, found)):  # theta alone may have given the value its graph
        raise no_graph()
    return [torch.zeros_like(like) if leaf is None else leaf for leaf, like in zip(found, x, strict=True)]


def slope(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor) -> torch.Tensor:
    """The gradient of ``function`` at a constant, differentiable in all else that it reads.

    That is ``torch.func.grad``, without a level of it (and its reference cycles) where nothing needs one.
    """
    if plainly_impossible():
        result: torch.Tensor = torch.func.grad(function)(at)
        return result
    attached = torch.is_grad_enabled()
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        (found,) = torch.autograd.grad(function(point), point, create_graph=attached)
    return found if any(leaf is not point for leaf in leaves_of([found])) else found.detach()


def no_graph() -> ObjectiveError:
    """The error of an objective whose derivative cannot be taken."""
    return ObjectiveError(
        "the objective does not depend on x in a way autograd can see: its value has no graph. Build it from torch "
        "operations on x, without .detach(), .item(), .numpy() or torch.no_grad()."
    )


def not_floating(value: Any) -> ObjectiveError:
    """The error of an objective that returns something else than a floating tensor."""
    kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
    hint = ""
    if isinstance(value, tuple):
        hint = " If it returns (value, aux), pass objective_has_aux=True."
    elif not isinstance(value, torch.Tensor):
        hint = " Write it in torch operations: NumPy and Python numbers have no gradient."
    return ObjectiveError(f"the objective must return a real floating tensor, got {kind}.{hint}")


def check_value(values: Any, lanes: torch.Size, has_lanes: bool) -> None:
    """Raise unless ``values`` is what an objective may return: one floating number (per lane)."""
    if not isinstance(values, torch.Tensor) or not values.is_floating_point():
        raise not_floating(values)
    if values.shape != lanes:
        expected = "one value per lane" if has_lanes else "a 0-d tensor"
        remedy = "Sum or average over the data inside the objective"
        if has_lanes and values.ndim < len(lanes):
            remedy = (
                f"With batch_dims={len(lanes)} the leading dimensions {tuple(lanes)} of x enumerate problems: sum over "
                "the others only, with .sum(-1) for example, or lower batch_dims if they are one problem"
            )
        raise ObjectiveError(
            f"the objective must return {expected}: expected shape {tuple(lanes)}, got {tuple(values.shape)}. "
            + remedy
            + ("." if has_lanes else "; for independent problems in one call pass batch_dims=1.")
        )


def flat_product(
    product: Callable[[Leaves], Leaves], like: Leaves, lane_dims: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """``product`` of leaves as one of flat vectors [*lanes, n]; nothing is recorded."""

    def flat(vector: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return ravel(product(unravel(vector, like, lane_dims)), lane_dims)

    return flat


def pushed(value: Leaves, inputs: Leaves) -> Callable[[Leaves], Leaves]:
    """u -> (d value / d inputs) u by a graph that is kept.

    The pull-back w -> J'w is linear, so the gradient of w -> <J'w, u> is J u, at any w.
    """
    live = [leaf for leaf in value if leaf.requires_grad]
    if not live:
        return lambda u: [torch.zeros_like(leaf) for leaf in value]
    dummies = [torch.zeros_like(leaf, requires_grad=True) for leaf in value]
    weights = [dummy for dummy, leaf in zip(dummies, value, strict=True) if leaf.requires_grad]
    pulled = torch.autograd.grad(live, inputs, weights, create_graph=True, materialize_grads=True)
    return partial(pull_back, list(pulled), dummies)


def pull_back(value: Leaves, inputs: Leaves, u: Leaves) -> Leaves:
    """(d value / d inputs)' u by a graph that is kept; zero where nothing depends on an input."""
    live = [pair for pair in zip(value, u, strict=True) if pair[0].requires_grad]
    if not live:
        return [torch.zeros_like(leaf) for leaf in inputs]
    outputs, cotangents = zip(*live, strict=True)
    return list(torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, materialize_grads=True))


def gauss_newton_of(
    model: Callable[[Leaves], Any], loss: Callable[[Any], torch.Tensor], x: Leaves
) -> Callable[[Leaves], Leaves]:
    """u -> J' (d^2 loss / d outputs^2) J u at x, J = d model / dx, from graphs that are built once."""
    with torch.enable_grad():
        points = [leaf.detach().requires_grad_() for leaf in x]
        outputs, spec = flatten(model(points))
        cut = [leaf.detach().requires_grad_() for leaf in outputs]
        slopes = torch.autograd.grad(loss(unflatten(cut, spec)).sum(), cut, create_graph=True, materialize_grads=True)
        push = pushed(outputs, points)
    return lambda u: pull_back(outputs, points, pull_back(list(slopes), cut, push(u)))


# NOTE [one pull-back]: <J'w, .> as the gradient of <f, w>. A pull-back from torch.func.vjp, called after its level is
# gone, fails inside torch when an output does not depend on an input (it makes zeros like a dead wrapper); a gradient
# is finished inside its level. torch.func.vjp is used where one linearisation serves many products.


def inner(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the products of all entries of two lists of leaves."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def pullback(function: Callable[[Leaves], Leaves], primals: Leaves, cotangents: Leaves) -> Leaves:
    """J(primals)' cotangents; see NOTE [one pull-back]."""
    return list(torch.func.grad(lambda p: inner(function(p), cotangents))(list(primals)))


def pushforward(function: Callable[[Leaves], Leaves], primals: Leaves, tangents: Leaves, like: Leaves) -> Leaves:
    """J(primals) tangents by two pull-backs; ``like`` has the shapes of the result.

    The pull-back w -> J'w is linear, so the gradient of w -> <J'w, t> is J t, at any w. Used in place of torch.func.jvp
    because torch switches forward mode off inside the jvp rule of a custom Function.
    """
    dummy = [torch.zeros_like(leaf) for leaf in like]
    return list(torch.func.grad(lambda w: inner(pullback(function, primals, w), tangents))(dummy))
