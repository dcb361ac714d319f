"""Warnings that point at the user's own line, past this package and torch."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_SKIPPED = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


def warn(message: str, category: type[Warning]) -> None:
    """``warnings.warn`` at the nearest caller outside this package and torch."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level + 1)
