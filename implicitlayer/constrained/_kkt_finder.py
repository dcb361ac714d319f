"""The user's solver inside ``il.constrained_argmin`` as a solver of the scalar: multipliers, polish, active set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from implicitlayer.base._solution import SolverResult
from implicitlayer.base._tree import flatten, unflatten
from implicitlayer.constrained._kkt_answer import Caller
from implicitlayer.constrained._kkt_lagrangian import ConstrainedProblem, Unknowns
from implicitlayer.constrained._kkt_point import PointOfProblem
from implicitlayer.programs._kkt_active import ActiveConstraints, Conditions, Tolerances
from implicitlayer.programs._kkt_multipliers import multipliers_of_lanes

__all__ = ["Finder"]


@dataclass(eq=False)
class Finder:
    """Makes z of NOTE [the scalar] of the answer of a solver.

    The lanes of vmap come here one at a time (``implicitlayer.layer._forward``) unless the solver is batched; those
    of ``batch_dims`` always come together, and what is done with the answer is done for all of them at once.

    Attributes:
        call: the user's solver.
        tolerances, hold_kinks, polish: as in :func:`constrained_argmin`.
        found: the active set of each call of this object.
        num_polished: Newton steps kept in all calls.
    """

    call: Caller
    tolerances: Tolerances
    hold_kinks: bool
    polish: int
    found: list[ActiveConstraints] = field(default_factory=list)
    num_polished: int = 0

    @property
    def batched(self) -> bool:
        """Whether this is to be called once for all lanes of vmap."""
        return self.call.batched

    def __call__(self, scalar: Callable[..., torch.Tensor], start: Unknowns, *theta: Any) -> SolverResult:
        """z with the shapes of ``start``, and how the solver ended."""
        problem = ConstrainedProblem(scalar, start, self.call.forms)
        init, spec = flatten(start.x)
        answer = self.call(problem, init, spec, theta, start.equality.shape[:-1])
        x, point = answer.x, PointOfProblem(problem, spec, theta, init)
        at = point.conditions(x)
        near = at.near(self.tolerances.active_rtol)
        y, z = multipliers_of_lanes(at.gradient, at.rows_h, at.rows_g, near, answer.known)
        for _ in range(self.polish):
            _, held = self._classify(at, y, z)
            better = point.newton_step(x, y, torch.where(held, z, 0.0), held)
            if better is None:
                break
            x, y, z = better
            self.num_polished += 1
            at = point.conditions(x)
        active, held = self._classify(at, y, z)
        rtol = self.tolerances.stationarity_rtol
        if rtol is not None and bool((active.stationarity <= rtol).any()):
            wrong_by = point.error(x, active.equality, active.inequality)
            # how far an answer is off that is none, nobody knows
            wrong_by = torch.where(active.stationarity <= rtol, wrong_by, 0.0)
            active, held = self._classify(at, y, z, wrong_by)
        self.found.append(active)
        rest = (active.equality, torch.where(held, active.inequality, 0.0), held)
        return answer.result(Unknowns(unflatten(x, spec), *(t.to(x[0].dtype) for t in rest)))

    def _classify(
        self, at: Conditions, y: torch.Tensor, z: torch.Tensor, wrong_by: torch.Tensor | None = None
    ) -> tuple[ActiveConstraints, torch.Tensor]:
        return at.active_set(y, z, self.tolerances.active_rtol, self.hold_kinks, wrong_by)
