"""What all meta-learning methods share: adapt a shared start to every task of a batch, then pay at the query set.

Shapes: B tasks. ``theta`` is a pytree of meta-parameters; ``phi``, the task parameters, is the same pytree with a
leading B on every leaf. ``support`` and ``query`` are pytrees of data with a leading B on every tensor; what is no
tensor in them (a number, a string) is the same for all tasks. What would go wrong without a word, or in a message of
torch's own, is refused here by name.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from implicitlayer.base._tree import flatten, flatten_with_names, tree_map
from implicitlayer.base._types import Extension, PyTree
from implicitlayer.layer import MatrixStrength, OperatorStrength, proximal

Strength = float | torch.Tensor | PyTree
StrengthLike = Strength | Callable[[], Strength]


class TaskLoss(Protocol):
    """``task_loss(params, batch) -> [B]``: one loss per task; ``params`` and ``batch`` carry a leading B."""

    def __call__(self, params: PyTree, batch: PyTree, /) -> torch.Tensor: ...


class MetaMethod(abc.ABC, Extension):
    """A way to adapt ``theta`` to tasks, and to differentiate what comes of it.

    A method is used through two calls::

        phi = method.adapt(theta, support)        # task parameters, a leading B on every leaf
        losses = method(theta, support, query)    # [B]; losses.mean().backward() leaves the meta-gradient in theta

    A subclass defines ``adapt``. ``il.testing.extension_checks(il.meta.MetaMethod)`` finds it; ``examples(task_loss)``
    are the instances that are tested, by default ``cls(task_loss)``.

    Attributes:
        exact: whether the meta-gradient is the derivative of the query losses after adaptation; if not, it is a
            direction that lowers them.
    """

    task_loss: TaskLoss
    exact: ClassVar[bool] = True

    @abc.abstractmethod
    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Task parameters after adaptation on ``support``, differentiable in ``theta`` in the method's own sense."""

    def query_losses(self, theta: PyTree, phi: PyTree, query: PyTree) -> torch.Tensor:
        """The losses [B] that the outer problem minimises, at the adapted ``phi``."""
        return PerTask(self.task_loss)(phi, query)

    def scored_query_losses(
        self, theta: PyTree, phi: PyTree, query: PyTree
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same, and the scores [B] of ``task_loss.scored(phi, query) -> (losses, scores)``; None without one."""
        scored = getattr(self.task_loss, "scored", None)
        if scored is None or type(self).query_losses is not MetaMethod.query_losses:
            return self.query_losses(theta, phi, query), None
        losses, scores = scored(phi, query)
        tasks = flatten(phi)[0][0].shape[0]
        return check_one_per_task("task_loss", losses, tasks), check_one_per_task("scores", scores, tasks)

    def __call__(self, theta: PyTree, support: PyTree, query: PyTree) -> torch.Tensor:
        """Query losses [B] after adaptation."""
        check_same_tasks(support, query)
        return self.query_losses(theta, self.adapt(theta, support), query)

    def inner_objective(self, phi: PyTree, theta: PyTree, support: PyTree) -> torch.Tensor:
        """The values [B] that adaptation lowers, with the proximal term of a ``strength``.

        The trainer compares them before and after to see divergence.
        """
        return regularised(self.task_loss, getattr(self, "strength", 0.0))(phi, theta, support)

    def parameters(self) -> list[torch.Tensor]:
        """Learnable tensors of the method itself, such as a learned strength, for the outer optimizer."""
        return []


def num_tasks(batch: PyTree) -> int:
    """The leading dimension B of a batch of tasks."""
    leaves = flatten(batch)[0]
    check_batch_leaves(leaves)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves if isinstance(leaf, torch.Tensor)}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            f"The tensors of a batch of tasks have the leading dimensions {sorted(map(str, sizes))}; all must share "
            "one, the number of tasks. For a single task add one with tensor[None]."
        )
    size = sizes.pop()
    assert size is not None
    return size


def check_same_tasks(support: PyTree, query: PyTree) -> None:
    """Raise ValueError where the query is of another number of tasks than the support; one would be broadcast."""
    tasks = num_tasks(support)
    others = {leaf.shape[0] for leaf in flatten(query)[0] if isinstance(leaf, torch.Tensor) and leaf.ndim}
    if others and tasks not in others:
        raise ValueError(
            f"the support is of {tasks} tasks, the query of {' or '.join(map(str, sorted(others)))}: the leading "
            "dimension of both counts the same tasks."
        )


def one_per_task(theta: PyTree, size: int) -> PyTree:
    """``theta`` repeated for every task: each leaf gets a leading dimension ``size``. No memory is copied."""
    check_theta(theta)
    return tree_map(lambda leaf: leaf.expand(size, *leaf.shape), theta)


def tensors_of(*settings: Any) -> list[torch.Tensor]:
    """The tensors in strengths, step sizes and other settings, in any of their forms.

    What a plain function closes over is not seen; give the product of an ``OperatorStrength`` as an ``nn.Module``.
    """
    found: list[Any] = []
    for setting in settings:
        if isinstance(setting, OperatorStrength):
            setting = setting.product
        if isinstance(setting, torch.nn.Module):
            found += [*setting.parameters(), *setting.buffers()]
        elif not callable(setting):
            found += flatten(setting.tensors if isinstance(setting, MatrixStrength) else setting)[0]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor)]


def learned_tensors(*settings: Any) -> list[torch.Tensor]:
    """Those of :func:`tensors_of` that require a gradient, each once."""
    return list({id(tensor): tensor for tensor in tensors_of(*settings) if tensor.requires_grad}.values())


def regularised(task_loss: TaskLoss, strength: StrengthLike) -> Callable[..., torch.Tensor]:
    """The inner objective ``(phi, theta, support) -> [B]``: the loss, and the proximal term unless the strength is 0.

    Made anew at every call: a learned strength is asked, and one that became negative is an error here.
    """
    present = strength() if callable(strength) else strength
    if isinstance(present, int | float) and present == 0:
        return lambda phi, theta, support: PerTask(task_loss)(phi, support)
    return proximal(PerTask(task_loss), present)


def check_strength(task_loss: TaskLoss, strength: StrengthLike) -> None:
    """Raise ValueError for a strength that is negative, or not one; a callable is not asked yet."""
    if not callable(strength):
        regularised(task_loss, strength)


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
