"""Accuracy on a fixed list of episodes, with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer.base._sharding import beside, gathered
from implicitlayer.base._tree import check_integer
from implicitlayer.base._types import PyTree
from implicitlayer.meta._distributed import WorkerGroup
from implicitlayer.meta._method import MetaMethod, check_one_per_task, num_tasks
from implicitlayer.meta._tasks import as_support_query, in_chunks, take_tasks

# The 97.5 % quantile of the normal distribution; at hundreds of tasks Student's t differs in the third digit.
_NORMAL_QUANTILE = 1.959964

AnyMetric = Callable[..., torch.Tensor]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One number per task, and what they say together.

    Attributes:
        values: float tensor [num_tasks].
        transductive: whether the predictions for a query example could depend on the other query examples of its task,
            as they do where batch norm takes its statistics from all of them; None: not stated.
    """

    values: torch.Tensor
    transductive: bool | None = None

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

    def as_dict(self) -> dict[str, Any]:
        """Mean, interval, number of tasks and the protocol, for a results file."""
        return {name: getattr(self, name) for name in ("mean", "interval", "num_tasks", "transductive")}

    def __str__(self) -> str:
        """As a percentage where all values are shares, with the protocol where it was stated.

        >>> print(Evaluation(torch.tensor([1.0, 0.5, 0.75, 0.75])))
        75.0 ± 20.0 %
        >>> print(Evaluation(torch.tensor([1.0, 0.5, 0.75, 0.75]), transductive=True))
        75.0 ± 20.0 % (transductive)
        >>> print(Evaluation(torch.tensor([-1.0, 2.0, 0.5, 0.5])))  # losses
        0.5 ± 1.2
        """
        protocol = {None: "", True: " (transductive)", False: " (not transductive)"}[self.transductive]
        if bool(((self.values < 0) | (self.values > 1)).any()):
            return f"{self.mean:.3g} ± {self.interval:.2g}{protocol}"
        return f"{100 * self.mean:.1f} ± {100 * self.interval:.1f} %{protocol}"


def evaluate(
    method: MetaMethod,
    theta: PyTree,
    episodes: Iterable[Any],
    metric: AnyMetric,
    *,
    transductive: bool | None = None,
    tasks_per_chunk: int | None = None,
    group: WorkerGroup | None = None,
) -> Evaluation:
    """Adapt to every episode and measure on its query set; nothing is learned.

    Args:
        method: any method; only its ``adapt`` is used.
        theta: meta-parameters.
        episodes: batches ``(support, query)``, each with a leading number of tasks, or batches of a few-shot sampler.
            ``tqdm(episodes)`` shows how far it is.
        metric: ``metric(phi, query) -> [B]``, such as the accuracy of each task. With ``transductive=False`` it is
            called as ``metric(phi, query, support)``: a query example may be judged beside the support, never beside
            the other query examples. For networks whose batch norm uses the statistics of the images it is given,
            :func:`implicitlayer.fewshot.inductive_logits` does that.
        transductive: the protocol, which the result carries; None states nothing.
        tasks_per_chunk: tasks that are adapted at a time; None takes each batch whole.
        group: processes that share the tasks of each batch, all of which must make this call with the same episodes;
            None: this process does all.

    Returns:
        The metric of every task, in the order of the episodes, on every process.

    Raises:
        ValueError: there are no episodes, ``tasks_per_chunk`` is less than 1, or the metric is not one number per task.
        TypeError: the metric is no tensor.
    """
    if tasks_per_chunk is not None:
        check_integer("tasks_per_chunk", tasks_per_chunk, 1)
    group = WorkerGroup() if group is None else group
    values: list[torch.Tensor] = []
    with torch.no_grad():
        theta = group.seen(theta)
        for support, query in map(as_support_query, episodes):
            mine = group.share(num_tasks(support))
            # the tasks of the other processes are zeros here, so that the sum over processes puts all in order
            all_tasks = torch.zeros(num_tasks(support))
            measured = [
                gathered(check_one_per_task("metric", values, num_tasks(some))).float().cpu()
                for chunk in in_chunks(take_tasks((support, query), mine), tasks_per_chunk)
                for some, other in [beside(chunk, theta)]
                for values in [metric(method.adapt(theta, some), other, *([some] if transductive is False else []))]
            ]
            all_tasks[mine] = torch.cat(measured) if measured else all_tasks[mine]
            values.append(all_tasks)
    if not values:
        raise ValueError("episodes is empty: there is nothing to evaluate.")
    return Evaluation(group.sum_of_tasks(torch.cat(values)), transductive)
