"""Where to compute, and with which precision: TF32 stays off unless it was asked for and its error is small."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from implicitlayer import ImplicitLayerError
from implicitlayer.meta import as_support_query, iMAML


class PrecisionError(ImplicitLayerError, RuntimeError):
    """TF32 changes the meta-gradient by more than the stated tolerance."""


def pick_device(name: str) -> torch.device:
    """The device of this name, or an error that says why there is none.

    Args:
        name: ``"cpu"``, ``"cuda"`` (the first GPU) or ``"cuda:1"``.

    Raises:
        ValueError: another kind of device, or one that torch does not see here.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"run.device={name!r} must be cpu, cuda or cuda:<number>.")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(
            f"run.device={name!r}: torch {torch.__version__} sees no GPU here. Take --run.device cpu, or install a "
            "CUDA build of torch and check the driver with nvidia-smi."
        )
    device = torch.device("cuda", device.index or 0)
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise ValueError(f"run.device={name!r}: there are {count} GPUs, numbered from 0.")
    torch.cuda.set_device(device)
    return device


def set_tf32(allowed: bool) -> None:
    """Allow matrix products with 10-bit mantissas on CUDA, or forbid them (torch allows them in convolutions)."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def tf32_difference(trainer: Any, switch: Callable[[bool], None] = set_tf32) -> float:
    """Relative Euclidean difference of one meta-gradient with and without TF32; TF32 is off afterwards.

    Args:
        trainer: at its start; its sampler does not move on, and theta keeps no gradient.
        switch: allows TF32 or forbids it.
    """
    state = trainer.sampler.state_dict()
    support, query = as_support_query(trainer.sampler.sample(min(4, trainer.tasks_per_step)))
    trainer.sampler.load_state_dict(state)
    leaves = list(trainer.theta.values())
    method = trainer.method
    if isinstance(method, iMAML):  # what was recorded with TF32 would be replayed with TF32
        method = dataclasses.replace(method, capture=False)
    gradients = []
    try:
        for allowed in (True, False):
            switch(allowed)
            losses = method(trainer.theta, support, query)
            gradient = torch.autograd.grad(losses.mean(), leaves)
            gradients.append(torch.cat([part.flatten().double() for part in gradient]))
    finally:
        switch(False)
    return float((gradients[0] - gradients[1]).norm() / gradients[1].norm())


def allow_tf32(trainer: Any, tolerance: float, switch: Callable[[bool], None] = set_tf32) -> float:
    """Switch TF32 on if it changes a meta-gradient by at most ``tolerance``; the difference, relative.

    Raises:
        PrecisionError: it changes more than that. TF32 is off then.
    """
    difference = tf32_difference(trainer, switch)
    if not difference <= tolerance:
        raise PrecisionError(
            f"TF32 changes the meta-gradient by {difference:.1e} (relative), more than run.tf32_tolerance="
            f"{tolerance:g}. Leave --run.tf32 out, or raise the tolerance knowing what it means."
        )
    switch(True)
    return difference
