"""Ritz values: extreme eigenvalues of the tridiagonal matrices that conjugate gradients make on their way."""

# Conjugate gradients with steps alpha_j and beta_j are the Lanczos process (Saad, Iterative Methods for Sparse Linear
# Systems, 2nd ed., section 6.7.3). Its tridiagonal matrix T = V'AV is L D L' with
#     D_j = 1 / alpha_j = p'Ap / r'z   ("pivots"),      L_{j+1,j}^2 = beta_j,
# and the eigenvalues of T (Ritz values) lie inside the spectrum of A, the extreme ones first close to its ends. No
# product with A is needed for them. With a preconditioner M they are those of M^-1 A.
#
# The number of eigenvalues of T below s is the number of negative pivots of T - sI = L+ D+ L+'. Its pivots come from
# those of T without ever forming T (Dhillon & Parlett 2004, "differential stationary qds"), and so the smallest
# eigenvalue keeps its digits where T itself would have lost them (condition up to 1e16):
#     D+_j = D_j + t_j,   t_1 = -s,   t_{j+1} = t_j beta_j D_j / D+_j - s.
# Many trial values s side by side ("multisection") bring a bracket of magnitudes down to three digits in a few sweeps.

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.float64]

_TRIALS = 64  # per sweep
_DIGITS = 1e-3  # relative width of the bracket at the end
_TINY, _LARGE = float(np.finfo(float).tiny), 1e300
_SMALLEST = 1e-20  # of the largest magnitude: what is below counts as zero


