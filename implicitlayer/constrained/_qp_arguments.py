"""The arguments of ``il.qp``: checked, with both sides of rows and bounds of x as rows of one kind; sparse matrices."""

# NOTE [two sides]: lower <= G x <= h and lb <= x <= ub are rows G x <= h, -G x <= -lower, x <= ub, -x <= -lb of one
# program, each of them left out where no program has that side. A row whose sides are equal in every program is an
# equation, with its sides' mean on the right: of two tensors that are equal only a change of both at once keeps the
# program feasible, and the solution follows it. Inside a transform no value can be looked at, and every side is a row.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer._errors import NotConvergedError
from implicitlayer.base._surroundings import NO_NUMBERS
from implicitlayer.constrained._kkt import Multipliers

_NO_BOUND = 1e20
# How many dimensions of each argument belong to one program.
RANKS = {"Q": 2, "p": 1, "A": 2, "b": 1, "G": 2, "h": 1, "lower": 1, "lb": 1, "ub": 1}


@dataclass(frozen=True, eq=False)
class Fold:
    """From multipliers of e equations and one-sided rows to those of what was given, and back.

    ``rows`` are those with two sides, None where there are none.
    """

    rows: list[_Rows] | None
    e: int

    def __call__(self, y: torch.Tensor, z: torch.Tensor) -> Multipliers:
        if self.rows is None:
            return Multipliers(y, z)
        ys = y.split([self.e, *(len(part.equal) for part in self.rows)], -1)
        zs = z.split([len(part.above) + len(part.below) for part in self.rows], -1)
        found = [part.multipliers(y, z) for part, y, z in zip(self.rows, ys[1:], zs, strict=True)]
        return Multipliers(ys[0], found[0] if len(found) == 1 else tuple(found))

    def start(self, init: Any, batch: torch.Size, count: int) -> torch.Tensor:
        """Which of the one-sided rows have a multiplier in ``init``, bool [*batch, count]."""
        found = init[1] if isinstance(init, tuple) and not isinstance(init, Multipliers) and len(init) == 2 else init
        z = found.inequality if isinstance(found, Multipliers) else None
        given = z if isinstance(z, tuple) else (z,)
        sizes = [count] if self.rows is None else [part.matrix.shape[-2] for part in self.rows]
        if [t.shape[-1] if isinstance(t, torch.Tensor) and t.ndim else None for t in given] != sizes:
            raise ValueError(
                "init must be what il.qp(..., return_multipliers=True) has returned for a program with as many "
                f"rows and bounds as this one, or the multipliers of it; got {type(init).__name__}."
            )
        lanes = [t.shape[:-1] for t in given]
        # a lane starts at its own or at the one that is shared
        shared = [zip(reversed(shape), reversed(batch), strict=False) for shape in lanes]
        if any(len(shape) > len(batch) for shape in lanes) or any(k not in (1, own) for z in shared for k, own in z):
            raise ValueError(
                f"init has multipliers of programs {tuple(lanes[0])}, which do not fit those of this call, "
                f"{tuple(batch)}: give one start for each program, or one for all."
            )
        parts = [t.detach() != 0 for t in given] if self.rows is None else []
        for part, t in zip(self.rows or [], given, strict=False):
            t = t.detach()
            parts += [t.index_select(-1, part.above) > 0, t.index_select(-1, part.below) < 0]
        held = torch.cat([part.expand(*batch, part.shape[-1]) for part in parts], -1)
        # where no row has a side, there is one without entries in its place
        return torch.nn.functional.pad(held, (0, count - held.shape[-1]))


