"""Vectors of which every process holds a part, and operations on them that cannot tell two processes different things.

A solver's vectors are used in two ways: entry by entry, or summed up to numbers that it decides by. The first needs no
other process; the second asks all of them, and every process gets the same bits. Nothing else is possible.
"""

# Legend: [*lead, n]: the shape that is shown, n entries on all processes together; m of them are here, [*lead, m].

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer.base._sharding import of_all

_aten: Any = torch.ops.aten
_NOTHING = ((0, 0),)


@dataclass(frozen=True)
class Cut:
    """How the entries of a vector lie on processes.

    Attributes:
        size: n, entries on all processes.
        counted: ranges of the entries here that sums count here: what several processes hold, one of them counts.
        groups: the process groups over which numbers are collected, one after the other.
        leaves: entries here of every leaf of the unknowns.
    """

    size: int
    counted: tuple[tuple[int, int], ...]
    groups: tuple[Any, ...]
    leaves: tuple[int, ...] = ()

    def collected(self, mine: torch.Tensor, operation: Callable[..., torch.Tensor]) -> torch.Tensor:
        """A reduction of the numbers of all processes, in one order: the same bits everywhere."""
        dtype = mine.dtype
        mine = mine.to(torch.uint8) if dtype is torch.bool else mine.contiguous()
        for group in self.groups:
            mine = operation(of_all(mine, group), [0], False).to(mine.dtype)
        return mine.to(dtype)

    def summed(
        self, of_range: Callable[[int, int], torch.Tensor], operation: Callable[..., torch.Tensor] = torch.sum
    ) -> torch.Tensor:
        """The sum of numbers of ranges of entries here, over all entries that count on all processes."""
        pieces = [of_range(*ends) for ends in self.counted or _NOTHING]
        return self.collected(pieces[0] if len(pieces) == 1 else operation(torch.stack(pieces), [0], False), operation)


class Parts(torch.Tensor):
    """A vector [*lead, n] of which this process holds the entries ``local`` [*lead, m]."""

    local: torch.Tensor
    cut: Cut

    @staticmethod
    def __new__(cls, local: torch.Tensor, cut: Cut) -> Parts:
        made: Parts = _torch.wrapper_of(cls, (*local.shape[:-1], cut.size), local)
        made.local, made.cut = local, cut
        return made

    __torch_function__ = _torch.no_torch_function

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Parts({self.local!r} of {self.cut.size})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        rule = _RULES.get(func.overloadpacket)
        if rule is not None:
            return rule(*args, **(kwargs or {}))
        if torch.Tag.pointwise in func.tags or func.overloadpacket in _BY_ENTRY:
            return _by_entry(func, args, kwargs or {})
        raise _impossible(str(func))


def _impossible(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{what}, on unknowns that lie in parts on several processes: only operations entry by entry, and sums over "
        "all entries, are possible. Set in_parts = False on the solver: it then gets whole vectors."
    )


