"""What a solver checks before its first step, so that mistakes have names and not torch's words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from implicitlayer._errors import ObjectiveError
from implicitlayer.equation._residual import no_graph, not_floating


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
