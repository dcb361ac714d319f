"""The two operations of a convolutional few-shot network, for many tasks at once, with cheap gradients of gradients.

# K: images of a task, B: tasks, C: channels in, F: channels out, H, W: height and width before, h, w: after

Activations are `[K, H, W, B, C]`. Seen as `[K, B·C, H, W]` that is channels-last memory, so every task is one group of a grouped
channels-last convolution and no layout is ever converted. Weights are `[B, F, 3, 3, C]`, channels-last for the same reason.

NOTE [why hand-written derivatives]
Meta-gradients spend half their time in Hessian-vector products, that is in the derivative of the gradient. PyTorch differentiates
`convolution_backward` group by group through transposed copies, and batch norm's backward through some thirty elementwise operations.
A convolution is bilinear and its gradient is closed under differentiation (below), which leaves six convolutions of the forward's size
per product, the least possible; batch norm with ReLU needs three sums and seven elementwise passes.

NOTE [orders and modes]
Reverse mode of any order, `torch.func.grad/vjp` and `vmap` run on the Functions of this file. They have no `jvp` rule on purpose:
PyTorch returns zeros for forward-over-forward derivatives of Functions that have one. Forward mode uses plain operations instead.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

EPSILON = 1e-5  # added to the variance; the default of torch.nn.BatchNorm2d

_GEOMETRY = ([2, 2], [1, 1], [1, 1], False, [0, 0])  # stride, padding, dilation, transposed, output padding
_SUMMED = (0, 1, 2)  # the axes K, H, W: batch statistics belong to one task and one channel


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolve each task's images with its own 3x3 weights, stride 2, padding 1.

    Args:
        x: `[K, H, W, B, C]`.
        weight: `[B, F, 3, 3, C]`.

    Returns:
        `[K, h, w, B, F]` with `h = ceil(H / 2)`, `w = ceil(W / 2)`.
    """
    if _hand_written(x):
        return _Convolution.apply(x, weight, None)  # type: ignore[no-any-return]
    # cuDNN's grouped kernels want contiguous [K, B·C, H, W]; elementwise operations keep those strides from layer to layer.
    y = F.conv2d(_images(x).contiguous(), _filters(weight).contiguous(), None, 2, 1, 1, x.shape[3])
    return _from_images(y, x.shape[3])


def convolution_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Convolve as `convolution` does, add the bias `[B, F]`, and clip at zero, in place to spare the memory."""
    if _hand_written(x):
        return _Convolution.apply(x, weight, bias)  # type: ignore[no-any-return]
    return (convolution(x, weight) + bias).relu()


def batch_norm_relu(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalise over each task's own images, scale, shift, and clip at zero: `relu(scale (z - mean) / sqrt(var + eps) + shift)`.

    Args:
        z: `[K, H, W, B, C]`.
        scale: `[B, C]`.
        shift: `[B, C]`.

    Returns:
        `[K, H, W, B, C]`.
    """
    if _hand_written(z):
        return _BatchNormReLU.apply(z, scale, shift)[0]  # type: ignore[no-any-return]
    return _plain_batch_norm_relu(z, scale, shift)


def _hand_written(x: Tensor) -> bool:
    """Whether the Functions below run: on a CPU (0.6 x the time of plain operations) and outside forward mode; see NOTE [orders and modes]."""
    return x.device.type == "cpu" and forward_ad._current_level < 0


# --- Convolution. With y = x * w and a cotangent g, the gradients are bilinear too: dx = g ⊛ w and dw = g ⋆ x. Given cotangents
#     (u, v) of (dx, dw), the scalar <u, g ⊛ w> + <v, g ⋆ x> = <g, u * w + x * v>, whose gradients are
#     to g: u * w + x * v,   to x: g ⊛ v,   to w: g ⋆ u.   The same three operations again, so every order follows.


