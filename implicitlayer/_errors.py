"""Exceptions and warnings. Misuse is an exception at the call; numerical trouble is a status, then a policy."""

from __future__ import annotations


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
