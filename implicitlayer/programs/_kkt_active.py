"""The optimality conditions of a constrained minimum at a given point: which constraints hold, and how well."""

# Legend: n unknowns, e equations h(x) = 0, m inequalities g(x) <= 0; J_i the gradient of constraint i; lanes lead.
#     grad f + J_h' lambda + J_g' mu = 0,    h = 0,    g <= 0,    mu >= 0,    mu_i g_i = 0
#
# NOTE [scales]: constraints come in any unit. -g_i / ||J_i|| is the distance of x from the border of constraint i, to
# first order, and is compared with the size of x; mu_i ||J_i|| is the force of the border, and is compared with
# ||grad f|| + ||H x||, the size of the terms of the gradient. Neither depends on the units of the constraint.
# Where x is zero nothing is small relative to it. So distances below a tiny part of the reach count as zero too. The
# reach is the length that the data know without x: how far the gradient would move x if no constraint held it, but not
# beyond the borders, if one of them is away from the origin (an almost linear objective would move x without end).

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from implicitlayer._errors import InfeasibleError, StationarityError, StationarityWarning, tell_kink, warn
from implicitlayer.base._failures import refuse, standing
from implicitlayer.base._solution import ActiveSet
from implicitlayer.base._tree import name_lanes
from implicitlayer.base._types import OnFailure
from implicitlayer.programs._interior_point_step import norm_of, times

NOISE = 1e3  # below this many eps of everything a distance is rounding
DEPENDENT = 1e-8  # smallest eigenvalue of the products of unit rows that are independent
FEW = 24  # rows up to which the matrix of all of them is factorised sooner than those that count are taken out of it
ABSOLUTE = 1e-12  # below this part of the reach a distance is zero, or 16 eps of it where that is more


@dataclass(frozen=True)
class Tolerances:
    """What counts as zero.

    Args:
        stationarity_rtol: allowed norm of the gradient of the Lagrangian, relative to ``||grad f|| + ||H x||``; also
            the allowed distance from the constraints, relative to the size of x. None: neither is judged.
        active_rtol: a constraint whose border is nearer than this, relative to the size of x, is at its border; it is
            active if its force, relative to the size of the terms of the gradient, is above this too, else at a kink.
            Distances that are zero relative to the data (NOTE [scales]) are zero where x is, too.
    """

    stationarity_rtol: float | None = 1e-3
    active_rtol: float = 1e-6

    def __post_init__(self) -> None:
        if self.stationarity_rtol is not None and not self.stationarity_rtol >= 0:
            raise ValueError(
                f"stationarity_rtol={self.stationarity_rtol} must be non-negative, or None to switch the checks off."
            )
        if not 0 <= self.active_rtol < 1:
            raise ValueError(
                f"active_rtol={self.active_rtol} must be at least 0 and below 1. It is the relative accuracy of the "
                "solver's answer."
            )


