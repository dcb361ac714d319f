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
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from implicitlayer import _torch
from implicitlayer._torch import pytree
from implicitlayer.base._copying import CopiesFunctions
from implicitlayer.base._parts import Parts, numbers
from implicitlayer.base._sharding import anywhere, whole
from implicitlayer.base._tree import TreeSpec, flatten, leaves_like, ravel, tree_map, unflatten, unravel
from implicitlayer.base._types import Extension, Leaves

_JUMP = 0.1  # of the derivative, whose eigenvalues lie between 0 and 1
_FAR = 1e-4  # over the size of y; the nearer step is sqrt(eps)


class ProximalTerm(CopiesFunctions, Extension):
    """A set, or a convex term added to the objective, known by its proximal operator.

    x and y are pytrees whose leaves have the same ``lane_dims`` leading lane dimensions; ``step`` has shape [*lanes].
    """

    per_entry: ClassVar[tuple[str, ...]] = ()  # attributes that broadcast to x
    # whether x may be one vector [*lanes, n] of which every process holds a part: used by entries and in sums only
    in_parts: ClassVar[bool] = False

    def bind(self, theta: tuple[Any, ...]) -> ProximalTerm:
        """The term at these thetas; itself, unless it is a function of them."""
        return self

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
        lanes = flatten(x)[0][0]
        zeros: torch.Tensor = lanes.new_zeros(lanes.shape[:lane_dims])
        return zeros


