"""What a solve returns, how far it can be believed, and which constraints are active at it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch

from implicitlayer._errors import (
    ConvergenceWarning,
    IndefiniteError,
    NonFiniteError,
    NotConvergedError,
    SingularError,
    warn,
)
from implicitlayer.base._ritz import RitzValues
from implicitlayer.base._status import Status
from implicitlayer.base._tree import name_lanes
from implicitlayer.base._types import Extension, OnFailure


@dataclass(frozen=True, eq=False)
class LinearSolution:
    """Solution of ``A value = rhs`` and its numbers, lane by lane.

    Attributes:
        value: shape and structure of the right-hand side.
        codes: int tensor [*lanes], one :class:`Status` per lane.
        steps: int tensor [*lanes], matrix products used by the iteration.
        residual_norm: tensor [*lanes], ``||rhs - A value||_2``; recomputed with one more product where
            ``residual_is_true``, else the one carried along by the recurrence.
        relative_residual: ``residual_norm / ||rhs||_2``; 0 for a zero right-hand side.
        smallest_curvature: tensor [*lanes], smallest ``p'Ap / p'Mp`` seen (M: the preconditioner's matrix, identity
            without one); +inf where no product was made.
        residual_is_true: whether the residual was recomputed from the value.
        method: name of the linear solver.
        rtol: relative tolerance asked for; None where only a number of steps was.
        ritz: the coefficients behind the Ritz values; None where the solver has none.
        preconditioned: whether the solver has a preconditioner of the user's; Ritz values are in its units.
        broken_preconditioner: whether it is this one that returned NaN or Inf.
        remedy: what was done about negative curvature, in words; empty where nothing was.
        damping: tensor [*lanes], added to the matrix by that remedy; None where nothing was.
        singular: bool [*lanes], where the matrix has no inverse, and the value is one of many; None: not known of any.
        damps: whether the advice of an error may be to pass damping= and curvature=.
    """

    value: Any
    codes: torch.Tensor
    steps: torch.Tensor
    residual_norm: torch.Tensor
    relative_residual: torch.Tensor
    smallest_curvature: torch.Tensor
    residual_is_true: bool
    method: str
    rtol: float | None = None
    ritz: RitzValues | None = None
    preconditioned: bool = False
    broken_preconditioner: bool = False
    remedy: str = ""
    damping: torch.Tensor | None = None
    singular: torch.Tensor | None = None
    damps: bool = True

    @property
    def ritz_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest Ritz value, tensors [*lanes]: estimates, from inside, of the ends of the spectrum.

        Of A; with a preconditioner M (a proximal objective's strength is one), of M^-1 A. From the coefficients of
        conjugate gradients, at no further product; NaN where there are none (other solvers, no step made).
        """
        if self.ritz is None:
            unknown = torch.full_like(self.relative_residual, math.nan)
            return unknown, unknown
        return self.ritz.extremes(self.relative_residual)

    @property
    def condition_estimate(self) -> torch.Tensor:
        """Tensor [*lanes], largest over smallest Ritz value: a lower estimate of the condition number.

        Infinite where the smallest is not positive; NaN where there are no Ritz values.
        """
        low, high = self.ritz_values
        return torch.where(low > 0, high / low, torch.where(low.isnan(), math.nan, math.inf))

    @cached_property
    def status(self) -> Status:
        """The status; of a batch, that of its worst lane."""
        return Status(int(self.codes.max())) if self.codes.numel() else Status.CONVERGED

    @property
    def num_steps(self) -> int:
        """Steps made; of a batch, those of its slowest lane."""
        return int(self.steps.max()) if self.steps.numel() else 0

    def describe(self) -> str:
        """What happened, with the numbers of the worst lane, and what to do."""
        status = self.status
        bad = self.codes == int(status)
        lane = name_lanes(bad)
        pick = tuple(bad.nonzero()[0].tolist()) if bad.numel() else ()

        def at(values: torch.Tensor) -> Any:
            return values[pick].item() if values.numel() else 0

        curvature, broken = at(self.smallest_curvature), self.broken_preconditioner
        known = self.smallest_curvature.numel() > 0 and math.isfinite(curvature) and not self.remedy
        what = {
            Status.INDEFINITE: f"met p'Ap/p'p = {curvature:.3g} <= 0" if curvature <= 0 else "met negative curvature",
            Status.SINGULAR: f"met p'Ap/p'p = {curvature:.3g}, zero to working precision,"
            if known
            else "found the matrix singular to working precision",
            Status.NONFINITE: f"met NaN or Inf in {'its preconditioner' if broken else 'a Hessian-vector product'}",
        }.get(status, f"ended with status {status.name.lower()}")
        asked = "" if self.rtol is None else f", rtol {self.rtol:.1e}"
        kind = "true" if self.residual_is_true else "recursive"
        if self.remedy:
            what += f" ({self.remedy})"
        remedy = "The function given as preconditioner= returned it. Look at what it divides by."
        if not broken:
            also = " The preconditioner may be the reason, too: solve without it to see."
            remedy = status.advice(self.damps) + also * (self.preconditioned and not status.ok)
        return (
            f"{self.method} {what}{lane} after {at(self.steps)} steps ({kind} relative residual "
            f"{at(self.relative_residual):.2e}{asked}). {remedy}"
        )

    def enforce(self, on_failure: OnFailure, context: str = "") -> None:
        """Apply the failure policy.

        ``"raise"`` makes every failure an error. ``"warn"`` warns where the value still approximates the answer
        (step limit before the tolerance, stagnation) and raises where it does not (negative curvature, singular,
        diverged). ``"ignore"`` keeps silent; only NaN and Inf are an error under every policy.
        """
        status = self.status
        if status.ok:
            return
        message = context + self.describe()
        if on_failure == "mask":  # whoever solves sets the lanes to zero
            return
        if status is Status.NONFINITE:
            raise NonFiniteError(message)
        if on_failure == "ignore":
            return
        if on_failure == "warn" and status.usable:
            warn(message, ConvergenceWarning, f"{context}{self.method}{status}")
            return
        errors = {Status.INDEFINITE: IndefiniteError, Status.SINGULAR: SingularError}
        raise errors.get(status, NotConvergedError)(message, self)