@dataclass(frozen=True, eq=False)
class ActiveConstraints(ActiveSet):
    """Which inequalities are active at a solution, and how well it satisfies the conditions of optimality.

    ``active`` and ``kinks`` are bool masks [*lanes, m] over the inequalities: at the border with a multiplier, and at
    the border without one. ``violation`` is the largest distance of x from a constraint.

    Attributes:
        equality: multipliers of the equations, [*lanes, e].
        inequality: multipliers of the inequalities, [*lanes, m]; exactly zero where not active.
        stationarity: [*lanes], norm of the gradient of the Lagrangian relative to ``||grad f|| + ||H x||``.
        independent: bool [*lanes], whether the gradients of the constraints that hold are linearly independent.
        residual: [*lanes], norm of what is left of the conditions of optimality, or of their rounding; None if unknown.
        size, zero: [*lanes], of x, which distances are compared with; a distance below which nothing is: NOTE [scales].
        nearest: [*lanes], distance of x from the nearest border of an inequality that does not hold as an equation.
        found_by: what found the active set of a quadratic program; empty elsewhere.
        shift: [e + m], how far the sides of a program without a feasible point were moved, of ``A x = b`` and of the
            rows ``G x <= h``; rows that moved hold as equations and are not in ``active``. None where nothing moved.
    """

    equality: torch.Tensor
    inequality: torch.Tensor
    stationarity: torch.Tensor
    independent: torch.Tensor
    residual: torch.Tensor | None = None
    size: torch.Tensor | None = None
    zero: torch.Tensor | None = None
    nearest: torch.Tensor | None = None
    found_by: str = ""
    shift: torch.Tensor | None = None

    def judge(self, on_failure: OnFailure, stationarity_rtol: float | None) -> None:
        """Apply the failure policy: outside the constraints, not stationary, at a kink, dependent gradients."""
        if on_failure == "ignore":
            return
        rtol = math.inf if stationarity_rtol is None else stationarity_rtol
        outside = ~(self.relative_violation <= rtol)
        if bool(outside.any()) and rtol < math.inf:
            at = tuple(outside.nonzero()[0].tolist())
            error = InfeasibleError(
                f"the solver's answer does not satisfy the constraints{name_lanes(outside)}: its distance from one is "
                f"about {self.violation[at].item():.3g} ({self.relative_violation[at].item():.1e} of its size, allowed "
                f"{rtol:.1e}). Does the solver know the constraints (g <= 0, h = 0), and can they all hold?"
            )
            refuse(outside, error)
        moving = ~(self.stationarity <= rtol)
        if bool(moving.any()) and rtol < math.inf:
            at = tuple(moving.nonzero()[0].tolist())
            message = (
                f"the solver's answer does not satisfy the optimality conditions{name_lanes(moving)}: no non-negative "
                "multipliers of the constraints at their border balance the gradient of the objective; "
                f"{self.stationarity[at].item():.1e} of it is left, allowed {rtol:.1e}. Solve the problem more "
                "tightly, raise active_rtol if the answer is rough, and check the sign of multipliers that the solver "
                "returns (the Lagrangian is f + lambda'h + mu'g with mu >= 0)."
            )
            if on_failure in ("raise", "mask"):
                refuse(moving, StationarityError(message))
            else:
                warn(message, StationarityWarning, "optimality conditions")
        self._judge_kinks(on_failure)

    def _judge_kinks(self, on_failure: OnFailure) -> None:
        messages = {}
        bent, dependent = standing(self.num_kinks > 0), standing(~self.independent)
        if bool(bent.any()):
            messages["kink"] = (
                f"the solution sits at a kink{name_lanes(bent)}: {int(self.num_kinks.max())} inequalities are at their "
                f"border with a multiplier of zero (border within {float(self.tolerance.max()):.1e}). The solution "
                "bends there, and its derivative is that of one side (at_kink says which). See "
                "record.active_set.kinks."
            )
        if bool(dependent.any()):
            messages["dependent"] = (
                f"the gradients of the constraints that hold are linearly dependent{name_lanes(dependent)}: "
                "multipliers are not unique, and the solution has a derivative only for changes that keep all of "
                "these constraints consistent (of others it is one of several). Remove redundant constraints."
            )
        for kind, message in messages.items():
            tell_kink(message, kind, on_failure)


