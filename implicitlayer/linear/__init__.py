"""Linear operators, linear solvers and the differentiable linear solve."""

from implicitlayer.linear._cg import ConjugateGradient
from implicitlayer.linear._operator import FlatOperator, LinearSolver
from implicitlayer.linear._public import HessianOperator, hessian_operator, hvp, linear_solve

__all__ = [
    "ConjugateGradient",
    "FlatOperator",
    "HessianOperator",
    "LinearSolver",
    "hessian_operator",
    "hvp",
    "linear_solve",
]
