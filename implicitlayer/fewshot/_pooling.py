"""The largest entry of every 2x2 square; see NOTE [layout] in `_kernels`.

# K: images of a task, B: tasks, C: channels, H, W: height and width before, h, w: after

Which entry is the largest is piecewise constant, so with the places known pooling is linear: it picks entries, and its
transpose puts them back among zeros. Each is the other's derivative, to every order. PyTorch's own second derivative
leaves its result in another memory layout, which the operations before it then read slowly: a Hessian-vector product of
the whole network (4 tasks of 5 images of 84 x 84, 32 filters, one core) takes 0.6 x the time with these two.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from implicitlayer.fewshot._kernels import call, from_images, hand_written, store_signature, to_images

_GEOMETRY = ([2, 2], [2, 2], [0, 0], [1, 1], False)  # window, stride, padding, dilation, round up


def max_pool(x: Tensor) -> Tensor:
    """Take the largest entry of every 2x2 square of `[K, H, W, B, C]`, the first of equal ones.

    Gives `[K, H // 2, W // 2, B, C]`: an odd last row or column is left out.
    """
    if hand_written(x):
        return _MaxPool.apply(x)[0]  # type: ignore[no-any-return]
    return from_images(F.max_pool2d(to_images(x), 2), x.shape[3])


@store_signature
class _MaxPool(Function):
    """Returns the place in H·W of each largest entry beside it, `[K, h, w, B, C]`, for the derivatives to use."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pooled, places = F.max_pool2d(to_images(x), 2, return_indices=True)
        return from_images(pooled, x.shape[3]), from_images(places, x.shape[3])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, places = output
        ctx.mark_non_differentiable(places)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(places)
        ctx.size = inputs[0].shape[1:3]

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, _: None) -> Any:
        return None if g is None else call(_PutBack, g, ctx.saved_tensors[0], *ctx.size)


@store_signature
class _PutBack(Function):
    """`[K, H, W, B, C]` with the entries of g at their places and zeros elsewhere."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor, places: Tensor, height: int, width: int) -> Tensor:
        num_tasks = g.shape[3]
        like = g.new_empty(g.shape[0], height, width, *g.shape[3:])  # of the operation's input only the size is read
        put = torch.ops.aten.max_pool2d_with_indices_backward(
            to_images(g), to_images(like), *_GEOMETRY, to_images(places)
        )
        return from_images(put, num_tasks)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, places, *ctx.size = inputs
        ctx.save_for_backward(places)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Any:
        return call(_Pick, u, ctx.saved_tensors[0]), None, None, None


@store_signature
class _Pick(Function):
    """`[K, h, w, B, C]`, the entries of x at the places."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, places: Tensor) -> Tensor:
        picked: Tensor = x.flatten(1, 2).gather(1, places.flatten(1, 2)).unflatten(1, places.shape[1:3])
        return picked

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, places = inputs
        ctx.save_for_backward(places)
        ctx.size = x.shape[1:3]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return call(_PutBack, g, ctx.saved_tensors[0], *ctx.size), None