@dataclass(frozen=True, eq=False)
class Conditions:
    """The terms of the optimality conditions at x, lane by lane, in float64.

    ``x``, ``away`` (x - init), ``gradient`` and ``curved`` (H x) are [*lanes, n], ``h`` [*lanes, e], ``rows_h``
    [*lanes, e, n], ``g`` [*lanes, m], ``rows_g`` [*lanes, m, n]. ``pull`` [*lanes] is the distance that the gradient
    would move x without constraints, zero where nobody knows. ``at_rest`` [*lanes] is the size that terms of the
    gradient can have there, where it is nothing but rounding, which tells no size; else zero. ``sides`` are those of
    rows that are linear, ``rows_h x - h`` and ``rows_g x - g``, where they are known.
    """

    x: torch.Tensor
    away: torch.Tensor
    gradient: torch.Tensor
    curved: torch.Tensor
    h: torch.Tensor
    rows_h: torch.Tensor
    g: torch.Tensor
    rows_g: torch.Tensor
    eps: float
    pull: torch.Tensor
    at_rest: torch.Tensor | float = 0.0
    sides: tuple[torch.Tensor, torch.Tensor] | None = None

    @cached_property
    def norms_h(self) -> torch.Tensor:
        """Lengths of the gradients of the equations, [*lanes, e]."""
        return norm_of(self.rows_h)

    @cached_property
    def norms_g(self) -> torch.Tensor:
        """Lengths of the gradients of the inequalities, [*lanes, m]."""
        return norm_of(self.rows_g)

    @cached_property
    def size(self) -> torch.Tensor:
        """max(||x||, ||x - init||), above rounding."""
        size = torch.maximum(norm_of(self.x), norm_of(self.away))
        return size.clamp(min=NOISE * self.eps * max(self.x.shape[-1], 1) ** 0.5)

    @cached_property
    def scale(self) -> torch.Tensor:
        """||grad f|| + ||H x||: the size of the terms of the gradient."""
        return (norm_of(self.gradient) + norm_of(self.curved)).clamp(min=self.at_rest)

    @cached_property
    def reach(self) -> torch.Tensor:
        """A length of the data, [*lanes]: NOTE [scales]."""
        sides = self.sides or (times(self.rows_h, self.x) - self.h, times(self.rows_g, self.x) - self.g)
        offsets = torch.cat([_over(sides[0], self.norms_h), _over(sides[1], self.norms_g)], -1).abs()
        # a border through the origin, to rounding, tells no length
        offsets = torch.where(offsets.isfinite() & (offsets > 1e-10 * norm_of(self.x)[..., None]), offsets, 0.0)
        farthest = offsets.amax(-1) if offsets.shape[-1] else torch.zeros_like(self.pull)
        return torch.where(farthest > 0, torch.minimum(self.pull, farthest), self.pull)

    @cached_property
    def border_distance(self) -> torch.Tensor:
        """Signed distance of x from the border of each inequality, positive inside, [*lanes, m]."""
        return _over(-self.g, self.norms_g)

    def near(self, active_rtol: float) -> torch.Tensor:
        """Inequalities at their border."""
        return self.border_distance <= self._tolerance(active_rtol)[..., None]

    def _tolerance(self, active_rtol: float) -> torch.Tensor:
        return torch.maximum(active_rtol * self.size, self._zero())

    def _zero(self) -> torch.Tensor:
        return max(ABSOLUTE, 16 * self.eps) * self.reach

    def _rounding(self) -> torch.Tensor:
        """What the conditions are rounded by, about: a few eps of their terms."""
        terms = sum((norm_of(norms) * self.size for norms in (self.norms_h, self.norms_g)), self.scale)
        rounding: torch.Tensor = 16 * self.eps * terms
        return rounding

    def active_set(
        self,
        equality: torch.Tensor,
        inequality: torch.Tensor,
        active_rtol: float,
        hold_kinks: bool,
        wrong_by: torch.Tensor | None = None,
        undecided: torch.Tensor | None = None,
    ) -> tuple[ActiveConstraints, torch.Tensor]:
        """What is active under these multipliers, and the mask [*lanes, m] of what is to hold as an equation.

        An inequality that is not active is at a kink too if its border is within twice the error of x, ``wrong_by``
        [*lanes], or if it is ``undecided`` [*lanes, m].
        """
        tolerance = self._tolerance(active_rtol)
        distance = self.border_distance
        near = distance <= tolerance[..., None]
        force = inequality * self.norms_g
        active = near & (force > active_rtol * self.scale[..., None])
        kinks = near
        if wrong_by is not None:
            tolerance = torch.maximum(tolerance, 2 * wrong_by)
            kinks = kinks | (distance <= tolerance[..., None])
        if undecided is not None:
            active, kinks = active & ~undecided, kinks | undecided
            farthest = torch.where(undecided, distance, 0.0)
            tolerance = torch.maximum(tolerance, farthest.amax(-1) if farthest.shape[-1] else tolerance)
        kinks = kinks & ~active
        kept = torch.where(active, inequality, 0.0)
        slope = self.gradient + times(self.rows_h.mT, equality) + times(self.rows_g.mT, kept)
        relative = torch.where(self.scale > 0, norm_of(slope) / torch.where(self.scale > 0, self.scale, 1.0), 0.0)
        off = torch.cat([_over(self.h, self.norms_h).abs(), (-distance).clamp(min=0)], -1)
        violation = off.amax(-1) if off.shape[-1] else torch.zeros_like(relative)
        held = active | kinks if hold_kinks else active
        left = norm_of(torch.cat([slope, self.h, torch.where(held, self.g, 0.0)], -1))
        found = ActiveConstraints(
            active=active,
            kinks=kinks,
            num_active=active.sum(-1),
            num_kinks=kinks.sum(-1),
            kinks_known=True,
            tolerance=tolerance,
            violation=violation,
            relative_violation=torch.where(violation <= self._zero(), 0.0, violation / self.size),
            equality=equality,
            inequality=kept,
            stationarity=relative,
            independent=self._independent(held),
            residual=torch.maximum(left, self._rounding()),
            size=self.size,
            zero=self._zero(),
            nearest=torch.where(held, torch.inf, distance).amin(-1) if distance.shape[-1] else None,
        )
        return found, held

    def settled(self, held: torch.Tensor, inequality: torch.Tensor, active_rtol: float, rtol: float) -> torch.Tensor:
        """Lanes in which ``held`` is all there is to say: no kink, independent rows, x inside to ``rtol``."""
        near = self.near(active_rtol)
        forced = inequality * self.norms_g > active_rtol * self.scale[..., None]
        outside = (_over(self.h, self.norms_h).abs(), -self.border_distance)
        inside = torch.cat(outside, -1) <= torch.maximum(self._zero(), rtol * self.size)[..., None]
        same = (near == held) & (forced | ~held)
        return same.all(-1) & inside.all(-1) & self._independent(held)

    def _independent(self, held: torch.Tensor) -> torch.Tensor:
        """Whether the gradients of what holds are independent, by the singular values of the unit rows."""
        norms, rows = torch.cat([self.norms_h, self.norms_g], -1), torch.cat([self.rows_h, self.rows_g], -2)
        holds = torch.cat([torch.ones_like(self.h, dtype=torch.bool), held], -1)
        zero = (norms == 0) & holds
        over = torch.where(holds & ~zero, 1 / norms, 0.0)  # of rows that do not count, zeros
        if over.shape[-1] > FEW:
            index = held_first(holds)
            over = over.gather(-1, index)
            rows = rows.gather(-2, index[..., None].expand(*index.shape, rows.shape[-1]))
        if not over.shape[-1] or not self.x.shape[-1]:
            return ~holds.any(-1)
        unit = torch.where(over[..., None] > 0, rows * over[..., None], 0.0)
        gram = unit @ unit.mT + torch.diag_embed((over == 0).to(rows.dtype) - DEPENDENT)
        independent: torch.Tensor = (torch.linalg.cholesky_ex(gram).info == 0) & ~zero.any(-1)
        return independent