def numbers(vector: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, ... along the last dimension, a vector [n] like one of ``vector``; in parts of every leaf anew.

    So processes that hold the same entries, all of them a part of one leaf, give them the same numbers.
    """
    inside = _torch.innermost(vector)  # transforms hide it, and wrap what is made
    if not isinstance(inside, Parts):
        return torch.arange(vector.shape[-1], device=vector.device)
    here = [torch.arange(size, device=vector.device) for size in inside.cut.leaves]
    return Parts(_torch.innermost(torch.cat(here)), inside.cut)


def patternless(vector: torch.Tensor) -> torch.Tensor:
    """Entries from 1 to 3, like those of ``vector`` and in no order: the golden angle has no period."""
    return (2.0 + torch.cos(numbers(vector).double() * 2.399963)).to(vector.dtype).expand_as(vector)


def _cut_of(tree: Any) -> Cut:
    return next(leaf.cut for leaf in _torch.pytree.tree_leaves(tree) if isinstance(leaf, Parts))


def _by_entry(func: Any, args: Any, kwargs: Any) -> Any:
    """``func`` on what is here."""
    cut = _cut_of((args, kwargs))

    def here(value: Any) -> Any:
        if isinstance(value, Parts):
            if value.cut is not cut and value.cut != cut:
                raise _impossible(f"{func} of unknowns that are cut in two different ways")
            return value.local
        if isinstance(value, torch.Tensor) and value.ndim and value.shape[-1] != 1:
            if value.shape[-1] != cut.size or value.stride(-1) != 0:
                raise _impossible(f"{func} with a whole tensor {tuple(value.shape)}")
            return value[..., :1]  # a number that was expanded
        return value

    result = func(*_torch.pytree.tree_map(here, args), **_torch.pytree.tree_map(here, kwargs))
    if func._schema.is_mutable:
        return None if result is None else args[0]
    return _torch.pytree.tree_map(lambda t: Parts(t, cut) if isinstance(t, torch.Tensor) else t, result)


def _split(dims: Any, ndim: int) -> tuple[list[int], bool]:
    """The dimensions of a reduction, and whether the last one, which lies in parts, is among them."""
    given = [dims] if isinstance(dims, int) else list(dims or range(ndim))
    found = [dim % ndim for dim in given]
    return found, ndim - 1 in found


def _reduction(operation: Callable[..., torch.Tensor], neutral: float | None = None) -> Callable[..., Any]:
    """A reduction ``operation(values, dims, keepdim)``, which gives the same of what processes have found.

    ``neutral``: what a process without entries finds; None where every entry is to be counted once.
    """

    def reduced(vector: Parts, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        found, over_parts = _split(dims, vector.ndim)
        local = vector.local if dtype is None else vector.local.to(dtype)
        if not over_parts:
            return Parts(operation(local, found, keepdim), vector.cut)
        if neutral is None:
            return vector.cut.summed(lambda a, b: operation(local[..., a:b], found, keepdim), operation)
        if local.shape[-1]:
            mine = operation(local, found, keepdim)
        else:
            value = neutral if local.is_floating_point() else bool(neutral)
            mine = operation(local.new_full((*local.shape[:-1], 1), value), found, keepdim)
        return vector.cut.collected(mine, operation)

    return reduced


def _dot(a: Parts, b: Parts) -> torch.Tensor:
    return a.cut.summed(lambda i, j: torch.dot(a.local[i:j], b.local[i:j]))


def products(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The inner products of all rows of ``a`` [lanes, k, n] and of ``b`` [lanes, m, n]: [lanes, k, m]."""
    if not (isinstance(a, Parts) and isinstance(b, Parts)):
        return torch.bmm(a, b.mT)
    x, y = a.local, b.local
    return a.cut.summed(lambda i, j: torch.bmm(x[..., i:j], y[..., i:j].mT))


def _norm(vector: Parts, order: Any = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    return _reduction(lambda values, dims, keepdim: torch.linalg.vector_norm(values, order, dims, keepdim))(
        vector, dims, keepdim, dtype=dtype
    )


def _shaped(how: str) -> Callable[..., Parts]:
    """``view`` and ``expand``, of the same last dimension."""

    def shaped(vector: Parts, size: Sequence[int], **_: Any) -> Parts:
        local = vector.local
        if size and (size[-1] == vector.cut.size or (size[-1] == -1 and vector.ndim == 1 == len(size))):
            return Parts(getattr(local, how)(*size[:-1], local.shape[-1]), vector.cut)
        raise _impossible(f"a view {tuple(size)} of {tuple(vector.shape)}")

    return shaped


def _selected(vector: Parts, dim: int, index: int) -> Parts:
    found, over_parts = _split(dim, vector.ndim)
    if over_parts:
        raise _impossible("one entry")
    return Parts(vector.local.select(found[0], index), vector.cut)


def _sliced(vector: Parts, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Parts:
    (found,), over_parts = _split([dim], vector.ndim)
    start, end = start or 0, vector.shape[found] if end is None else min(end, vector.shape[found])
    if over_parts and (start, end, step) != (0, vector.cut.size, 1):
        raise _impossible("some entries")
    return Parts(vector.local if over_parts else _aten.slice(vector.local, found, start, end, step), vector.cut)


def _unsqueezed(vector: Parts, dim: int) -> Parts:
    place = dim % (vector.ndim + 1)
    if place == vector.ndim:
        raise _impossible("a dimension behind the last one")
    return Parts(vector.local.unsqueeze(place), vector.cut)


def _joined(tensors: Sequence[Parts], dim: int = 0) -> Parts:
    cut = _cut_of(tensors)
    if _split(dim, tensors[0].ndim)[1]:
        raise _impossible("vectors one behind the other")
    return Parts(torch.cat([t.local for t in tensors], dim), cut)


def _filled(make: str) -> Callable[..., Any]:
    """``new_zeros`` and its relatives: a vector where the last dimension is that of one, else a plain tensor."""

    def filled(vector: Parts, size: Sequence[int], *args: Any, **kwargs: Any) -> torch.Tensor:
        made: Callable[..., torch.Tensor] = getattr(vector.local, make)
        kwargs = {name: value for name, value in kwargs.items() if name in ("dtype", "device")}
        if not size or size[-1] != vector.cut.size:
            return made(size, *args, **kwargs)
        return Parts(made((*size[:-1], vector.local.shape[-1]), *args, **kwargs), vector.cut)

    return filled


_RULES: dict[Any, Callable[..., Any]] = {
    _aten.sum: _reduction(torch.sum),
    _aten.amax: _reduction(torch.amax, -math.inf),
    _aten.amin: _reduction(torch.amin, math.inf),
    _aten.any: _reduction(torch.any, 0.0),
    _aten.all: _reduction(torch.all, 1.0),
    _aten.dot: _dot,
    _aten.vdot: _dot,
    _aten.baddbmm: lambda start, by, rows, **how: Parts(torch.baddbmm(start.local, by, rows.local, **how), start.cut),
    _aten.linalg_vector_norm: _norm,
    _aten.view: _shaped("view"),
    _aten.expand: _shaped("expand"),
    _aten.select: _selected,
    _aten.slice: _sliced,
    _aten.unsqueeze: _unsqueezed,
    _aten.cat: _joined,
    **{getattr(_aten, name): _filled(name) for name in ("new_zeros", "new_ones", "new_full", "new_empty")},
}
_BY_ENTRY = {
    *(_aten.detach, _aten.alias, _aten.clone, _aten._to_copy, _aten.copy_, _aten.fill_, _aten.zero_),
    *(_aten.zeros_like, _aten.ones_like, _aten.full_like, _aten.empty_like),
    *(_aten._foreach_add, _aten._foreach_add_, _aten._foreach_sub, _aten._foreach_sub_, _aten._foreach_mul),
}
