"""``il.qp`` with sparse matrices: a Function of their entries whose backward is one solve with sparse factors."""

# NOTE [sparse]: where Q, A or G is sparse, and there is one program on the CPU with a search of the library's own, its
# proof comes from ``_sparse_program`` and is handed out as on the plain path. The gradients are those of the entries
# that are stored, and autograd gives them the layout of what was passed. A program that is not proved there (a kink,
# rows that depend on each other, no solution), and everything that is not the plain path (lanes, transforms, records,
# second derivatives), is that of the dense matrices, with the same numbers, and with the words for what is wrong.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from implicitlayer._errors import NotConvergedError

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
    """A matrix as the values [k] of entries and where they are, with what ``_qp_arguments`` asks of a tensor."""

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