class RitzValues:
    """Extreme Ritz values of one solve, lane by lane, computed from CG's coefficients when asked for.

    Coefficients come in rounds (a restart from the true residual begins a new one); the extremes are over all rounds.
    """

    def __init__(self) -> None:
        self._rounds: list[tuple[list[Any], list[Any]]] = []
        self._extremes: tuple[torch.Tensor, torch.Tensor] | None = None

    def new_round(self) -> tuple[list[Any], list[Any]]:
        """Two lists for a round to fill: pivots p'Ap / r'z, one per product, and betas, one per further direction.

        Entries are numbers, or float64 tensors [*lanes] with NaN where a lane no longer ran.
        """
        lists: tuple[list[Any], list[Any]] = ([], [])
        self._rounds.append(lists)
        return lists

    def any_below(self, shift: torch.Tensor) -> torch.Tensor:
        """Lanes, bool [*lanes], with a Ritz value below ``shift`` [*lanes]: one sweep, far cheaper than the values."""
        by_lanes = False
        for pivots, _ in self._rounds:  # any(...) would be two calls more on the path of every small layer
            by_lanes = by_lanes or (bool(pivots) and isinstance(pivots[0], torch.Tensor))
        if shift.numel() == 1 and not by_lanes:
            value, negative = float(shift), False
            for pivots, betas in self._rounds:
                negative = negative or _below(pivots, betas, value)
            return torch.full_like(shift, negative, dtype=torch.bool)
        below = torch.zeros(shift.numel(), dtype=torch.bool)
        for pivots, betas in self._rounds:
            if pivots:
                with np.errstate(all="ignore"):
                    d, b, known = _joined(_stack(pivots), _stack(betas))
                    found = _any_below(d, b, shift.reshape(1, -1).double().cpu().numpy())[0]
                    below |= torch.from_numpy(known & found)
        return below.reshape(shift.shape).to(shift.device)

    def extremes(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest Ritz value, float64 tensors of the shape of ``like`` [*lanes]; NaN without a product."""
        if self._extremes is None:
            low, high = np.full(like.numel(), np.nan), np.full(like.numel(), np.nan)
            for pivots, betas in self._rounds:
                if pivots:
                    with np.errstate(all="ignore"):  # an overflow is clipped, a NaN lane stays NaN
                        lowest, highest = _extremes(_stack(pivots), _stack(betas))
                    low, high = np.fmin(low, lowest), np.fmax(high, highest)
            self._extremes = (torch.from_numpy(low), torch.from_numpy(high))
        low_, high_ = self._extremes
        return low_.reshape(like.shape).to(like.device), high_.reshape(like.shape).to(like.device)


def _below(pivots: Sequence[float], betas: Sequence[float], shift: float) -> bool:
    """Whether T of one system has an eigenvalue below ``shift``: a negative pivot of T - sI, in Python numbers."""
    t = -shift
    for j, d in enumerate(pivots):
        plus = d + t
        if not plus > 0:
            return True
        if j < len(betas):
            t = t * (betas[j] * d / plus) - shift
    return False


def _stack(steps: Sequence[Any]) -> Array:
    """[steps, lanes] on the CPU."""
    if not steps:
        return np.zeros((0, 1))
    if isinstance(steps[0], torch.Tensor):
        stacked: Array = torch.stack(list(steps)).reshape(len(steps), -1).double().cpu().numpy()
        return stacked
    return np.array(steps, dtype=np.float64)[:, None]


def _joined(pivots: Array, betas: Array) -> tuple[Array, Array, npt.NDArray[np.bool_]]:
    """D [k, lanes] and the squares of L [k - 1, lanes] without gaps, and the lanes that have a matrix."""
    runs = np.isfinite(pivots)
    known: npt.NDArray[np.bool_] = np.asarray(runs.any(0))
    betas = betas[: len(pivots) - 1]
    joined = np.isfinite(betas) & runs[1:] & runs[:-1]  # a lane that has ended is cut off from what follows
    # a lane's matrix is padded by copies of its first entry, a Rayleigh quotient: the extremes do not change
    d = np.where(runs, pivots, np.where(known, pivots[0], 1.0))
    return d, np.where(joined, betas, 0.0), known


def _extremes(pivots: Array, betas: Array) -> tuple[Array, Array]:
    """Smallest and largest eigenvalue [lanes] of L D L' from D [k, lanes] and squares of L [k - 1 or k, lanes]."""
    d, b, known = _joined(pivots, betas)
    diagonal = d.copy()
    diagonal[1:] += b * d[:-1]
    side = np.sqrt(b) * np.abs(d[:-1])
    reach = np.abs(diagonal)
    reach[1:] += side
    reach[:-1] += side
    bound = np.maximum(reach.max(0), _TINY) * (1 + 1e-6)  # Gershgorin
    d, b, diagonal = d / bound, b, diagonal / bound
    low = _smallest(d, b)
    high = -_smallest(-d, b)
    return np.where(known, low * bound, np.nan), np.where(known, high * bound, np.nan)


def _smallest(d: Array, b: Array) -> Array:
    """Smallest eigenvalue [lanes] of matrices whose eigenvalues are in (-1, 1)."""
    # inertia: as many negative eigenvalues as negative pivots
    negative: npt.NDArray[np.bool_] = np.any(d < 0, axis=0)
    magnitude = _multisection(d, b, negative)
    return np.where(negative, -magnitude, magnitude)


def _multisection(d: Array, b: Array, negative: npt.NDArray[np.bool_]) -> Array:
    """Magnitude [lanes] of the smallest eigenvalue, of known sign."""
    low = np.full(d.shape[1], np.log(_SMALLEST))
    high = np.zeros(d.shape[1])
    while (high - low).max() > _DIGITS:
        trials = low + (high - low) * np.linspace(0, 1, _TRIALS)[1:-1, None]
        shift = np.exp(trials)
        some_below = _any_below(d, b, np.where(negative, -shift, shift))
        # positive: below a trial that is too large; negative: below minus a trial that is too small
        below_answer = np.where(negative, some_below, ~some_below)
        count = below_answer.sum(0)  # trials rise, so those below the answer come first
        edges = np.concatenate([low[None], trials, high[None]])
        low, high = np.take_along_axis(edges, count[None], 0)[0], np.take_along_axis(edges, count[None] + 1, 0)[0]
    smallest: Array = np.exp((low + high) / 2)
    return np.where(high <= np.log(_SMALLEST) + _DIGITS, 0.0, smallest)


def _any_below(d: Array, b: Array, shift: Array) -> npt.NDArray[np.bool_]:
    """Whether an eigenvalue lies below ``shift`` [trials, lanes]."""
    t = -shift
    found = np.zeros(shift.shape, dtype=bool)
    last = len(d) - 1
    for j, pivot in enumerate(d):
        plus = pivot + t
        plus[plus == 0] = -_TINY
        found |= plus < 0
        if j < last:
            np.divide(b[j] * pivot, plus, out=plus)
            plus *= t
            plus -= shift
            t = np.minimum(np.maximum(plus, -_LARGE, out=plus), _LARGE, out=plus)
    return found
