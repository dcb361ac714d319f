"""Pytrees: flattening, names of leaves, matching an answer to the unknowns; and copies of functions of the user's."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
import torch

from implicitlayer import _torch
from implicitlayer._errors import ObjectiveError
from implicitlayer._torch import pytree
from implicitlayer.base._types import Leaves

TreeSpec = pytree.TreeSpec
_LEAF: TreeSpec = pytree.tree_flatten(0)[1]
_KIND = attrgetter("__class__", "dtype", "device")


def flatten(tree: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves of ``tree`` and its structure; a bare tensor, the commonest tree, takes no walk."""
    if isinstance(tree, torch.Tensor):
        return [tree], _LEAF
    leaves: list[Any] = []
    return leaves, _walk(tree, leaves)


def _walk(tree: Any, leaves: list[Any]) -> TreeSpec:
    # torch's own walk is a closure that calls itself: every call leaves a cycle, which only the garbage collector frees
    kind = pytree._get_node_type(tree)
    if kind not in pytree.SUPPORTED_NODES:
        leaves.append(tree)
        return _LEAF
    children, context = pytree.SUPPORTED_NODES[kind].flatten_fn(tree)
    specs = []
    for child in children:
        if isinstance(child, torch.Tensor):
            leaves.append(child)
            specs.append(_LEAF)
        else:
            specs.append(_walk(child, leaves))
    return TreeSpec(kind, context, specs)


def unflatten(leaves: Sequence[Any], spec: TreeSpec) -> Any:
    """Inverse of :func:`flatten`."""
    return leaves[0] if spec is _LEAF else pytree.tree_unflatten(list(leaves), spec)


