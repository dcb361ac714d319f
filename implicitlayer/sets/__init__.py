"""Simple sets for constrained layers, each known by its projection."""

from implicitlayer.sets._set import ConvexSet, Projection
from implicitlayer.sets._shapes import Affine, Ball, Box, NonNegative, Simplex

__all__ = ["Affine", "Ball", "Box", "ConvexSet", "NonNegative", "Projection", "Simplex"]
