"""``il.argmin``, ``il.root``, ``il.fixed_point`` and their modules: what chooses among the layers."""

from implicitlayer.api._argmin import argmin, fixed_point, root
from implicitlayer.api._module import ArgminLayer, DeepEquilibrium, FixedPointLayer, RootLayer
from implicitlayer.api._value import value

__all__ = [
    "ArgminLayer",
    "DeepEquilibrium",
    "FixedPointLayer",
    "RootLayer",
    "argmin",
    "fixed_point",
    "root",
    "value",
]
