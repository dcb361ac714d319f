"""Unknowns that stay in parts for the solvers too: NOTE [sharded objectives], without the gathering."""

# The layer sees one flat vector `Parts`, made of the parts of all leaves, one behind the other, and the objective sees
# DTensors that are views of it. With x the vector and D x its DTensors, f(D x) has the gradient D'f'(D x): every
# cotangent is brought into the placements of its leaf (a sum over processes is scattered, not gathered), and its part
# is taken. D and D' are a pair as in NOTE [one vector].

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer.base._parts import Cut, Parts
from implicitlayer.base._sharding import Sharding, _no_summands, gathered
from implicitlayer.base._tree import FlatOf, LeavesOf, flatten, unflatten


class Divided(Sharding):
    """How the unknowns of a layer lie on processes, none of which holds all of them.

    Args:
        init: pytree of tensors, at least one of them a DTensor.
        lane_dims: number of leading dimensions that count problems: these are not cut.
    """

    def __init__(self, init: Any, lane_dims: int = 0) -> None:
        super().__init__(init)
        leaves, self.spec = flatten(init)
        self.shapes = [leaf.shape for leaf in leaves]
        self.lanes = self.shapes[0][:lane_dims]
        self.here = [leaf.shape if how is None else leaf.to_local().shape for leaf, how in self._pairs(leaves)]
        self.strides = [torch.empty(shape, device="meta").stride() for shape in self.shapes]
        self.sizes = [shape[lane_dims:].numel() for shape in self.here]
        self.cut = Cut(sum(shape[lane_dims:].numel() for shape in self.shapes), self._counted(), self._groups())

    @classmethod
    def possible(cls, init: Any, lane_dims: int = 0) -> bool:
        """Whether some leaf is cut, no lane is, and the flat vector of all has one dtype and one mesh."""
        from torch.distributed.tensor import Replicate, Shard

        leaves = flatten(init)[0]
        layouts = [how for how in Sharding(init).layouts if how is not None]
        placed = [placement for _, placements in layouts for placement in placements]
        kinds, within = {type(p) for p in placed}, all(getattr(p, "dim", lane_dims) >= lane_dims for p in placed)
        one = len({leaf.dtype for leaf in leaves}) == 1 == len({mesh for mesh, _ in layouts})
        cut = Shard in kinds and kinds <= {Shard, Replicate} and within
        return one and cut and sum(leaf.shape[lane_dims:].numel() for leaf in leaves) > 1

    def inside(self, init: Any) -> torch.Tensor:
        """The leaves of ``init`` as one vector [*lanes, n]."""
        vector: torch.Tensor = FlatOf.apply(self, *flatten(init)[0])
        return vector

    def outside(self, x: torch.Tensor) -> Any:
        """The tree of a vector."""
        return unflatten(LeavesOf.apply(x, self, False), self.spec)

    def seen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of a tree as one of its vector, with a whole value."""

        def of_vector(x: torch.Tensor, *theta: Any) -> Any:
            return self.put_together(function(unflatten(LeavesOf.apply(x, self, True), self.spec), *theta))

        of_vector.unknowns = self.outside  # type: ignore[attr-defined]  # how its user calls them, for messages
        return of_vector

    def leaves(self, flat: Any) -> tuple[torch.Tensor, ...]:
        """DTensors, or plain tensors where ``init`` had some, that are views of a vector."""
        from torch.distributed.tensor import DTensor

        found = []
        columns = flat.local.split(self.sizes, -1), self.here, self.shapes, self.strides, self.layouts
        for part, here, shape, stride, how in zip(*columns, strict=True):
            local = part.reshape(here).contiguous()  # of one problem it is a view
            if how is not None:
                local = DTensor.from_local(local, *how, run_check=False, shape=shape, stride=stride)
            found.append(local)
        return tuple(found)

    def flat(self, leaves: Sequence[Any]) -> Parts:
        """The vector of some leaves, in whatever placements they are."""
        parts = []
        for (leaf, how), size in zip(self._pairs(leaves), self.sizes, strict=True):
            part = gathered(leaf) if how is None else leaf.redistribute(placements=_no_summands(how[1])).to_local()
            parts.append(part.reshape(*self.lanes, size))
        return Parts(torch.cat(parts, -1), self.cut)

    def compare_gradient(self, gradient: Any) -> None:
        """Raise unless processes that hold the same entries have found the same gradient of them."""
        for index, (part, how) in enumerate(self._pairs(_torch.innermost(gradient).local.split(self.sizes, -1))):
            dims = [i for i in range(self.mesh.ndim) if how is None or not how[1][i].is_shard()]
            if dims:
                self.compare(f"gradient in leaf {index} of x", [part], dims)

    def _pairs(self, leaves: Sequence[Any]) -> list[tuple[Any, Any]]:
        return list(zip(leaves, self.layouts, strict=True))

    def _counted(self) -> tuple[tuple[int, int], ...]:
        """The ranges of entries here of which no process before this one holds a copy."""
        coordinate, start = self.mesh.get_coordinate(), 0
        found: list[tuple[int, int]] = []
        for size, how in zip(self.sizes, self.layouts, strict=True):
            copied = [i for i in range(self.mesh.ndim) if how is None or not how[1][i].is_shard()]
            if not any(coordinate[i] for i in copied):
                first = found.pop()[0] if found and found[-1][1] == start else start
                found.append((first, start + size))
            start += size
        return tuple(found)

    def _groups(self) -> tuple[Any, ...]:
        import torch.distributed as dist

        if self.mesh.ndim > 1 and self.mesh.size() == dist.get_world_size():
            return (None,)  # all processes, in one
        return tuple([self.mesh.get_group(dim) for dim in range(self.mesh.ndim)])
