"""The library's own interior-point method as a solver of ``il.qp``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from implicitlayer.programs._interior_point import QuadraticSolution, interior_point
from implicitlayer.solvers._progress import Iteration, reporting


@dataclass(frozen=True)
class InteriorPoint:
    """Dense primal-dual interior-point method for convex quadratic programs, all lanes at a time.

    Stops a lane when every condition of optimality holds to ``rtol`` of the size of its terms, when a certificate shows
    that it is infeasible or unbounded, or when rounding stops its progress. Scales of the data do not matter.

    Args:
        rtol: relative tolerance, positive.
        max_steps: limit of steps, each with one factorisation.
        callback: called with an :class:`Iteration` at the start and after every step, of all lanes; its
            ``gradient_norm`` is the largest violation of a condition of optimality, relative to the size of its terms.
            A second attempt, which a program that seems to have no solution gets, is not told.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: a tolerance or limit that is not positive.

    Source: S. Mehrotra, SIAM J. Optim. 2 (1992); Nocedal & Wright, Numerical Optimization, 2nd ed., section 16.6.
    Difference from qpth's solver: a status per lane with certificates, the second-order term weighted by the square of
    the first step's length (without that about one random program in a hundred cycles), frozen lanes, equations that
    may be redundant.

    Example:
        >>> import torch, implicitlayer as il
        >>> data = torch.eye(2), -torch.ones(2), torch.ones(0, 2), torch.ones(0), torch.eye(2), torch.tensor([0.5, 2.0])
        >>> solution = il.solvers.InteriorPoint()(*(t.double() for t in data))
        >>> [round(v, 6) for v in solution.x.tolist()], int(solution.codes)
        ([0.5, 1.0], 0)
    """

    rtol: float = 1e-9
    max_steps: int = 60
    callback: Callable[[Iteration], None] | None = None
    progress: bool = False

    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("rtol", "max_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")

    def __call__(
        self, Q: torch.Tensor, p: torch.Tensor, A: torch.Tensor, b: torch.Tensor, G: torch.Tensor, h: torch.Tensor
    ) -> QuadraticSolution:
        with reporting(self.callback, self.progress, self.max_steps) as report:
            if report is None:
                return interior_point((Q, p, A, b, G, h), self.rtol, self.max_steps)

            def tell(step: int, x: torch.Tensor, error: torch.Tensor) -> None:
                value = (x * (0.5 * (Q @ x[..., None])[..., 0] + p)).sum(-1)
                report(Iteration(step, value, error, x.clone()))

            return interior_point((Q, p, A, b, G, h), self.rtol, self.max_steps, tell)
