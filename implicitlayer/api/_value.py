"""``il.value``: the smallest value that a layer finds, whose gradient needs no solve."""

# With L(x, w, theta) the objective, or the Lagrangian with multipliers w, and V(theta) = L(x*, w*, theta):
#     dV/dtheta = L_theta + L_x dx*/dtheta + L_w dw*/dtheta,
# where L_x = 0 and L_w dw* = 0 at a minimum (a multiplier that changes belongs to a constraint that holds): the theorem
# of Danskin, or of the envelope. So a first derivative is that of L at fixed x* and w*. Of a second one
#     d/dtheta L_theta(x*, w*, theta) = L_theta,theta + L_theta,x dx*/dtheta + L_theta,w dw*/dtheta
# the last terms do count.
#
# NOTE [envelope]: x* and w* pass through a Function that is the identity. Its backward gives nothing where only the
# gradient is asked for; from the first backward on that makes a graph it hands everything through, so that all further
# derivatives are total ones.
#
# With a set that moves, or rows that are moved until they hold together, L has no multipliers here: x* keeps its
# derivative, and L_x dx* counts from the first derivative on.

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from implicitlayer.api._module import ArgminLayer
from implicitlayer.base._failures import failed_lanes, finite_data, replaced
from implicitlayer.base._sharding import on_whole_tensors
from implicitlayer.base._tree import flatten, tree_map, unflatten
from implicitlayer.constrained._constrained import ProxLayer
from implicitlayer.constrained._kkt import ConstrainedLayer
from implicitlayer.constrained._qp import qp
from implicitlayer.constrained._qp_arguments import Entries, is_sparse
from implicitlayer.equation._capture import plainly_impossible
from implicitlayer.layer._layer import ImplicitLayer, without_aux
from implicitlayer.programs._interior_point_step import times
from implicitlayer.sets._set import Projection
from implicitlayer.sets._term import ProximalTerm

_ARGUMENTS = inspect.signature(qp)


