"""The meta-gradient of a batch of tasks, in chunks, with the numbers that a training record is made of."""

# b: tasks of one chunk, B: tasks of the whole meta-batch, over all processes

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from implicitlayer.base._records import collect
from implicitlayer.base._sharding import beside, gathered
from implicitlayer.base._types import PyTree
from implicitlayer.meta._method import MetaMethod, check_one_per_task, num_tasks
from implicitlayer.meta._monitor import curvature_sums, inner_sums
from implicitlayer.meta._tasks import Episode, in_chunks


@dataclass(frozen=True, eq=False)
class ChunkMetric:
    """``function(phi, query, support) -> [B]``, measured on every chunk.

    ``from_loss``: whether it is what the task loss scores, in the forward pass of the query losses.
    """

    function: Callable[[PyTree, PyTree, PyTree], torch.Tensor]
    from_loss: bool = False

    def of(self, phi: PyTree, query: PyTree, support: PyTree) -> torch.Tensor:
        with torch.no_grad():
            return check_one_per_task("metric", self.function(phi, query, support), num_tasks(support))


_OF_TASKS, _OF_LOOKS = ("loss", "accuracy"), ("inner_before", "inner_after", "inner_diverged")
_OF_SOLVES = ("negative_curvature", "cg_residual")
_NAMES = ("tasks", *_OF_TASKS, "looked_at", *_OF_LOOKS, "solves", *_OF_SOLVES)


class Totals:
    """Sums over tasks, left on the device until all are read at once: one wait for the device in a meta-step."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, values: torch.Tensor) -> None:
        total = gathered(values.detach()).double().sum()
        self._sums[name] = self._sums[name] + total if name in self._sums else total

    def numbers(self) -> list[float]:
        """The sums in the order of ``_NAMES``; 0 where nothing was added."""
        if not self._sums:
            return [0.0] * len(_NAMES)
        device = self._sums["loss"].device
        values = torch.stack([total.to(device) for total in self._sums.values()]).tolist()
        found = dict(zip(self._sums, values, strict=True))
        return [found.get(name, 0.0) for name in _NAMES]


def means(numbers: list[float], *, with_metric: bool) -> dict[str, float]:
    """The entries of a training record, from the sums over all tasks of all processes."""
    sums = dict(zip(_NAMES, numbers, strict=True))
    record = {name: sums[name] / sums["tasks"] for name in _OF_TASKS[: 1 + with_metric]}
    for count, names in (("solves", _OF_SOLVES), ("looked_at", _OF_LOOKS)):
        record |= {name: sums[name] / sums[count] for name in names if sums[count]}
    return record


def accumulate(
    method: MetaMethod,
    theta: PyTree,
    episode: Episode,
    total_tasks: int,
    tasks_per_chunk: int | None,
    metric: ChunkMetric | None,
    look: bool,
) -> Totals:
    """Add the meta-gradient of ``episode``'s tasks to the ``.grad`` of every leaf, ``tasks_per_chunk`` at a time.

    The outer loss is the mean over B = ``total_tasks``, so each task's loss is divided by B whatever the chunk it is
    in: the sum over chunks (and processes) is the meta-gradient of the whole batch. With ``look`` the inner problem is
    measured too; two forward passes.
    """
    totals = Totals()

    def add(support: PyTree, query: PyTree) -> None:  # all that a chunk holds is freed before the next one begins
        support, query = beside((support, query), theta)
        with collect(in_depth=False) as records:
            phi = method.adapt(theta, support)
            if metric is not None and metric.from_loss:
                losses, scores = method.scored_query_losses(theta, phi, query)
            else:
                losses, scores = method.query_losses(theta, phi, query), None
            (losses.sum() / total_tasks).backward()
        totals.add("loss", losses)
        totals.add("tasks", torch.tensor(num_tasks(support), device=losses.device))
        if metric is not None:
            totals.add("accuracy", metric.of(phi, query, support) if scores is None else scores)
        if look:
            for name, values in (curvature_sums(records) | inner_sums(method, theta, phi, support)).items():
                totals.add(name, values)

    for support, query in in_chunks(episode, tasks_per_chunk):
        add(support, query)
    return totals
