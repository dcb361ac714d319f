"""Whether a training run is losing what it has learned, from its history alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from implicitlayer._errors import ImplicitLayerError, ImplicitLayerWarning

OnCollapse = Literal["warn", "rollback", "stop"]
ON_COLLAPSE = ("warn", "rollback", "stop")

# NOTE [collapse]: meta-training sharpens the support loss. Once its largest curvature passes 2 / step - strength, inner
# gradient descent with a fixed step raises its own objective, the point that it ends at is no minimum, and the implicit
# gradient there is that of none: the meta-loss climbs back to where it began. So a run has collapsed
#   - where the mean loss of the last WINDOW steps has lost half of what the best WINDOW steps had won over the first,
#     and is above theirs by SURE standard errors of the two means (the best of many is best by chance, too), or
#   - where the metric has lost a third in this way: first-order meta-gradients leave curvature out, and fit support
#     sets ever better and queries worse at a standing loss (Omniglot 20-way 1-shot: 81 % to 60 %), or
#   - where the inner objective rose, or negative curvature was met, in most tasks of the last LOOKS looks.
WINDOW = 20
LOOKS = 3
MOST = 0.5
LOST = {"loss": 1 / 2, "accuracy": 1 / 3}  # of what was won
SURE = 6.0
MAX_ROLLBACKS = 3


class CollapseWarning(ImplicitLayerWarning):
    """Training loses what it has learned; the message says by what numbers, and what helps."""


class CollapseError(ImplicitLayerError, RuntimeError):
    """The same where ``on_collapse`` ends the run; the checkpoints hold the last and the best state."""


def collapse(history: Sequence[dict[str, Any]], better: str = "higher") -> str:
    """What is wrong with a run since its last return to an earlier state, in a sentence; empty where nothing is.

    ``better``: whether a higher or a lower metric is the better one.

    >>> falling = [{"step": k + 1, "loss": 1.6 - 0.02 * k} for k in range(60)]
    >>> rising = [{"step": k + 61, "loss": 0.42 + 0.05 * k} for k in range(30)]
    >>> collapse(falling), bool(collapse(falling + rising))
    ('', True)
    """
    starts = [i for i, record in enumerate(history) if record.get("rolled_back")]
    recent = history[starts[-1] + 1 :] if starts else history
    sign = -1.0 if better == "higher" else 1.0
    found = [*_of_inner_problem(recent), *_of_series(recent, "loss", "meta-loss", 1.0)]
    return "; ".join([*found, *_of_series(recent, "accuracy", "metric of the training tasks", sign)])


def _of_series(history: Sequence[dict[str, Any]], name: str, what: str, sign: float) -> list[str]:
    """Whether the numbers ``name``, which fall in a good run once they have been given ``sign``, have climbed back."""
    values = [sign * record[name] for record in history if math.isfinite(record.get(name, math.nan))]
    if len(values) < 2 * WINDOW:
        return []
    means = np.lib.stride_tricks.sliding_window_view(values, WINDOW).mean(-1)
    first, best, last = means[0], means.min(), means[-1]
    at = int(means.argmin())
    spread = math.hypot(statistics.stdev(values[at : at + WINDOW]), statistics.stdev(values[-WINDOW:]))
    lost = best < first and last - best > max(LOST[name] * (first - best), SURE * spread / math.sqrt(WINDOW))
    last, best, first = sign * last, sign * best, sign * first
    return [f"the {what} is {last:.3g} after {best:.3g} at its best and {first:.3g} at the start"] if lost else []


def _of_inner_problem(history: Sequence[dict[str, Any]]) -> list[str]:
    words = []
    for name, what in (
        ("inner_diverged", "the inner solver raised its own objective"),
        ("negative_curvature", "the meta-gradient's matrix was indefinite"),
    ):
        shares = [record[name] for record in history if name in record][-LOOKS:]
        if len(shares) == LOOKS and min(shares) > MOST:
            words.append(f"{what} in {sum(shares) / LOOKS:.0%} of the tasks")
    return words


def advice(found: str, step: int) -> str:
    return (
        f"training collapses at meta-step {step}: {found}. A fixed inner step diverges once meta-training has "
        "sharpened the support loss: search it (GradientDescent(..., line_search='armijo')), or lower it, or raise the "
        "strength. A first-order meta-gradient leaves curvature out: il.meta.iMAML with some conjugate gradient steps "
        "has it. A lower outer rate and max_gradient_norm help too."
    )