def value(layer: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """The function ``(init, *theta) -> objective(x*, *theta)``, called as ``layer`` is.

    Its gradient is that of the objective (of the Lagrangian, under constraints) at the solution, without a linear
    solve: as exact as x to first order. Second derivatives, and everything under transforms, go through the layer. At a
    kink, of which the layer tells, the gradient is right and second derivatives are those of one side. Of many
    solutions (a flat direction) it is that at the one that was found; nothing tells, as there is no linear solve.

    Args:
        layer: of :func:`argmin`, :class:`ArgminLayer`, :func:`constrained_argmin`, or :func:`qp` itself. Without a
            linear solve if there is no set, or one of ``il.sets`` whose numbers need no gradient; a set that depends on
            theta costs the solve of the layer, and so does ``infeasible="closest"``.

    Returns:
        A function with the arguments of the layer; one value per program or lane, [*lanes].

    Raises:
        ValueError: a layer that does not minimise, or whose derivative needs multipliers that it does not have.

    Source: J. M. Danskin, SIAM J. Appl. Math. 14 (1966); A. V. Fiacco (1983), theorem 3.4.1.

    Example:
        >>> import torch, implicitlayer as il
        >>> t = torch.tensor([3.0, -4.0]).double().requires_grad_()
        >>> eye, ones = torch.eye(2).double(), torch.ones(2).double()
        >>> smallest = il.value(il.qp)(eye, -t, ub=ones)  # 1/2 |x|^2 - t'x at x = (1, -4)
        >>> smallest.item()
        -10.5
        >>> torch.autograd.grad(smallest, t)[0].tolist()  # -x
        [-1.0, 4.0]
    """
    if layer is qp:
        return _value_of_qp
    if isinstance(layer, ConstrainedLayer):
        return _of_constrained(layer)
    inner = layer._layer if isinstance(layer, ArgminLayer) else layer
    if not isinstance(inner, ImplicitLayer) or inner.kind != "argmin":
        what = inner.kind if isinstance(inner, ImplicitLayer) else type(layer).__name__
        raise ValueError(
            f"il.value needs a layer that minimises (of il.argmin or il.constrained_argmin), or il.qp; got {what}. An "
            "equation has no value; where there is an objective, compute it at the layer's answer."
        )
    if isinstance(inner, ProxLayer) and inner.terms_name == "regularizer":
        raise ValueError(
            "il.value cannot tell whether the regularizer of this layer belongs to the value. Compute the objective, "
            "or the sum, at the layer's x."
        )
    return _of_argmin(layer, inner)


def _of_argmin(layer: Callable[..., Any], inner: ImplicitLayer) -> Callable[..., torch.Tensor]:
    def smallest(*arguments: Any) -> torch.Tensor:
        solution = layer(*arguments)
        x = solution[0] if inner.solver_has_aux else solution
        terms = inner.terms if isinstance(inner, ProxLayer) else ()
        if not callable(terms) and all(term is None or _is_constant(term) for term in flatten(terms)[0]):
            x = _fixed(x)
        stored = layer.init if isinstance(layer, ArgminLayer) else None
        init, *theta = arguments if stored is None else (stored, *arguments)
        objective = layer.objective if isinstance(layer, ArgminLayer) else inner.function
        objective = without_aux(objective) if inner.objective_has_aux else objective
        if inner.on_failure == "mask":
            init = init(*theta) if callable(init) else init
            return _masked(objective, inner.batch_dims, (x, init), tuple(theta))
        found: torch.Tensor = objective(x, *theta)
        return found

    return smallest


def _of_constrained(layer: ConstrainedLayer) -> Callable[..., torch.Tensor]:
    def smallest(init: Any, *theta: Any) -> torch.Tensor:
        x, multipliers = layer.solved(init, theta)
        unknowns = _fixed((x, tuple(multipliers)))

        def lagrangian(unknowns: Any, *theta: Any) -> torch.Tensor:
            x, (equality, inequality) = unknowns
            found: torch.Tensor = layer.objective(x, *theta)
            held = torch.zeros_like(found)
            for function, weights in ((layer.equality, equality), (layer.inequality, inequality)):
                if function is not None:
                    values, weights = flatten(function(x, *theta))[0], flatten(weights)[0]
                    for value, weight in zip(values, weights, strict=True):
                        held = held + (weight * value).reshape(*found.shape, -1).sum(-1)
            return _with_derivative(found, held)

        if layer.on_failure == "mask":
            stand_in = init, tree_map(lambda t: t if t is None else torch.zeros_like(t), unknowns[1])
            return _masked(lagrangian, layer.batch_dims, (unknowns, stand_in), theta)
        return lagrangian(unknowns, *theta)

    return smallest


@on_whole_tensors
def _value_of_qp(*args: Any, **settings: Any) -> torch.Tensor:
    """The smallest value of a quadratic program, [*batch]; arguments are those of :func:`qp`."""
    given = _ARGUMENTS.bind(*args, **settings).arguments
    x, multipliers = qp(**given, return_multipliers=True)
    Q, p = given["Q"], given["p"]
    A, b, G, h, lower, lb, ub = (given.get(name) for name in ("A", "b", "G", "h", "lower", "lb", "ub"))
    moves = given.get("infeasible") == "closest"
    if not moves:
        x, *multipliers = _fixed((x, *multipliers))
    failed = x.isnan().any(-1) if given.get("on_failure") == "mask" else None
    if failed is not None:
        x, *multipliers = tree_map(lambda t: replaced(failed, [t], 0.0)[0], (x, *multipliers))
    found: torch.Tensor = (x * (0.5 * _times(Q, x) + p)).sum(-1)
    if not moves:
        y, z = multipliers
        rows, bounds = z if isinstance(z, tuple) else (z, None)
        held = torch.zeros_like(found)
        if A is not None and b is not None:
            held = held + (y * (_times(A, x) - b)).sum(-1)
        if G is not None:
            held = held + _held(rows, _times(G, x), lower, h)
        found = _with_derivative(found, held if bounds is None else held + _held(bounds, x, lb, ub))
    return found if failed is None else torch.where(failed, torch.nan, found)


def _with_derivative(value: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """``value`` with the derivatives of ``value + term``: the term is zero but for the rounding of x."""
    return value + (term - term.detach())


def _masked(
    function: Callable[..., torch.Tensor], lane_dims: int, found: tuple[Any, Any], theta: tuple[Any, ...]
) -> torch.Tensor:
    """``function(x, *theta)`` of ``found = (x, what stands for it)``; NaN, without a derivative, in masked lanes."""
    failed = failed_lanes([t for t in flatten(found[0])[0] if t is not None], lane_dims)
    x = tree_map(lambda t, by: t if t is None else replaced(failed, [t], [by])[0], *found)
    theta = tree_map(lambda t: finite_data([t], failed)[0] if isinstance(t, torch.Tensor) else t, theta)
    return torch.where(failed, torch.nan, function(x, *theta))


def _is_constant(term: ProximalTerm) -> bool:
    """Whether a set or regulariser is known not to depend on anything that needs a gradient."""
    ours = type(term).__module__.startswith("implicitlayer.sets") and not isinstance(term, Projection)
    data = [t for t in flatten(list(vars(term).values()))[0] if isinstance(t, torch.Tensor)]
    return ours and not any(t.requires_grad for t in data)


def _held(
    force: torch.Tensor, values: torch.Tensor, lower: torch.Tensor | None, upper: torch.Tensor | None
) -> torch.Tensor:
    """The terms of the Lagrangian of rows with two sides: force above zero is of the upper one, below of the lower."""
    found = (force * values).sum(-1)
    for side, part in ((upper, force.clamp(min=0)), (lower, force.clamp(max=0))):
        if side is not None:
            found = found - (part * torch.where(part == 0, 0.0, side)).sum(-1)
    return found


def _times(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    if is_sparse(matrix):  # torch's own product has the gradient of a dense matrix
        return Entries.of(matrix).times(vector)
    return times(matrix, vector)


def _fixed(tree: Any) -> Any:
    """The same for a Lagrangian whose first derivative in it is zero: NOTE [envelope]."""
    leaves, spec = flatten(tree)
    if plainly_impossible():
        return tree
    some = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
    for i, leaf in zip(some, _Envelope.apply(*(leaves[i] for i in some)) if some else (), strict=True):
        leaves[i] = leaf
    return unflatten(leaves, spec)


class _Envelope(torch.autograd.Function):
    """The identity, without a first derivative: NOTE [envelope]."""

    @staticmethod
    def forward(ctx: Any, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.passes = False
        ctx.set_materialize_grads(False)
        return tuple(leaf.clone() for leaf in leaves)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        ctx.passes = ctx.passes or torch.is_grad_enabled()
        return cotangents if ctx.passes else (None,) * len(cotangents)
