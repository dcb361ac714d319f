"""Checks of whole numbers among the arguments."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise ValueError for what is no integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")
