"""Classifiers on tasks: the loss with the accuracy of its forward pass, and predictions for one query image alone."""

# B: tasks, S: support images of a task, Q: query images, N: ways

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from implicitlayer.fewshot._networks import Conv4, task_accuracy


class ClassificationLoss:
    """The cross-entropy of a network of :func:`conv4` on tasks ``batch = (images, labels)``: a task loss for `il.meta`.

    Given ``metric=loss.accuracy``, `il.meta.Trainer` takes the accuracy of the training tasks from the forward pass of
    their query losses, and makes none for it.

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


def inductive_logits(
    network: Callable[[Any, Tensor], Tensor], params: Any, support_images: Tensor, query_images: Tensor
) -> Tensor:
    """Logits ``[..., Q, N]`` of each query image, computed without the other query images.

    A network whose batch norm takes its statistics from the images of the call, such as :func:`conv4`, lets query
    images that go through it together help one another: the transductive setting. One image alone has no statistics
    worth the name. So each query image goes through the network together with the support images, which are known
    in any case, and its own logits are taken: Q passes of S + 1 images.

    Args:
        network: ``network(params, images) -> logits``, images ``[..., K, C, H, W]`` and logits ``[..., K, N]``.
        params: adapted parameters, of one task or of B tasks.
        support_images: ``[..., S, C, H, W]``, S at least 1.
        query_images: ``[..., Q, C, H, W]``.

    Raises:
        ValueError: pictures of other shapes, or tasks of another number.

    Example:
        A "network" that takes the mean of the images away, as batch norm does:

        >>> centre = lambda params, images: (images - images.mean(-4, keepdim=True)).flatten(-3)
        >>> support, query = torch.zeros(1, 1, 1, 1), torch.tensor([2.0, 8.0]).view(2, 1, 1, 1)
        >>> inductive_logits(centre, None, support, query).flatten()   # 2 − (0 + 2)/2, whatever the other image is
        tensor([1., 4.])
    """
    apart = support_images.shape[:-4] != query_images.shape[:-4] or support_images.shape[-3:] != query_images.shape[-3:]
    if support_images.ndim < 4 or apart or support_images.shape[-4] == 0:
        raise ValueError(
            f"support_images {tuple(support_images.shape)} and query_images {tuple(query_images.shape)} must be "
            "[..., S, C, H, W] and [..., Q, C, H, W] with the same tasks and picture size, and S at least 1."
        )
    logits = [
        network(params, torch.cat([support_images, query_images.narrow(-4, index, 1)], -4))[..., -1:, :]
        for index in range(query_images.shape[-4])
    ]
    return torch.cat(logits, -2)