def tree_map(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """``tree`` with ``function`` of every leaf, and of what the others have in its place."""
    leaves, spec = flatten(tree)
    rows = [leaves, *([other] if spec is _LEAF else spec.flatten_up_to(other) for other in others)]
    return unflatten([function(*row) for row in zip(*rows, strict=True)], spec)


def is_data(leaf: Any) -> bool:
    """Whether ``leaf`` is a tensor that layers differentiate and carry by its entries; a sparse one is an object."""
    return isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided


def places_of_data(leaves: Sequence[Any]) -> list[int]:
    """Where in ``leaves`` such tensors are."""
    return [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided]


def flatten_with_names(tree: Any, root: str) -> tuple[list[Any], list[str]]:
    """Leaves of ``tree`` and a readable name for each, such as ``x['weight'][0]``."""
    if isinstance(tree, torch.Tensor):
        return [tree], [root]
    try:
        pairs = list(pytree._generate_key_paths((), tree))
    except ValueError:  # a class that was registered without names of its parts (flatten_with_keys_fn)
        leaves, spec = flatten(tree)
        return leaves, [f"{root or spec}[{i}]" for i in range(len(leaves))]
    return [leaf for _, leaf in pairs], [root + pytree.keystr(path) for path, _ in pairs]


def leaves_in_order(tree: Any, like: Any) -> list[Any] | None:
    """Leaves of ``tree`` in the order of those of ``like``: keys of dictionaries may come in another one.

    None if the structures differ in more than that.
    """
    leaves, spec = flatten(tree)
    wanted_spec = flatten(like)[1]
    if spec is wanted_spec or spec == wanted_spec:
        return leaves
    leaves, names = flatten_with_names(tree, "")
    wanted = flatten_with_names(like, "")[1]
    if sorted(names) != sorted(wanted):
        return None
    by_name = dict(zip(names, leaves, strict=True))
    return [by_name[key] for key in wanted]


def leaves_like(tree: Any, like: Any, rule: str) -> list[Any]:
    """The same, or an error that begins with ``rule``: what must have which structure."""
    leaves = leaves_in_order(tree, like)
    if leaves is None:
        raise ValueError(f"{rule}: expected {flatten(like)[1]}, got {flatten(tree)[1]}.")
    return leaves


def like_x(
    value: Any, x: Sequence[Any], x_spec: TreeSpec, what: str = "the residual must return one equation per unknown"
) -> Leaves:
    """Leaves of a residual, checked to be one equation per unknown; of something else that an error calls ``what``."""
    leaves = leaves_in_order(value, unflatten(x, x_spec))
    fits = [isinstance(a, torch.Tensor) and a.shape == b.shape for a, b in zip(leaves or (), x, strict=False)]
    if leaves is None or not all(fits):
        found = flatten(value)[0] if leaves is None else leaves
        shapes = [tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in found]
        raise ObjectiveError(
            f"{what}, in the structure of x: expected shapes {[tuple(t.shape) for t in x]}, got {shapes}."
        )
    if any(leaf.is_complex() for leaf in leaves):
        raise ObjectiveError(f"{what}, which is real, got a complex one. Stack its parts with torch.view_as_real.")
    return list(leaves)


def lane_reduce(values: torch.Tensor, lane_dims: int) -> torch.Tensor:
    """Sum of all but the first ``lane_dims`` dimensions; works for 0-d and empty tensors."""
    if lane_dims == 0:
        return values.sum()
    # not flattened: torch does not flatten what is cut unevenly
    return values.sum(tuple(range(lane_dims, values.ndim))) if values.ndim > lane_dims else values


def ravel(leaves: Sequence[torch.Tensor], lane_dims: int) -> torch.Tensor:
    """Leaves of shape [*lanes, ...] as one tensor [*lanes, n]; n counts elements. No leaves give n = 0."""
    first, lanes = leaves[0], leaves[0].shape[:lane_dims]
    if len(leaves) == 1:
        return first if first.ndim == lane_dims + 1 else first.reshape(*lanes, first.shape[lane_dims:].numel())
    flat = [t if t.ndim == lane_dims + 1 else t.reshape(*lanes, t.shape[lane_dims:].numel()) for t in leaves]
    return torch.cat(flat, -1)


def unravel(flat: torch.Tensor, like: Sequence[torch.Tensor], lane_dims: int) -> list[torch.Tensor]:
    """Inverse of :func:`ravel`, cast back to each leaf's dtype."""
    parts: Sequence[torch.Tensor] = [flat]
    if len(like) > 1:
        parts = torch.split(flat, [leaf.shape[lane_dims:].numel() for leaf in like], -1)
    lanes, found = flat.shape[:-1], []
    for part, leaf in zip(parts, like, strict=True):
        if leaf.ndim != lane_dims + 1:
            part = part.reshape((*lanes, *leaf.shape[lane_dims:]))
        found.append(part if part.dtype is leaf.dtype else part.to(leaf.dtype))
    return found


# NOTE [one vector]: torch.autograd.grad looks at every input, output and cotangent by itself, which for a thousand
# leaves costs more than the derivative. Where all are pieces of one vector, cut by one node, there is one of each. With
# v the vector and P v its pieces, f(P v) has the gradient P' f'(P v), and P' puts pieces together: P and P' are each
# other's transposes, so each Function below is the backward of the other one, to any order. They are those of any
# object with the methods ``leaves(vector)`` and ``flat(leaves)``, as :class:`Pieces`.


class LeavesOf(torch.autograd.Function):
    """``apply(vector, of, checks) -> leaves``; ``checks``: whether ``of`` is to compare the gradient."""

    @staticmethod
    def forward(flat: torch.Tensor, of: Any, checks: bool) -> tuple[torch.Tensor, ...]:
        return tuple(of.leaves(flat.detach()))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        flat, ctx.of, ctx.checks = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(flat)

    @staticmethod
    def backward(ctx: Any, *cotangents: torch.Tensor | None) -> tuple[Any, ...]:
        if all(cotangent is None for cotangent in cotangents):
            return None, None, None
        if any(cotangent is None for cotangent in cotangents):
            zeros = LeavesOf.apply(torch.zeros_like(*ctx.saved_tensors), ctx.of, False)
            cotangents = tuple([z if c is None else c for c, z in zip(cotangents, zeros, strict=True)])
        if ctx.checks:
            ctx.of.compare_copies("gradient", cotangents)
        recorded = torch.is_grad_enabled()
        return FlatOf.apply(ctx.of, *cotangents) if recorded else ctx.of.flat(cotangents), None, None


class FlatOf(torch.autograd.Function):
    """``apply(of, *leaves) -> vector``."""

    @staticmethod
    def forward(of: Any, *leaves: torch.Tensor) -> torch.Tensor:
        flat: torch.Tensor = of.flat([leaf.detach() for leaf in leaves])
        return flat

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.of, ctx.count = inputs[0], len(inputs) - 1
        ctx.set_materialize_grads(False)  # torch's zeros would not be cut as DTensors are

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor | None) -> tuple[Any, ...]:
        if cotangent is None:
            return None, *[None] * ctx.count
        recorded = torch.is_grad_enabled()
        return None, *(LeavesOf.apply(cotangent, ctx.of, False) if recorded else ctx.of.leaves(cotangent))


