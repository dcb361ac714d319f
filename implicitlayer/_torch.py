"""Names of torch that are not public, under names that say what they are for; no other file touches any.

``tests/test_torch_names.py`` checks what the package relies on of each, and says what breaks when torch changes it.
(Attributes of tensors and graph nodes, such as ``_version``, are read where they are needed.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TorchDispatchMode", "pytree"]

_functorch: Any = torch._C._functorch
_autograd: Any = torch._C._autograd
_core: Any = torch._C

# DTensor.to_local and full_tensor, and so modules under parallelize_module, have no second derivative in torch 2.11.
SHARDS_HAVE_SECOND_DERIVATIVES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

# Transforms of torch.func. A tensor inside one is wrapped, once for every level that is active around it.
transforms_active: Callable[[], bool] = _core._are_functorch_transforms_active
is_wrapped: Callable[[torch.Tensor], bool] = _functorch.is_functorch_wrapped_tensor
is_mapped: Callable[[torch.Tensor], bool] = _functorch.is_batchedtensor  # its outermost wrapper is that of vmap
unwrapped: Callable[[torch.Tensor], torch.Tensor] = _functorch.get_unwrapped  # one wrapper less
unwrapped_if_over: Callable[[torch.Tensor], torch.Tensor] = _functorch.unwrap_if_dead  # of a level that has ended
level_of: Callable[[torch.Tensor], int] = _functorch.maybe_get_level  # -1 for a plain tensor
current_level: Callable[[], int | None] = _functorch.maybe_current_level  # of the innermost transform; None outside
# The number of the innermost level of forward mode, by ``torch.func.jvp`` or ``forward_ad.dual_level``; -1 outside.
forward_level: Callable[[], int] = partial(getattr, forward_ad, "_current_level")


def innermost(value: Any) -> Any:
    """What is inside all wrappers of transforms: of a tensor the values of all lanes; of anything else itself."""
    while isinstance(value, torch.Tensor) and not torch.compiler.is_dynamo_compiling() and is_wrapped(value):
        value = unwrapped(value)
    return value


def num_forward_levels() -> int:
    """How many ``torch.func.jvp`` are active, one inside the other."""
    return _num_levels("Jvp")


def num_map_levels() -> int:
    """How many ``torch.vmap`` are active, one inside the other."""
    return _num_levels("Vmap")


def _num_levels(kind: str) -> int:
    stack = _functorch.get_interpreter_stack() or []
    return sum(level.key() == getattr(_functorch.TransformType, kind) for level in stack)


def mapped_over(function: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor) -> torch.Tensor:
    """``torch.vmap(function)(vectors)`` of one tensor, without the reference cycles of its trees."""
    size = vectors.shape[0]
    level = _functorch._vmap_increment_nesting(size, "error")
    _functorch._set_vmap_fallback_warning_enabled(False)  # a loop over lanes is no slower than what it replaces
    try:
        mapped = function(_functorch._add_batch_dim(vectors, 0, level))
        result: torch.Tensor = _functorch._remove_batch_dim(mapped, level, size, 0)
    finally:
        _functorch._set_vmap_fallback_warning_enabled(True)
        _functorch._vmap_decrement_nesting()
    return result


def forward_mode_active() -> bool:
    """Whether forward mode is at work."""
    return forward_level() >= 0


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a dual number."""
    return forward_mode_active() and forward_ad.unpack_dual(tensor).tangent is not None


# The older batching of ``torch.autograd.grad(is_grads_batched=True)``, which custom Functions do not see. The numbers
# are dim and level, and level, size and dim.
is_batched_by_grad: Callable[[torch.Tensor], bool] = _functorch.is_legacy_batchedtensor
add_batch: Callable[[torch.Tensor, int, int], torch.Tensor] = torch._add_batch_dim
remove_batch: Callable[[torch.Tensor, int, int, int], torch.Tensor] = torch._remove_batch_dim


def batch_level() -> int:
    """The number of the innermost level of that batching."""
    level: int = _core._vmapmode_increment_nesting() - 1
    _core._vmapmode_decrement_nesting()
    return level


