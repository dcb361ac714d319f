"""Differentiation through solutions: rules, the Function, and the layers built on it."""

from implicitlayer.implicit._argmin import ImplicitLayer, argmin
from implicitlayer.implicit._function import ImplicitArgmin
from implicitlayer.implicit._proximal import Proximal, proximal

__all__ = ["ImplicitArgmin", "ImplicitLayer", "Proximal", "argmin", "proximal"]
