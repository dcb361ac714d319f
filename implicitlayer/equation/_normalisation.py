"""Batch, instance and layer norm in plain operations."""

# Third derivatives of torch's own kernels for these three are wrong (torch 2.13: relative errors of 0.15 to 2 against
# the formula of mean and variance and against central differences of the second derivative; first and second
# derivatives are right, and so are all of group norm, RMS norm, and batch norm with frozen statistics). A second
# derivative through a layer needs third derivatives of its objective, so the evaluations that derivatives are made of
# use these. The signatures are those of torch.nn.functional; torch has the same under names and in orders of its own.
# What no mode sees (a scripted module, torch.ops) shows in the graph, and second derivatives are refused.

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
    cudnn_enable: bool = True,
) -> torch.Tensor:
    """``F.layer_norm``, and ``torch.layer_norm``, which has one argument more."""
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


def _in_torch_order(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``F.batch_norm`` or ``F.instance_norm`` with the arguments of ``torch.batch_norm`` or ``torch.instance_norm``."""

    def called(input: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, *rest: Any, **by: Any) -> Any:
        by.pop("cudnn_enabled", None)
        return function(input, running_mean, running_var, weight, bias, *rest[:3], **by)

    return called


PLAIN: dict[Any, Callable[..., torch.Tensor]] = {
    F.batch_norm: batch_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    torch.batch_norm: _in_torch_order(batch_norm),
    torch.instance_norm: _in_torch_order(instance_norm),
    torch.layer_norm: layer_norm,
}

NORMALISATIONS = {
    "NativeLayerNormBackward",
    "NativeBatchNormBackward",
    "CudnnBatchNormBackward",
    "MiopenBatchNormBackward",
}


def wrong_third_derivative(node: Any) -> str:
    """Words for one of NORMALISATIONS in a graph, whose third derivative is wrong; empty where it is right."""
    # with frozen statistics the same node is right; what torch has freed it does not tell
    if not getattr(node, "_saved_training", True):
        return ""
    kind = "layer norm" if "Layer" in type(node).__name__ else "batch norm"
    return (
        f"the objective reaches torch's own kernel of {kind} in a way that could not be followed (a scripted "
        "module, torch.ops): its third derivative, which a second derivative through the layer needs, is wrong "
        f"in torch. Call torch.nn.functional.{kind.replace(' ', '_')} or its module in the objective: the "
        "plain formula is then used."
    )
