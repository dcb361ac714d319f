"""Few-shot classifiers as pure functions of their parameters, computed for a whole batch of tasks at once.

# B: tasks, K: images of a task, N: ways, C: channels of an image, F: filters
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from implicitlayer.base._tree import check_integer
from implicitlayer.fewshot._batch_norm import EPSILON, batch_norm_relu
from implicitlayer.fewshot._conv4_loss import Conv4Loss, Evaluation
from implicitlayer.fewshot._kernels import (
    convolution,
    convolution_relu,
    hand_written,
    keep_freed_memory,
    mapped,
    max_pool,
    needs_plain_operations,
)
from implicitlayer.fewshot._parameters import DrawnNetwork, stacked_parameters

Downsample = Literal["stride", "max_pool"]

_NUM_BLOCKS = 4
_GAIN = 1.73  # of the Xavier-uniform weights, and
_MAX_BIAS = 0.05  # of the head's uniform bias: the initialisation of the iMAML authors' released code
# Entries of the largest activation on a CPU, 8 MiB in float32: more tasks go through the network in parts. The gradient
# of 16 tasks of 75 images takes 0.72 x the time of one piece, which leaves the cache and is given fresh memory.
_MAX_ACTIVATION = 2**21
# Images of a task up to which derivatives by hand win. Their patches are 9/4 times the activations, so with many images
# they wait for memory: 16 tasks of 5 images take 0.72 x (gradient) and 0.65 x (Hessian product) the time of autograd's,
# of 25 images 1.04 x and 0.88 x, of 75 images 1.16 x with 2.3 x the memory.
_MAX_IMAGES_BY_HAND = 25


@dataclass(frozen=True)
class Conv4(DrawnNetwork):
    """Four blocks of 3x3 convolution, batch norm with the task's own statistics, ReLU; then a linear layer.

    Each block halves the image: by a stride of 2 in the convolution, or by a stride of 1 and, after the ReLU, the
    largest entry of every 2x2 square. Published networks use the first on Omniglot and the second on mini-ImageNet,
    with 32 filters.

    The convolutions have no bias: batch norm would cancel it exactly. Parameters are a flat dict: for blocks 1 to 4
    `conv{i}.weight` `[F, 3, 3, C_in]`, `norm{i}.weight` and `norm{i}.bias` `[F]`, and for the head `head.weight`
    `[N, side² F]` and `head.bias` `[N]`. Channels come last, in the filters and in the flattened image (row, column,
    channel): `weight.permute(0, 3, 1, 2)` is what `torch.nn.Conv2d` holds. `init` draws weights from Xavier's uniform
    distribution (gain 1.73) and the bias of the head from [0, 0.05]; norms start at 1 and 0.

    Args:
        num_ways: number of classes N, at least 1.
        in_channels: channels C of an image, at least 1.
        num_filters: channels F of every block, at least 1.
        image_size: height and width of an image in pixels, at least 1 with strides, which round a half up, and at
            least 16 with max pooling, which leaves an odd last row and column out.
        downsample: `"stride"` or `"max_pool"`.

    Source: of the initial distributions, the code released with "Meta-Learning with Implicit Gradients" (Rajeswaran et
    al., 2019).

    Example:
        >>> network = conv4(num_ways=5, num_filters=8)
        >>> params = network.init(torch.Generator().manual_seed(0))
        >>> network(params, torch.rand(10, 1, 28, 28)).shape
        torch.Size([10, 5])
        >>> network(params, torch.rand(3, 10, 1, 28, 28)).shape  # three tasks, each with its own batch statistics
        torch.Size([3, 10, 5])
    """

    num_ways: int
    in_channels: int = 1
    num_filters: int = 64
    image_size: int = 28
    downsample: Downsample = "stride"

    def __post_init__(self) -> None:
        for name in ("num_ways", "in_channels", "num_filters", "image_size"):
            check_integer(name, getattr(self, name), 1)
        if self.downsample not in get_args(Downsample):
            listed = ", ".join(map(repr, get_args(Downsample)))
            raise ValueError(f"downsample={self.downsample!r} must be one of {listed}.")
        if self.num_features == 0:
            raise ValueError(
                f"image_size={self.image_size} must be at least {2**_NUM_BLOCKS} with downsample='max_pool': four "
                "halvings leave nothing of smaller images. Take larger images or downsample='stride'."
            )

    @property
    def num_features(self) -> int:
        """Length of the vector that the linear head reads."""
        side = self.image_size
        for _ in range(_NUM_BLOCKS):
            side = side // 2 if self.downsample == "max_pool" else math.ceil(side / 2)
        return side * side * self.num_filters

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter of one task."""
        shapes: dict[str, tuple[int, ...]] = {}
        in_channels = self.in_channels
        for block in range(1, _NUM_BLOCKS + 1):
            shapes[f"conv{block}.weight"] = (self.num_filters, 3, 3, in_channels)
            shapes[f"norm{block}.weight"] = shapes[f"norm{block}.bias"] = (self.num_filters,)
            in_channels = self.num_filters
        shapes["head.weight"] = (self.num_ways, self.num_features)
        shapes["head.bias"] = (self.num_ways,)
        return shapes

    def _fill(self, name: str, value: Tensor, generator: torch.Generator | None) -> None:
        shape = value.shape
        if name.startswith("conv"):
            bound = _GAIN * math.sqrt(6 / (9 * (shape[0] + shape[3])))
            value.uniform_(-bound, bound, generator=generator)
        elif name == "head.weight":
            bound = _GAIN * math.sqrt(6 / (shape[0] + shape[1]))
            value.uniform_(-bound, bound, generator=generator)
        elif name == "head.bias":
            value.uniform_(0, _MAX_BIAS, generator=generator)
        else:
            value.fill_(1.0 if name.endswith("weight") else 0.0)

    def __call__(self, params: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """Compute the logits of one task or of a batch of independent tasks.

        Args:
            params: one task's parameters, or the same with a leading axis of B tasks; tensors without it are shared.
            images: `[K, C, height, width]`, or `[B, K, C, height, width]` for B tasks.

        Returns:
            `[K, N]`, or `[B, K, N]`. Batch statistics are those of the K images of the same task.

        Raises:
            ValueError: a tensor that is missing or has another shape.
            TypeError: images and parameters have different dtypes.
        """
        p, images, batched = self._stacked(params, images)
        logits = self._in_parts(self._logits, p, images)
        return logits if batched else logits.squeeze(0)

    def features(self, params: Mapping[str, Tensor], images: Tensor) -> Tensor:
        """What the linear head reads, `[K, num_features]` or `[B, K, num_features]`, of what the logits take.

        The parameters of the head may be missing.
        """
        p, images, batched = self._stacked(params, images, without_head=True)
        features = self._in_parts(self._features, p, images)
        return features if batched else features.squeeze(0)

    def cross_entropy(self, params: Mapping[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """Each task's mean cross-entropy in nats, 0-d or `[B]`: `task_cross_entropy(network(params, images), labels)`.

        On a CPU, with strides and with few images this is faster than that expression: of five images, gradients and
        Hessian-vector products in the parameters take 0.7 x its time. Labels are `[K]`, or `[B, K]` for B tasks,
        integers in 0 .. N - 1.

        Example:
            >>> network = conv4(num_ways=5, num_filters=8)
            >>> params = network.init(torch.Generator().manual_seed(0))
            >>> params["head.weight"] = torch.zeros(5, network.num_features)
            >>> params["head.bias"] = torch.zeros(5)
            >>> network.cross_entropy(params, torch.rand(10, 1, 28, 28), torch.arange(10) % 5).exp()
            tensor(5.)
        """
        return self._evaluated(params, images, labels, with_accuracy=False)

    def cross_entropy_and_accuracy(
        self, params: Mapping[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The losses of `cross_entropy`, and the accuracies without a gradient, in one forward pass."""
        both = self._evaluated(params, images, labels, with_accuracy=True)
        return both[..., 0], both[..., 1].detach()

    def _evaluated(
        self, params: Mapping[str, Tensor], images: Tensor, labels: Tensor, *, with_accuracy: bool
    ) -> Tensor:
        """Losses, 0-d or `[B]`; with the accuracies beside them `[..., 2]`."""
        by_hand = (
            self.downsample == "stride"
            and hand_written(images)
            and images.numel() > 0
            and images.ndim in (4, 5)
            and images.shape[-4] <= _MAX_IMAGES_BY_HAND
            and not any(needs_plain_operations(tensor) for tensor in (images, labels))
            and not any(mapped(value) for value in params.values())
        )
        if not by_hand:
            logits = self(params, images)
            losses = task_cross_entropy(logits, labels)
            return torch.stack([losses, task_accuracy(logits.detach(), labels)], -1) if with_accuracy else losses
        p, images, batched = self._stacked(params, images)
        if not batched:
            labels = labels.unsqueeze(0)
        check_labels(images[..., 0, 0, 0, None], labels)

        def by_hand_of(p: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
            evaluation = self._evaluation(p, images, labels)
            losses = evaluation(p)
            if not with_accuracy:
                return losses
            return torch.stack([losses, task_accuracy(evaluation.loss.log_p.detach(), labels)], -1)

        found = self._in_parts(by_hand_of, p, images, labels)
        return found if batched else found.squeeze(0)

    def _stacked(
        self, params: Mapping[str, Tensor], images: Tensor, *, without_head: bool = False
    ) -> tuple[dict[str, Tensor], Tensor, bool]:
        """Parameters and images with a leading axis of tasks, checked; and whether the images had one."""
        batched = images.ndim == 5
        if images.ndim not in (4, 5) or images.shape[-3:] != (self.in_channels, self.image_size, self.image_size):
            size = f"{self.in_channels}, {self.image_size}, {self.image_size}"
            raise ValueError(
                f"images of shape {tuple(images.shape)} must be [K, {size}], or [B, K, {size}] for B tasks. "
                "Build conv4 with the in_channels and image_size of the data."
            )
        if not batched:
            images = images.unsqueeze(0)
        shapes = {name: s for name, s in self.shapes.items() if not (without_head and name.startswith("head"))}
        p = stacked_parameters(params, shapes, images.shape[0], batched=batched, dtype=images.dtype, name="conv4")
        return p, images, batched

    def _in_parts(self, function: Callable[..., Tensor], p: dict[str, Tensor], *data: Tensor) -> Tensor:
        """`function(p, *data)`, on a CPU in parts of as many tasks as stay in the cache."""
        num_tasks, num_images = data[0].shape[:2]
        at_once = num_tasks
        if data[0].device.type == "cpu":
            keep_freed_memory()
            # the first convolution's output of one task
            largest = num_images * math.ceil(self.image_size / self._stride) ** 2 * self.num_filters
            at_once = max(1, _MAX_ACTIVATION // largest) if largest else num_tasks
        if num_tasks <= at_once:
            return function(p, *data)
        parts = {name: value.split(at_once) for name, value in p.items()}
        pieces = zip(*(tensor.split(at_once) for tensor in data), strict=True)
        found = [function({name: split[i] for name, split in parts.items()}, *some) for i, some in enumerate(pieces)]
        return torch.cat(found)

    def _evaluation(self, p: dict[str, Tensor], images: Tensor, labels: Tensor) -> Evaluation:
        def plain(*tensors: Tensor) -> Tensor:
            return task_cross_entropy(self._logits(dict(zip(p, tensors, strict=True)), images), labels)

        side = math.ceil(self.image_size / 4)
        loss = Conv4Loss(images, labels, self.num_ways, [side, math.ceil(side / 2)])
        return Evaluation(loss, list(p), plain)

    def _logits(self, p: dict[str, Tensor], images: Tensor) -> Tensor:
        """Logits `[B, K, N]` of stacked parameters and images `[B, K, C, height, width]`."""
        return torch.baddbmm(p["head.bias"].unsqueeze(1), self._features(p, images), p["head.weight"].mT)

    def _features(self, p: dict[str, Tensor], images: Tensor) -> Tensor:
        """What the head reads, `[B, K, num_features]`."""
        num_tasks, num_images = images.shape[:2]
        x = _first_block(images, p["conv1.weight"], p["norm1.weight"], p["norm1.bias"], self._stride)
        for block in range(2, _NUM_BLOCKS + 1):
            z = convolution(self._pooled(x), p[f"conv{block}.weight"], self._stride)
            x = batch_norm_relu(z, p[f"norm{block}.weight"], p[f"norm{block}.bias"])
        x = self._pooled(x)
        return x.permute(3, 0, 1, 2, 4).reshape(num_tasks, num_images, self.num_features)

    @property
    def _stride(self) -> int:
        return 1 if self.downsample == "max_pool" else 2

    def _pooled(self, x: Tensor) -> Tensor:
        return max_pool(x) if self.downsample == "max_pool" else x


def conv4(
    num_ways: int,
    *,
    in_channels: int = 1,
    num_filters: int = 64,
    image_size: int = 28,
    downsample: Downsample = "stride",
) -> Conv4:
    """Return the four-convolution network of the few-shot papers (MAML, iMAML); see `Conv4`.

    Example:
        >>> conv4(5).num_features  # Omniglot
        256
        >>> conv4(5, in_channels=3, num_filters=32, image_size=84, downsample="max_pool").num_features  # mini-ImageNet
        800
    """
    return Conv4(num_ways, in_channels, num_filters, image_size, downsample)


def _first_block(images: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: int) -> Tensor:
    """Convolution, batch norm and ReLU of `[B, K, C, H, W]` images, as one convolution: `[K, h, w, B, F]`.

    A filter w sees patches of 9 C pixels; its output has mean w·m and variance wᵀ S w, where m and S are the patches'
    mean and covariance over the task. So batch norm is a change of the filters, w -> w scale / sqrt(wᵀ S w + eps), and
    a bias. No pass over the output, the network's largest tensor, is spent on statistics here or in any derivative.
    Gradients and Hessian-vector products of the whole network take 0.9 x the time for it.
    """
    num_tasks, num_filters = weight.shape[:2]
    windows = F.pad(images, (1, 1, 1, 1)).unfold(3, 3, stride).unfold(4, 3, stride)  # [B, K, C, h, w, 3, 3]
    patches = windows.permute(0, 5, 6, 2, 1, 3, 4).reshape(num_tasks, 9 * images.shape[2], -1)  # [B, 9 C, K·h·w]
    mean = patches.mean(-1, keepdim=True)
    centred = patches - mean
    covariance = centred @ centred.mT / patches.shape[-1]
    flat = weight.reshape(num_tasks, num_filters, -1)
    factor = scale * (((flat @ covariance) * flat).sum(-1) + EPSILON).rsqrt()
    flat = flat * factor.unsqueeze(-1)
    bias = shift - (flat @ mean).squeeze(-1)
    x = images.permute(1, 3, 4, 0, 2)  # [K, H, W, B, C]
    return convolution_relu(x, flat.view_as(weight), bias, stride)


# K: examples of a task, N: ways, D: numbers in one output


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
