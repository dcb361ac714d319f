"""Where tasks come from, as the trainer sees it, and how the learning rate falls."""

from __future__ import annotations

import math
from typing import Any, Protocol

from implicitlayer.base._types import PyTree

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
