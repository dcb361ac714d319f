"""Python numbers and NumPy arrays that a function takes out of x and theta: no gradient flows through them."""

# NOTE [numbers]: .item() takes a number out of a tensor, and no gradient flows through it. A number for a log is
# harmless. So the function is run again with such numbers changed a little: where its value changes, it uses them. At
# init that may not show (x = 0 hides a strength, a point of a set hides its borders): it is tried near and far as well.

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer._errors import ClosureError
from implicitlayer.base._tree import flatten
from implicitlayer.equation._state import Sources

_SHIFT = 2.0**-7
_MOVES = 0.0, 0.0625, 10.0, -10.0, 1e3, -1e3  # beyond what a set holds, near enough for what a regulariser takes away
_ROUNDINGS = 1e3  # in units of eps: changes of the value below this are rounding


def _shifted(value: Any, shift: float) -> Any:
    """Numbers changed by a part ``shift`` of their size; zero stays zero where it is negative, which is for x."""
    if isinstance(value, list):
        return [_shifted(item, shift) for item in value]
    return value + shift * (value if value or shift < 0 else 1.0) if isinstance(value, float) and shift else value


# What takes a Python number out of a tensor; asked with a relative shift.
NUMBERS: dict[Any, Callable[[torch.Tensor, float], Any]] = {
    torch.Tensor.item: lambda tensor, shift: _shifted(tensor.item(), shift),
    torch.Tensor.tolist: lambda tensor, shift: _shifted(tensor.tolist(), shift),
    torch.Tensor.__float__: lambda tensor, shift: _shifted(float(tensor), shift),
}
NUMPY: set[Any] = {torch.Tensor.numpy, torch.Tensor.__array__}


def moved(x: torch.Tensor, far: float) -> torch.Tensor:
    """x + far (1 + |x|), by another factor between 3/4 and 5/4 in every entry."""
    factors = 1 + 0.25 * torch.arange(x.numel(), dtype=x.dtype, device=x.device).cos().reshape(x.shape)
    return x.detach() + far * factors * (1 + x.detach().abs())


def refuse_numbers(sources: Sources, bits: int, run: Callable[[float, float], tuple[Any, Any]]) -> None:
    """Raise if the function depends on Python numbers that it took out of x or theta; see NOTE [numbers].

    ``run(shift, move)``: what it reads and its value, with numbers changed by ``shift``, at ``move`` from x.
    """
    if not any(_depends_on_numbers(run, move, bits) for move in _MOVES):
        return
    raise ClosureError(
        f"the objective takes a Python number out of {sources.name(bits)} (by .item(), float() or .tolist()) and "
        "computes with it: no gradient flows through a number. Compute with the tensor itself; if it is meant to be a "
        "constant here, say so by .detach()."
    )


def _depends_on_numbers(run: Callable[[float, float], tuple[Any, Any]], move: float, bits: int) -> bool:
    try:
        finder, value = run(0.0, move)
        shifted, other = run(_SHIFT, move)
        expected = finder.numbers if move else bits  # at x the first run has taken these
        if shifted.numbers == expected and not _differ(value, other):
            return False
        # of a random function nothing is known
        return shifted.numbers != expected or not _differ(value, run(0.0, move)[1])
    except Exception:
        if move:  # it need not be defined there
            return False
        raise


def inside_a_function(begin: Callable[..., Any]) -> bool:
    """Whether ``begin`` has called the forward of an autograd.Function, which says itself what its derivative is."""
    kinds: list[Any] = torch.autograd.Function.__subclasses__()
    for kind in kinds:  # which grows
        kinds += kind.__subclasses__()
    forwards = {getattr(kind.forward, "__code__", None) for kind in kinds}
    frame = sys._getframe(1)
    while frame.f_code not in forwards:
        if frame.f_code is begin.__code__ or frame.f_back is None:
            return False
        frame = frame.f_back
    return True


def refuse_numpy(tensor: torch.Tensor) -> ClosureError:
    """The error of a function that hands what it made of its arguments to NumPy."""
    return ClosureError(
        f"the objective hands a tensor of shape {tuple(tensor.shape)}, which it made of x or theta, to NumPy: what "
        "NumPy computes has no derivative (nor has .detach().numpy()). Write the objective in torch operations (torch "
        "has most of NumPy's functions); only the solver may use NumPy."
    )


def _differ(value: Any, other: Any) -> bool:
    for a, b in zip(flatten(value)[0], flatten(other)[0], strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            a, b = _torch.innermost(a).detach(), _torch.innermost(b).detach()
            if bool(((a - b).abs() > _ROUNDINGS * torch.finfo(a.dtype).eps * a.abs()).any()):
                return True
    return False
