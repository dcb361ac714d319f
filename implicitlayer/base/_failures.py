"""Where a failure of some lanes is decided: an error, or with ``on_failure="mask"`` a mark on these lanes."""

# NOTE [masked lanes]: with ``on_failure="mask"`` a lane that has failed is NaN in the layer's answer, and has a zero
# derivative; no other lane notices. Whoever finds lanes bad says so by :func:`refuse`, and goes on with whatever finite
# numbers stand there. x itself carries the mask to the derivatives: NaN is in no other lane.

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from implicitlayer.base._sharding import beside
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._tree import ravel
from implicitlayer.base._types import Leaves


class _Marks(threading.local):
    """``failed``: the lanes, bool [*lanes], that have failed in the solve at work; None where that is an error."""

    failed: torch.Tensor | None = None


marks = _Marks()
# of a solver, not of its code
FAILURES = (ArithmeticError, np.linalg.LinAlgError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@contextmanager
def marking(masks: bool, lanes: torch.Size, like: torch.Tensor) -> Iterator[torch.Tensor | None]:
    """The lanes that fail in the block, bool [*lanes]; None where a failure is an error."""
    before = marks.failed
    marks.failed = torch.zeros(lanes, dtype=torch.bool, device=like.device) if masks else None
    try:
        yield marks.failed
    finally:
        marks.failed = before


def refuse(lanes: torch.Tensor, error: Exception) -> None:
    """Mark ``lanes`` as failed, or raise ``error`` where failures are not masked."""
    failed = marks.failed
    if failed is None or failed.shape != lanes.shape:
        raise error
    failed |= lanes


def standing(lanes: torch.Tensor) -> torch.Tensor:
    """Those of ``lanes`` that have not failed: of a failed one no warning is due."""
    failed = marks.failed
    return lanes if failed is None or failed.shape != lanes.shape else lanes & ~failed


def over_lanes(lanes: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    """``lanes`` [*lanes] in as many dimensions as ``leaf`` [*lanes, ...]."""
    return lanes.reshape((*lanes.shape, *[1] * (leaf.ndim - lanes.ndim)))


def replaced(lanes: torch.Tensor, leaves: Sequence[torch.Tensor], by: Sequence[torch.Tensor] | float) -> Leaves:
    """The leaves with other values in ``lanes``."""
    values = [torch.full_like(leaf, by) for leaf in leaves] if isinstance(by, float) else by
    return [torch.where(over_lanes(lanes, leaf), value, leaf) for leaf, value in zip(leaves, values, strict=True)]


def failed_lanes(x: Leaves, lane_dims: int) -> torch.Tensor:
    """The lanes [*lanes] of a layer's answer that are masked."""
    return ravel(x, lane_dims).isnan().any(-1)


def finite_data(theta: Sequence[torch.Tensor], failed: torch.Tensor) -> Leaves:
    """theta with ones in place of NaN and Inf that masked lanes read; of data without lanes, where some lane failed."""

    def finite(t: torch.Tensor) -> torch.Tensor:
        reads = over_lanes(failed, t) if t.shape[: failed.ndim] == failed.shape else failed.any()
        return torch.where(t.isfinite() | ~beside(reads, t), t, 1.0)

    return [finite(t) if t.is_floating_point() else t for t in theta]


class FailedResult(SolverResult):
    """What stands for the answer of a solver that raised, in a lane that is masked."""
