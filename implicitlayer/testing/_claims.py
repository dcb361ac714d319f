"""What a solver says of itself: for which systems or problems it is, and how accurate it promises to be."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch

from implicitlayer.base._solution import LinearSolution, RecordingSolver
from implicitlayer.base._types import check_one_of, name_of
from implicitlayer.linear._operator import FlatOperator, LinearSolver, default_rtol

SYSTEMS = ("positive definite", "symmetric", "general", "contraction")
Dtypes = Sequence[torch.dtype]
_BOTH = (torch.float64, torch.float32)


@dataclass(frozen=True, eq=False)
class _Claim:
    solver: Callable[..., Any]
    log10_cond: float
    batched: bool
    deterministic: bool
    dtypes: Dtypes
    name: str

    def __post_init__(self) -> None:
        if not 0 <= self.log10_cond <= 12:
            raise ValueError(
                f"log10_cond={self.log10_cond!r} must be from 0 to 12. It is an exponent: 2 is a condition of 100."
            )
        if torch.float64 not in self.dtypes or not set(self.dtypes) <= set(_BOTH):
            raise ValueError(f"dtypes={self.dtypes!r} must hold torch.float64, and torch.float32 or nothing else.")

    def __call__(self, *args: Any) -> Any:
        return self.solver(*args)


@dataclass(frozen=True, eq=False, repr=False)
class LinearClaim(_Claim):
    """A linear solver and what it promises; made by :func:`linear`, called as the solver itself."""

    systems: str
    rtol: float
    log10_scale: int
    limited: Callable[..., Any] | None
    preconditioned: Callable[..., Any] | None

    def __repr__(self) -> str:
        return f"testing.linear({self.name}, systems={self.systems!r}, rtol={self.rtol:g})"

    @property
    def symmetric(self) -> bool:
        """Whether it is for symmetric systems only."""
        return self.systems in ("positive definite", "symmetric")

    @cached_property
    def returns_status(self) -> bool:
        """Whether it returns an ``il.LinearSolution``, found by one solve of ``2 u = 1``; True where that fails."""
        operator = FlatOperator(lambda v: 2 * v, lambda v: 2 * v)
        try:
            return isinstance(self.solver(operator, torch.ones(1, dtype=torch.float64)), LinearSolution)
        except Exception:
            return True  # a solver that cannot solve this meets all checks, and fails them

    def allowed(self, dtype: torch.dtype) -> float:
        """Relative residual that counts as solved: ``rtol``, in float32 at least 1e-4 (ten times the package's)."""
        return self.rtol if dtype == torch.float64 else max(self.rtol, 10 * default_rtol(dtype))


@dataclass(frozen=True, eq=False, repr=False)
class InnerClaim(_Claim):
    """An inner solver and what it promises; made by :func:`inner`, called as the solver itself."""

    accuracy: float

    def __repr__(self) -> str:
        return f"testing.inner({self.name}, accuracy={self.accuracy:g})"


def linear(
    solver: Callable[..., Any],
    systems: str | None = None,
    *,
    rtol: float | None = None,
    log10_cond: float = 2,
    batched: bool | None = None,
    deterministic: bool = True,
    log10_scale: int = 200,
    dtypes: Dtypes = _BOTH,
    limited: Callable[..., Any] | None = None,
    name: str | None = None,
) -> LinearClaim:
    """Say what a linear solver is for, so that :func:`solver_checks` tests that and no more.

    Args:
        solver: ``solver(operator, rhs) -> il.LinearSolution`` or a tensor. ``operator(v)`` is ``A v``,
            ``operator.transpose_matvec(v)`` is ``A' v``; rhs is a tensor [n], or [*lanes, n] if ``batched``.
        systems: ``"positive definite"``, ``"symmetric"``, ``"general"``, or ``"contraction"``: A = I - J with
            ``||J||_2 = 1/2``. Default: its attribute ``systems``, else ``"positive definite"``.
        rtol: promised ``||b - A u||_2 / ||b||_2`` in float64, positive; in float32 it counts as 1e-4 at least.
            Default 1e-9, ten times the package's own tolerance.
        log10_cond: logarithm of the hardest condition number at which that is promised, at least 0.
        batched: whether independent systems may lie side by side. Default: True for an ``il.LinearSolver``.
        deterministic: whether a repeat gives the same bits; not so for a solver that starts at its last answer.
        log10_scale: right-hand sides and matrices may be scaled by 10 to plus and minus this number, 0 to 200
            (float32: at most 25).
        dtypes: float64, and float32 if it works in float32.
        limited: the same solver, stopped after one step. Default: made by itself for a dataclass that has fields
            ``rtol`` and ``max_steps``. (A dataclass with a field ``preconditioner`` that is None is also tested with
            a diagonal one.)
        name: for test ids; default its class or function.

    Raises:
        TypeError: the solver is not callable.
        ValueError: an argument outside its range.

    Example:
        >>> import implicitlayer as il
        >>> il.testing.linear(il.Minres())
        testing.linear(Minres, systems='symmetric', rtol=1e-09)
    """
    _check_callable(solver, "solver(operator, rhs)")
    systems = getattr(solver, "systems", "positive definite") if systems is None else systems
    check_one_of("systems", systems, SYSTEMS)
    rtol = 10 * default_rtol(torch.float64) if rtol is None else rtol
    _check_positive("rtol", rtol, "It is the relative residual that the solver promises.")
    if not 0 <= log10_scale <= 200:
        raise ValueError(f"log10_scale={log10_scale!r} must be from 0 to 200. 0 leaves the checks of scale out.")
    settings = _settings(solver)
    if limited is None and {"rtol", "max_steps"} <= settings:
        limited = replace(solver, rtol=rtol, max_steps=1)  # type: ignore[type-var]
    bare = "preconditioner" in settings and solver.preconditioner is None  # type: ignore[attr-defined]
    preconditioned = replace(solver, preconditioner=_weights) if bare else None  # type: ignore[type-var]
    many = isinstance(solver, LinearSolver) if batched is None else batched
    claim = (solver, log10_cond, many, deterministic, dtypes, name_of(solver) if name is None else name)
    return LinearClaim(*claim, systems, rtol, log10_scale, limited, preconditioned)


def inner(
    solver: Callable[..., Any],
    accuracy: float = 1e-6,
    *,
    log10_cond: float = 1,
    batched: bool | None = None,
    deterministic: bool = True,
    dtypes: Dtypes = _BOTH,
    name: str | None = None,
) -> InnerClaim:
    """Say what an inner solver promises, so that :func:`solver_checks` tests that and no more.

    The objectives of the checks are quadratic or smooth and strongly convex, with Hessians between
    ``10^-log10_cond / 2`` and 1: gradient descent with step size 1 converges on all of them.

    Args:
        solver: ``solver(objective, init, *theta) -> x``.
        accuracy: promised ``||x - x*||_2 / max(1, ||x*||_2)`` in float64, positive; in float32 it counts as 1e-2 at
            least, since solvers that compare values of the objective find no more than the square root of eps.
        log10_cond, deterministic, dtypes, name: as in :func:`linear`.
        batched: whether it takes many problems at once: an objective that returns [*lanes], and leaves of init with
            these dimensions in front. Default: its attribute ``batched``.

    Raises:
        TypeError: the solver is not callable.
        ValueError: an argument outside its range.

    Example:
        >>> import implicitlayer as il
        >>> il.testing.inner(il.solvers.SciPyMinimize("BFGS"), accuracy=1e-4).batched
        False
    """
    _check_callable(solver, "solver(objective, init, *theta)")
    _check_positive("accuracy", accuracy, "It is the relative distance to the solution that the solver promises.")
    many = bool(getattr(solver, "batched", False)) if batched is None else batched
    return InnerClaim(
        solver, log10_cond, many, deterministic, dtypes, name_of(solver) if name is None else name, accuracy
    )


def claim_of(solver: Any) -> LinearClaim | InnerClaim:
    """A claim as it is; a bare solver with the defaults of its kind.

    Linear: an ``il.LinearSolver``, or a function of exactly two arguments. Inner: an ``il.RecordingSolver``, or a
    function that takes three arguments or more, or ``*theta``.
    """
    if isinstance(solver, (LinearClaim, InnerClaim)):
        return solver
    if isinstance(solver, LinearSolver):
        return linear(solver)
    if isinstance(solver, RecordingSolver):
        return inner(solver)
    _check_callable(solver, "solver(operator, rhs) or solver(objective, init, *theta)")
    try:
        parameters = list(inspect.signature(solver).parameters.values())
    except ValueError:
        parameters = []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or len(positional) > 2:
        return inner(solver)
    if len(positional) == 2:
        return linear(solver)
    raise TypeError(
        f"solver={solver!r} takes neither (operator, rhs) nor (objective, init, *theta). "
        "Say what it is by il.testing.linear(solver) or il.testing.inner(solver)."
    )


def require(condition: bool, who: Any, text: str) -> None:
    """Raise AssertionError that begins with the name of what is checked."""
    if not condition:
        raise AssertionError(f"{getattr(who, 'name', type(who).__name__)} {text}.")


def _weights(vector: torch.Tensor) -> torch.Tensor:
    """A preconditioner: any positive definite matrix will do, and a diagonal one changes no condition much."""
    size = vector.shape[-1]
    return vector * torch.linspace(0.5, 2.0, size, dtype=vector.dtype, device=vector.device)


def _settings(solver: Any) -> set[str]:
    known = is_dataclass(solver) and not isinstance(solver, type)
    return {f.name for f in fields(solver) if f.init} if known else set()


def _check_callable(solver: Any, call: str) -> None:
    if not callable(solver):
        raise TypeError(f"solver={solver!r} must be callable: {call}.")


def _check_positive(name: str, value: float, meaning: str) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name}={value!r} must be positive and finite. {meaning}")
