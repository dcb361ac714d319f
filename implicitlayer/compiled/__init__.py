"""Layers whose solver and derivative are compiled functions."""

from implicitlayer.compiled._layer import CompiledLayer, compile

__all__ = ["CompiledLayer", "compile"]
