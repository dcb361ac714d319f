"""Diagnostics: what every forward and backward solve met, for whoever listens."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

from implicitlayer._errors import NotRecordedError, StationarityError, StationarityWarning, warn
from implicitlayer.base._solution import ActiveSet, LinearSolution, span
from implicitlayer.base._status import Status
from implicitlayer.base._tree import name_lanes
from implicitlayer.base._types import OnFailure

# A backward pass may run on one of autograd's own threads, so the listeners are shared by all threads.
_listeners: list[tuple[list[Record], bool]] = []
_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class ForwardRecord:
    """What the forward solve left behind.

    Attributes:
        stationarity_norm: tensor [*lanes], Euclidean norm of the gradient of the objective (or of the residual) at
            the returned point; None if the check was off (outside of il.diagnostics()) or no derivative was wanted.
        estimated_distance: tensor [*lanes], estimate from below of the distance to the exact solution.
        relative_distance: the same over ``max(||x||, ||x - init||)``: the stationarity free of every scale.
        solver_status, num_steps: as the solver told them, else None.
        num_polish_steps: Newton steps made after the solver.
        rtol: the relative distance that the layer allows; None if it allows any.
        active_set: which constraints are active and where the solution has a kink; None for a layer without a
            constraint or regularizer.
        failed: bool [*lanes], the lanes that ``on_failure="mask"`` made NaN; None under any other policy.
    """

    stationarity_norm: torch.Tensor | None
    estimated_distance: torch.Tensor | None
    relative_distance: torch.Tensor | None
    solver_status: Status | None
    num_steps: int | None
    num_polish_steps: int = 0
    rtol: float | None = None
    active_set: ActiveSet | None = None
    failed: torch.Tensor | None = None

    @property
    def stationary(self) -> bool | None:
        """Whether every lane is as close to its solution as the layer asks; None if that was not checked."""
        if self.relative_distance is None or self.rtol is None:
            return None
        return bool((self.relative_distance <= self.rtol).all())

    @property
    def _solver_said(self) -> str:
        """How the solver ended, as it says itself."""
        if self.solver_status is None:
            return ""
        steps = "" if self.num_steps is None else f" after {_steps(self.num_steps)}"
        return f"; the solver's own status is {self.solver_status.name.lower()}{steps}"

    def __str__(self) -> str:
        solver = "" if self.num_steps is None else f", {_steps(self.num_steps, 'solver ')}"
        solver += f", {_steps(self.num_polish_steps, 'polish ')}" if self.num_polish_steps else ""
        solver += f", {self.active_set}" if self.active_set is not None else ""
        solver += f", solver {self.solver_status.name.lower()}" if self.solver_status is not None else ""
        if self.stationarity_norm is None or self.relative_distance is None:
            return f"forward: stationarity not checked{solver}"
        return (
            f"forward: gradient norm {span(self.stationarity_norm)}, estimated relative distance to the solution "
            f"{span(self.relative_distance)}{solver}"
        )

    def explain(self) -> str:
        """Two sentences: what was found, and what to do about it."""
        if self.relative_distance is None:
            return (
                "Whether the solver's answer is stationary was not checked: the check is off, or no gradient was "
                f"asked for{self._solver_said}. Leave stationarity_rtol at its default and call the layer with a theta "
                "that requires a gradient."
            )
        if self.stationary is None or self.rtol is None:
            return (
                f"The solver's answer is at an estimated relative distance of {span(self.relative_distance)} from the "
                f"solution, at least{self._solver_said}. The layer does not judge that (stationarity_rtol=None): the "
                "gradient carries an error of that order at least."
            )
        distance = f"estimated relative distance to the solution {span(self.relative_distance)}"
        numbers = f"{distance}, allowed {self.rtol:g}{self._solver_said}"
        if self.solver_status is Status.MAX_STEPS_REACHED and self.stationary and not self.num_polish_steps:
            return (
                f"The solver stopped at its step limit before its tolerance ({numbers}): the distance is one from "
                "below, and larger where the problem is ill-conditioned. Raise its max_steps, loosen its tolerance, or "
                "pass polish=1 for a Newton step after the solver; the record of the backward solve knows more."
            )
        if self.stationary:
            numbers = f"as far as the forward pass tells ({numbers})"
            return f"The solver's answer is stationary {numbers}. There is nothing to do."
        bad = name_lanes(~(self.relative_distance <= self.rtol))
        return (
            f"The solver's answer is not stationary{bad} ({numbers}), and the gradient carries an error of that order "
            "at least. Solve the inner problem more tightly, or pass polish=1 for a Newton step after the solver."
        )


@dataclass(frozen=True, eq=False)
class GradientError:
    """How far a computed gradient is from the exact one, ``||g - g*||``, lane by lane. It is for the given cotangent.

    The gradient is that of all theta leaves together. ``float(error)`` is the sum over the lanes, which bounds the
    error of a theta that they share, and that of all together where each has its own.

    Attributes:
        total: tensor [*lanes], bound or estimate of the error (Euclidean norm).
        inner: the part that the inexact inner solve (x is not x*) has in it.
        linear: the part of the inexact linear solve.
        distance: tensor [*lanes], bound or estimate of ``||x - x*||``.
        relative: ``total / ||g||``.
        rigorous: whether ``total`` is a bound under the assumptions given to the layer (up to rounding), or an
            estimate.
        note: what it rests on, and what a bound would need.
    """

    total: torch.Tensor
    inner: torch.Tensor
    linear: torch.Tensor
    distance: torch.Tensor
    relative: torch.Tensor
    rigorous: bool
    note: str = ""

    def __float__(self) -> float:
        """That of all lanes together, at most: the sum."""
        return float(self.total.sum()) if self.total.numel() else 0.0

    def __str__(self) -> str:
        kind, sign = ("bound", "<=") if self.rigorous else ("estimate", "about")
        return (
            f"gradient error {sign} {span(self.total)}, relative {span(self.relative)} ({kind}; inner solve "
            f"{span(self.inner)}, linear solve {span(self.linear)})"
            + (f"; of all lanes together {sign} {float(self):.2e}" if self.total.ndim else "")
        )


@dataclass(eq=False)
class AnswerDistance:
    """What the solve behind a derivative tells of the distance from the solver's answer to the solution.

    Attributes:
        pull: tensor [*lanes], norm of the gradient there (in the units of the matrix) over the size of x.
        newton: tensor [*lanes], length of the Newton step over the size of x; None where the answer was not in doubt.
        message: what is wrong with the answer; empty where nothing is.
        lost: bool [*lanes], the lanes that ``message`` is about; None without one.
    """

    pull: torch.Tensor
    newton: torch.Tensor | None = None
    message: str = ""
    lost: torch.Tensor | None = None

    def enforce(self, on_failure: OnFailure) -> None:
        """Apply the failure policy; the solve itself masks lanes."""
        if not self.message or on_failure in ("ignore", "mask"):
            return
        if on_failure == "raise":
            raise StationarityError(self.message)
        warn(self.message, StationarityWarning, "answer, backward")


@dataclass(frozen=True, eq=False)
class BackwardRecord:
    """What one linear solve behind a derivative met.

    Attributes:
        kind: which derivative the solve was for: ``backward``, ``forward-mode``, ``higher-order ...``; of
            :func:`linear_solve` itself ``linear``.
        solution: all its numbers, lane by lane (without the value).
        answer: what the solve tells of the distance from the solver's answer to the solution; None where it was not
            looked at (the answer is right to rounding, or was called not stationary before; no derivative of a layer).
    """

    kind: str
    solution: LinearSolution
    certificate: Callable[[], GradientError] | None = None
    answer: AnswerDistance | None = None

    @property
    def status(self) -> Status:
        """How the solve ended; of a batch, that of its worst lane."""
        return self.solution.status

    @cached_property
    def gradient_error(self) -> GradientError:
        """How far the gradient made of this solve is from the exact one.

        A rigorous bound if the layer was given :class:`Assumptions`, else an estimate; it says which. Computed when
        first asked for, with a few solves more for an estimate, from tensors that the record holds: only records of
        reverse-mode derivatives taken inside ``il.diagnostics()`` have it.

        Raises:
            NotRecordedError: any other record.

        Source: Rajeswaran et al. 2019 (arXiv:1909.04630), Lemma 3.
        """
        if self.certificate is None:
            raise NotRecordedError(
                f"this record (of a {self.kind} solve) keeps no tensors to judge the gradient by. Run forward and "
                "backward inside `with il.diagnostics() as records:` and ask a record of kind 'backward' there."
            )
        return self.certificate()

    @property
    def relative_distance(self) -> torch.Tensor | None:
        """Tensor [*lanes], distance from the solver's answer to the solution over its size; None where not looked at.

        By a Newton step where that was in doubt; else ``||grad f||`` over the smallest Ritz value, an estimate from
        above as far as these see the flattest direction (NaN without Ritz values).
        """
        if self.answer is None or self.answer.newton is not None:
            return None if self.answer is None else self.answer.newton
        return self._over_smallest(self.answer.pull)

    @property
    def solution_error(self) -> torch.Tensor:
        """Tensor [*lanes], estimate of ``||u - A^-1 b||``: residual norm over smallest Ritz value, at no product.

        NaN without Ritz values, infinite where the smallest is not positive; in the preconditioner's units, if any.
        """
        return self._over_smallest(self.solution.residual_norm)

    def _over_smallest(self, norm: torch.Tensor) -> torch.Tensor:
        low, _ = self.solution.ritz_values
        return torch.where(low > 0, norm / low, torch.where(low.isnan(), low, torch.inf))

    def __str__(self) -> str:
        s = self.solution
        remedy = f", {s.remedy}" if s.remedy else ""
        known = not bool(s.condition_estimate.isnan().all())
        condition = f", condition about {span(s.condition_estimate)}" if known else ""
        return (
            f"{self.kind}: {s.method} {s.status.name.lower()}, {_steps(s.num_steps)}, relative residual "
            f"{span(s.relative_residual)}, smallest curvature {span(s.smallest_curvature)}{condition}{remedy}"
        )

    def explain(self) -> str:
        """Two sentences: what was found, and what to do about it."""
        s = self.solution
        if not s.status.ok:
            return f"The {self.kind} solve failed. {s.describe()}"
        if self.answer is not None and self.answer.message:
            return f"The {self.kind} solve converged, but {self.answer.message}"
        if s.remedy:
            changed = "" if s.damping is None and "Gauss" not in s.remedy else ", so the gradient is a biased one"
            return (
                f"Negative curvature was met, and the {self.kind} solve was {s.remedy}{changed}. If a minimum is "
                "meant, solve the inner problem more tightly: a minimum has no negative curvature."
            )
        if s.status is Status.STEP_LIMIT:
            return (
                f"The {self.kind} solve made the {_steps(s.num_steps)} that were asked for; its relative residual is "
                f"{span(s.relative_residual)}. Give a tolerance in place of max_steps alone for a converged solve."
            )
        return (
            f"The {self.kind} solve converged in {_steps(s.num_steps)} to a relative residual of "
            f"{span(s.relative_residual)}. There is nothing to do."
        )


Record = ForwardRecord | BackwardRecord


class CallRecords(list[Record]):
    """The records of one call of a layer."""

    def listener(self) -> Callable[[Record], None]:
        """What adds one, as long as somebody holds the list.

        A backward record may hold tensors of the graph, and the graph holds the listener: that must not hold the list.
        """
        reference = weakref.ref(self)

        def listen(record: Record) -> None:
            records = reference()
            if records is not None:
                records.append(record)

        return listen


def _steps(count: int, kind: str = "") -> str:
    return f"{count} {kind}step{'' if count == 1 else 's'}"


@contextmanager
def diagnostics() -> Iterator[list[Record]]:
    """Collect one record per forward solve and one per linear solve made inside the block (by any thread).

    A :class:`ForwardRecord` holds the norm of the gradient at the returned point, the estimated distance to the
    solution and the solver's own count; a :class:`BackwardRecord` the status, steps, residual, smallest curvature,
    Ritz values and condition estimate, and the gradient's error on demand. Printing one is readable; ``explain()``
    says what is wrong and what to do. A backward record holds x, theta and the solution of its system, as long as it
    is held.

    Yields:
        The list that fills up.

    Example:
        >>> import torch, implicitlayer as il
        >>> layer = il.argmin(lambda x, t: 0.5 * ((x - t) ** 2).sum(), lambda f, x, t: t)
        >>> theta = torch.ones(3, dtype=torch.float64, requires_grad=True)
        >>> with il.diagnostics() as records:
        ...     layer(torch.zeros(3, dtype=torch.float64), theta).sum().backward()
        >>> records[1].status.name, records[1].solution.num_steps
        ('CONVERGED', 1)
        >>> print(records[1].explain())
        The backward solve converged in 1 step to a relative residual of 0.00e+00. There is nothing to do.
        >>> float(records[1].gradient_error) < 1e-12
        True
    """
    with collect(in_depth=True) as records:
        yield records


@contextmanager
def collect(in_depth: bool) -> Iterator[list[Record]]:
    """The same; without ``in_depth`` records hold only what the layers measure anyway, and no tensors."""
    records: list[Record] = []
    with _lock:
        _listeners.append((records, in_depth))
    try:
        yield records
    finally:
        with _lock:
            # by identity: two empty lists are equal
            _listeners[:] = [entry for entry in _listeners if entry[0] is not records]


def listening() -> bool:
    """Whether anybody collects records."""
    return bool(_listeners)


def listening_in_depth() -> bool:
    """Whether anybody wants all that can be measured."""
    return bool(_listeners) and any(in_depth for _, in_depth in _listeners)


def emit(record: Record) -> None:
    """Hand ``record`` to every listener."""
    with _lock:
        for records, _ in _listeners:
            records.append(record)
