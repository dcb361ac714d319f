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

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from implicitlayer.api._module import ArgminLayer
from implicitlayer.base._sharding import on_whole_tensors
from implicitlayer.base._tree import flatten, unflatten
from implicitlayer.constrained._constrained import ProxLayer
from implicitlayer.constrained._kkt import ConstrainedLayer
from implicitlayer.constrained._qp import qp
from implicitlayer.constrained._qp_sparse import Entries, is_sparse
from implicitlayer.equation._capture import plainly_impossible
from implicitlayer.layer._layer import ImplicitLayer, without_aux
from implicitlayer.programs._interior_point_step import times

_ARGUMENTS = inspect.signature(qp)


def value(layer: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """The function ``(init, *theta) -> objective(x*, *theta)``, called as ``layer`` is.

    Its gradient is that of the objective (of the Lagrangian, under constraints) at the solution, without a linear
    solve: as exact as x to first order. Second derivatives, and everything under transforms, go through the layer. At a
    kink, of which the layer tells, the gradient is right and second derivatives are those of one side.

    Args:
        layer: of :func:`argmin` (with a set that does not depend on theta, or none), :class:`ArgminLayer`,
            :func:`constrained_argmin`, or :func:`qp` itself.

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
        raise ValueError(f"il.value needs a layer that minimises, or il.qp; got {what}. An equation has no value.")
    if isinstance(inner, ProxLayer) and (inner.terms_name == "regularizer" or callable(inner.terms)):
        raise ValueError(
            f"il.value cannot tell how the {inner.terms_name} of this layer changes the value. Write it as constraints "
            "of il.constrained_argmin or il.qp, whose multipliers do, or compute the value of the layer's x."
        )
    return _of_argmin(layer, inner)


def _of_argmin(layer: Callable[..., Any], inner: ImplicitLayer) -> Callable[..., torch.Tensor]:
    def smallest(*arguments: Any) -> torch.Tensor:
        solution = layer(*arguments)
        x = solution[0] if inner.solver_has_aux else solution
        stored = isinstance(layer, ArgminLayer) and layer.init is not None
        objective = layer.objective if isinstance(layer, ArgminLayer) else inner.function
        objective = without_aux(objective) if inner.objective_has_aux else objective
        found: torch.Tensor = objective(_fixed(x), *arguments[0 if stored else 1 :])
        return found

    return smallest


def _of_constrained(layer: ConstrainedLayer) -> Callable[..., torch.Tensor]:
    def smallest(init: Any, *theta: Any) -> torch.Tensor:
        x, multipliers = layer.solved(init, theta)
        x, (equality, inequality) = _fixed((x, tuple(multipliers)))
        found: torch.Tensor = layer.objective(x, *theta)
        for function, weights in ((layer.equality, equality), (layer.inequality, inequality)):
            if function is not None:
                values, weights = flatten(function(x, *theta))[0], flatten(weights)[0]
                for value, weight in zip(values, weights, strict=True):
                    found = found + (weight * value).reshape(*found.shape, -1).sum(-1)
        return found

    return smallest


@on_whole_tensors
def _value_of_qp(*args: Any, **settings: Any) -> torch.Tensor:
    """The smallest value of a quadratic program, [*batch]; arguments are those of :func:`qp`."""
    given = _ARGUMENTS.bind(*args, **settings).arguments
    x, multipliers = qp(**given, return_multipliers=True)
    Q, p = given["Q"], given["p"]
    A, b, G, h, lower, lb, ub = (given.get(name) for name in ("A", "b", "G", "h", "lower", "lb", "ub"))
    x, y, z = _fixed((x, *multipliers))
    rows, bounds = z if isinstance(z, tuple) else (z, None)
    found: torch.Tensor = (x * (0.5 * _times(Q, x) + p)).sum(-1)
    if A is not None and b is not None:
        found = found + (y * (_times(A, x) - b)).sum(-1)
    if G is not None:
        found = found + _held(rows, _times(G, x), lower, h)
    return found if bounds is None else found + _held(bounds, x, lb, ub)


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
