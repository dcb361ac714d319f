"""Checks of whole numbers among the arguments."""

from __future__ import annotations

from typing import Any

import numpy as np

from implicitlayer.base._tree import flatten


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise ValueError for what is no integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")


def check_dim(dim: int | None, x: Any = None, lane_dims: int = 0) -> Any:
    """``dim``, checked to be None or negative, and a dimension of every leaf of x."""
    if dim is not None and dim >= 0:
        raise ValueError(f"dim={dim} must be negative (counted from the last dimension), or None for all of them.")
    for leaf in flatten(x)[0] if x is not None else ():
        if leaf.ndim - lane_dims < -(dim or 0):
            raise ValueError(f"dim={dim} is out of range for a leaf of shape {tuple(leaf.shape[lane_dims:])}.")
    return dim
