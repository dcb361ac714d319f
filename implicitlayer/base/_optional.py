"""Packages that only some calls need, and the extra that brings each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str, need: str) -> Iterator[None]:
    """Imports of optional packages, whose error says what needs which package and which extra brings it."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{need}, which is not installed: pip install 'implicitlayer[{name}]'") from error
