"""What sets and non-smooth regularisers have in common: a proximal operator, and terms for parts of a pytree."""

# NOTE [proximal terms]: prox_s(y) = argmin_x  s r(x) + 1/2 ||x - y||^2. For a set, r is 0 inside and infinite outside,
# and the prox is the projection, whatever s. Every prox is plain torch code that branches on values, so that autograd's
# derivative of it is an element of its generalised Jacobian: the branch that was taken is the piece that is
# differentiated. On the border of two pieces (a kink) the constrained side is taken.
#
# NOTE [NaN stays]: a comparison with NaN is false, so a prox must name the entries that it holds, never those that it
# lets go: NaN in y or in the data then falls through to a branch that keeps it, and the checks behind it fire. An
# infinite y is a point far out: sets with bounds clamp it, all others return NaN or Inf.
#
# Lanes: the first ``lane_dims`` dimensions of every leaf enumerate independent problems; a term acts on each alone.

# NOTE [kinks of a black box]: with D+- = (prox(y +- h d) - prox(y)) / (+-h), a smooth prox of curvature c (over the
# size of y) has |D+ - D-| = c h, and one whose derivative jumps between y - h d and y + h d has a difference of the
# size of the jump for this h and for every larger one. An iteration that is good to e makes a difference of 2 e / h,
# which falls with h. So a kink at h shows as a difference above _JUMP at h and at _FAR. d has no two entries alike and
# none small: it crosses a kink in any position. Nothing is said where nothing shows: d may pass along an edge.

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from typing import Any, ClassVar

import torch

from implicitlayer import _torch
from implicitlayer._torch import pytree
from implicitlayer.base._divided import Divided
from implicitlayer.base._parts import Parts, numbers
from implicitlayer.base._sharding import Sharding, anywhere, beside, layout_of, mesh_of, whole
from implicitlayer.base._tree import (
    CopiesFunctions,
    TreeSpec,
    flatten,
    leaves_like,
    positive,
    ravel,
    tree_map,
    unflatten,
    unravel,
)
from implicitlayer.base._types import Extension, Leaves

_JUMP = 0.1  # of the derivative, whose eigenvalues lie between 0 and 1
_FAR = 1e-4  # over the size of y; the nearer step is sqrt(eps)
_NO_FUNCTIONS = (
    dict,
    list,
    tuple,
    type,
)  # torch's tracer (2.13) knows neither ``callable`` of them nor ``dict | list``


