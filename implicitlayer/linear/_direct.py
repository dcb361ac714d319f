"""Refinement for solvers that have factors: mostly their first answer is the last."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.linear._common import Correction, Limits, Round, refine
from implicitlayer.linear._operator import FlatOperator

__all__ = ["refine_direct"]


def refine_direct(
    operator: FlatOperator, rhs: torch.Tensor, limits: Limits, correct: Callable[[Round], Correction], method: str
) -> LinearSolution:
    """:func:`refine`, which is spared where one system on the CPU is solved by the first round; the answer is the same.

    ``correct`` may be called again for the same round: it is to keep its factors.
    """
    if rhs.device.type == "cpu" and rhs.shape[:-1].numel() == 1 and rhs.shape[-1]:
        solution = _first_round(operator, rhs, limits, correct, method)
        if solution is not None:
            return solution
    return refine(operator, rhs, limits, correct, method)


def _first_round(
    operator: FlatOperator, rhs: torch.Tensor, limits: Limits, correct: Callable[[Round], Correction], method: str
) -> LinearSolution | None:
    """The first round of :func:`refine` with Python's numbers; None where it does not end there."""
    lanes, rtol = rhs.shape[:-1], limits.relative(rhs.dtype)
    scale = rhs.abs().max().item()
    if not 0 < scale < math.inf or rtol is None:
        return None
    b = rhs / scale
    initial = torch.linalg.vector_norm(b).item()
    tolerance = max(rtol * initial, limits.atol / scale)
    max_steps = limits.max_steps if limits.max_steps is not None else 10 * rhs.shape[-1]
    runs, stop, left = (torch.full(lanes, value) for value in (True, tolerance, max_steps))
    found = correct(Round(b, runs, stop, left, max_steps))
    if found.codes.item() != int(Status.CONVERGED):
        return None
    norm = torch.linalg.vector_norm(b - operator(found.value)).item()
    if not norm <= 2 * tolerance:
        return None
    curvature = torch.full(lanes, math.inf, dtype=torch.float64) if found.curvature is None else found.curvature
    return LinearSolution(
        value=found.value * scale,
        codes=found.codes,
        steps=found.steps,
        residual_norm=torch.full(lanes, norm * scale, dtype=torch.float64),
        relative_residual=torch.full(lanes, norm / initial, dtype=torch.float64),
        smallest_curvature=curvature,
        residual_is_true=True,
        method=method,
        rtol=rtol,
    )
