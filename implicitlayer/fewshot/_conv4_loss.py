"""Cross-entropy of the strided Conv4 on a CPU with gradients and Hessian-vector products as batched matrix products.

# B: tasks, K: images of a task, N: ways, F: filters, M: output pixels of a layer over the K images, S: side of an input

A convolution with stride 2 is one matrix product per task of patches `[B, M, 9 F]` and filters `[B, F, 9 F]`, and so
are its derivatives. Every piece of the network below has four passes:

    forward     values
    backward    cotangents of the values -> cotangents of the input, and the gradient in the piece's parameters
    tangent     derivatives of the values along a direction u of the parameters
    product     derivatives of `backward` along u

The tangents of the gradient are the Hessian times u: forward over reverse, six products of the size of the forward's
per layer, the fewest possible. What a pass leaves for later ones is kept in `self` (forward) or returned (the others).

The output of the first layer, the largest tensor of the network, is never made: its ReLU is evaluated at the patches
that the second layer reads, `relu(Q A)`, where a row of Q holds the pixels below one entry and a 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from implicitlayer.fewshot._batch_norm import EPSILON
from implicitlayer.fewshot._kernels import call, store_signature

Params = dict[str, Tensor]
_masked = torch.ops.aten.threshold_backward  # (g, x, 0): g where x > 0, else 0


def halved(size: int) -> int:
    """Side after a stride of 2 with padding 1."""
    return (size + 1) // 2


def patches(x: Tensor) -> Tensor:
    """The 3x3 patches, stride 2 and padding 1, of `[B, K, S, S, C]`: `[B, K, h, h, 9 C]`, `h = halved(S)`."""
    size, h = x.shape[2], halved(x.shape[2])
    padded = F.pad(x, (0, 0, 1, 2 * h - size, 1, 2 * h - size))
    s = padded.stride()
    rows = padded.as_strided((*x.shape[:2], h, h, 3, 3 * x.shape[4]), (s[0], s[1], 2 * s[2], 2 * s[3], s[2], 1))
    return rows.reshape(*x.shape[:2], h, h, -1)


def fold(g: Tensor, size: int) -> Tensor:
    """The transpose of `patches`: `[B, K, h, h, 9 C]` -> `[B, K, S, S, C]`, every entry added to its pixel."""
    h = g.shape[2]
    parts = g.unflatten(-1, (3, 3, -1)).permute(0, 1, 2, 4, 3, 5, 6)  # [B, K, h, 3, h, 3, C]
    sums = g.new_empty(*g.shape[:2], h + 1, 2, h + 1, 2, g.shape[4] // 9)  # pixel (2 i + a, 2 j + b), one row too many
    sums[:, :, :h, :, :h] = parts[:, :, :, :2, :, :2]
    sums[:, :, :h, :, h, 0] = 0
    sums[:, :, h, 0] = 0
    sums[:, :, :h, :, 1:, 0] += parts[:, :, :, :2, :, 2]
    sums[:, :, 1:, 0, :h] += parts[:, :, :, 2, :, :2]
    sums[:, :, 1:, 0, 1:, 0] += parts[:, :, :, 2, :, 2]
    return sums.flatten(4, 5).flatten(2, 3)[:, :, 1 : 1 + size, 1 : 1 + size]


class _First:
    """Convolution, batch norm and ReLU of the images, read as patches by the next layer: `relu(Q A)`.

    Batch norm is a change of the filters w: with m, S mean and covariance of the image patches and
    r = (wᵀ S w + eps)^(-1/2), the normalised convolution has the filter f w, f = scale r, and the bias
    shift - f wᵀ m. A holds both.
    """

    names = ("conv1.weight", "norm1.weight", "norm1.bias")

    def __init__(self, images: Tensor) -> None:
        below = patches(images.permute(0, 1, 3, 4, 2))
        flat = below.flatten(1, 3)
        self.mean = flat.mean(1, keepdim=True)  # [B, 1, 9 C]
        centred = flat - self.mean
        self.covariance = centred.mT @ centred / flat.shape[1]
        self.h = halved(below.shape[2])
        self.q = patches(F.pad(below, (0, 1), value=1.0)).view(flat.shape[0], -1, flat.shape[2] + 1)

    def forward(self, p: Params) -> Tensor:
        w, scale, shift = (p[name] for name in self.names)
        self.w, self.scale = w.flatten(2), scale
        self.sw = self.w @ self.covariance
        self.r = ((self.sw * self.w).sum(-1) + EPSILON).rsqrt()
        self.f = scale * self.r
        self.values = self._at(self.f.unsqueeze(-1) * self.w, shift).relu_()
        return self.values

    def _at(self, filters: Tensor, shift: Tensor) -> Tensor:
        bias = shift.unsqueeze(-1) - filters @ self.mean.mT
        rows = torch.bmm(self.q, torch.cat([filters, bias], -1).mT)
        return rows.view(rows.shape[0], -1, 9 * rows.shape[2])

    def _to_filters(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents of filters and shift, from that of the values before the ReLU."""
        da = torch.bmm(g.view(g.shape[0], -1, self.w.shape[1]).mT, self.q)
        dshift = da[..., -1]
        return da[..., :-1] - dshift.unsqueeze(-1) * self.mean, dshift

    def backward(self, g: Tensor) -> tuple[list[Tensor], Any]:
        dfilters, dshift = self._to_filters(_masked(g, self.values, 0))
        df = (dfilters * self.w).sum(-1)
        c = df * self.f * self.r.square()  # r changes by -r³ (S w)ᵀ dw
        dw = self.f.unsqueeze(-1) * dfilters - c.unsqueeze(-1) * self.sw
        return [dw, df * self.r, dshift], (dfilters, df, c)

    def tangent(self, u: Params) -> tuple[Tensor, Any]:
        uw, uscale, ushift = (u[name] for name in self.names)
        uw = uw.flatten(2)
        rd = -(self.r**3) * (self.sw * uw).sum(-1)
        fd = uscale * self.r + self.scale * rd
        filters = self.f.unsqueeze(-1) * uw + fd.unsqueeze(-1) * self.w
        values = self._at(filters, ushift)
        return _masked.grad_input(values, self.values, 0, grad_input=values), (uw, uscale, rd, fd)

    def product(self, gd: Tensor, back: Any, along: Any) -> list[Tensor]:
        (dfilters, df, c), (uw, uscale, rd, fd) = back, along
        dfiltersd, dshiftd = self._to_filters(_masked(gd, self.values, 0))
        dfd = (dfiltersd * self.w).sum(-1) + (dfilters * uw).sum(-1)
        r = self.r
        cd = (dfd * self.scale + df * uscale) * r**3 + 3 * df * self.scale * r.square() * rd
        dwd = fd.unsqueeze(-1) * dfilters + self.f.unsqueeze(-1) * dfiltersd
        dwd -= cd.unsqueeze(-1) * self.sw + c.unsqueeze(-1) * (uw @ self.covariance)
        return [dwd, dfd * r + df * rd, dshiftd]


