"""What would go wrong without a word, or in a message of torch's own, is refused here by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from implicitlayer.base._tree import flatten, flatten_with_names
from implicitlayer.base._types import PyTree


def check_one_per_task(name: str, values: Any, num_tasks: int) -> torch.Tensor:
    """``values``, what the user's function ``name`` returned, if it is one number per task.

    Else TypeError or ValueError: a mean over the tasks, or one number for each example, would be summed up like any
    other tensor and scale the gradients.
    """
    if not isinstance(values, torch.Tensor):
        raise TypeError(
            f"{name} returned a {type(values).__name__} and must return a tensor [{num_tasks}], one number per task."
        )
    if values.shape != (num_tasks,):
        raise ValueError(
            f"{name} returned shape {tuple(values.shape)} for {num_tasks} tasks and must return one "
            f"{'loss' if 'loss' in name else 'number'} for each, [{num_tasks}]. Take the mean over the examples of a "
            "task, such as .mean(1), and none over the tasks."
        )
    return values


class PerTask:
    """A task loss whose every value is checked to be one number per task."""

    def __init__(self, task_loss: Callable[..., torch.Tensor]) -> None:
        self.task_loss = task_loss

    def __call__(self, params: PyTree, *batch: PyTree) -> torch.Tensor:
        """The losses, [B]."""
        return check_one_per_task("task_loss", self.task_loss(params, *batch), flatten(params)[0][0].shape[0])

    def as_composite(self) -> Any:
        return self.task_loss.as_composite() if hasattr(self.task_loss, "as_composite") else None


def check_theta(theta: PyTree) -> None:
    """Raise TypeError, with its name, for a leaf of theta that is no floating tensor."""
    wrong = [not (isinstance(leaf, torch.Tensor) and leaf.is_floating_point()) for leaf in flatten(theta)[0]]
    if any(wrong):  # names are made only where they are needed: that takes longer than the check
        leaf, name = (column[wrong.index(True)] for column in flatten_with_names(theta, "theta"))
        what = f"has dtype {leaf.dtype}" if isinstance(leaf, torch.Tensor) else f"is a {type(leaf).__name__}"
        raise TypeError(
            f"{name} {what}, but meta-parameters are a dict, list or tuple of floating tensors. Take "
            "dict(model.named_parameters()) of a module; what is not adapted, such as counters and other buffers, "
            "belongs into task_loss."
        )


def check_batch_leaves(leaves: Iterable[Any]) -> None:
    """Raise TypeError for an array: it has tasks along its first axis, but only tensors are split by tasks."""
    for leaf in leaves:
        if isinstance(leaf, np.ndarray):
            raise TypeError(
                f"The batch of tasks holds a NumPy array of shape {leaf.shape}; only tensors are split into chunks and "
                "shared among processes. Convert it with torch.from_numpy."
            )


def check_number(name: str, value: Any, least: float) -> None:
    """Raise ValueError for what is no number of at least ``least``; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not value >= least:
        raise ValueError(f"{name}={value!r} must be a number of at least {least:g}.")