def held_first(held: torch.Tensor) -> torch.Tensor:
    """The rows of a mask [*lanes, c] that are held and then others, as many as the lane with most of them has."""
    most = int(held.sum(-1).max()) if held.numel() else 0
    return held.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., :most]


def length_of_step(slope: torch.Tensor, product: torch.Tensor) -> torch.Tensor:
    """||H^-1 slope|| as far as the product ``H slope`` tells; zero where it shows no curvature.

    (v'v)^2 <= v'Hv v'H^-1 v <= v'Hv ||v|| ||H^-1 v|| for a positive definite H, so it is never too large.
    """
    norm, curvature = norm_of(slope), (slope * product).sum(-1).abs()
    curved = curvature > 0
    step = norm * (norm * norm / torch.where(curved, curvature, 1.0))
    return torch.where(curved & step.isfinite(), step, 0.0)


def stacked(found: list[ActiveConstraints], lanes: torch.Size) -> ActiveConstraints:
    """The active sets of single problems, in the order of their lanes, as one."""
    parts: dict[str, Any] = {name: part for name, part in vars(found[0]).items() if isinstance(part, torch.Tensor)}
    for name, part in parts.items():
        parts[name] = torch.stack([getattr(one, name) for one in found]).reshape((*lanes, *part.shape))
    return replace(found[0], **parts)


def _over(values: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """values / norms; without a gradient the border is infinitely far, or here if the value is zero."""
    return torch.where(values == 0, 0.0, values / norms)