class _Block:
    """Convolution of patches, batch norm, ReLU: `z = P Wᵀ`, `y = (z - m(z)) r`, `relu(scale y + shift)`.

    m(.) is the mean over a task's M pixels, r = (m((z - m(z))²) + eps)^(-1/2), s = scale r, and
    P(v) = v - m(v) - y m(v y) is the projection that batch norm's derivatives share: dz = s P(e) for the masked
    cotangent e. Along a direction: yd = r P(zd), rd = -r² m(zd y), sd = uscale r + scale rd, and
    dzd = sd P(e) + s (ed - m(ed) - yd m(e y) - y m(ed y + e yd)).
    """

    def __init__(self, number: int) -> None:
        self.names = f"conv{number}.weight", f"norm{number}.weight", f"norm{number}.bias"

    def forward(self, p: Params, x: Tensor) -> Tensor:
        w, scale, shift = (p[name] for name in self.names)
        self.p, self.w, self.scale = x, w.flatten(2), scale.unsqueeze(1)
        z = torch.bmm(x, self.w.mT)
        y = z.sub_(z.mean(1, keepdim=True))
        self.r = (y.square().mean(1, keepdim=True) + EPSILON).rsqrt()
        self.y = y.mul_(self.r)
        self.s = self.scale * self.r
        self.values = torch.addcmul(shift.unsqueeze(1), y, self.scale).relu_()
        return self.values

    def backward(self, g: Tensor) -> tuple[Tensor, list[Tensor], Any]:
        e = _masked(g, self.values, 0)
        dshift, dscale = e.sum(1, keepdim=True), (e * self.y).sum(1, keepdim=True)
        me, mey = dshift / e.shape[1], dscale / e.shape[1]
        dz = torch.addcmul(e, self.y, mey, value=-1).sub_(me).mul_(self.s)
        grads = [torch.bmm(dz.mT, self.p), dscale.squeeze(1), dshift.squeeze(1)]
        return torch.bmm(dz, self.w), grads, (e, me, mey, dz)

    def tangent(self, u: Params, xd: Tensor) -> tuple[Tensor, Any]:
        uw, uscale, ushift = (u[name] for name in self.names)
        uw, uscale = uw.flatten(2), uscale.unsqueeze(1)
        zd = torch.bmm(xd, self.w.mT).baddbmm_(self.p, uw.mT)
        mzy = (zd * self.y).mean(1, keepdim=True)
        sd = uscale * self.r - self.s * self.r * mzy
        yd = zd.sub_(zd.mean(1, keepdim=True)).addcmul_(self.y, mzy, value=-1).mul_(self.r)
        values = torch.addcmul(ushift.unsqueeze(1), self.y, uscale).addcmul_(yd, self.scale)
        return _masked(values, self.values, 0), (uw, xd, yd, sd)

    def product(self, gd: Tensor, back: Any, along: Any) -> tuple[Tensor, list[Tensor]]:
        (e, me, mey, dz), (uw, xd, yd, sd) = back, along
        y, s, num = self.y, self.s, e.shape[1]
        ed = _masked(gd, self.values, 0)
        dshiftd, dscaled = ed.sum(1, keepdim=True), (ed * y).addcmul_(e, yd).sum(1, keepdim=True)
        # the coefficients of 1, y, e, ed and yd
        one, of_y = -s * dshiftd / num - sd * me, -s * dscaled / num - sd * mey
        dzd = torch.addcmul(one, y, of_y).addcmul_(e, sd).addcmul_(ed, s).addcmul_(yd, -s * mey)
        dwd = torch.bmm(dzd.mT, self.p).baddbmm_(dz.mT, xd)
        return torch.bmm(dzd, self.w).baddbmm_(dz, uw), [dwd, dscaled.squeeze(1), dshiftd.squeeze(1)]


