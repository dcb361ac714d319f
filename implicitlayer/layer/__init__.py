"""The layer around any solver: the call, the forward solve, the autograd Function, and proximal objectives."""

from implicitlayer.layer._function import ImplicitArgmin
from implicitlayer.layer._layer import ImplicitLayer
from implicitlayer.layer._proximal import Bregman, Proximal, bregman, proximal
from implicitlayer.layer._strengths import LearnedStrength, MatrixStrength, OperatorStrength

__all__ = [
    "Bregman",
    "ImplicitArgmin",
    "ImplicitLayer",
    "LearnedStrength",
    "MatrixStrength",
    "OperatorStrength",
    "Proximal",
    "bregman",
    "proximal",
]
