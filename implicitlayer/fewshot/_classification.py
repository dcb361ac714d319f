"""The loss of a classifier on tasks, with the accuracy that its forward pass knows anyway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from implicitlayer.fewshot._networks import Conv4
from implicitlayer.fewshot._task_losses import task_accuracy


class ClassificationLoss:
    """The cross-entropy of a network on tasks ``batch = (images, labels)``: a task loss for `il.meta`.

    Given ``metric=loss.accuracy``, `il.meta.Trainer` takes the accuracy of the training tasks from the forward pass of
    their query losses, and makes none for it.

    Args:
        network: of :func:`conv4`.

    Example:
        >>> import torch
        >>> from implicitlayer.fewshot import conv4
        >>> network = conv4(num_ways=5, num_filters=8)
        >>> loss, params = ClassificationLoss(network), network.init(torch.Generator().manual_seed(0))
        >>> batch = torch.rand(10, 1, 28, 28), torch.arange(10) % 5
        >>> bool(loss.scored(params, batch)[1] == loss.accuracy(params, batch))
        True
    """

    def __init__(self, network: Conv4) -> None:
        self.network = network

    def __call__(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Losses, 0-d or `[B]`, in nats."""
        return self.network.cross_entropy(params, *batch)

    def scored(self, params: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """Losses and accuracies of one forward pass."""
        return self.network.cross_entropy_and_accuracy(params, *batch)

    def accuracy(self, params: Mapping[str, Tensor], batch: Any) -> Tensor:
        """Share of right answers, 0-d or `[B]`."""
        images, labels = batch
        return task_accuracy(self.network(params, images), labels)