@dataclass(frozen=True)
class Pieces:
    """How a vector is cut into leaves of these shapes."""

    shapes: Sequence[torch.Size]

    def leaves(self, flat: torch.Tensor) -> Leaves:
        parts = flat.split_with_sizes([shape.numel() for shape in self.shapes])
        return [p if len(shape) == 1 else p.view(shape) for p, shape in zip(parts, self.shapes, strict=True)]

    def flat(self, leaves: Sequence[torch.Tensor]) -> torch.Tensor:
        return ravel(leaves, 0)


def points_of(x: Leaves, lane_dims: int) -> tuple[Leaves, Leaves]:
    """Detached tensors with the entries of x that require a gradient, and the leaves of x made of them.

    One vector where several plain leaves are of one kind, else the leaves themselves. So it is with lanes: there a
    piece of a vector would not be contiguous, as the leaf is.
    """
    several = len(x) > 1 and not lane_dims and not _torch.transforms_active()
    alike = several and type(x[0]) is torch.Tensor and len(set(map(_KIND, x))) == 1
    if not (alike and all(map(torch.Tensor.is_contiguous, x))):
        points = [leaf.detach().requires_grad_() for leaf in x]
        return points, points
    vector = ravel(x, 0).detach().requires_grad_()
    return [vector], list(LeavesOf.apply(vector, Pieces([leaf.shape for leaf in x]), False))


def as_points(value: Sequence[torch.Tensor], points: Leaves) -> Leaves:
    """Leaves like those of x, as one vector where the ``points`` of x are one."""
    return list(value) if len(points) == len(value) else [FlatOf.apply(Pieces([leaf.shape for leaf in value]), *value)]


def name_lanes(bad: torch.Tensor) -> str:
    """Where a fault is, for messages: ``' in lane 2 of (4,)'``; nothing for a single problem."""
    if bad.ndim == 0:
        return ""
    lanes = bad.nonzero().tolist()
    shown = ", ".join(str(tuple(lane) if len(lane) > 1 else lane[0]) for lane in lanes[:8])
    return f" in lane {shown}{', ...' if len(lanes) > 8 else ''} of {tuple(bad.shape)}"


def leaves_norm(leaves: Sequence[torch.Tensor], lane_dims: int) -> torch.Tensor:
    """Euclidean norm over all leaves per lane, in float64, safe from overflow and underflow
    of squares; infinite where a leaf holds NaN.
    """
    lanes = leaves[0].shape[:lane_dims]
    flat = [g.reshape(*lanes, g.shape[lane_dims:].numel()) for g in leaves]
    if all(g.dtype in (torch.float32, torch.float16, torch.bfloat16) for g in flat):  # squares fit into float64
        parts = [torch.linalg.vector_norm(g, dim=-1, dtype=torch.float64) for g in flat]
        norm: torch.Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return norm.nan_to_num(math.inf, math.inf)
    largest = [g.abs().amax(-1) if g.numel() else g.new_zeros(lanes) for g in flat]
    scale = torch.stack([part.double() for part in largest]).amax(0)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    total = torch.zeros_like(scale)
    for g in flat:
        unit = g.double() / scale.unsqueeze(-1)
        total = total + (unit * unit).sum(-1)
    norm = scale * total.sqrt()
    return norm.nan_to_num(math.inf, math.inf)


