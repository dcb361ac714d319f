"""A network's parameters: how one task's are drawn, and how those of B tasks come in."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
    """Every parameter of ``shapes`` as ``[B, *shape]``; one without the axis is shared by the tasks.

    Args:
        num_tasks: B.
        batched: whether the input has an axis of tasks, so that parameters may have it too.
        dtype: of the input, which the parameters must share (but under autocast), or TypeError.
        name: of the network, for the messages.
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


class DrawnNetwork(ABC):
    """Base of the networks of this package: a subclass names the shapes of its parameters and fills one at a time."""

    @property
    @abstractmethod
    def shapes(self) -> dict[str, Shape]:
        """Shape of every parameter of one task."""

    @abstractmethod
    def _fill(self, name: str, value: Tensor, generator: torch.Generator | None) -> None:
        """Draw a parameter in place."""

    def init(
        self,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> dict[str, Tensor]:
        """Draw one task's parameters, with the names and shapes of `shapes`; the class says from which distribution.

        The numbers are drawn on the generator's device (without one by torch's global generator on the CPU) and then
        moved to ``device`` (torch's default one), so that a seed gives the same network on every device.
        """
        device = torch.get_default_device() if device is None else device
        drawn_on = torch.device("cpu") if generator is None else generator.device
        params = {}
        for name, shape in self.shapes.items():
            value = torch.empty(shape, dtype=dtype, device=drawn_on)
            self._fill(name, value, generator)
            params[name] = value.to(device)
        return params
