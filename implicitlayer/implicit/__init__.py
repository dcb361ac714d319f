"""Differentiation through solutions: rules, the Function, and the layers built on it."""

from implicitlayer.implicit._argmin import argmin, fixed_point, root
from implicitlayer.implicit._bregman import Bregman, bregman
from implicitlayer.implicit._certificate import Assumptions
from implicitlayer.implicit._composite import Composite, composite, least_squares
from implicitlayer.implicit._explain import GradientExplanation, explain_gradient
from implicitlayer.implicit._function import ImplicitArgmin
from implicitlayer.implicit._kkt import ConstrainedLayer, Multipliers, constrained_argmin
from implicitlayer.implicit._kkt_active import ActiveConstraints
from implicitlayer.implicit._layer import ImplicitLayer
from implicitlayer.implicit._module import ArgminLayer, FixedPointLayer, RootLayer
from implicitlayer.implicit._proximal import Proximal, proximal
from implicitlayer.implicit._qp import qp
from implicitlayer.implicit._strengths import LearnedStrength, MatrixStrength, OperatorStrength

__all__ = [
    "ActiveConstraints",
    "ArgminLayer",
    "Assumptions",
    "Bregman",
    "Composite",
    "ConstrainedLayer",
    "FixedPointLayer",
    "GradientExplanation",
    "ImplicitArgmin",
    "ImplicitLayer",
    "LearnedStrength",
    "MatrixStrength",
    "Multipliers",
    "OperatorStrength",
    "Proximal",
    "RootLayer",
    "argmin",
    "bregman",
    "composite",
    "constrained_argmin",
    "explain_gradient",
    "fixed_point",
    "least_squares",
    "proximal",
    "qp",
    "root",
]
