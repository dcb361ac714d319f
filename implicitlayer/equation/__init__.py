"""The equation F(x, theta) = 0 behind a layer: closed-over tensors, residual, products, solves, rules, certificates."""

from implicitlayer.equation._certificate import Assumptions
from implicitlayer.equation._flat import Composite, composite, least_squares
from implicitlayer.equation._public import HessianOperator, hessian_operator, hvp, linear_solve

__all__ = [
    "Assumptions",
    "Composite",
    "HessianOperator",
    "composite",
    "hessian_operator",
    "hvp",
    "least_squares",
    "linear_solve",
]
