"""Drawn networks: how one task's parameters are drawn, how those of B tasks come in; and the smallest such network."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from implicitlayer.base._tree import check_integer

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


# B: tasks, K: points of a task


@dataclass(frozen=True)
class MLP(DrawnNetwork):
    """Linear layers with a ReLU between any two of them.

    Parameters are a flat dict: for layers 1, 2 ... `linear{i}.weight` `[out, in]` and `linear{i}.bias` `[out]`, as
    `torch.nn.Linear` has them. `init` draws them as it does by default: uniform in ±1/sqrt(in).

    Args:
        in_features: numbers in one input, at least 1.
        hidden: widths of the hidden layers, each at least 1; empty for a linear map.
        out_features: numbers in one output, at least 1.
    """

    in_features: int = 1
    hidden: tuple[int, ...] = (40, 40)
    out_features: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        widths = {f"hidden[{i}]": width for i, width in enumerate(self.hidden)}
        for name, value in {"in_features": self.in_features, **widths, "out_features": self.out_features}.items():
            check_integer(name, value, 1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one task."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (width, next_width) in enumerate(pairwise((self.in_features, *self.hidden, self.out_features)), 1):
            shapes[f"linear{layer}.weight"] = (next_width, width)
            shapes[f"linear{layer}.bias"] = (next_width,)
        return shapes

    def _fill(self, name: str, value: Tensor, generator: torch.Generator | None) -> None:
        bound = 1 / math.sqrt(self.shapes[name.replace("bias", "weight")][1])
        value.uniform_(-bound, bound, generator=generator)

    def __call__(self, params: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """The outputs `[K, out_features]` of inputs `[K, in_features]`; with B tasks both have a leading axis of B.

        Parameters may have that axis too; tensors without it are shared. ValueError for a tensor that is missing or has
        another shape, TypeError where inputs and parameters have different dtypes.
        """
        if inputs.ndim not in (2, 3) or inputs.shape[-1] != self.in_features:
            raise ValueError(
                f"inputs of shape {tuple(inputs.shape)} must be [K, {self.in_features}], or "
                f"[B, K, {self.in_features}] for B tasks. Build mlp with the in_features of the data."
            )
        batched = inputs.ndim == 3
        x = inputs if batched else inputs.unsqueeze(0)
        p = stacked_parameters(params, self.shapes, x.shape[0], batched=batched, dtype=inputs.dtype, name="mlp")
        num_layers = len(self.hidden) + 1
        for layer in range(1, num_layers + 1):
            x = torch.baddbmm(p[f"linear{layer}.bias"].unsqueeze(1), x, p[f"linear{layer}.weight"].mT)
            if layer < num_layers:
                x = x.relu()
        return x if batched else x.squeeze(0)


def mlp(*, in_features: int = 1, hidden: Sequence[int] = (40, 40), out_features: int = 1) -> MLP:
    """A fully connected network, see :class:`MLP`; the default is the regressor of MAML's sinusoids."""
    return MLP(in_features, tuple(hidden), out_features)
