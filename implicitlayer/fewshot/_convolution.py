"""The 3x3 convolution with separate filters for every task; see NOTE [layout] in `_kernels`.

# K: images of a task, B: tasks, C: channels in, F: channels out, H, W: height and width before, h, w: after

With y = x * w and a cotangent g, the gradients are bilinear too: dx = g ⊛ w and dw = g ⋆ x. Given cotangents (u, v) of
(dx, dw), the scalar <u, g ⊛ w> + <v, g ⋆ x> = <g, u * w + x * v> has the gradients

    to g: u * w + x * v        to x: g ⊛ v        to w: g ⋆ u

which are the same three operations again, whatever the stride, so every order of derivative follows from two Functions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from implicitlayer.fewshot._kernels import SUMMED, call, from_images, hand_written, store_signature, to_images

_GEOMETRY = ([1, 1], [1, 1], False, [0, 0])  # after the stride: padding, dilation, transposed, output padding


def convolution(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Convolve each task's images `[K, H, W, B, C]` with its own 3x3 filters `[B, F, 3, 3, C]`, padding 1.

    Gives `[K, h, w, B, F]` with `h = ceil(H / stride)`, `w = ceil(W / stride)`.
    """
    if hand_written(x):
        return _Convolution.apply(x, weight, None, stride)  # type: ignore[no-any-return]
    # cuDNN's grouped kernels want contiguous [K, B·C, H, W]; elementwise operations keep those strides between layers
    y = F.conv2d(to_images(x).contiguous(), _filters(weight).contiguous(), None, stride, 1, 1, x.shape[3])
    return from_images(y, x.shape[3])


def convolution_relu(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Convolve as `convolution` does, add the bias `[B, F]`, and clip at zero, in place to spare the memory."""
    if hand_written(x):
        return _Convolution.apply(x, weight, bias, stride)  # type: ignore[no-any-return]
    return (convolution(x, weight, stride) + bias).relu()


@store_signature
class _Convolution(Function):
    """Without a bias the convolution alone; with one, also the bias and the ReLU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        flat_bias = None if bias is None else bias.flatten()
        y = torch.convolution(to_images(x), _filters(weight), flat_bias, [stride] * 2, *_GEOMETRY, x.shape[3])
        return from_images(y if bias is None else y.relu_(), x.shape[3])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias, ctx.stride = inputs
        ctx.save_for_backward(x, weight, None if bias is None else output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, out = ctx.saved_tensors
        if out is not None:
            g = torch.ops.aten.threshold_backward(g, out.detach(), 0)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dx, dweight = call(_ConvolutionGradient, g, x, weight, needs_x, needs_weight, ctx.stride)
        return dx, dweight, g.sum(SUMMED) if needs_bias else None, None


@store_signature
class _ConvolutionGradient(Function):
    """`(g, x, weight) -> (g ⊛ weight, g ⋆ x)`, or None for the one that is not needed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool, stride: int
    ) -> tuple[Tensor | None, Tensor | None]:
        num_tasks = x.shape[3]
        needed = [needs_x, needs_weight, False]
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            to_images(g), to_images(x), _filters(weight), None, [stride] * 2, *_GEOMETRY, num_tasks, needed
        )
        dx = from_images(dx, num_tasks) if needs_x else None
        dweight = dweight.permute(0, 2, 3, 1).unflatten(0, (num_tasks, -1)) if needs_weight else None
        return dx, dweight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.stride = inputs[5]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> Any:
        g, x, weight = ctx.saved_tensors
        needs_g, needs_x, needs_weight = ctx.needs_input_grad[:3]
        dg = dx = dweight = None
        if needs_g and u is not None:
            dg = call(_Convolution, u, weight, None, ctx.stride)
        if needs_g and v is not None:
            from_weight = call(_Convolution, x, v, None, ctx.stride)
            dg = from_weight if dg is None else dg + from_weight
        if needs_x and v is not None:
            dx = call(_ConvolutionGradient, g, x, v, True, False, ctx.stride)[0]
        if needs_weight and u is not None:
            dweight = call(_ConvolutionGradient, g, u, weight, False, True, ctx.stride)[1]
        return dg, dx, dweight, None, None, None


def _filters(weight: Tensor) -> Tensor:
    """View `[B, F, 3, 3, C]` as `[B·F, C, 3, 3]`."""
    return weight.flatten(0, 1).permute(0, 3, 1, 2)