class ProximalTerm(CopiesFunctions, Extension):
    """A set, or a convex term added to the objective, known by its proximal operator.

    x and y are pytrees whose leaves have the same ``lane_dims`` leading lane dimensions; ``step`` has shape [*lanes].
    """

    per_entry: ClassVar[tuple[str, ...]] = ()  # attributes that broadcast to x
    in_parts: ClassVar[bool] = False  # whether the leaves of x, and data, may be DTensors; else they are whole tensors

    def bind(self, theta: tuple[Any, ...]) -> ProximalTerm:
        """The term at these thetas; itself, unless it is a function of them."""
        return self

    def whole(self) -> ProximalTerm:
        """The term with its data put together."""
        made = copy(self)
        own: Any = fields(self) if is_dataclass(self) else ()  # not all have some
        held = {field.name: getattr(self, field.name) for field in own}
        made.__dict__.update(tree_map(lambda t: t.whole() if isinstance(t, ProximalTerm) else whole(t), held))
        return made

    def among(self, x: Any, lane_dims: int) -> ProximalTerm:
        """The term for x whose leaves may be DTensors; one that is not made for them sees whole tensors."""
        if self.in_parts and Divided.possible(x, lane_dims):
            return self
        lies = Sharding(x)
        return _Through(self.whole(), lies.inside, lies.outside)

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """``argmin_x step * r(x) + 1/2 ||x - y||^2``, in the structure of y."""
        raise NotImplementedError

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        """What the term does at y = x - step * gradient: (mask of entries that it holds, distance of y from a kink).

        Both in the structure of y. The distance is infinite where there is no kink, NaN where it is not known; of
        terms that do not say it, see NOTE [kinks of a black box].
        """
        held = tree_map(lambda a, b: a != b, y, self.prox(y, step, lane_dims))
        return held, kink_distances(lambda at: self.prox(at, step, lane_dims), y, lane_dims)

    def diagonal(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """The derivative of the prox in y where it is a diagonal matrix: its entries, constants, in the structure of y.

        None where it is not diagonal, or not written out: autograd's derivative of the prox is used then.
        """
        return None

    def refuse_ambiguous(self, x: Any, lane_dims: int) -> None:
        """Raise where one number per lane would be read as one per entry, because there are as many of both.

        Raises:
            ValueError: see above; the remedy is a dimension more.
        """
        leaves = flatten(x)[0]
        for name in self.per_entry:
            value = getattr(self, name)
            for leaf in leaves if isinstance(value, torch.Tensor) and value.ndim else ():
                lanes = leaf.shape[:lane_dims]
                if value.shape == lanes and lane_dims < leaf.ndim and leaf.shape[-lane_dims:] == lanes:
                    raise ValueError(
                        f"{name} of shape {tuple(value.shape)} may be meant for the lanes or for the entries of x of "
                        f"shape {tuple(leaf.shape)}. Write {name}.reshape{(*lanes, *[1] * (leaf.ndim - lane_dims))} "
                        f"for one number per lane, {name}.expand{tuple(leaf.shape)} for one per entry."
                    )

    def magnitude(self, y: Any, lane_dims: int = 0) -> torch.Tensor:
        """The size of y that distances from kinks are compared with, tensor [*lanes]: its largest entry."""
        return largest_of(joined(y, lane_dims))

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        """How far x is from the set, tensor [*lanes]; zero for a term without constraints."""
        first = flatten(x)[0][0]
        return torch.zeros(first.shape[:lane_dims], dtype=first.dtype, device=first.device)  # plain, of DTensors too


class Free(ProximalTerm):
    """No term at all."""

    in_parts: ClassVar[bool] = True

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        return y

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        held = tree_map(lambda a: torch.zeros_like(a, dtype=torch.bool), y)
        return held, tree_map(lambda a: torch.full_like(a, torch.inf), y)

    def diagonal(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        return tree_map(torch.ones_like, y)


@dataclass(frozen=True, eq=False)
class PerPart(ProximalTerm):
    """One term for each part of the unknowns: a pytree of terms whose leaves stand for subtrees of x."""

    terms: tuple[ProximalTerm, ...]
    spec: TreeSpec

    in_parts: ClassVar[bool] = True

    def bind(self, theta: tuple[Any, ...]) -> ProximalTerm:
        return replace(self, terms=tuple(term.bind(theta) for term in self.terms))

    def among(self, x: Any, lane_dims: int) -> ProximalTerm:
        """Each part by its own term."""
        return replace(self, terms=tuple(term.among(part, lane_dims) for term, part in self._pairs(x)))

    def _pairs(self, x: Any) -> list[tuple[ProximalTerm, Any]]:
        try:
            parts: list[Any] = self.spec.flatten_up_to(x)
        except ValueError as error:
            raise ValueError(
                f"a pytree of constraints must have the structure of x from the top down, got {self.spec} for x of "
                f"structure {flatten(x)[1]}. Give every part of x an entry, None where it is free."
            ) from error
        return list(zip(self.terms, parts, strict=True))

    def _join(self, parts: list[Any], x: Any) -> Any:
        leaves = leaves_like(pytree.tree_unflatten(parts, self.spec), x, "the parts must have the structure of x")
        return unflatten(leaves, flatten(x)[1])

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        return self._join([term.prox(part, step, lane_dims) for term, part in self._pairs(y)], y)

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        found = [term.activity(part, step, lane_dims) for term, part in self._pairs(y)]
        return self._join([held for held, _ in found], y), self._join([margins for _, margins in found], y)

    def diagonal(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """Each part by its own term; None unless all are known."""
        found = [term.diagonal(part, step, lane_dims) for term, part in self._pairs(y)]
        return None if any(part is None for part in found) else self._join(found, y)

    def refuse_ambiguous(self, x: Any, lane_dims: int) -> None:
        for term, part in self._pairs(x):
            term.refuse_ambiguous(part, lane_dims)

    def magnitude(self, y: Any, lane_dims: int = 0) -> torch.Tensor:
        """That of the largest part."""
        return torch.stack([term.magnitude(part, lane_dims) for term, part in self._pairs(y)]).amax(0)

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        return reduce(torch.hypot, [term.violation(part, lane_dims) for term, part in self._pairs(x)])


@dataclass(frozen=True, eq=False)
class _Through(ProximalTerm):
    """A term of other unknowns, which ``there`` makes of those of the layer; ``back`` is its inverse."""

    term: ProximalTerm
    there: Callable[[Any], Any]
    back: Callable[[Any], Any]

    def bind(self, theta: tuple[Any, ...]) -> ProximalTerm:
        return replace(self, term=self.term.bind(theta))

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        return self.back(self.term.prox(self.there(y), step, lane_dims))

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        held, margins = self.term.activity(self.there(y), step, lane_dims)
        return self.back(held), self.back(margins)

    def diagonal(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        known = self.term.diagonal(self.there(y), step, lane_dims)
        return None if known is None else self.back(known)

    def magnitude(self, y: Any, lane_dims: int = 0) -> torch.Tensor:
        return self.term.magnitude(self.there(y), lane_dims)

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        return self.term.violation(self.there(x), lane_dims)


def seen_by(terms: Any, sharding: Sharding, init: Any, lane_dims: int) -> Any:
    """The same terms, of unknowns like ``init`` as they are inside of ``sharding``."""
    if callable(terms) and not isinstance(terms, type):
        return lambda *theta: seen_by(terms(*theta), sharding, init, lane_dims)
    term = resolve(terms, ())
    if not isinstance(sharding, Divided):
        return term.whole()
    return _Through(term.among(init, lane_dims), sharding.outside, sharding.inside)


def resolve(terms: Any, theta: tuple[Any, ...], name: str = "constraint") -> ProximalTerm:
    """The term that ``terms`` stands for at ``theta``: a term, a pytree of terms and None, or a function of theta."""
    if isinstance(terms, ProximalTerm):
        return terms.bind(theta)
    if not isinstance(terms, _NO_FUNCTIONS) and callable(terms):
        return resolve(terms(*theta), theta, name)
    leaves, spec = flatten(terms)
    wrong = [leaf for leaf in leaves if leaf is not None and not isinstance(leaf, ProximalTerm)]
    if wrong or not leaves or all(leaf is None for leaf in leaves):
        shown = wrong[0] if wrong else terms
        shown = shown.__name__ if isinstance(shown, type) else type(shown).__name__
        raise TypeError(
            f"{name} must be a set or regulariser (such as il.sets.Box(0, 1) or il.L1(0.1)), a pytree of them, or a "
            f"function of theta that returns one; got {shown}. Wrap a projection of your own in il.sets.Projection, a "
            "proximal operator in il.Prox."
        )
    return PerPart(tuple(Free() if leaf is None else leaf for leaf in leaves), spec).bind(theta)


def kink_distances(prox: Callable[[Any], Any], y: Any, lane_dims: int) -> Any:
    """How far the nearest kink is, entry by entry: 0 within sqrt(eps) of the size of y, _FAR of it; NaN if unknown."""
    leaves, spec = flatten(y)
    here = flatten(prox(y))[0]
    size = positive(largest_of(joined(y, lane_dims)))
    directions = signs(leaves, lane_dims)  # with entries between 1.25 and 2: without a period, the same in every lane
    for i, leaf in enumerate(leaves):
        shape = leaf.shape[lane_dims:]
        count = torch.arange(shape.numel(), device=leaf.device, dtype=torch.float64)
        directions[i] = directions[i] * (1.25 + 0.75 * ((0.618034 * count) % 1)).to(leaf.dtype).reshape(shape)

    def jumps(part: float) -> list[torch.Tensor]:
        h = [expand_like(part * size, leaf) for leaf in leaves]
        steps = [w * beside(direction, v) for v, w, direction in zip(leaves, h, directions, strict=True)]
        ends = [unflatten([v + sign * s for v, s in zip(leaves, steps, strict=True)], spec) for sign in (1.0, -1.0)]
        ahead, behind = (flatten(prox(end))[0] for end in ends)
        return [((a - c) - (c - b)).abs() / w > _JUMP for a, b, c, w in zip(ahead, behind, here, h, strict=True)]

    near, far = jumps(torch.finfo(leaves[0].dtype).eps ** 0.5), jumps(_FAR)
    margins = []
    for n, f, leaf in zip(near, far, leaves, strict=True):
        at = torch.where(n & f, expand_like(0.0 * size, leaf), expand_like(_FAR * size, leaf))
        margins.append(torch.where(f, at, torch.nan))
    return unflatten(margins, spec)


def signs(like: Leaves, num_levels: int = 0) -> Leaves:
    """A direction of signs; the golden angle spreads them without a period, so that it mixes all eigenvectors.

    The same one in every lane of the first ``num_levels`` dimensions, as a function of one lane would have it.
    """
    directions = []
    for v in like:
        in_parts = isinstance(_torch.innermost(v), Parts)
        shape = v.shape[-1:] if in_parts else v.shape[num_levels:]
        count = numbers(v) if in_parts else torch.arange(shape.numel(), device=v.device)
        angles = torch.cos(2.399963 * count.to(v.dtype) ** 2)
        directions.append(torch.where(angles >= 0, 1.0, -1.0).to(v.dtype).reshape(shape).expand(v.shape))
    return directions


def spread(value: Any, x: Any, name: str) -> Leaves:
    """One tensor per leaf of x that broadcasts to it: from one number or tensor for all, or a pytree like x."""
    leaves = flatten(x)[0]
    values = [value] * len(leaves)
    if isinstance(value, (dict, list, tuple)):
        values = leaves_like(value, x, f"{name} must be one tensor or number, or have the structure of x")
    result = []
    for entry, leaf in zip(values, leaves, strict=True):
        tensor = number_like(entry, leaf)
        if tensor.ndim > leaf.ndim or any(
            a not in (1, b) for a, b in zip(tensor.shape[::-1], leaf.shape[::-1], strict=False)
        ):
            raise ValueError(
                f"{name} of shape {tuple(tensor.shape)} does not broadcast to a leaf of x of shape "
                f"{tuple(leaf.shape)}. Give one number, one per entry, or one per lane with dimensions of size one "
                "behind it (a[:, None])."
            )
        result.append(tensor)
    return result


def per_lane(value: Any, like: torch.Tensor, lane_dims: int, name: str) -> torch.Tensor:
    """A number for the whole problem: 0-d, or one per lane, as a tensor of dtype like ``like``."""
    tensor = number_like(value, like)
    if tensor.ndim and tensor.shape != like.shape[:lane_dims]:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} must be one number, or one per lane: shape "
            f"{tuple(like.shape[:lane_dims])}."
        )
    return tensor


def number_like(value: Any, like: torch.Tensor) -> torch.Tensor:
    """``value`` as a tensor to combine with ``like``, of its dtype and device, a DTensor or none; with its graph."""
    if not isinstance(value, torch.Tensor):
        return torch.as_tensor(value, dtype=like.dtype, device=like.device)
    tensor: torch.Tensor = value.to(like.device, like.dtype)  # as_tensor would hide it from the finder of closed-over
    if tensor.shape != like.shape or layout_of(tensor) != layout_of(like):
        tensor = beside(whole(tensor), like)  # which is where its gradient, a sum over processes, is put together
    return tensor


def expand_like(value: Any, leaf: torch.Tensor) -> torch.Tensor:
    """A number, or one per lane [*lanes], as [*lanes, 1, ...], to be combined with a leaf."""
    tensor = number_like(value, leaf)
    return tensor.reshape((*tensor.shape, *[1] * (leaf.ndim - tensor.ndim))) if tensor.ndim else tensor


def joined(x: Any, lane_dims: int, like: Any = None) -> torch.Tensor:
    """All entries of one problem as a vector: [*lanes, n], of DTensors in parts as those of ``like`` (else of x)."""
    leaves = flatten(x)[0]
    if mesh_of(leaves) is None:
        return ravel(leaves, lane_dims)
    vector: torch.Tensor = Divided(leaves if like is None else flatten(like)[0], lane_dims).inside(leaves)
    return vector


def parted(flat: torch.Tensor, x: Any, lane_dims: int) -> Any:
    """Inverse of :func:`joined`; the dtype of ``flat`` is kept."""
    leaves, spec = flatten(x)
    if mesh_of(leaves) is not None:
        return unflatten(Divided(leaves, lane_dims).outside(flat), spec)
    return unflatten([part.to(flat.dtype) for part in unravel(flat, leaves, lane_dims)], spec)


def largest_of(flat: torch.Tensor) -> torch.Tensor:
    """Largest magnitude along the last dimension; 0 of nothing."""
    return flat.abs().amax(-1) if flat.shape[-1] else flat.new_zeros(flat.shape[:-1])


def is_plain(value: Any) -> bool:
    """Whether the numbers of ``value`` can be looked at: no transform has wrapped it, and no compiler traces it."""
    hidden = torch.compiler.is_dynamo_compiling
    return not (isinstance(value, torch.Tensor) and (hidden() or _torch.is_wrapped(value)))


def check_entries(value: Any, name: str, rule: str, holds: Any) -> None:
    """Raise ValueError unless ``holds(tensor)`` is true of every entry that can be looked at."""
    for leaf in flatten(value)[0]:
        if not is_plain(leaf):
            continue
        tensor = leaf if isinstance(leaf, torch.Tensor) else torch.as_tensor(leaf)
        if anywhere(~holds(tensor)):
            leaf, tensor = whole((leaf, tensor))
            shown = leaf if tensor.ndim == 0 else f"{tensor[~holds(tensor)][0].item()} (an entry of it)"
            shown = shown.item() if isinstance(shown, torch.Tensor) else shown
            raise ValueError(f"{name}={shown} must be {rule}.")
