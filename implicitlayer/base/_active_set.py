"""What constraints and regularisers do at a solution: which entries they hold, and where a derivative is one-sided."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The constraints (or zeros of a regulariser) that are active at a solution, lane by lane.

    Attributes:
        active: bool masks in the structure of x: entries that are held and do not move freely (at a bound, at
            zero, or on the sphere of a ball, which holds all entries together).
        kinks: bool masks in the structure of x: entries at a border with a zero multiplier, within ``tolerance``. The
            solution bends there and its derivative is that of one side.
        num_active, num_kinks: how many, tensors [*lanes].
        kinks_known: False if a projection or prox of the user's own is involved: kinks that show are told, others not.
        tolerance: tensor [*lanes], the distance to a kink, in units of x, that counts as being there.
        violation: tensor [*lanes], distance of x from the constraints.
        relative_violation: the same over the size of x (or of the step that was projected, where x is near zero).
    """

    active: Any
    kinks: Any
    num_active: torch.Tensor
    num_kinks: torch.Tensor
    kinks_known: bool
    tolerance: torch.Tensor
    violation: torch.Tensor
    relative_violation: torch.Tensor

    def __str__(self) -> str:
        kinks = span(self.num_kinks, "d") if self.kinks_known else "unknown"
        return f"active {span(self.num_active, 'd')}, kinks {kinks}"


def span(values: torch.Tensor, form: str = ".2e") -> str:
    """One number, or the range over the lanes."""
    if values.numel() == 0:
        return "-"
    low, high = (format(value.item(), form) for value in values.aminmax())
    return high if values.ndim == 0 else f"{low} to {high} over {tuple(values.shape)} lanes"
