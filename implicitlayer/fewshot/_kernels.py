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
