"""Exponents of measured power laws; also for examples/theory.py, where this folder is ``paper``."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def fit_exponent(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Least squares of log y on log x: the slope, and its standard error from the residuals (n - 2 degrees)."""
    u, v = torch.tensor(x, dtype=torch.float64).log(), torch.tensor(y, dtype=torch.float64).log()
    u, v = u - u.mean(), v - v.mean()
    slope = (u @ v) / (u @ u)
    residual = v - slope * u
    return float(slope), float((residual @ residual / (len(x) - 2) / (u @ u)).sqrt())
