"""How a network's parameters come in: as one task's, or as those of B tasks with a leading axis."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Shape = tuple[int, ...]


def stacked_parameters(
    params: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    num_tasks: int,
    *,
    batched: bool,
    dtype: torch.dtype,
    name: str,
) -> dict[str, Tensor]:
    """Every parameter as ``[B, *shape]``; one without the axis is shared by the tasks.

    Args:
        params: the parameters given.
        shapes: shape of every parameter of one task.
        num_tasks: B.
        batched: whether the input has an axis of tasks, so that parameters may have it too.
        dtype: of the input, which the parameters must share (but under autocast).
        name: of the network, for the messages.

    Raises:
        ValueError: a parameter is missing or has another shape.
        TypeError: a parameter has another dtype.
    """
    found = {}
    for key, shape in shapes.items():
        if key not in params:
            raise ValueError(f"params has no {key!r}; {name} needs {', '.join(shapes)}. See its init().")
        value = params[key]
        if value.shape == shape:
            value = value.expand(num_tasks, *shape)
        elif not batched or value.shape != (num_tasks, *shape):
            expected = f"{shape} or {(num_tasks, *shape)}" if batched else f"{shape}, as the input holds one task"
            raise ValueError(f"params[{key!r}] of shape {tuple(value.shape)} must have shape {expected}.")
        if value.dtype != dtype and not torch.is_autocast_enabled(value.device.type):
            raise TypeError(
                f"The input of {name} has dtype {dtype} and params[{key!r}] {value.dtype}; both must have one. Convert "
                "the input with .to(...), or give dtype= to init()."
            )
        found[key] = value
    return found


def drawing_device(generator: torch.Generator | None) -> torch.device:
    """Where numbers are drawn: the generator's device, the CPU without one, so that a seed means one network."""
    return generator.device if generator is not None else torch.device("cpu")