class Conv4Loss:
    """One evaluation of the losses of B tasks, and its derivatives."""

    def __init__(self, images: Tensor, labels: Tensor, num_ways: int, sides: list[int]) -> None:
        self.first = _First(images)
        self.blocks = [_Block(number) for number in (2, 3, 4)]
        self.sides = sides  # of the inputs of the blocks 3 and 4
        self.num_images = images.shape[1]
        self.target = F.one_hot(labels.long(), num_ways).to(images.dtype)

    def _between(self, x: Tensor, block: int) -> Tensor:
        """The output of a block as the patches that the next one reads."""
        side = self.sides[block]
        return patches(x.view(x.shape[0], self.num_images, side, side, -1)).flatten(1, 3)

    def _back(self, g: Tensor, block: int) -> Tensor:
        h, size = halved(self.sides[block]), self.sides[block]
        return fold(g.view(g.shape[0], self.num_images, h, h, -1), size).reshape(g.shape[0], -1, g.shape[2] // 9)

    def forward(self, p: Params) -> Tensor:
        """Losses [B]."""
        x = self.first.forward(p)
        for i, block in enumerate(self.blocks):
            x = block.forward(p, x)
            if i < 2:
                x = self._between(x, i)
        self.features = x.reshape(x.shape[0], self.num_images, -1)
        self.head = p["head.weight"]
        logits = torch.baddbmm(p["head.bias"].unsqueeze(1), self.features, self.head.mT)
        self.log_p = logits.log_softmax(-1)
        return (self.log_p * self.target).sum((1, 2)) / -self.num_images

    def gradient(self, g: Tensor) -> tuple[list[Tensor], Any]:
        """The gradient of sum(g losses), and what `product` needs of it."""
        prob = self.log_p.exp()
        per_image = g.view(-1, 1, 1) / self.num_images
        dl = (prob - self.target) * per_image
        grads = [torch.bmm(dl.mT, self.features), dl.sum(1)]
        x = torch.bmm(dl, self.head)
        kept: list[Any] = []
        for i in (2, 1, 0):
            x, found, back = self.blocks[i].backward(x.view(self.blocks[i].values.shape))
            grads, kept = found + grads, [back, *kept]
            if i > 0:
                x = self._back(x, i - 1)
        found, back = self.first.backward(x)
        return found + grads, (prob, per_image, dl, kept, back)

    def product(self, u: Params, kept: Any) -> tuple[list[Tensor], Tensor]:
        """The derivative of `gradient` along u in the parameters, and that of the losses [B]."""
        prob, per_image, dl, backs, first = kept
        x, along = self.first.tangent(u)
        alongs = []
        for i, block in enumerate(self.blocks):
            x, found = block.tangent(u, x)
            alongs.append(found)
            if i < 2:
                x = self._between(x, i)
        features = x.reshape(self.features.shape)
        uhead = u["head.weight"]
        ld = torch.baddbmm(u["head.bias"].unsqueeze(1), features, self.head.mT).baddbmm_(self.features, uhead.mT)
        losses = ((prob - self.target) * ld).sum((1, 2)) / self.num_images
        dld = (ld - (prob * ld).sum(-1, keepdim=True)) * prob * per_image
        grads = [torch.bmm(dld.mT, self.features).baddbmm_(dl.mT, features), dld.sum(1)]
        x = torch.bmm(dld, self.head).baddbmm_(dl, uhead)
        for i in (2, 1, 0):
            x, more = self.blocks[i].product(x.view(self.blocks[i].values.shape), backs[i], alongs[i])
            grads = more + grads
            if i > 0:
                x = self._back(x, i - 1)
        return self.first.product(x, first, along) + grads, losses


# NOTE [two Functions]: `_Losses` and `_Gradient`, its backward, make the derivatives above known to autograd: the
# backward of `_Gradient` is a Hessian-vector product. One evaluation belongs to one call of `_Losses`, and what
# `product` needs to one call of `_Gradient`, so nothing is overwritten. Where a product is to be differentiated in its
# turn, it is made anew from plain operations.


class Evaluation:
    """One call: the numbers that its passes leave for each other, and the same loss in plain operations.

    ``names``: of the parameters, in the order in which the Functions get them; ``plain``: losses [B] of a list of
    parameters, by operations that can be differentiated any number of times.
    """

    def __init__(self, loss: Conv4Loss, names: list[str], plain: Callable[..., Tensor]) -> None:
        self.loss, self.names, self.plain = loss, names, plain

    def __call__(self, params: Params) -> Tensor:
        """Losses [B], differentiable in the parameters."""
        return _Losses.apply(self, *(params[name] for name in self.names))  # type: ignore[no-any-return]

    def named(self, tensors: Sequence[Tensor]) -> Params:
        return dict(zip(self.names, tensors, strict=True))


@store_signature
class _Losses(Function):
    @staticmethod
    def forward(evaluation: Evaluation, *params: Tensor) -> Tensor:
        return evaluation.loss.forward(evaluation.named(params))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.evaluation = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, *call(_Gradient, ctx.evaluation, [], g, *ctx.saved_tensors)


@store_signature
class _Gradient(Function):
    """`(g, params) ->` gradient of sum(g losses); ``kept`` is filled with what products need."""

    @staticmethod
    def forward(evaluation: Evaluation, kept: list[Any], g: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
        gradient, needed = evaluation.loss.gradient(g)
        kept.append(needed)
        return tuple(part.view(like.shape) for part, like in zip(gradient, params, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.evaluation, ctx.kept, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *u: Tensor) -> Any:
        evaluation, (g, *params) = ctx.evaluation, ctx.saved_tensors
        if torch.is_grad_enabled():
            pull = torch.func.vjp(lambda g, *p: torch.func.vjp(evaluation.plain, *p)[1](g), g, *params)[1]
            return None, None, *pull(u)
        products, losses = evaluation.loss.product(evaluation.named(u), ctx.kept[0])
        shaped = (part.view(like.shape) for part, like in zip(products, params, strict=True))
        return None, None, losses, *shaped
