"""Differentiation through solutions: rules, the Function, and the layers built on it."""

from implicitlayer.implicit._argmin import argmin, fixed_point, root
from implicitlayer.implicit._function import ImplicitArgmin
from implicitlayer.implicit._layer import ImplicitLayer
from implicitlayer.implicit._module import ArgminLayer
from implicitlayer.implicit._proximal import Proximal, proximal

__all__ = [
    "ArgminLayer",
    "ImplicitArgmin",
    "ImplicitLayer",
    "Proximal",
    "argmin",
    "fixed_point",
    "proximal",
    "root",
]
