"""The forms of a step size: a number, one per tensor, one per entry, a matrix; and each of them learned."""

# Legend: x <- x - P g with the gradient g; P is a I, a diagonal, or a matrix over the n entries of one problem.

from __future__ import annotations

import math
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer.base._tree import TreeSpec, flatten, leaves_like, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves

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
