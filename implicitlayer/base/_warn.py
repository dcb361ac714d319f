"""Warnings that point at the user's own line, past this package and torch."""

# NOTE [one warning per kind]: Python shows a warning once per line of code and wording. Ours hold measured numbers, so
# that a loop would show a new wording at every step. Two texts of one kind are equal here, whatever their numbers: the
# first is shown, with its numbers, and the records hold those of all the others.

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from implicitlayer._errors import KinkError, KinkWarning
from implicitlayer.base._types import OnFailure

_SKIPPED = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


class _Text(str):
    """A text that equals every other one of its kind; see NOTE [one warning per kind]."""

    __slots__ = ("kind",)
    kind: str

    def __eq__(self, other: object) -> bool:
        return self.kind == other.kind if isinstance(other, _Text) else str.__eq__(self, other) is True

    __ne__ = object.__ne__

    def __hash__(self) -> int:
        return hash(self.kind)

    def __str__(self) -> str:
        return self


def warn(message: str, category: type[Warning], kind: str) -> None:
    """``warnings.warn`` at the nearest caller outside this package and torch; ``kind``: what it is about."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        level, frame = level + 1, frame.f_back
    text = _Text(message)
    text.kind = kind
    warnings.warn(text, category, stacklevel=level + 1)


def tell_kink(message: str, kind: str, on_failure: OnFailure) -> None:
    """A solution that has a one-sided derivative: an error under ``"raise"``, else a warning."""
    if on_failure == "raise":
        raise KinkError(message)
    warn(message, KinkWarning, kind)
