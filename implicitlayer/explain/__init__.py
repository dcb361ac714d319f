"""``il.explain_gradient``: why is my gradient None, or zero?"""

from implicitlayer.explain._explain import explain_gradient
from implicitlayer.explain._explain_leaves import GradientExplanation

__all__ = [
    "GradientExplanation",
    "explain_gradient",
]