def arguments(given: dict[str, Any]) -> tuple[torch.Size, tuple[Any, ...], Fold]:
    """The batch dimensions, Q, p, A, b, G, h, and what turns their multipliers into those of the arguments.

    Where a matrix is sparse, of one program, all three are :class:`Entries`.
    """
    sparse = any(is_sparse(value) for value in given.values())
    both = sparse or any(given[name] is not None for name in ("lower", "lb", "ub"))
    batch, tensors = _checked(given)
    if sparse:
        tensors |= {name: Entries.of(tensors[name]) for name in ("Q", "A", "G")}
    Q, p, A, b = (tensors[name] for name in ("Q", "p", "A", "b"))
    if not both:
        G, h = _without_missing(tensors["G"], tensors["h"])
        return batch, (Q, p, A, b, G, h), Fold(None, tensors["b"].shape[-1])
    rows = [_Rows.of(tensors["G"], tensors.get("lower"), tensors.get("h"))]
    if "lb" in tensors or "ub" in tensors:
        n = p.shape[-1]
        shape = (*[1] * len(batch), n, n)
        eye = Entries.identity(p) if sparse else torch.eye(n, dtype=p.dtype, device=p.device).reshape(shape)
        rows.append(_Rows.of(eye, tensors.get("lb"), tensors.get("ub")))
    parts = [part.one_sided() for part in rows]
    A, b = _joined([A, *(part[0] for part in parts)], -2), _joined([b, *(part[1] for part in parts)], -1)
    G, h = _joined([part[2] for part in parts], -2), _joined([part[3] for part in parts], -1)
    # of one program, rows without a side are left out already
    return batch, (Q, p, A, b, *((G, h) if sparse else _without_missing(G, h))), Fold(rows, tensors["b"].shape[-1])


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows with two sides; the indices of those that are equations, and of those with a side above and below."""

    matrix: Any
    lower: torch.Tensor
    upper: torch.Tensor
    equal: torch.Tensor
    above: torch.Tensor
    below: torch.Tensor

    @classmethod
    def of(cls, matrix: Any, lower: torch.Tensor | None, upper: torch.Tensor | None) -> _Rows:
        """The rows lower <= matrix x <= upper; None: no side."""
        m, like = matrix.shape[-2], upper if lower is None else lower
        assert like is not None
        device, none = like.device, like.new_full((*[1] * (matrix.ndim - 2), m), torch.inf)
        sides = (-none if lower is None else lower), (none if upper is None else upper)
        if _torch.transforms_active():
            masks = torch.zeros(3, m, dtype=torch.bool, device=device)
            masks[1], masks[2] = upper is not None, lower is not None
        else:
            low, high = (t.detach() for t in sides)
            # NaN is a side: the solver refuses it
            found = (low == high) & (high.abs() < _NO_BOUND), ~(high >= _NO_BOUND), ~(low <= -_NO_BOUND)
            equal, above, below = (t.flatten(0, -2) if t.ndim > 1 else t[None] for t in found)
            same = equal.all(0)
            masks = torch.stack([same, above.any(0) & ~same, below.any(0) & ~same])
        equal, above, below = (mask.nonzero()[:, 0] for mask in masks)
        return cls(matrix, *sides, equal, above, below)

    def one_sided(self) -> tuple[Any, torch.Tensor, Any, torch.Tensor]:
        """Rows and right-hand sides of the equations, and of the inequalities."""
        A, above, below = (self.matrix.index_select(-2, index) for index in (self.equal, self.above, self.below))
        mean = (self.lower.index_select(-1, self.equal) + self.upper.index_select(-1, self.equal)) / 2
        h = _joined([self.upper.index_select(-1, self.above), -self.lower.index_select(-1, self.below)], -1)
        return A, mean, _joined([above, -below], -2), h

    def multipliers(self, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """[*lanes, m]: positive at the upper side, negative at the lower one, of either sign where they are equal."""
        above, below = z.split([len(self.above), len(self.below)], -1)
        found = z.new_zeros(*z.shape[:-1], self.matrix.shape[-2])
        for index, part in ((self.equal, y), (self.above, above), (self.below, -below)):
            found = found.index_add(-1, index, part)
        return found


def _joined(parts: list[Any], dim: int) -> Any:
    """One tensor of all parts along ``dim``; their dimensions before that are broadcast."""
    parts = [part for part in parts if part.shape[dim]] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Entries):
        return Entries.joined(parts)
    leading = torch.broadcast_shapes(*(part.shape[:dim] for part in parts))
    return torch.cat([part.expand(*leading, *part.shape[dim:]) for part in parts], dim)


def _without_missing(G: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with 0'x <= 1 in place of rows without a bound; :data:`_NO_BOUND` is what most solvers take for none."""
    missing = h >= _NO_BOUND
    if not _torch.transforms_active() and not bool(missing.any()):
        return G, h
    return torch.where(missing[..., None], 0.0, G), torch.where(missing, 1.0, h)


