"""What to do about negative curvature: truncate, damp, MINRES or Gauss-Newton, on the lanes that met it."""

# NOTE [policies for negative curvature]: conjugate gradients need a positive-definite matrix; at a saddle point, at an
# answer far from the minimum, or by rounding, p'Ap <= 0 ends a lane. A layer may ask for more than an error:
#   "truncate"      the iterate before the direction of negative curvature (Steihaug 1983, without a trust region:
#                   Conn, Gould & Toint, Trust-Region Methods, section 7.5.1); in the first direction b itself.
#   "damp"          (A + sigma M) u = b, M the metric (identity without one), sigma twice the magnitude of the smallest
#                   Ritz value, which mirrors that eigenvalue at zero; again where that was not enough.
#   "minres"        A u = b by MINRES: exact, for where the saddle point is meant.
#   "gauss_newton"  (J' L'' J) u = b, positive semidefinite for a convex loss.
# Lanes that met none keep their answer to the bit.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any, Literal, get_args

import torch

from implicitlayer.base._solution import LinearSolution
from implicitlayer.base._status import Status
from implicitlayer.linear._common import merged, select
from implicitlayer.linear._minres import Minres
from implicitlayer.linear._operator import FlatOperator

NegativeCurvature = Literal["raise", "truncate", "damp", "minres", "gauss_newton"]
POLICIES = get_args(NegativeCurvature)
# The solution of another system: its derivative is not that of A^-1 b.
CHANGES_THE_SYSTEM = ("truncate", "damp", "gauss_newton")

_MOST_DAMPINGS = 20

Solver = Callable[[FlatOperator, torch.Tensor], LinearSolution]


def repair(
    policy: NegativeCurvature,
    solver: Solver,
    operator: FlatOperator,
    gauss_newton: Callable[[], FlatOperator],
    rhs: torch.Tensor,
    solution: LinearSolution,
) -> LinearSolution:
    """``solution`` with the policy (not "raise") applied to its lanes of status INDEFINITE; rhs [*lanes, n]."""
    failed = solution.codes == int(Status.INDEFINITE)
    if policy == "truncate":
        codes = torch.where(failed, int(Status.TRUNCATED), solution.codes)
        return replace(solution, codes=codes, remedy="truncated at negative curvature")
    if policy == "damp":
        return _damp(solver, operator, rhs, solution, failed)
    masked = select(failed, rhs)  # a lane with a zero right-hand side makes no step
    if policy == "minres":
        limits = {name: getattr(solver, name) for name in ("rtol", "atol", "max_steps") if hasattr(solver, name)}
        return merged(
            solution, Minres(**limits)(operator, masked), failed, "solved again by MINRES after negative curvature"
        )
    other = solver(gauss_newton(), masked)
    return merged(solution, other, failed, "solved again with the Gauss-Newton matrix after negative curvature")


def _damp(
    solver: Solver, operator: FlatOperator, rhs: torch.Tensor, solution: LinearSolution, failed: torch.Tensor
) -> LinearSolution:
    if is_dataclass(solver) and getattr(solver, "preconditioner", None) is not None:
        # a preconditioner is for A, and Ritz values in its units are no eigenvalues of A
        plain: Any = replace(solver, preconditioner=None)  # type: ignore[type-var]
        return _damp(plain, operator, rhs, merged(solution, plain(operator, select(failed, rhs)), failed, ""), failed)
    sigma = torch.zeros_like(solution.relative_residual)
    latest, found = solution, solution
    for _ in range(_MOST_DAMPINGS):
        still = failed & (latest.codes == int(Status.INDEFINITE))
        if not bool(still.any()):
            break
        lowest = torch.fmin(latest.ritz_values[0], latest.smallest_curvature)
        sigma = torch.where(still, torch.maximum(2 * sigma, sigma + 2 * lowest.abs()), sigma)
        latest = solver(_damped(operator, sigma), select(still, rhs))
        found = merged(found, latest, still, "")
    worst = float(sigma.max())
    return replace(found, remedy=f"damped by up to {worst:.3g} after negative curvature", damping=sigma)


def _damped(operator: FlatOperator, sigma: torch.Tensor) -> FlatOperator:
    """A + sigma M, with M the metric."""

    def matvec(vector: torch.Tensor) -> torch.Tensor:
        return operator(vector) + sigma.to(vector.dtype).unsqueeze(-1) * operator.metric(vector)

    return replace(operator, matvec=matvec, transpose_matvec=matvec)
