"""Simple sets for constrained layers, each known by its projection."""

from implicitlayer.sets._affine import Affine
from implicitlayer.sets._ball import Ball
from implicitlayer.sets._box import Box, NonNegative
from implicitlayer.sets._set import ConvexSet
from implicitlayer.sets._simplex import Simplex
from implicitlayer.sets._user import Projection

__all__ = ["Affine", "Ball", "Box", "ConvexSet", "NonNegative", "Projection", "Simplex"]