def _checked(given: dict[str, Any]) -> tuple[torch.Size, dict[str, Any]]:
    """The batch dimensions, and what is given with as many leading dimensions (of size one where it is shared)."""
    given = {name: value for name, value in given.items() if value is not None or name in ("Q", "p")}
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a real floating tensor, got {kind}. Use torch.as_tensor(..., dtype=...).")
    p = given["p"]
    for matrix, vectors in (("A", ("b",)), ("G", ("h", "lower"))):
        if (matrix in given) != any(vector in given for vector in vectors):
            names = " or ".join(vectors)
            raise ValueError(f"{matrix} and {names} belong together: give both or neither.")
        if matrix not in given:
            given |= {matrix: p.new_zeros(0, p.shape[-1] if p.ndim else 0), vectors[0]: p.new_zeros(0)}
    tensors: dict[str, torch.Tensor] = given
    for name, tensor in tensors.items():
        if tensor.dtype != p.dtype or tensor.device != p.device:
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}, but p is {p.dtype} on {p.device}. Bring all arguments "
                "to one dtype and device; float64 is recommended."
            )
        if tensor.is_meta:
            raise ValueError(NO_NUMBERS)
        if tensor.layout is not torch.strided and RANKS[name] == 1:
            raise TypeError(f"{name} is sparse ({tensor.layout}); only Q, A and G may be. Pass {name}.to_dense().")
        if tensor.ndim < RANKS[name]:
            raise ValueError(
                f"{name} needs {RANKS[name]} dimensions after those of the batch, got shape {tuple(tensor.shape)}."
            )
    n = p.shape[-1]
    if not n:
        raise ValueError(f"p must have at least one entry per program, got shape {tuple(p.shape)}.")
    e, m = tensors["b"].shape[-1], tensors["h" if "h" in tensors else "lower"].shape[-1]
    expected = {"Q": (n, n), "A": (e, n), "G": (m, n), "h": (m,), "lower": (m,), "lb": (n,), "ub": (n,)}
    for name, shape in expected.items():
        if name in tensors and tensors[name].shape[-len(shape) :] != shape:
            raise ValueError(
                f"{name} must end in dimensions {shape} to fit p and its right-hand side, got shape "
                f"{tuple(tensors[name].shape)} with p {tuple(p.shape)}."
            )
    leading = {name: tensor.shape[: tensor.ndim - RANKS[name]] for name, tensor in tensors.items()}
    if len(set(leading.values())) == 1:
        return leading["p"], tensors
    try:
        batch = torch.broadcast_shapes(*leading.values())
    except RuntimeError:
        shapes = {name: tuple(shape) for name, shape in leading.items()}
        raise ValueError(f"the batch dimensions do not fit together: {shapes}. They are broadcast.") from None
    k = len(batch)
    return batch, {
        name: tensor.reshape(*[1] * (k - len(leading[name])), *tensor.shape) for name, tensor in tensors.items()
    }


