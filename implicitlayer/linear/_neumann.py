"""The truncated Neumann series: the cheapest approximate inverse, right only where the map contracts."""

# A^-1 = step sum_{k>=0} (I - step A)^k where the spectral radius of I - step A is below 1. With the terms
# t_0 = b, t_{k+1} = t_k - step A t_k, the sum of K of them, u = step (t_0 + ... + t_{K-1}), telescopes:
#     b - A u = t_0 - (t_0 - t_K) = t_K,
# so the next term is the residual.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.linear._common import any_runs, lane_norm, select
from implicitlayer.linear._operator import FlatOperator, LinearSolver, lane_scale


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """Approximate ``A^-1 b`` by ``u = step_size sum_{k < num_terms} (I - step_size A)^k b``.

    ``num_terms`` products are made: one per term after the first, and one for the residual ``b - A u``, which is the
    next term of the series. There is no tolerance, so a residual below that of u = 0 is success (status STEP_LIMIT,
    or CONVERGED if it has fallen to rounding); otherwise the series does not contract and the status is DIVERGED. A
    lane whose terms grow by 1/eps is stopped at once. Equals ``num_terms`` steps of gradient descent, and the
    back-propagation through that many last steps of it; conjugate gradients reach far smaller residuals with the same
    number of products.

    Args:
        num_terms: terms of the series, at least 1. One term is ``step_size * b``.
        step_size: positive, below 2 / (largest eigenvalue) for a positive-definite A. Its default, 1, suits the
            Jacobian ``I - dT/dx`` of a fixed-point map T that contracts.

    Raises:
        ValueError: ``num_terms`` below 1, a step size that is not positive and finite.

    Source: J. Lorraine, P. Vicol and D. Duvenaud, Optimizing millions of hyperparameters by implicit differentiation,
    AISTATS 2020, algorithm 3; here with the residual and a test of divergence.

    Example:
        >>> import torch, implicitlayer as il
        >>> solution = il.Neumann(3)(lambda v: 0.5 * v, torch.ones(1).double())
        >>> solution.value.item(), solution.relative_residual.item()  # 1 + 1/2 + 1/4, and 1/8
        (1.75, 0.125)
    """

    num_terms: int
    step_size: float = 1.0

    systems, in_parts = "contraction", True

    @classmethod
    def examples(cls, *given: Any) -> list[Neumann]:
        """As many terms as a contraction by 1/2 takes to 1e-12."""
        return [cls(40)]

    def __post_init__(self) -> None:
        if self.num_terms < 1:
            raise ValueError(f"num_terms={self.num_terms} must be at least 1. One term is step_size times the rhs.")
        if not (self.step_size > 0 and math.isfinite(self.step_size)):
            raise ValueError(
                f"step_size={self.step_size} must be positive and finite, below 2 / (largest eigenvalue of A)."
            )

    def solve(self, operator: FlatOperator, rhs: torch.Tensor) -> LinearSolution:
        """Sum the series for a flat right-hand side [*lanes, n]."""
        scale = lane_scale(rhs)
        b = rhs / scale
        initial = norm = lane_norm(b)
        eps = torch.finfo(b.dtype).eps
        running = initial.isfinite() & (initial > 0)
        codes = torch.where(running, int(Status.STEP_LIMIT), int(Status.CONVERGED))
        codes = torch.where(initial.isfinite(), codes, int(Status.NONFINITE))
        steps = torch.zeros_like(codes)
        term = total = select(running, b)
        for k in range(self.num_terms):
            if not any_runs(running, k):
                break
            total = select(running, total + term, total) if k else total
            following = term - self.step_size * operator(term)
            steps = steps + running
            new_norm = lane_norm(following)
            finite = new_norm.isfinite()
            codes = torch.where(running & ~finite, int(Status.NONFINITE), codes)
            norm = torch.where(running & finite, new_norm, norm)
            lost = running & finite & (norm > initial / eps)
            codes = torch.where(lost, int(Status.DIVERGED), codes)
            running = running & finite & ~lost
            term = select(running, following)
        relative = torch.where(initial > 0, norm / initial, torch.zeros_like(norm))
        summed = codes == int(Status.STEP_LIMIT)
        codes = torch.where(summed & (relative <= eps), int(Status.CONVERGED), codes)
        codes = torch.where(summed & ~(relative < 1), int(Status.DIVERGED), codes)
        numbers = (codes, steps, norm * scale[..., 0], relative, torch.full_like(relative, math.inf))
        return LinearSolution(self.step_size * total * scale, *numbers, False, "Neumann series")
