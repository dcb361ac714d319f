"""Batch, instance and layer norm in plain operations."""

# Third derivatives of torch's own kernels for these three are wrong (torch 2.13: relative errors of 0.2 to 0.3 against
# central differences of the second derivative; first and second derivatives are right). A second derivative through a
# layer needs third derivatives of its objective, so the evaluations that derivatives are made of use these. The
# signatures are those of torch.nn.functional.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from implicitlayer._errors import ClosureError

Maybe = torch.Tensor | None


def batch_norm(
    input: torch.Tensor,
    running_mean: Maybe,
    running_var: Maybe,
    weight: Maybe = None,
    bias: Maybe = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``F.batch_norm``; frozen statistics are torch's own business."""
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    _refuse_running_statistics("BatchNorm", running_mean)
    return _normalise(input, [0, *range(2, input.ndim)], eps, weight, bias, (1, -1, *[1] * (input.ndim - 2)))


def instance_norm(
    input: torch.Tensor,
    running_mean: Maybe = None,
    running_var: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``F.instance_norm``; frozen statistics are torch's own business."""
    if not use_input_stats:
        return F.instance_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    _refuse_running_statistics("InstanceNorm", running_mean)
    return _normalise(input, list(range(2, input.ndim)), eps, weight, bias, (1, -1, *[1] * (input.ndim - 2)))


def layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: Maybe = None,
    bias: Maybe = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``F.layer_norm``."""
    return _normalise(input, list(range(-len(normalized_shape), 0)), eps, weight, bias, tuple(normalized_shape))


def _normalise(
    x: torch.Tensor, dims: list[int], eps: float, weight: Maybe, bias: Maybe, shape: tuple[int, ...]
) -> torch.Tensor:
    centred = x - x.mean(dims, keepdim=True)
    result = centred * torch.rsqrt((centred * centred).mean(dims, keepdim=True) + eps)
    if weight is not None:
        result = result * weight.reshape(shape)
    return result if bias is None else result + bias.reshape(shape)


def _refuse_running_statistics(module: str, running_mean: Maybe) -> None:
    if running_mean is not None:
        raise ClosureError(
            f"the objective holds a {module} in train mode that writes its running statistics at every evaluation: "
            "solutions would depend on how often the solver evaluated it, and no transform can run it. Use "
            "track_running_stats=False (batch statistics) or .eval() (frozen running statistics)."
        )


PLAIN: dict[Any, Callable[..., torch.Tensor]] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
}
