"""Losses and scores of a batch of tasks: one number for each task, never their mean."""

# K: examples of a task, N: ways, D: numbers in one output

from __future__ import annotations

import torch
from torch import Tensor


def task_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of each task, in nats: `[...]`, one loss a task, so a 0-d tensor for one task.

    Args:
        logits: `[..., K, N]`.
        labels: `[..., K]`, integers in 0 .. N - 1; no broadcasting.

    Raises:
        ValueError: the labels have another shape, or are no integers.

    Example:
        >>> import torch
        >>> task_cross_entropy(torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)).exp()
        tensor([5., 5.])
    """
    check_labels(logits, labels)
    log_probabilities = logits.log_softmax(-1)
    return -log_probabilities.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1).mean(-1)


def task_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Fraction of each task's images whose largest logit is at the label; arguments as in `task_cross_entropy`."""
    check_labels(logits, labels)
    return (logits.argmax(-1) == labels).to(logits.dtype).mean(-1)


def task_mean_squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean of the squared differences of each task, over its examples and their outputs: `[...]`, one loss a task.

    Predictions and targets are `[..., K, D]`, or it is a ValueError: no broadcasting, which makes `[K, K]` of `[K, 1]`
    and `[K]`.
    """
    if predictions.shape != targets.shape or predictions.ndim < 2:
        raise ValueError(
            f"predictions of shape {tuple(predictions.shape)} and targets of shape {tuple(targets.shape)} must have "
            "one shape [..., K, D]. Give single outputs an axis of length 1 with .unsqueeze(-1)."
        )
    return (predictions - targets).square().mean((-2, -1))


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """Raise ValueError for labels that are no integers, one for each image of `logits` `[..., K, N]`."""
    # gather would take a part of the logits where there are fewer labels, and == would broadcast
    integers = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if logits.ndim < 2 or labels.shape != logits.shape[:-1] or not integers:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype} must be integers of shape "
            f"{tuple(logits.shape[:-1])}, one for each of the logits {tuple(logits.shape)} [..., K, N]."
        )
