"""Exceptions and warnings: misuse is an exception at the call; numerical trouble is a status, then a policy."""

# NOTE [one warning per kind]: Python shows a warning once per line of code and wording. Ours hold measured numbers, so
# that a loop would show a new wording at every step. Two texts of one kind are equal here, whatever their numbers: the
# first is shown, with its numbers, and the records hold those of all the others.

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from implicitlayer.base._types import OnFailure

__all__ = [
    "ClosureError",
    "ConvergenceWarning",
    "ImplicitLayerError",
    "ImplicitLayerWarning",
    "IndefiniteError",
    "InfeasibleError",
    "KinkError",
    "KinkWarning",
    "LinearSolveError",
    "NonFiniteError",
    "NotConvergedError",
    "NotRecordedError",
    "ObjectiveError",
    "SingularError",
    "SolverOutputError",
    "StationarityError",
    "StationarityWarning",
    "UnboundedError",
    "UnsupportedTransformError",
]

_SKIPPED = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class ImplicitLayerError(Exception):
    """Base class of every error that this library raises by itself."""


class ObjectiveError(ImplicitLayerError, ValueError):
    """The objective (or residual) does not return what a solution can be differentiated through."""


class SolverOutputError(ImplicitLayerError, ValueError):
    """The solver returned something that is no value for the unknowns: structure, shape, dtype or device."""


class NonFiniteError(ImplicitLayerError, ArithmeticError):
    """NaN or Inf in a solution, a cotangent or a Hessian-vector product."""


class UnsupportedTransformError(ImplicitLayerError, RuntimeError):
    """A composition of transforms that torch would answer with a wrong number."""


class ClosureError(ImplicitLayerError, RuntimeError):
    """The objective reads a tensor that needs a gradient in a way that cannot be differentiated."""


class LinearSolveError(ImplicitLayerError, ArithmeticError):
    """The linear solve behind a gradient failed; ``solution`` carries its numbers."""

    def __init__(self, message: str, solution: object = None) -> None:
        super().__init__(message)
        self.solution = solution


class IndefiniteError(LinearSolveError):
    """A positive-definite solver met a direction of non-positive curvature."""


class SingularError(LinearSolveError):
    """The system is singular to working precision and the right-hand side is outside its range."""


class NotConvergedError(LinearSolveError):
    """A requested tolerance was not reached."""


class StationarityError(ImplicitLayerError, ArithmeticError):
    """The solver's answer is not a stationary point of the objective (raised with ``on_failure="raise"``)."""


class InfeasibleError(ImplicitLayerError, ArithmeticError):
    """The solver's answer lies outside of the set that the layer minimises over."""


class KinkError(ImplicitLayerError, ArithmeticError):
    """The solution sits at a kink, where its derivative is one-sided (raised with ``on_failure="raise"``)."""


class UnboundedError(ImplicitLayerError, ArithmeticError):
    """The objective has no smallest value inside the constraints."""


class NotRecordedError(ImplicitLayerError, RuntimeError):
    """A record was asked for a number that it was not made to hold."""


class ImplicitLayerWarning(UserWarning):
    """Base class of every warning of this library."""


class ConvergenceWarning(ImplicitLayerWarning):
    """A solve (the linear one, or the layer's solver) ended above its tolerance. The gradient carries that error."""


class StationarityWarning(ImplicitLayerWarning):
    """The solver's answer is not stationary; the gradient is that of another point."""


class KinkWarning(ImplicitLayerWarning):
    """The solution sits at a kink: its derivative is that of one side."""


class _Text(str):
    """A text that equals every other one of its kind; see NOTE [one warning per kind]."""

    __slots__ = ("kind",)
    kind: str

    def __eq__(self, other: object) -> bool:
        return self.kind == other.kind if isinstance(other, _Text) else str.__eq__(self, other) is True

    __ne__ = object.__ne__

    def __hash__(self) -> int:
        return hash(self.kind)

    def __str__(self) -> str:
        return self


def warn(message: str, category: type[Warning], kind: str) -> None:
    """``warnings.warn`` at the nearest caller outside this package and torch; ``kind``: what it is about."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        level, frame = level + 1, frame.f_back
    text = _Text(message)
    text.kind = kind
    warnings.warn(text, category, stacklevel=level + 1)


def tell_kink(message: str, kind: str, on_failure: OnFailure) -> None:
    """A solution that has a one-sided derivative: an error under ``"raise"``, else a warning."""
    if on_failure == "raise":
        raise KinkError(message)
    warn(message, KinkWarning, kind)


@contextmanager
def extra(name: str, need: str) -> Iterator[None]:
    """Imports of optional packages, whose error says what needs which package and which extra brings it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{need}, which is not installed: pip install 'implicitlayer[{name}]'") from error
