"""The small regression network of the few-shot papers, computed for a whole batch of tasks at once."""

# B: tasks, K: points of a task

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from implicitlayer.base._tree import check_integer
from implicitlayer.fewshot._parameters import DrawnNetwork, stacked_parameters


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
