"""Warm start: begin a solve at the answer of the one before."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any, ClassVar

import torch

from implicitlayer import _torch
from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.linear._common import SLACK, Limits, lane_norm, merged, select
from implicitlayer.linear._operator import FlatOperator, LinearSolver


@dataclass(eq=False)
class WarmStart(LinearSolver):
    """Start each solve at the last answer of the same shape: solve ``A d = b - A u_0`` and return ``u_0 + d``.

    For sequences of slowly changing systems, such as one backward pass per training step. The tolerance stays relative
    to b, so a good start saves steps; one product is spent on ``b - A u_0``, and a lane for which the old answer is no
    better than zero starts at zero. Only the number of steps depends on the past: the residual is that of the system
    given. With ``max_steps`` alone the answer itself depends on the past, which is the point of a truncated solve with
    a warm start.

    The last answer is kept, detached, for each shape, dtype and device until :meth:`reset`. Not safe to share between
    threads. Off for tensors that are wrapped by a ``torch.func`` transform (inside a differentiable layer the solver
    sees plain tensors, with the lanes of ``vmap`` as leading dimensions: lanes are warm-started one by one).

    Args:
        solver: a linear solver with ``rtol``, ``atol`` and ``max_steps``, such as ``il.ConjugateGradient()``; TypeError
            for one without.

    Example:
        >>> import torch, implicitlayer as il
        >>> matrix, rhs = torch.diag(torch.arange(1.0, 30.0).double()), torch.ones(29).double()
        >>> solver = il.WarmStart(il.ConjugateGradient())
        >>> first, second = solver(matrix, rhs), solver(matrix, rhs * 1.001)
        >>> second.num_steps < first.num_steps, second.status.name
        (True, 'CONVERGED')
    """

    solver: Any
    _kept: dict[Hashable, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    # those of the solver
    systems: ClassVar[Any] = property(lambda self: getattr(self.solver, "systems", "general"))
    in_parts: ClassVar[Any] = property(lambda self: getattr(self.solver, "in_parts", False))
    rtol: ClassVar[Any] = property(lambda self: self.solver.rtol)
    atol: ClassVar[Any] = property(lambda self: float(self.solver.atol))
    max_steps: ClassVar[Any] = property(lambda self: self.solver.max_steps)

    def __post_init__(self) -> None:
        needed = ("rtol", "atol", "max_steps")
        if not is_dataclass(self.solver) or not all(hasattr(self.solver, name) for name in needed):
            raise TypeError(
                f"il.WarmStart needs a solver with rtol, atol and max_steps, such as il.ConjugateGradient(), got "
                f"{type(self.solver).__name__}. For normal equations: il.NormalEquations(il.WarmStart(...))."
            )

    @classmethod
    def examples(cls, *given: Any) -> list[WarmStart]:
        """None: its rounding depends on the solve before, so that repeats are no more than close."""
        return []

    def reset(self) -> None:
        """Forget all answers: the next solve of any shape starts at zero."""
        self._kept.clear()

    def solve(self, operator: FlatOperator, rhs: torch.Tensor) -> LinearSolution:
        """Solve for a flat right-hand side [*lanes, n]."""
        if _torch.is_wrapped(rhs):
            return self.solver(operator, rhs)  # type: ignore[no-any-return]
        key = (tuple(rhs.shape), rhs.dtype, rhs.device, getattr(rhs, "cut", None))  # how it lies on processes
        start = self._kept.get(key)
        solution: LinearSolution = (
            self.solver(operator, rhs) if start is None else self._corrected(operator, rhs, start)
        )
        # a lane that failed, or had nothing to solve, keeps its old start
        worth = (solution.codes <= int(Status.STAGNATED)) & (rhs != 0).any(-1) & solution.value.isfinite().all(-1)
        self._kept[key] = select(worth, solution.value.detach(), start)
        return solution

    def _corrected(self, operator: FlatOperator, rhs: torch.Tensor, start: torch.Tensor) -> LinearSolution:
        norm = lane_norm(rhs)
        live = norm.isfinite() & (norm > 0)
        start = select(live, start)
        if not bool((start != 0).any()):
            return self.solver(operator, rhs)  # type: ignore[no-any-return]
        residual = rhs - operator(start)
        better = live & (lane_norm(residual) < norm)
        start, residual = select(better, start), select(better, residual, rhs)
        # Each lane is divided by ||b||, so that one absolute tolerance of the inner solver is relative to b in all.
        unit = torch.where(live, norm, 1.0).to(rhs.dtype)
        limits = Limits(self.rtol, self.atol, self.max_steps)
        solver, rtol = self.solver, limits.relative(rhs.dtype)
        if rtol is not None:
            atol = max(rtol, float((limits.atol / unit[live]).min())) if limits.atol > 0 and live.any() else rtol
            solver = replace(solver, rtol=0.0, atol=atol)
        found: LinearSolution = solver(operator, residual / unit.unsqueeze(-1))
        value, residual_norm = start + found.value * unit.unsqueeze(-1), found.residual_norm * unit
        if found.residual_is_true:
            # a start far larger than the answer costs digits that the correction cannot see: look at the sum
            residual_norm = lane_norm(rhs - operator(value))
        relative = torch.where(norm > 0, residual_norm / norm, torch.zeros_like(norm))
        found = replace(found, value=value, residual_norm=residual_norm, relative_residual=relative, rtol=rtol)
        allowed = SLACK * torch.clamp((rtol or 0.0) * norm, min=limits.atol)
        lost = (found.codes == int(Status.CONVERGED)) & (residual_norm > allowed)
        if found.residual_is_true and bool(lost.any()):  # and begin at zero
            found = merged(found, self.solver(operator, select(lost, rhs)), lost, found.remedy)
        return found
