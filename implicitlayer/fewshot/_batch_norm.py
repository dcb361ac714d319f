"""Batch norm with a task's own statistics, then ReLU; see NOTE [layout] in `_kernels`.

# K: images of a task, H, W: height and width, B: tasks, C: channels

Per task and channel, with M = K·H·W entries, m(.) their mean, r = 1 / sqrt(m((z - m(z))²) + eps), y = (z - m(z)) r and
P(v) = v - m(v) - y m(v y), which is symmetric:

    forward     relu(scale y + shift)
    gradient    from the cotangent g, masked by the ReLU to e:
                dz = scale r P(e)        dscale = sum(e y)        dshift = sum(e)
    second      from the cotangents u, a, b of those three, with q = sum(u P(e)):
                to e: scale r P(u) + a y + b        to scale: r q        to shift: 0
                to z: r (P(c) - scale r q y / M)    where c = a e - scale r (u m(e y) + e m(u y))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from implicitlayer.fewshot._kernels import SUMMED, call, hand_written, store_signature

EPSILON = 1e-5  # added to the variance; the default of torch.nn.BatchNorm2d


def batch_norm_relu(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`relu(scale (z - mean) / sqrt(var + eps) + shift)` of z `[K, H, W, B, C]`, with a task's own mean and variance.

    `scale` and `shift` are `[B, C]`.
    """
    if hand_written(z):
        return _BatchNormReLU.apply(z, scale, shift)[0]  # type: ignore[no-any-return]
    return _plain(z, scale, shift)


@store_signature
class _BatchNormReLU(Function):
    """Returns y and r beside the value, for the derivatives to use; nothing is differentiated through these two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = z - z.mean(SUMMED)  # torch.var_mean takes 60 x the time of these passes in this memory layout
        r = (y.square().mean(SUMMED) + EPSILON).rsqrt()
        y = y * r
        return torch.addcmul(shift, y, scale).relu_(), y, r

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        out, y, r = output
        ctx.mark_non_differentiable(y, r)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, out, y, r)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *_: None) -> Any:
        if g is None:
            return None, None, None
        z, scale, shift, out, y, r = ctx.saved_tensors
        return call(_BatchNormReLUGradient, g, z, scale, shift, out.detach(), y, r)[:3]


@store_signature
class _BatchNormReLUGradient(Function):
    """Returns e beside the gradients, for the second derivative to use."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        g: Tensor, z: Tensor, scale: Tensor, shift: Tensor, out: Tensor, y: Tensor, r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        e = torch.ops.aten.threshold_backward(g, out, 0)
        dshift, dscale = e.sum(SUMMED), (e * y).sum(SUMMED)
        s = scale * r
        share = s * (-1 / _num_entries(z))
        dz = torch.addcmul(torch.addcmul(share * dshift, y, share * dscale), e, s)
        return dz, dscale, dshift, e

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, dscale, dshift, e = output
        ctx.mark_non_differentiable(e)
        ctx.save_for_backward(*inputs, dscale, dshift, e)

    @staticmethod
    def backward(ctx: Any, u: Tensor, a: Tensor, b: Tensor, _: Any) -> Any:
        g, z, scale, shift, *known, dscale, dshift, e = ctx.saved_tensors
        known = (*known, dscale.detach(), dshift.detach(), e)
        return *call(_BatchNormReLUSecond, u, a, b, g, z, scale, shift, *known), None, None, None


@store_signature
class _BatchNormReLUSecond(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, a: Tensor, b: Tensor, g: Tensor, z: Tensor, *known: Tensor) -> tuple[Tensor, ...]:
        scale, shift, out, y, r, dscale, dshift, e = known
        num = _num_entries(z)
        s = scale * r
        mean_e, mean_ey = dshift / num, dscale / num
        mean_u, mean_uy = u.sum(SUMMED) / num, (u * y).sum(SUMMED) / num
        q = (u * e).sum(SUMMED) - num * (mean_u * mean_e + mean_uy * mean_ey)
        slope = a - s * mean_uy
        dg = torch.addcmul(torch.addcmul(b - s * mean_u, y, slope), u, s)
        dg = torch.ops.aten.threshold_backward(dg, out, 0)
        # c = slope e - s m(e y) u, so P(c) is a combination of u, e, y and 1 with one coefficient per channel
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
        # third derivatives and beyond are rare: PyTorch differentiates the plain formula
        return *torch.func.vjp(_plain_second, *ctx.saved_tensors)[1](cotangents), *(None,) * 6


def _plain(z: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    centred = z - z.mean(SUMMED)
    r = (centred.square().mean(SUMMED) + EPSILON).rsqrt()
    return torch.addcmul(shift, centred, scale * r).relu()


def _plain_second(u: Tensor, a: Tensor, b: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """What `_BatchNormReLUSecond` computes, for inputs g, z, scale and shift, by differentiating `_plain` twice."""

    def gradient(g: Tensor, *args: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(_plain, *args)[1](g)  # type: ignore[no-any-return]

    return torch.func.vjp(gradient, *inputs)[1]((u, a, b))  # type: ignore[no-any-return]


def _num_entries(z: Tensor) -> int:
    return z.shape[0] * z.shape[1] * z.shape[2]