def on_all_levels(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, each with the lanes of every vmap level that one of them has.

    The solver sees the data with the lanes of all levels in front; it could not tell which level a lane belongs to if
    an argument had some of them only.
    """
    if not _torch.transforms_active():
        return list(tensors)
    zeros = [torch.zeros_like(t.detach().reshape(-1)[:1]).sum() for t in tensors]
    zero = torch.stack(zeros).sum()
    return [t + zero for t in tensors]


# NOTE [sparse]: where Q, A or G is sparse, and there is one program on the CPU with a search of the library's own, its
# proof comes from ``_sparse_program`` and is handed out as on the plain path. The gradients are those of the entries
# that are stored, and autograd gives them the layout of what was passed. A program that is not proved there (a kink,
# rows that depend on each other, no solution), and everything that is not the plain path (lanes, transforms, records,
# second derivatives), is that of the dense matrices, with the same numbers, and with the words for what is wrong.

_LAYOUTS = (torch.sparse_coo, torch.sparse_csr)
_MOST = 50_000_000  # entries of the matrices of a program that is made dense: 400 MB


def is_sparse(value: Any) -> bool:
    """Whether it is a sparse tensor, of a layout whose values torch differentiates; others are a TypeError."""
    if not isinstance(value, torch.Tensor) or value.layout is torch.strided:
        return False
    if value.layout not in _LAYOUTS:
        raise TypeError(
            f"a matrix of layout {value.layout} is not for il.qp, which takes COO and CSR. Use .to_sparse_coo()."
        )
    if value.dense_dim():
        raise TypeError(
            f"a sparse tensor whose entries are tensors (dense_dim={value.dense_dim()}) is not for il.qp, whose sparse "
            "matrices hold numbers. Use .to_dense().to_sparse()."
        )
    return True


@dataclass(frozen=True, eq=False)
class Entries:
    """A matrix as the values [k] of entries and where they are, with what is asked of a tensor in its place."""

    values: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    shape: torch.Size
    ndim: int = 2

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Entries:
        """The entries that are stored of a sparse matrix, all of a dense one; differentiable."""
        if matrix.layout is torch.strided:
            rows, columns = torch.ones(matrix.shape, dtype=torch.bool).nonzero().unbind(1)
            return cls(matrix.reshape(-1), rows, columns, matrix.shape)
        if matrix.layout is torch.sparse_coo:
            matrix = matrix.coalesce()
            rows, columns = matrix.indices().unbind(0)
        else:
            counts = matrix.crow_indices().diff()
            rows, columns = torch.repeat_interleave(torch.arange(len(counts)), counts), matrix.col_indices()
        return cls(matrix.values(), rows, columns.long(), matrix.shape)

    @classmethod
    def identity(cls, like: torch.Tensor) -> Entries:
        """That of the size of a vector."""
        at = torch.arange(len(like))
        return cls(torch.ones_like(like.detach()), at, at, torch.Size((len(like), len(like))))

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """One below the other."""
        rows, height = [], 0
        for part in parts:
            rows.append(part.rows + height)
            height += part.shape[0]
        values, columns = torch.cat([part.values for part in parts]), torch.cat([part.columns for part in parts])
        return cls(values, torch.cat(rows), columns, torch.Size((height, parts[0].shape[1])))

    def index_select(self, dim: int, index: torch.Tensor) -> Entries:
        """Rows, none of them twice."""
        place = torch.full(self.shape[:1], -1)
        place[index] = torch.arange(len(index))
        rows = place[self.rows]
        kept = (rows >= 0).nonzero()[:, 0]
        shape = torch.Size((len(index), self.shape[1]))
        return Entries(self.values.index_select(0, kept), rows[kept], self.columns[kept], shape)

    def __neg__(self) -> Entries:
        return replace(self, values=-self.values)

    def times(self, vector: torch.Tensor) -> torch.Tensor:
        """The product with a vector [*lanes, n], differentiable."""
        product = self.values * vector.index_select(-1, self.columns)
        return product.new_zeros(*vector.shape[:-1], self.shape[0]).index_add(-1, self.rows, product)

    def of_product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The entries of ``left @ right`` that are stored here, [k]; left [rows, r], right [r, columns]."""
        return (left[self.rows] * right.mT[self.columns]).sum(-1)

    def dense(self) -> torch.Tensor:
        """As a dense tensor, differentiable."""
        return self.values.new_zeros(self.shape).index_put((self.rows, self.columns), self.values, accumulate=True)

    def arrays(self) -> tuple[Any, ...]:
        """Values in float64, rows, columns, and shape, for SciPy."""
        return self.values.detach().double().numpy(), self.rows.numpy(), self.columns.numpy(), tuple(self.shape)


def made_dense(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments without sparse ones, if that many entries can be dense; differentiable."""
    shapes = [value.shape for value in given.values() if is_sparse(value)]
    if sum(shape.numel() for shape in shapes) > _MOST:
        raise NotConvergedError(
            f"sparse matrices of shapes {[tuple(shape) for shape in shapes]} are too large to be made dense. il.qp "
            "does that where it finds no proof of a solution with them sparse (a kink, rows that depend on each other, "
            "a solution that is not unique, none at all), and with lanes, another solver, records, or a transform. Try "
            "a smaller program of the kind to see which; a small multiple of the identity added to Q makes x unique."
        )
    return {name: value.to_dense() if is_sparse(value) else value for name, value in given.items()}
