"""Linear solvers of A u = b from products with A; they know no objective."""

from implicitlayer.linear._bicgstab import Bicgstab
from implicitlayer.linear._cg import ConjugateGradient
from implicitlayer.linear._dense import Dense
from implicitlayer.linear._gmres import Gmres
from implicitlayer.linear._minres import Minres
from implicitlayer.linear._neumann import Neumann
from implicitlayer.linear._normal import NormalEquations
from implicitlayer.linear._operator import FlatOperator, Jacobi, LinearSolver, Nystrom
from implicitlayer.linear._warm_start import WarmStart

__all__ = [
    "Bicgstab", "ConjugateGradient", "Dense", "FlatOperator", "Gmres", "Jacobi", "LinearSolver", "Minres",
    "Neumann", "NormalEquations", "Nystrom", "WarmStart",
]  # fmt: skip
