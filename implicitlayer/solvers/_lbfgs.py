"""Limited-memory BFGS with a strong Wolfe line search, for one problem or many at once."""

# Legend: s = x_{k+1} - x_k, y = g_{k+1} - g_k, rho = 1 / y's; oldest pair first. lanes: bool [*lanes].

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from implicitlayer._solution import SolverResult
from implicitlayer.linear._operator import lane_dot
from implicitlayer.solvers._descent import Limited, descend, rounds_between_syncs
from implicitlayer.solvers._line_search import LineSearch
from implicitlayer.solvers._problem import Problem

__all__ = ["LBFGS"]

_CURVATURE = 0.9  # c2 of the Wolfe conditions, the usual choice for quasi-Newton directions
_LEAST = 1e-10  # y's below this share of |s'g| is rounding: the Wolfe conditions alone give 0.1


@dataclass(frozen=True)
class LBFGS(Limited):
    """The quasi-Newton method for smooth objectives of many unknowns: gradients only, superlinear in practice.

    ``x <- x - a H g``, H the inverse-Hessian approximation from the last ``memory`` pairs of steps and gradient
    changes, a from a line search for the strong Wolfe conditions (1e-4 and 0.9), which keep H positive definite.

    Stops a lane when ``||g||_2 <= max(atol, rtol * ||g at init||_2)``. Where the line search finds no lower point the
    memory is dropped once and then the lane stops, status ``STAGNATED``: with no tolerance that is where rounding
    errors stop it. Batched: with an objective that returns one value per lane, every lane has its own memory and its
    own line search, all are evaluated together, and a finished lane is frozen.

    Args:
        max_steps: limit of steps; each takes one gradient, at times two or three.
        rtol, atol: tolerances on the norm of the gradient, see above; both 0 means none.
        memory: pairs to keep, at least 1; costs ``2 memory`` copies of the unknowns.
        callback: called with an :class:`Iteration` at the start and after every step.
        progress: show a bar (needs tqdm, extra ``implicitlayer[fewshot]``).

    Raises:
        ValueError: a memory below 1, a negative limit or tolerance.
        ImportError: ``progress=True`` without tqdm.

    Source: Nocedal & Wright, Numerical Optimization, 2006, algorithms 7.4 and 7.5 (two-loop recursion, scaled by
    s'y / y'y), 3.5 and 3.6 (line search). Difference to SciPy's L-BFGS-B: no bounds, and the line search trusts slopes
    where values differ by rounding errors, so small tolerances are reached.

    Example:
        >>> import torch, implicitlayer as il
        >>> def rosenbrock(x):
        ...     return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        >>> x = il.solvers.LBFGS(rtol=1e-12)(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> [round(v, 9) for v in x.tolist()]
        [1.0, 1.0]
    """

    _: KW_ONLY
    memory: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.memory >= 1:
            raise ValueError(f"memory={self.memory} must be at least 1. For none use GradientDescent.")

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        return descend(self, Problem(objective, init, theta), _TwoLoop(self.memory), _CURVATURE)


class _TwoLoop:
    """The pairs of every lane; a lane that has fewer than the others has zeros in front, which change nothing."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self.gamma: torch.Tensor | None = None  # float64 [*lanes]: y's / y'y of the newest pair, 0 without one

    def direction(
        self, lanes: torch.Tensor, gradient: torch.Tensor, norm: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """-H g and the first trial 1; without a pair -g and a trial of length 1."""
        if self.gamma is None:
            return -gradient, 1 / norm
        known = self.gamma > 0
        q = gradient
        alphas = []
        for s, y, rho in reversed(self.pairs):
            alpha = rho * lane_dot(s, q)
            alphas.append(alpha)
            q = q - _times(alpha, y)
        q = _times(torch.where(known, self.gamma, 1.0), q)
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            q = q + _times(alpha - rho * lane_dot(y, q), s)
        return -q, torch.where(known, 1.0, 1 / norm)

    def moved(self, lanes: torch.Tensor, step: torch.Tensor, change: torch.Tensor, search: LineSearch) -> None:
        """Remember the pair of these lanes where its curvature is positive."""
        curvature, square = lane_dot(step, change), lane_dot(change, change)
        rho, gamma = 1 / curvature, curvature / square
        good = lanes & (curvature > _LEAST * (search.step * search.slope).abs()) & rho.isfinite() & gamma.isfinite()
        if self.gamma is None:
            self.gamma = torch.zeros_like(gamma)
        self.gamma = torch.where(good, gamma, self.gamma)
        if rounds_between_syncs(step) == 1 and bool(good.all()):
            self.pairs = [*self.pairs, (step, change, rho)][-self.memory :]
            return
        here, nothing = good.unsqueeze(-1), torch.zeros_like(step)
        newest = (torch.where(here, step, nothing), torch.where(here, change, nothing), torch.where(good, rho, 0.0))
        # only some lanes move on: theirs shift by one place, the others keep theirs
        if len(self.pairs) < self.memory:
            self.pairs.insert(0, (nothing, nothing, torch.zeros_like(rho)))
        following = [*self.pairs[1:], newest]
        self.pairs = [_where(good, new, old) for new, old in zip(following, self.pairs, strict=True)]

    def forget(self, lanes: torch.Tensor) -> torch.Tensor:
        """Drop the pairs of these lanes; those that had some may go on from the steepest descent."""
        if self.gamma is None:
            return torch.zeros_like(lanes)
        had_some = lanes & (self.gamma > 0)
        self.gamma = torch.where(lanes, 0.0, self.gamma)
        self.pairs = [
            _where(lanes, (torch.zeros_like(s), torch.zeros_like(y), torch.zeros_like(rho)), (s, y, rho))
            for s, y, rho in self.pairs
        ]
        return had_some


def _times(factor: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """One factor per lane, float64 [*lanes], times [*lanes, n]."""
    return factor.unsqueeze(-1).to(vector.dtype) * vector


def _where(
    lanes: torch.Tensor,
    new: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    old: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    here = lanes.unsqueeze(-1)
    return torch.where(here, new[0], old[0]), torch.where(here, new[1], old[1]), torch.where(lanes, new[2], old[2])
