"""Quadratic programs and KKT systems as arrays, one or many at a time; no user code, no derivatives."""

from implicitlayer.programs._kkt_active import ActiveConstraints

__all__ = [
    "ActiveConstraints",
]
