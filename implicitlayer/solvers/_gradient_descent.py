"""Gradient descent with a fixed step size, for one problem or many at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from implicitlayer._solution import RecordingSolver, SolverResult
from implicitlayer._status import Status
from implicitlayer._tree import flatten, leaves_norm, unflatten

__all__ = ["GradientDescent"]

_STEPS_BETWEEN_SYNCS = 8


@dataclass(frozen=True)
class GradientDescent(RecordingSolver):
    """``x <- x - step_size * grad objective(x)``, a fixed number of steps and/or until the gradient is small.

    Stops a lane when ``||g||_2 <= max(atol, rtol * ||g at init||_2)``; without a tolerance it makes exactly
    ``max_steps`` steps and never looks at a number (no host synchronisation). Batched: with an objective that returns
    one value per lane, all lanes step together and a finished lane is frozen.

    Args:
        step_size: positive; converges for a convex objective when below 2 / (largest eigenvalue of the Hessian).
        max_steps: limit of steps; without a tolerance, their number.
        rtol, atol: tolerances on the norm of the gradient, see above; both 0 means none.

    Raises:
        ValueError: a step size that is not positive, a negative limit or tolerance.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.GradientDescent(step_size=0.5, max_steps=100, rtol=1e-12)
        >>> x = solver(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> x.tolist()
        [3.0, 3.0]
    """

    step_size: float
    max_steps: int = 1000
    rtol: float = 0.0
    atol: float = 0.0

    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.step_size > 0:
            raise ValueError(f"step_size={self.step_size} must be positive.")
        for name in ("max_steps", "rtol", "atol"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be non-negative.")

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        leaves, spec = flatten(init)
        x = [leaf.detach().clone() for leaf in leaves]
        if self.rtol == 0 and self.atol == 0:
            for _ in range(self.max_steps):
                gradient, _ = _gradient(objective, x, spec, theta)
                torch._foreach_add_(x, gradient, alpha=-self.step_size)
            return SolverResult(unflatten(x, spec), Status.STEP_LIMIT, self.max_steps)
        return self._to_tolerance(objective, x, spec, theta)

    def _to_tolerance(self, objective: Callable[..., Any], x: list[Any], spec: Any, theta: Any) -> SolverResult:
        tolerance: torch.Tensor | None = None
        # finished lanes stand still, so asking rarely changes the count only; on an accelerator asking is a host sync
        every = 1 if x[0].device.type == "cpu" else _STEPS_BETWEEN_SYNCS
        for step in range(self.max_steps + 1):
            gradient, lane_dims = _gradient(objective, x, spec, theta)
            norm = leaves_norm(gradient, lane_dims)
            if tolerance is None:
                tolerance = torch.clamp(self.rtol * norm, min=self.atol)
            running = norm > tolerance
            if step % every == 0 and not bool(running.any()):
                status = Status.CONVERGED if bool(norm.isfinite().all()) else Status.NONFINITE
                return SolverResult(unflatten(x, spec), status, step)
            if step < self.max_steps:
                for leaf, g in zip(x, gradient, strict=True):
                    here = running.reshape((*running.shape, *[1] * (leaf.ndim - running.ndim)))
                    leaf.sub_(torch.where(here, g, torch.zeros_like(g)), alpha=self.step_size)
        status = Status.MAX_STEPS_REACHED if bool(running.any()) else Status.CONVERGED
        return SolverResult(unflatten(x, spec), status, self.max_steps)


def _gradient(
    objective: Callable[..., torch.Tensor], x: list[torch.Tensor], spec: Any, theta: Any
) -> tuple[list[torch.Tensor], int]:
    """Gradient of the sum over lanes (lanes are independent) and the number of lane dimensions."""
    with torch.enable_grad():
        points = [leaf.detach().requires_grad_() for leaf in x]
        value = objective(unflatten(points, spec), *theta)
        total = value.sum() if value.ndim else value
        return list(torch.autograd.grad(total, points, materialize_grads=True)), value.ndim
