"""What surrounds a call must not leak into the solve: saved-tensor hooks, autocast, readers, inference, compilers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from typing import ParamSpec, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from implicitlayer import _torch

P = ParamSpec("P")
R = TypeVar("R")


_DEVICE_TYPE = attrgetter("device.type")


@contextmanager
def plain_surroundings(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Run the block without saved-tensor hooks and autocast, whatever is active around it.

    The graphs built inside live and die inside: hooks that offload, compress or count saved tensors (activation
    checkpointing) have no business with them, and torch.func refuses to run under such hooks. Autocast would give the
    forward and the backward solve different objectives; the layer works in the dtype of its tensors.
    """
    with ExitStack() as stack:
        for device_type in set(map(_DEVICE_TYPE, tensors)):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        popped = []
        while (pair := _torch.saving_hooks(False)) is not None:
            popped.append(pair)
            _torch.pop_saving_hooks()
        try:
            yield
        finally:
            for pack, unpack in reversed(popped):
                _torch.push_saving_hooks(pack, unpack)


class ReadingMode(TorchFunctionMode):
    """A mode of this library, active while a function of a layer runs: it watches what the function reads."""


@contextmanager
def unread() -> Iterator[None]:
    """Run the block, the solver of a layer, past the modes of a layer whose function it is called in.

    What a solver does is no part of the function around it: it may use NumPy and Python numbers. Modes of others (a
    default device is one) stay.
    """
    if not _torch.num_modes():
        yield
        return
    modes = [_torch.pop_mode() for _ in range(_torch.num_modes())][::-1]
    others = [mode for mode in modes if not isinstance(mode, ReadingMode)]
    for mode in others:
        _torch.push_mode(mode)
    try:
        yield
    finally:
        for _ in others:
            _torch.pop_mode()
        for mode in modes:
            _torch.push_mode(mode)


def saves_by_hooks() -> bool:
    """Whether hooks on saved tensors are active."""
    return _torch.saving_hooks(True) is not None


def out_of_inference(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies that autograd can record of tensors made in inference mode; the others as they are."""
    return [t.clone() if t.is_inference() else t for t in tensors]


def outside_compiled_code(function: Callable[P, R]) -> Callable[P, R]:
    """A graph break around ``function`` in code compiled by torch.compile: solvers are black boxes to it too."""
    uncompiled: Callable[P, R] = _torch.not_compiled(function)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return uncompiled(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def draws_since(tensors: Sequence[torch.Tensor]) -> Callable[[], bool]:
    """Tells whether torch's generators, on the CPU and where ``tensors`` are, have been drawn from since this call."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    generators = [torch.default_generator, *(torch.cuda.default_generators[device.index or 0] for device in devices)]
    before = [generator.get_state() for generator in generators]

    def drawn() -> bool:
        with _torch.without_modes():  # no business of an enclosing finder's
            return not all(torch.equal(a, b.get_state()) for a, b in zip(before, generators, strict=True))

    return drawn