def positive(scale: torch.Tensor) -> torch.Tensor:
    """``scale``, 1 where it is not above zero: what may be divided by."""
    return torch.where(scale > 0, scale, 1.0)


def tensors_in(values: Iterable[Any], found: list[torch.Tensor]) -> list[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            tensors_in(value, found)
        elif isinstance(value, dict):
            tensors_in(value.values(), found)
    return found


def check_integer(name: str, value: Any, least: int) -> None:
    """Raise ValueError for what is no integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name}={value!r} must be an integer of at least {least}.")


def check_dim(dim: int | None, x: Any = None, lane_dims: int = 0) -> Any:
    """``dim``, checked to be None or negative, and a dimension of every leaf of x."""
    if dim is not None and dim >= 0:
        raise ValueError(f"dim={dim} must be negative (counted from the last dimension), or None for all of them.")
    for leaf in flatten(x)[0] if x is not None else ():
        if leaf.ndim - lane_dims < -(dim or 0):
            raise ValueError(f"dim={dim} is out of range for a leaf of shape {tuple(leaf.shape[lane_dims:])}.")
    return dim


# copy.deepcopy takes functions as they are. A module whose layer has a lambda over the module itself,
#     self.layer = il.argmin(lambda x, t: self.net(x, t), solver),
# would then have a copy whose layer reads the weights of the original. So where a cell of a function (or a default, an
# argument of a partial) holds what the copy in progress has copied already, the module itself above all, the function
# is made anew over the copy. What is met for the first time stays shared, as Python has it: a function is no owner.

T = TypeVar("T", bound="CopiesFunctions")


class CopiesFunctions:
    """Base of what holds functions of the user's: ``copy.deepcopy`` gives them the objects of the copy."""

    def __deepcopy__(self: T, memo: dict[int, Any]) -> T:
        made: T = object.__new__(type(self))
        memo[id(self)] = made
        state: Any = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # Python 3.10 has none
        for name, value in (state or {}).items():
            made.__dict__[name] = _copied(value, memo)
        return made


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, types.FunctionType):
        return _rebuilt(value, memo) if _follows(value, memo, set()) else value
    if isinstance(value, partial) and _follows(value, memo, set()):
        arguments = [_within(item, memo) for item in value.args]
        keywords = {name: _within(item, memo) for name, item in value.keywords.items()}
        return partial(_within(value.func, memo), *arguments, **keywords)
    return copy.deepcopy(value, memo)


def _within(value: Any, memo: dict[int, Any]) -> Any:
    """What stands in a function: the copy if there is one, itself if not."""
    return _copied(value, memo) if _follows(value, memo, set()) else value


def _parts(value: Any) -> list[Any]:
    """What a function reads, as far as it holds it."""
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.MethodType):
        return [value.__self__]
    if not isinstance(value, types.FunctionType):
        return []
    held = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    for cell in value.__closure__ or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:  # a name without a value yet
            continue
    return held


def _follows(value: Any, memo: dict[int, Any], seen: set[int]) -> bool:
    """Whether ``value`` has a copy, or is a function that reads something that has."""
    if id(value) in memo:
        return True
    if id(value) in seen:  # functions may close over each other
        return False
    seen.add(id(value))
    return any(_follows(part, memo, seen) for part in _parts(value))


def _rebuilt(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """The same function over the objects of the copy."""
    cells = tuple(types.CellType() for _ in function.__closure__ or ())
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, None, cells if function.__closure__ else None
    )
    memo[id(function)] = made  # a function may close over itself
    made.__defaults__ = function.__defaults__ and tuple(_within(item, memo) for item in function.__defaults__)
    made.__kwdefaults__ = {name: _within(item, memo) for name, item in (function.__kwdefaults__ or {}).items()}
    for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
        setattr(made, name, getattr(function, name))
    made.__dict__.update(function.__dict__)
    for new, old in zip(cells, function.__closure__ or (), strict=True):
        try:
            new.cell_contents = _within(old.cell_contents, memo)
        except ValueError:
            continue
    return made
