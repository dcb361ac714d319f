"""``il.explain_gradient``: why is my gradient None, or zero?"""

from implicitlayer.explain._explain import GradientExplanation, explain_gradient

__all__ = [
    "GradientExplanation",
    "explain_gradient",
]
