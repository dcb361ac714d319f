"""Diagnostics: what every forward and backward solve met, for whoever listens."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from implicitlayer._solution import LinearSolution
from implicitlayer._status import Status

__all__ = ["BackwardRecord", "ForwardRecord", "Record", "diagnostics"]

# A backward pass may run on one of autograd's own threads, so the listeners are shared by all threads.
_listeners: list[list[Record]] = []
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class ForwardRecord:
    """What the forward solve left behind.

    Attributes:
        stationarity_norm: tensor [*lanes], Euclidean norm of the gradient of the objective (or of the residual) at
            the returned point; None if the check was off.
        estimated_distance: tensor [*lanes], estimate of the distance to the exact solution.
        relative_distance: the same over ``max(||x||, ||x - init||)``.
        solver_status, num_steps: as the solver told them, else None.
        num_polish_steps: Newton steps made after the solver.
    """

    stationarity_norm: torch.Tensor | None
    estimated_distance: torch.Tensor | None
    relative_distance: torch.Tensor | None
    solver_status: Status | None
    num_steps: int | None
    num_polish_steps: int = 0

    def __str__(self) -> str:
        solver = "" if self.num_steps is None else f", {self.num_steps} solver steps"
        if self.stationarity_norm is None or self.relative_distance is None:
            return f"forward: stationarity not checked{solver}"
        return (
            f"forward: gradient norm {_span(self.stationarity_norm)}, estimated relative distance to the solution "
            f"{_span(self.relative_distance)}{solver}"
        )


@dataclass(frozen=True, eq=False)
class BackwardRecord:
    """What one linear solve behind a derivative met. ``solution`` holds all numbers (without the value)."""

    kind: str
    solution: LinearSolution

    @property
    def status(self) -> Status:
        return self.solution.status

    def __str__(self) -> str:
        s = self.solution
        return (
            f"{self.kind}: {s.method} {s.status.name.lower()}, {s.num_steps} steps, relative residual "
            f"{_span(s.relative_residual)}, smallest curvature {_span(s.smallest_curvature)}"
        )


Record = ForwardRecord | BackwardRecord


def _span(values: torch.Tensor) -> str:
    """One number, or the range over the lanes."""
    if values.numel() == 0:
        return "-"
    low, high = float(values.min()), float(values.max())
    return f"{high:.2e}" if values.ndim == 0 else f"{low:.2e} to {high:.2e} over {tuple(values.shape)} lanes"


@contextmanager
def diagnostics() -> Iterator[list[Record]]:
    """Collect one record per forward solve and one per linear solve made inside the block (by any thread).

    Yields:
        The list that fills up. A :class:`ForwardRecord` holds the norm of the gradient at the returned point, the
        estimated distance to the solution and the solver's own count; a :class:`BackwardRecord` holds the status,
        the steps, the residual and the smallest curvature seen.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), lambda f, x, t: t)
        >>> theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> with il.diagnostics() as records:
        ...     layer(torch.zeros(3, dtype=torch.float64), theta).sum().backward()
        >>> records[1].status.name, records[1].solution.num_steps
        ('CONVERGED', 1)
    """
    records: list[Record] = []
    with _lock:
        _listeners.append(records)
    try:
        yield records
    finally:
        with _lock:
            # by identity: two empty lists are equal
            _listeners[:] = [listener for listener in _listeners if listener is not records]


def emit(record: Record) -> None:
    """Hand ``record`` to every listener."""
    with _lock:
        for listener in _listeners:
            listener.append(record)
