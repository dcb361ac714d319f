"""A compiled layer inside ``torch.compile(..., fullgraph=True)``: two operators of our own."""

# An operator takes tensors, numbers and text, so a layer has a number, and the structure of its arguments is a text. It
# runs below autograd, where nothing can be differentiated and no compiled code is found again: its body is run in the
# state of dispatch of a thread that has just begun.

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from implicitlayer._torch import as_in_a_new_thread, pytree
from implicitlayer.base._tree import flatten
from implicitlayer.base._types import Leaves
from implicitlayer.compiled._program import NUM_MEASURED
from implicitlayer.equation._state import changed_since

if TYPE_CHECKING:
    from implicitlayer.compiled._layer import Call, CompiledLayer

_NUMBERS = itertools.count()
_LAYERS: weakref.WeakValueDictionary[int, CompiledLayer] = weakref.WeakValueDictionary()


def number_of(layer: CompiledLayer) -> int:
    """A number by which operators find the layer."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return number


def call_in_graph(layer: CompiledLayer, init: Any, theta: Sequence[Any]) -> Any:
    """The layer's answer, as code that the compiler traces."""
    x: Leaves = []
    tensors: Leaves = []
    form = "[" + _described(init, x) + "," + _described(list(theta), tensors) + "]"
    needed = "".join(["1" if t.requires_grad and torch.is_grad_enabled() else "0" for t in tensors])
    found = torch.ops.implicitlayer.solve(x, tensors, layer.number, form, needed)
    leaves = list(found[: len(x)])
    return pytree.tree_map_only(torch.Tensor, lambda _: leaves.pop(0), init)


def _described(tree: Any, tensors: Leaves) -> str:
    """``tree`` as JSON, its tensors put into the list."""
    if isinstance(tree, torch.Tensor):
        tensors.append(tree)
        return '"t"'
    if isinstance(tree, dict):
        return "{" + ",".join([f'"{key}":' + _described(value, tensors) for key, value in tree.items()]) + "}"
    if isinstance(tree, tuple | list):
        kind = '["tuple",' if isinstance(tree, tuple) else '["list",'
        return kind + ",".join([_described(part, tensors) for part in tree]) + "]"
    if isinstance(tree, int | float):
        return repr(tree).lower()  # as JSON has True and False
    raise TypeError(
        f"inside torch.compile a compiled layer takes tensors, numbers, and dicts, lists and tuples of them: got "
        f"{type(tree).__name__}."
    )


def _parsed(form: Any, tensors: Leaves) -> Any:
    """The inverse of :func:`_described`."""
    if form == "t":
        return tensors.pop(0)
    if isinstance(form, dict):
        return {key: _parsed(value, tensors) for key, value in form.items()}
    if isinstance(form, list):
        parts = [_parsed(part, tensors) for part in form[1:]]
        return tuple(parts) if form[0] == "tuple" else parts
    return form


def _prepared(number: int, form: str, needed: str, init: Leaves, theta: Leaves) -> tuple[Call, Leaves]:
    """The call, and theta with what requires a gradient."""
    from implicitlayer.compiled._layer import Call

    layer = _LAYERS[number]
    wanted = [flag == "1" for flag in needed]
    marked = [t.detach().requires_grad_(need) for t, need in zip(theta, wanted, strict=True)]
    init_form, theta_form = json.loads(form)
    x_tree, args = _parsed(init_form, list(init)), tuple(_parsed(theta_form, list(marked)))
    program, slots = layer.prepared(x_tree, args, wanted)
    return Call(layer.layer, program, flatten(x_tree)[1], slots, len(init)), marked


@torch.library.custom_op("implicitlayer::solve", mutates_args=())
def _solve(
    init: Sequence[torch.Tensor], theta: Sequence[torch.Tensor], number: int, form: str, needed: str
) -> list[torch.Tensor]:
    x, tensors = list(init), list(theta)
    with as_in_a_new_thread():
        call, marked = _prepared(number, form, needed, x, tensors)
        found = call.solve(x, tensors, partial(call.judged, x, marked))
    return [*(t.clone() for t in found), torch.tensor(call.program.num_changes())]


@_solve.register_fake
def _(init: Any, theta: Any, number: int, form: str, needed: str) -> list[torch.Tensor]:
    lanes = init[0].shape[: _LAYERS[number].layer.batch_dims]
    measured = init[0].new_empty((NUM_MEASURED, *lanes), dtype=torch.float64)
    return [*(torch.empty_like(t) for t in init), measured, torch.empty((), dtype=torch.int64)]


@torch.library.custom_op("implicitlayer::pull", mutates_args=())
def _pull(
    x: Sequence[torch.Tensor],
    init: Sequence[torch.Tensor],
    theta: Sequence[torch.Tensor],
    cotangent: Sequence[torch.Tensor],
    measured: Sequence[torch.Tensor],
    number: int,
    form: str,
    needed: str,
) -> list[torch.Tensor]:
    at, v = list(x), list(cotangent)
    with as_in_a_new_thread():
        call, marked = _prepared(number, form, needed, list(init), list(theta))
        if call.program.num_changes() != int(measured[1]):
            raise changed_since("a tensor that the objective closes over was changed in place")
        found = call.pull(at, list(theta), v, measured[0]) or call.pull_by_layer(at, list(init), marked, v, False)
    return [t.clone() for t in found]


@_pull.register_fake
def _(x: Any, init: Any, theta: Any, cotangent: Any, measured: Any, number: int, form: str, needed: str) -> Any:
    return [torch.empty_like(t) for t, need in zip(theta, needed, strict=True) if need == "1"]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    init, theta, ctx.number, ctx.form, ctx.needed = inputs
    ctx.num_x, ctx.num_theta = len(init), len(theta)
    ctx.save_for_backward(*init, *theta, *output)


def _backward(ctx: Any, grads: Any) -> tuple[Any, ...]:
    k, m = ctx.num_x, ctx.num_theta
    saved = list(ctx.saved_tensors)
    init, theta, x = saved[:k], saved[k : k + m], saved[k + m : 2 * k + m]
    v = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads[:k], x, strict=True)]
    found = iter(torch.ops.implicitlayer.pull(x, init, theta, v, saved[-2:], ctx.number, ctx.form, ctx.needed))
    return [None] * k, [next(found) if need == "1" else None for need in ctx.needed], None, None, None


_solve.register_autograd(_backward, setup_context=_setup)


@_solve.register_vmap
def _(info: Any, in_dims: Any, init: Any, theta: Any, number: int, form: str, needed: str) -> Any:
    def lane(tensors: Any, dims: Any, index: int) -> list[torch.Tensor]:
        return [t if dim is None else t.select(dim, index) for t, dim in zip(tensors, dims, strict=True)]

    answers = [
        torch.ops.implicitlayer.solve(lane(init, in_dims[0], i), lane(theta, in_dims[1], i), number, form, needed)
        for i in range(info.batch_size)
    ]
    stacked = [torch.stack(leaves) for leaves in zip(*answers, strict=True)]
    return stacked, [0] * len(stacked)