# Modes of ``torch.overrides``, and hooks on saved tensors: stacks that a layer looks at, or runs without.
without_modes: Callable[[], AbstractContextManager[None]] = _core.DisableTorchFunction
num_modes: Callable[[], int] = _core._len_torch_function_stack
pop_mode: Callable[[], Any] = _core._pop_torch_function_stack
push_mode: Callable[[Any], None] = _core._push_on_torch_function_stack
# The pair of hooks on saved tensors that is on top, None without any; True: also while a compiler traces.
saving_hooks: Callable[[bool], Any] = _autograd._top_saved_tensors_default_hooks
pop_saving_hooks: Callable[[], None] = _autograd._pop_saved_tensors_default_hooks
push_saving_hooks: Callable[[Any, Any], None] = _autograd._push_saved_tensors_default_hooks

# Inside a backward: whether it was asked to keep the graph.
keeps_graph: Callable[[], bool] = _autograd._get_current_graph_task_keep_graph

# A graph break of torch.compile that does not import the compiler by itself.
not_compiled: Callable[[Any], Any] = torch._compile._disable_dynamo

# Classes of tensors that are no memory of their own.
no_torch_function: Any = _core._disabled_torch_function_impl  # operators see them, functions do not


def wrapper_of(kind: type[torch.Tensor], shape: tuple[int, ...], like: torch.Tensor) -> Any:
    """A tensor of class ``kind`` without memory, of the dtype and device of ``like``."""
    make: Any = getattr(torch.Tensor, "_make_wrapper_subclass")  # noqa: B009  torch's annotation has no such name
    return make(kind, shape, dtype=like.dtype, device=like.device)


# One call for a list of tensors.
foreach_add = torch._foreach_add
foreach_add_ = torch._foreach_add_
foreach_sub = torch._foreach_sub
foreach_sub_ = torch._foreach_sub_
foreach_mul = torch._foreach_mul


def while_loop(
    going: Callable[..., torch.Tensor], body: Callable[..., Any], state: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """``while going(*state): state = body(*state)``, which a compiler keeps as a loop; no shape changes.

    The body runs at least once, so it has to leave a finished state as it is. After no round at all the compiler (2.13,
    with its C++ wrapper) gives what came in for what comes out, and its memory to other tensors too: pytorch #146213.
    """
    from torch._higher_order_ops.while_loop import while_loop as loop  # imports the compiler

    first = torch.ones((), dtype=torch.bool, device=state[0].device)
    _, *result = loop(
        lambda first, *state: first | going(*state),
        lambda first, *state: (torch.zeros_like(first), *body(*state)),
        (first, *state),
    )
    return tuple(result)


def kept_loops() -> dict[str, Any]:
    """Options of the compiler with which the next process finds on disk what it has made of a :func:`while_loop`.

    It keeps only what is marked as safe to keep, and no loop is. The key of what is kept holds the code of the graph
    with that of the loops' bodies, and with this mark the version of torch.
    """
    from torch._inductor import config

    mark = "unsafe_marked_cacheable_functions"
    return {mark: {"torch.ops.higher_order.while_loop": torch.__version__}} if hasattr(config, mark) else {}


@cache
def _state_of_a_new_thread() -> tuple[Any, Any]:
    with ThreadPoolExecutor(1) as pool:
        included = pool.submit(_core._dispatch_tls_local_include_set).result()
        return included, pool.submit(_core._dispatch_tls_local_exclude_set).result()


@contextmanager
def as_in_a_new_thread() -> Iterator[None]:
    """Inside of an operator: with the state of dispatch of a thread that has just begun."""
    with _core._ForceDispatchKeyGuard(*_state_of_a_new_thread()), torch.enable_grad():
        yield


def compiler_errors() -> tuple[type[Exception], ...]:
    """What ``torch.compile`` raises where it cannot follow a function; asked for when an exception is there."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException, AssertionError)  # the latter for NumPy's arrays inside of a loop (2.13)


def inductor() -> Callable[..., Any]:
    """The compiler behind ``torch.compile``: ``(graph, inputs, config_patches=options) -> function``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its own, of torch 2.13
        from torch._inductor.compile_fx import compile_fx

    return compile_fx
