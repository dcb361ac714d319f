"""Linear operators, linear solvers and the differentiable linear solve."""

from implicitlayer.linear._cg import ConjugateGradient
from implicitlayer.linear._operator import FlatOperator, LinearSolver

__all__ = ["ConjugateGradient", "FlatOperator", "LinearSolver"]