@dataclass(frozen=True, eq=False)
class PerPart(ProximalTerm):
    """One term for each part of the unknowns: a pytree of terms whose leaves stand for subtrees of x."""

    terms: tuple[ProximalTerm | None, ...]
    spec: TreeSpec

    def bind(self, theta: tuple[Any, ...]) -> ProximalTerm:
        return PerPart(tuple(None if t is None else t.bind(theta) for t in self.terms), self.spec)

    def _parts(self, x: Any) -> list[Any]:
        try:
            parts: list[Any] = self.spec.flatten_up_to(x)
        except ValueError as error:
            raise ValueError(
                f"a pytree of constraints must have the structure of x from the top down, got {self.spec} for x of "
                f"structure {flatten(x)[1]}. Give every part of x an entry, None where it is free."
            ) from error
        return parts

    def _join(self, parts: list[Any], x: Any) -> Any:
        leaves = leaves_like(pytree.tree_unflatten(parts, self.spec), x, "the parts must have the structure of x")
        return unflatten(leaves, flatten(x)[1])

    def prox(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        parts = zip(self.terms, self._parts(y), strict=True)
        return self._join([p if t is None else t.prox(p, step, lane_dims) for t, p in parts], y)

    def activity(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> tuple[Any, Any]:
        pairs = zip(self.terms, self._parts(y), strict=True)
        found = [free(part) if term is None else term.activity(part, step, lane_dims) for term, part in pairs]
        return self._join([held for held, _ in found], y), self._join([margins for _, margins in found], y)

    def diagonal(self, y: Any, step: Any = 1.0, lane_dims: int = 0) -> Any:
        """Each part by its own term; None unless all are known."""
        found = []
        for term, part in zip(self.terms, self._parts(y), strict=True):
            found.append(tree_map(torch.ones_like, part) if term is None else term.diagonal(part, step, lane_dims))
            if found[-1] is None:
                return None
        return self._join(found, y)

    def refuse_ambiguous(self, x: Any, lane_dims: int) -> None:
        for term, part in zip(self.terms, self._parts(x), strict=True):
            if term is not None:
                term.refuse_ambiguous(part, lane_dims)

    def magnitude(self, y: Any, lane_dims: int = 0) -> torch.Tensor:
        """That of the largest part."""
        parts = zip(self.terms, self._parts(y), strict=True)
        return torch.stack([(t or ProximalTerm()).magnitude(p, lane_dims) for t, p in parts]).amax(0)

    def violation(self, x: Any, lane_dims: int = 0) -> torch.Tensor:
        total = ProximalTerm.violation(self, x, lane_dims)
        for term, part in zip(self.terms, self._parts(x), strict=True):
            total = total if term is None else torch.hypot(total, term.violation(part, lane_dims))
        return total


def resolve(terms: Any, theta: tuple[Any, ...], name: str = "constraint") -> ProximalTerm:
    """The term that ``terms`` stands for at ``theta``: a term, a pytree of terms and None, or a function of theta."""
    if isinstance(terms, ProximalTerm):
        return terms.bind(theta)
    if callable(terms) and not isinstance(terms, type):
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
    return PerPart(tuple(leaves), spec).bind(theta)


def kink_distances(prox: Callable[[Any], Any], y: Any, lane_dims: int) -> Any:
    """How far the nearest kink is, entry by entry: 0 within sqrt(eps) of the size of y, _FAR of it; NaN if unknown."""
    leaves, spec = flatten(y)
    here = flatten(prox(y))[0]
    size = largest_of(joined(y, lane_dims))
    size = torch.where(size > 0, size, 1.0)

    def jumps(part: float) -> list[torch.Tensor]:
        h = [expand_like(part * size, leaf) for leaf in leaves]
        steps = [w * _direction(v, lane_dims) for v, w in zip(leaves, h, strict=True)]
        ends = [unflatten([v + sign * s for v, s in zip(leaves, steps, strict=True)], spec) for sign in (1.0, -1.0)]
        ahead, behind = (flatten(prox(end))[0] for end in ends)
        return [((a - c) - (c - b)).abs() / w > _JUMP for a, b, c, w in zip(ahead, behind, here, h, strict=True)]

    near, far = jumps(torch.finfo(leaves[0].dtype).eps ** 0.5), jumps(_FAR)
    margins = []
    for n, f, leaf in zip(near, far, leaves, strict=True):
        at = torch.where(n & f, expand_like(0.0 * size, leaf), expand_like(_FAR * size, leaf))
        margins.append(torch.where(f, at, torch.nan))
    return unflatten(margins, spec)


def _direction(like: torch.Tensor, lane_dims: int) -> torch.Tensor:
    """Entries between 1.25 and 2 of both signs, without a period; the same in every lane."""
    shape = like.shape[lane_dims:]
    count = torch.arange(shape.numel(), device=like.device, dtype=torch.float64)
    return signs([like], lane_dims)[0] * (1.25 + 0.75 * ((0.618034 * count) % 1)).to(like.dtype).reshape(shape)


def signs(like: Leaves, num_levels: int = 0) -> Leaves:
    """A direction of signs; the golden angle spreads them without a period, so that it mixes all eigenvectors.

    The same one in every lane of the first ``num_levels`` dimensions, as a function of one lane would have it.
    """
    directions = []
    for v in like:
        in_parts = isinstance(v, Parts)
        shape = v.shape[-1:] if in_parts else v.shape[num_levels:]
        count = numbers(v) if in_parts else torch.arange(shape.numel(), device=v.device)
        angles = torch.cos(2.399963 * count.to(v.dtype) ** 2)
        directions.append(torch.where(angles >= 0, 1.0, -1.0).to(v.dtype).reshape(shape).expand(v.shape))
    return directions


def free(x: Any) -> tuple[Any, Any]:
    """The activity of no term at all."""
    return (
        tree_map(lambda a: torch.zeros_like(a, dtype=torch.bool), x),
        tree_map(lambda a: torch.full_like(a, torch.inf), x),
    )


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
    """``value`` as a tensor with dtype and device of ``like``; a tensor keeps its graph."""
    if isinstance(value, torch.Tensor):
        return value.to(like.device, like.dtype)  # as_tensor would hide it from the finder of closed-over tensors
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def expand_like(value: Any, leaf: torch.Tensor) -> torch.Tensor:
    """A number, or one per lane [*lanes], as [*lanes, 1, ...], to be combined with a leaf."""
    tensor = number_like(value, leaf)
    return tensor.reshape((*tensor.shape, *[1] * (leaf.ndim - tensor.ndim))) if tensor.ndim else tensor


def joined(x: Any, lane_dims: int) -> torch.Tensor:
    """All entries of one problem as a vector: [*lanes, n]."""
    return ravel(flatten(x)[0], lane_dims)


def parted(flat: torch.Tensor, x: Any, lane_dims: int) -> Any:
    """Inverse of :func:`joined`; the dtype of ``flat`` is kept."""
    leaves, spec = flatten(x)
    return unflatten([part.to(flat.dtype) for part in unravel(flat, leaves, lane_dims)], spec)


def norm_of(vector: torch.Tensor, dim: Any = -1, keepdim: bool = False) -> torch.Tensor:
    """Euclidean norm along ``dim`` whose derivative at zero is zero, not NaN; no square over- or underflows."""
    unit = unit_of(vector, dim)
    norm = norm_in_units(vector / unit, dim) * unit
    return norm if keepdim else norm.sum(dim)  # of one entry


def largest_of(flat: torch.Tensor) -> torch.Tensor:
    """Largest magnitude along the last dimension; 0 of nothing."""
    return flat.abs().amax(-1) if flat.shape[-1] else flat.new_zeros(flat.shape[:-1])


def unit_of(vector: torch.Tensor, dim: Any = -1) -> torch.Tensor:
    """A power of two, which rounds nothing, near the largest magnitude along ``dim`` (kept): a constant."""
    if vector.numel() == 0:
        return torch.ones_like(vector.detach().sum(dim, keepdim=True))
    largest = vector.detach().abs().amax(dim, keepdim=True)
    known = (largest > 0) & largest.isfinite()
    return torch.where(known, torch.where(known, largest, 1.0).log2().floor().exp2(), 1.0)


def norm_in_units(vector: torch.Tensor, dim: Any = -1) -> torch.Tensor:
    """The norm along ``dim`` (kept) of a vector whose largest entry is about 1."""
    squared = (vector * vector).sum(dim, keepdim=True)
    zero = squared == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())


def is_plain(value: Any) -> bool:
    """Whether the numbers of ``value`` can be looked at: no transform has wrapped it."""
    return not (isinstance(value, torch.Tensor) and _torch.is_wrapped(value))


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
