"""Accuracy on a fixed list of episodes, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from implicitlayer._types import PyTree
from implicitlayer.meta._method import MetaMethod, Metric

# The 97.5 % quantile of the normal distribution; at hundreds of tasks Student's t differs in the third digit.
_NORMAL_QUANTILE = 1.959964


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One number per task, and what they say together.

    Attributes:
        values: float tensor [num_tasks].
    """

    values: torch.Tensor

    @property
    def num_tasks(self) -> int:
        """How many tasks were evaluated."""
        return self.values.numel()

    @property
    def mean(self) -> float:
        """Mean over tasks."""
        return float(self.values.double().mean())

    @property
    def interval(self) -> float:
        """Half width of the 95 % confidence interval of the mean, ``1.96 s / sqrt(num_tasks)``; NaN for one task."""
        if self.num_tasks < 2:
            return math.nan
        return _NORMAL_QUANTILE * float(self.values.double().std()) / math.sqrt(self.num_tasks)

    def __str__(self) -> str:
        """As a percentage.

        >>> print(Evaluation(torch.tensor([1.0, 0.5, 0.75, 0.75])))
        75.0 ± 20.0 %
        """
        return f"{100 * self.mean:.1f} ± {100 * self.interval:.1f} %"


def evaluate(
    method: MetaMethod, theta: PyTree, episodes: Iterable[tuple[PyTree, PyTree]], metric: Metric
) -> Evaluation:
    """Adapt to every episode and measure on its query set; nothing is learned.

    Args:
        method: any method; only its ``adapt`` is used.
        theta: meta-parameters.
        episodes: batches ``(support, query)``, each with a leading number of tasks.
        metric: ``metric(phi, query) -> [B]``, such as the accuracy of each task.

    Returns:
        The metric of every task.
    """
    with torch.no_grad():
        values = [metric(method.adapt(theta, support), query).detach().float().cpu() for support, query in episodes]
    if not values:
        raise ValueError("episodes is empty: there is nothing to evaluate.")
    return Evaluation(torch.cat(values))
