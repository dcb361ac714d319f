"""Layers over sets, with constraints and with non-smooth regularisers, and quadratic programs."""

from implicitlayer.constrained._from_cvxpy import CvxpyLayer, from_cvxpy
from implicitlayer.constrained._kkt import ConstrainedLayer, Multipliers, constrained_argmin
from implicitlayer.constrained._qp import qp

__all__ = [
    "ConstrainedLayer",
    "CvxpyLayer",
    "Multipliers",
    "constrained_argmin",
    "from_cvxpy",
    "qp",
]
