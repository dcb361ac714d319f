"""Closed-over tensors: found by running the function once, then fed back as explicit arguments."""

# A tensor that an objective reads from its closure, a global or a module would get no gradient: the Function behind
# the layer sees only its arguments. One pass under a TorchFunctionMode sees every tensor that enters an operation;
# what is neither an argument nor made inside comes from outside. Those that need a derivative become extra theta, and
# a second mode swaps their values in wherever the function is run.

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from implicitlayer._errors import ClosureError


def needs_derivative(tensor: torch.Tensor) -> bool:
    """Whether a derivative with respect to ``tensor`` may be asked for, or a transform has wrapped it."""
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def find_closed_over(
    function: Callable[..., Any], args: Sequence[Any], known: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Tensors that ``function(*args)`` reads from outside and that need a derivative, in order of first use."""
    finder = _Finder(known)
    with torch.no_grad(), finder:
        function(*args)
    return [tensor for tensor in finder.outside if _worth_passing(tensor)]


def substitute(
    function: Callable[..., Any], originals: Sequence[torch.Tensor], values: Sequence[torch.Tensor], args: Sequence[Any]
) -> Any:
    """``function(*args)`` with every read of ``originals[i]`` answered by ``values[i]``."""
    with _Substitute(originals, values):
        return function(*args)


def refuse_hidden_leaves(output: torch.Tensor, allowed: Sequence[torch.Tensor], describe: Callable[[Any], str]) -> None:
    """Raise if the graph of ``output`` ends in a leaf that is not ``allowed``.

    Catches what the mode cannot see: a tensor handed straight to a custom autograd Function or an extension.
    """
    if output.grad_fn is None:
        return
    allowed_ids = {id(tensor) for tensor in allowed}
    stack, seen = [output.grad_fn], {output.grad_fn}
    while stack:
        node = stack.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in allowed_ids:
            raise ClosureError(
                f"the objective reads {describe(leaf)}, which requires a gradient, through code that torch functions "
                "do not see (a custom autograd.Function or an extension). Pass it to the layer as one more theta."
            )
        for child, _ in node.next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)


def announce(tensor: Any) -> Any:
    """Let an enclosing finder see ``tensor``: our own Functions take tensors past every TorchFunctionMode."""
    if isinstance(tensor, torch.Tensor) and torch._C._len_torch_function_stack() > 0:
        return tensor.view_as(tensor)
    return tensor


def _worth_passing(tensor: torch.Tensor) -> bool:
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return tensor.is_floating_point() and needs_derivative_in_grad_mode(tensor)


def needs_derivative_in_grad_mode(tensor: torch.Tensor) -> bool:
    return tensor.requires_grad or (
        forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
    )


def _tensors_in(value: Any, found: list[torch.Tensor]) -> None:
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _tensors_in(item, found)
    elif isinstance(value, dict):
        for item in value.values():
            _tensors_in(item, found)


class _Finder(TorchFunctionMode):
    """Collects tensors that enter an operation without being known; keeps all alive, so that ids stay unique."""

    def __init__(self, known: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.known = {id(tensor): tensor for tensor in known}
        self.outside: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        entering: list[torch.Tensor] = []
        _tensors_in(args, entering)
        if kwargs:
            _tensors_in(kwargs, entering)
        for tensor in entering:
            if id(tensor) not in self.known:
                self.known[id(tensor)] = tensor
                self.outside.append(tensor)
        result = func(*args, **(kwargs or {}))
        leaving: list[torch.Tensor] = []
        _tensors_in(result, leaving)
        for tensor in leaving:
            self.known.setdefault(id(tensor), tensor)
        return result


class _Substitute(TorchFunctionMode):
    def __init__(self, originals: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.values = {id(old): new for old, new in zip(originals, values, strict=True)}

    def swap(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.values.get(id(value), value)
        if isinstance(value, (list, tuple)):
            items = [self.swap(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {key: self.swap(item) for key, item in value.items()}
        return value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*self.swap(args), **(self.swap(kwargs) if kwargs else {}))
