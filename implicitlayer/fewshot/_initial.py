"""How a network's first parameters are drawn: one task's, the same from one seed on every device."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from implicitlayer.fewshot._parameters import Shape, drawing_device


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
        """Draw one task's parameters; the class says from which distribution.

        The numbers are drawn on the generator's device (the CPU without one) and then moved, so that a seed gives the
        same network on every device.

        Args:
            generator: source of randomness; None takes torch's global one.
            dtype: floating type of the parameters.
            device: where the parameters will live; None is torch's default device.

        Returns:
            a dict with the names and shapes of `shapes`.
        """
        device = torch.get_default_device() if device is None else device
        params = {}
        for name, shape in self.shapes.items():
            value = torch.empty(shape, dtype=dtype, device=drawing_device(generator))
            self._fill(name, value, generator)
            params[name] = value.to(device)
        return params
