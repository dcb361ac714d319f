"""The outer problem: parameters of a layer chosen by a loop around it."""

from implicitlayer.outer._bilevel import bilevel
from implicitlayer.outer._result import BilevelResult

__all__ = ["BilevelResult", "bilevel"]
