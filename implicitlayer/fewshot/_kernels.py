"""What the hand-written operations of the few-shot networks share: when they run, and how cheaply.

# K: images of a task, B: tasks, C: channels in, F: channels out, H, W: height and width before, h, w: after

NOTE [layout]
Activations are `[K, H, W, B, C]` and filters `[B, F, 3, 3, C]`. Seen as `[K, B·C, H, W]` and `[B·F, C, 3, 3]` both are
channels-last memory, so a batch of tasks is one grouped channels-last convolution and no layout is ever converted.

NOTE [hand-written derivatives]
A meta-gradient spends a third of its time in Hessian-vector products, the derivative of the gradient. PyTorch
differentiates `convolution_backward` through transposed copies, group by group, and batch norm's backward through some
thirty elementwise operations. Written by hand, a product is six convolutions of the forward's size, the least possible,
and three sums and seven passes for batch norm and ReLU. For 4 to 16 tasks of 5 images (64 filters, one core), against
plain operations in the same layout: product 0.7 x, gradient the same.

NOTE [orders and modes]
Reverse mode of any order, `torch.func.grad` and `vjp`, and `vmap` around them run on Functions. These have no `jvp`
rule on purpose: PyTorch silently returns zeros for forward-over-forward derivatives of Functions that have one. Where
forward mode is on, plain operations are used instead.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from implicitlayer import _torch

SUMMED = (0, 1, 2)  # the axes K, H, W: batch statistics belong to one task and one channel

AnyFunction = TypeVar("AnyFunction", bound=type[Function])


def hand_written(x: Tensor) -> bool:
    """Whether Functions run rather than plain operations: on the CPU, outside forward mode; NOTE [orders and modes]."""
    return x.device.type == "cpu" and not _torch.forward_mode_active()


def mapped(tensor: Tensor) -> bool:
    """Whether ``tensor`` stands for many under `torch.func.vmap`."""
    while _torch.is_wrapped(tensor):
        if _torch.is_mapped(tensor):
            return True
        tensor = _torch.unwrapped(tensor)
    return False


def needs_plain_operations(data: Tensor) -> bool:
    """Whether data of a task is differentiated or transformed, or of no fixed precision."""
    wrapped = _torch.is_wrapped(data)
    return data.requires_grad or wrapped or torch.is_autocast_enabled("cpu")


def call(function: type[Function], *args: Any) -> Any:
    """Apply a Function inside another's backward; where nothing is recorded its forward alone, which saves 30 µs."""
    return function.apply(*args) if torch.is_grad_enabled() else function.forward(*args)


def store_signature(function: AnyFunction) -> AnyFunction:
    """Spare `Function.apply` the inspection of the signature of `forward` at every call, 40 µs."""
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]
    return function


def to_images(x: Tensor) -> Tensor:
    """View `[K, H, W, B, C]` as `[K, B·C, H, W]`."""
    return x.flatten(3).permute(0, 3, 1, 2)


def from_images(x: Tensor, num_tasks: int) -> Tensor:
    """View `[K, B·C, H, W]` as `[K, H, W, B, C]`."""
    tasks_last: Tensor = x.permute(0, 2, 3, 1).unflatten(3, (num_tasks, -1))
    return tasks_last


@functools.cache
def keep_freed_memory() -> None:
    """Let glibc's allocator reuse memory from one gradient to the next; does nothing with other allocators.

    Freeing one large block raises glibc's thresholds for the rest of the process (mallopt(3), M_MMAP_THRESHOLD), so
    that up to 64 MiB of freed memory stay. Otherwise they go back to the kernel, and every gradient of the network
    takes 900 to 5,000 page faults: a quarter of its time.
    """
    torch.empty(31 * 2**20, dtype=torch.uint8, device="cpu")


# The 3x3 convolution with separate filters for every task.
#
# With y = x * w and a cotangent g, the gradients are bilinear too: dx = g ⊛ w and dw = g ⋆ x. Given cotangents (u, v)
# of (dx, dw), the scalar <u, g ⊛ w> + <v, g ⋆ x> = <g, u * w + x * v> has the gradients
#
#     to g: u * w + x * v        to x: g ⊛ v        to w: g ⋆ u
#
# which are the same three operations again, whatever the stride: every order of derivative follows from two Functions.

_OF_CONVOLUTION = ([1, 1], [1, 1], False, [0, 0])  # after the stride: padding, dilation, transposed, output padding


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
        y = torch.convolution(to_images(x), _filters(weight), flat_bias, [stride] * 2, *_OF_CONVOLUTION, x.shape[3])
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
            to_images(g), to_images(x), _filters(weight), None, [stride] * 2, *_OF_CONVOLUTION, num_tasks, needed
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


# The largest entry of every 2x2 square.
#
# Which entry is the largest is piecewise constant, so with the places known pooling is linear: it picks entries, and
# its transpose puts them back among zeros. Each is the other's derivative, to every order. PyTorch's own second
# derivative leaves its result in another memory layout, which the operations before it then read slowly: a Hessian-
# vector product of the whole network (4 tasks of 5 images of 84 x 84, 32 filters, one core) takes 0.6 x the time with
# these two.

_OF_POOLING = ([2, 2], [2, 2], [0, 0], [1, 1], False)  # window, stride, padding, dilation, round up


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
            to_images(g), to_images(like), *_OF_POOLING, to_images(places)
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