class _Convolution(Function):
    """The convolution alone without a bias; with one, also the bias and the ReLU."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        flat_bias = None if bias is None else bias.flatten()
        y = torch.convolution(_images(x), _filters(weight), flat_bias, *_GEOMETRY, x.shape[3])
        return _from_images(y if bias is None else y.relu_(), x.shape[3])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight, None if bias is None else output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight, out = ctx.saved_tensors
        if out is not None:
            g = torch.ops.aten.threshold_backward(g, out.detach(), 0)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx, dweight = _call(_ConvolutionGradient, g, x, weight, needs_x, needs_weight)
        return dx, dweight, g.sum(_SUMMED) if needs_bias else None


class _ConvolutionGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        num_tasks = x.shape[3]
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            _images(g), _images(x), _filters(weight), None, *_GEOMETRY, num_tasks, [needs_x, needs_weight, False]
        )
        dx = _from_images(dx, num_tasks) if needs_x else None
        dweight = dweight.permute(0, 2, 3, 1).unflatten(0, (num_tasks, -1)) if needs_weight else None
        return dx, dweight

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> Any:
        g, x, weight = ctx.saved_tensors
        needs_g, needs_x, needs_weight = (needed for needed in ctx.needs_input_grad[:3])
        dg = dx = dweight = None
        if needs_g and u is not None:
            dg = _call(_Convolution, u, weight, None)
        if needs_g and v is not None:
            other = _call(_Convolution, x, v, None)
            dg = other if dg is None else dg + other
        if needs_x and v is not None:
            dx = _call(_ConvolutionGradient, g, x, v, True, False)[0]
        if needs_weight and u is not None:
            dweight = _call(_ConvolutionGradient, g, u, weight, False, True)[1]
        return dg, dx, dweight, None, None


# --- Batch norm and ReLU. Per channel, with M = K·h·w entries, mean m(.), y = (z - m(z)) r with r = (m((z - m(z))²) + eps)^(-1/2),
#     and P(v) = v - m(v) - y m(v y), which is symmetric:
#     forward    relu(scale y + shift)
#     gradient   (cotangent g, masked by relu: e)   dz = scale r P(e),   dscale = sum(e y),   dshift = sum(e)
#     its own    (cotangents u, a, b of those)      to e: scale r P(u) + a y + b,      to scale: r q  with q = sum(u P(e)),
#                to z: r (P(c) - scale r q y / M)   with c = a e - scale r (u m(e y) + e m(u y)).


class _BatchNormReLU(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = z - z.mean(_SUMMED)  # torch.var_mean is 60 x slower than these passes in this memory layout
        r = (y.square().mean(_SUMMED) + EPSILON).rsqrt()
        y = y * r
        return torch.addcmul(shift, y, scale).relu_(), y, r

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, scale, shift = inputs
        out, y, r = output
        ctx.mark_non_differentiable(y, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(z, scale, shift, out, y, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> Any:
        if g is None:
            return None, None, None
        z, scale, shift, out, y, r = ctx.saved_tensors
        dz, dscale, dshift, _e = _call(_BatchNormReLUGradient, g, z, scale, shift, out.detach(), y, r)
        return dz, dscale, dshift


class _BatchNormReLUGradient(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, z: Tensor, scale: Tensor, shift: Tensor, out: Tensor, y: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        e = torch.ops.aten.threshold_backward(g, out, 0)
        dshift, dscale = e.sum(_SUMMED), (e * y).sum(_SUMMED)
        a = scale * r
        per_entry = a * (-1 / _entries(z))
        dz = torch.addcmul(torch.addcmul(per_entry * dshift, y, per_entry * dscale), e, a)
        return dz, dscale, dshift, e

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dscale, dshift, e = output
        ctx.mark_non_differentiable(e)
        ctx.save_for_backward(*inputs, dscale, dshift, e)

    @staticmethod
    def backward(ctx: Any, u: Tensor, a: Tensor, b: Tensor, _: Any) -> Any:
        g, z, scale, shift, out, y, r, dscale, dshift, e = ctx.saved_tensors
        cached = (out, y, r, dscale.detach(), dshift.detach(), e)
        return *_call(_BatchNormReLUSecond, u, a, b, g, z, scale, shift, *cached), None, None, None, None


class _BatchNormReLUSecond(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor, a: Tensor, b: Tensor, g: Tensor, z: Tensor, scale: Tensor, shift: Tensor,
        out: Tensor, y: Tensor, r: Tensor, dscale: Tensor, dshift: Tensor, e: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        num = _entries(z)
        s = scale * r
        mean_e, mean_ey = dshift / num, dscale / num
        mean_u, mean_uy = u.sum(_SUMMED) / num, (u * y).sum(_SUMMED) / num
        q = (u * e).sum(_SUMMED) - num * (mean_u * mean_e + mean_uy * mean_ey)
        slope = a - s * mean_uy
        dg = torch.addcmul(torch.addcmul(b - s * mean_u, y, slope), u, s)
        dg = torch.ops.aten.threshold_backward(dg, out, 0)
        # P(c) with c = slope e - s m(ey) u, written as one linear combination of u, e, y and 1
        mean_c = slope * mean_e - s * mean_ey * mean_u
        mean_cy = (slope - s * mean_uy) * mean_ey
        dz = torch.addcmul(-r * mean_c, y, -r * (mean_cy + s * q / num))
        dz = torch.addcmul(torch.addcmul(dz, e, r * slope), u, -r * s * mean_ey)
        return dg, dz, r * q, torch.zeros_like(shift)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:7])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        # Third derivatives and beyond are rare: let PyTorch differentiate the plain formula.
        def second(*args: Tensor) -> tuple[Tensor, ...]:
            return _plain_second(*args)

        return *torch.func.vjp(second, *ctx.saved_tensors)[1](cotangents), *(None,) * 6


def _plain_batch_norm_relu(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = z - z.mean(_SUMMED)
    r = (centred.square().mean(_SUMMED) + EPSILON).rsqrt()
    return torch.addcmul(shift, centred, scale * r).relu()


def _plain_second(u: Tensor, a: Tensor, b: Tensor, *primals: Tensor) -> tuple[Tensor, ...]:
    def gradient(g: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(_plain_batch_norm_relu, *args)[1](g)  # type: ignore[no-any-return]

    return torch.func.vjp(gradient, *primals)[1]((u, a, b))  # type: ignore[no-any-return]


def _images(x: Tensor) -> Tensor:
    """View `[K, H, W, B, C]` as `[K, B·C, H, W]`."""
    return x.flatten(3).permute(0, 3, 1, 2)


def _from_images(x: Tensor, num_tasks: int) -> Tensor:
    """View `[K, B·C, H, W]` as `[K, H, W, B, C]`."""
    return x.permute(0, 2, 3, 1).unflatten(3, (num_tasks, -1))


def _filters(weight: Tensor) -> Tensor:
    """View `[B, F, 3, 3, C]` as `[B·F, C, 3, 3]`."""
    return weight.flatten(0, 1).permute(0, 3, 1, 2)


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc's allocator reuse memory from one gradient to the next instead of returning it to the kernel; does nothing elsewhere.

    Freeing one large block raises glibc's thresholds for the rest of the process (mallopt(3), M_MMAP_THRESHOLD): up to 64 MiB of freed
    memory stay. Without it every gradient of this network touches fresh pages, 900 to 5,000 page faults, a quarter of its time.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


def _call(function: type[Function], *args: Any) -> Any:
    """Apply a Function; where nothing is recorded, its forward alone, which saves 30 µs."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(*args)


def _entries(z: Tensor) -> int:
    return z.shape[0] * z.shape[1] * z.shape[2]


for _function in (_Convolution, _ConvolutionGradient, _BatchNormReLU, _BatchNormReLUGradient, _BatchNormReLUSecond):
    # Function.apply inspects the signature of `forward` at every call, 40 µs, unless it is stored
    setattr(_function.forward, "__signature__", inspect.signature(_function.forward))  # noqa: B010
