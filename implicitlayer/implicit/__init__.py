"""Differentiation through solutions: rules, the Function, and the layers built on it."""

from implicitlayer.implicit._argmin import argmin, fixed_point, root
from implicitlayer.implicit._composite import Composite, composite, least_squares
from implicitlayer.implicit._function import ImplicitArgmin
from implicitlayer.implicit._layer import ImplicitLayer
from implicitlayer.implicit._module import ArgminLayer
from implicitlayer.implicit._proximal import Proximal, proximal

__all__ = [
    "ArgminLayer",
    "Composite",
    "ImplicitArgmin",
    "ImplicitLayer",
    "Proximal",
    "argmin",
    "composite",
    "fixed_point",
    "least_squares",
    "proximal",
    "root",
]
