"""The layer x = log t, whose every derivative is known, for the tests of what layers promise."""

from typing import Any

import torch
from references import F64, randn
from torch import Tensor

import implicitlayer as il


def log_objective(x: Tensor, t: Tensor) -> Tensor:
    return (x.exp() - t * x).sum()


def log_solver(objective: Any, x: Tensor, t: Tensor) -> Tensor:
    return t.log()


def log_layer(**settings: Any) -> il.ImplicitLayer:
    """x = log t, dx/dt = 1/t."""
    return il.argmin(log_objective, log_solver, **settings)


def leaf(*shape: int, seed: int = 0) -> Tensor:
    return (randn(*shape, seed=seed).abs() + 0.5).requires_grad_()


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=F64)