@dataclass(frozen=True, eq=False)
class SolverResult:
    """What an inner solver may return in place of the bare value: records then tell how it ended.

    Attributes:
        value: the unknowns, in the structure of ``init``.
        status: how the solver ended, as it says itself.
        num_steps: its steps, if it counts them.
        message: its own words.
        aux: anything the caller should get back (``solver_has_aux=True`` returns it beside the value).
        nonfinite: the problems that met NaN or Inf, bool [*lanes]; one of them makes it the status. None: the solver
            does not say which.

    Example:
        >>> import torch, implicitlayer as il
        >>> def solver(objective, init, t):
        ...     return il.SolverResult(t.clone(), il.Status.CONVERGED, num_steps=1)
        >>> layer = il.argmin(lambda x, t: ((x - t) ** 2).sum(), solver)
        >>> t = torch.ones(2, requires_grad=True)
        >>> _ = layer(torch.zeros(2), t)
        >>> layer.records[0].num_steps
        1
    """

    value: Any
    status: Status | None = None
    num_steps: int | None = None
    message: str = ""
    aux: Any = field(default=None)
    nonfinite: torch.Tensor | None = field(default=None, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.nonfinite is not None and bool(self.nonfinite.any()):
            object.__setattr__(self, "status", Status.NONFINITE)


class RecordingSolver(Extension):
    """Base class of inner solvers that tell how they ended: a subclass defines ``run``, layers call it.

    ``solver(objective, init, *theta)`` returns the bare value, so a subclass is a solver like any other callable.
    ``il.testing.extension_checks(il.RecordingSolver)`` finds it, and tests it as a minimiser unless it finds roots.

    Attributes:
        finds: what it looks for, if it can say so: layers refuse a solver of another problem than theirs. What finds
            a root is called with ``x - map(x)`` by a layer of a fixed point.
        batched: if it is there and true, the solver takes many problems at once: an objective that returns [*lanes].
        in_parts: whether it may be given one vector [*lanes, n] of which every process holds a part only, where
            unknowns are DTensors: it uses it entry by entry and in sums (products, norms, ``amax``) only. One with an
            attribute ``callback`` that is not None gets whole ones all the same.

    Example:
        >>> import torch, implicitlayer as il
        >>> class Halving(il.RecordingSolver):
        ...     def run(self, objective, init, *theta):
        ...         x = init
        ...         for _ in range(20):
        ...             x = x - 0.25 * torch.func.grad(objective)(x, *theta)
        ...         return il.SolverResult(x, num_steps=20)
        ...     @classmethod
        ...     def examples(cls):
        ...         return []  # one for this page: not to be found by il.testing.extension_checks
        >>> x = Halving()(lambda x, t: ((x - t) ** 2).sum(), torch.zeros(2), torch.ones(2))
        >>> [round(v, 4) for v in x.tolist()]
        [1.0, 1.0]
    """

    finds: ClassVar[Literal["minimum", "root", "fixed point"] | None] = None
    in_parts: ClassVar[bool] = False

    def run(self, objective: Callable[..., Any], init: Any, *theta: Any) -> SolverResult:
        """Solve, and return the value with status and step count."""
        raise NotImplementedError

    def __call__(self, objective: Callable[..., Any], init: Any, *theta: Any) -> Any:
        return self.run(objective, init, *theta).value


@dataclass(frozen=True, eq=False)
class ActiveSet:
    """The constraints (or zeros of a regulariser) that are active at a solution, lane by lane.

    Attributes:
        active: bool masks in the structure of x: entries that are held and do not move freely (at a bound, at
            zero, or on the sphere of a ball, which holds all entries together).
        kinks: bool masks in the structure of x: entries at a border with a zero multiplier, within ``tolerance``. The
            solution bends there and its derivative is that of one side.
        num_active, num_kinks: how many, tensors [*lanes].
        kinks_known: False if a projection or prox of the user's own is involved: kinks that show are told, others not.
        tolerance: tensor [*lanes], the distance to a kink, in units of x, that counts as being there.
        violation: tensor [*lanes], distance of x from the constraints.
        relative_violation: the same over the size of x (or of the step that was projected, where x is near zero).
    """

    active: Any
    kinks: Any
    num_active: torch.Tensor
    num_kinks: torch.Tensor
    kinks_known: bool
    tolerance: torch.Tensor
    violation: torch.Tensor
    relative_violation: torch.Tensor

    def __str__(self) -> str:
        kinks = span(self.num_kinks, "d") if self.kinks_known else "unknown"
        return f"active {span(self.num_active, 'd')}, kinks {kinks}"


def span(values: torch.Tensor, form: str = ".2e") -> str:
    """One number, or the range over the lanes."""
    if values.numel() == 0:
        return "-"
    low, high = (format(value.item(), form) for value in values.aminmax())
    return high if values.ndim == 0 else f"{low} to {high} over {tuple(values.shape)} lanes"
