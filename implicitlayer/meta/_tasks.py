"""Where tasks come from, batches of them in parts, and how the learning rate falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from implicitlayer.base._tree import tree_map
from implicitlayer.base._types import PyTree
from implicitlayer.meta._method import num_tasks

Episode = tuple[PyTree, PyTree]


class TaskSampler(Protocol):
    """Where tasks come from; its state is part of a checkpoint."""

    def sample(self, num_tasks: int) -> Any:
        """A batch of tasks, in any form that the trainer's ``split`` turns into (support, query)."""

    def state_dict(self) -> dict[str, Any]:
        """Everything the next samples depend on."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""


def as_support_query(batch: Any) -> Episode:
    """(support, query) of a few-shot batch: ``((support_images, support_labels), (query_images, query_labels))``.

    A pair is taken as it is.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    return (batch.support_images, batch.support_labels), (batch.query_images, batch.query_labels)


def cosine_decay(done: float) -> float:
    """Learning-rate factor from 1 to 0.01 along a half cosine. ``done`` is the share of the budget, 0 to 1.

    Example:
        >>> import implicitlayer as il
        >>> [round(il.meta.cosine_decay(done), 3) for done in (0.0, 0.5, 1.0)]
        [1.0, 0.505, 0.01]
    """
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))


def take_tasks(batch: PyTree, tasks: slice) -> PyTree:
    """Some of the tasks of a batch: views, no copy."""
    return tree_map(lambda leaf: leaf[tasks] if isinstance(leaf, torch.Tensor) else leaf, batch)


def in_chunks(episode: Episode, tasks_per_chunk: int | None) -> Iterator[Episode]:
    """``episode`` in parts of ``tasks_per_chunk`` tasks, the last one may be smaller; None leaves it whole."""
    size = num_tasks(episode)
    step = size if tasks_per_chunk is None else tasks_per_chunk
    for start in range(0, size, max(step, 1)):  # an empty batch has no parts
        yield episode if size <= step else take_tasks(episode, slice(start, start + step))


def largest_chunk(peak_of: Callable[[int], int], memory_budget: int, most: int) -> int:
    """The largest number of tasks, up to ``most``, whose peak ``peak_of(tasks)`` stays within ``memory_budget`` bytes.

    The peak of k tasks is close to a constant plus k times the share of one task, so two measurements give the
    answer; a third confirms it, and takes a task away as long as it is wrong. ValueError where one task does not fit.
    """
    one = peak_of(1)
    if one > memory_budget:
        raise ValueError(
            f"memory_budget={memory_budget} bytes is less than the {one} bytes that the meta-gradient of a single task "
            "takes. Give at least that, or make the task smaller: fewer query examples, a smaller network, or "
            "il.meta.iMAML in place of il.meta.MAML, whose memory grows with every inner step."
        )
    if most == 1:
        return 1
    per_task = max(peak_of(2) - one, 0)
    chunk = most if per_task == 0 else min(most, 1 + (memory_budget - one) // per_task)
    while chunk > 1 and peak_of(chunk) > memory_budget:
        chunk -= 1
    return chunk
