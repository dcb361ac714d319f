"""Unknowns that stay in parts for the solvers too: NOTE [sharded objectives], without the gathering."""

# The layer sees one flat vector `Parts`, made of the parts of all leaves, one behind the other, and the objective sees
# DTensors that are views of it. With x the vector and D x its DTensors, f(D x) has the gradient D'f'(D x): every
# cotangent is brought into the placements of its leaf (a sum over processes is scattered, not gathered), and its part
# is taken. D and D' are a pair as in NOTE [one vector].

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer.base._parts import Cut, Parts
from implicitlayer.base._sharding import Sharding, everywhere, gathered, layout_of, recut
from implicitlayer.base._tree import FlatOf, LeavesOf, flatten, like_x, unflatten


class Divided(Sharding):
    """How the unknowns of a layer lie on processes, none of which holds all of them.

    Args:
        init: pytree of tensors, at least one of them a DTensor.
        lane_dims: number of leading dimensions that count problems: these are not cut.
        gives_value: whether the function of the layer has a value, and is no residual or map, which is like ``init``.
    """

    def __init__(self, init: Any, lane_dims: int = 0, gives_value: bool = True) -> None:
        import torch.distributed as dist

        super().__init__(init)
        leaves, self.spec = flatten(init)
        self.gives_value = gives_value
        strides = [torch.empty(leaf.shape, device="meta").stride() for leaf in leaves]
        # no tensors: the objective would be seen to read them
        self.like: Any = [
            SimpleNamespace(shape=t.shape, stride=stride) for t, stride in zip(leaves, strides, strict=True)
        ]
        self.lanes = self.like[0].shape[:lane_dims]
        with torch.no_grad():  # within transforms there is no to_local() with a graph
            inside = list(map(_torch.innermost, leaves))
            self.here = [t.shape if how is None else t.to_local().shape for t, how in self._pairs(inside)]
        self.sizes = [shape[lane_dims:].numel() for shape in self.here]
        size = sum(leaf.shape[lane_dims:].numel() for leaf in leaves)
        at_once = self.mesh.ndim > 1 and self.mesh.size() == dist.get_world_size()  # all processes, in one group
        groups = (None,) if at_once else tuple([self.mesh.get_group(dim) for dim in range(self.mesh.ndim)])
        self.cut = Cut(size, self._counted(), groups, tuple(self.sizes))

    @classmethod
    def possible(cls, init: Any, lane_dims: int = 0) -> bool:
        """Whether some leaf is cut, no lane is, and the vector has one dtype and one mesh."""
        from torch.distributed.tensor import Replicate, Shard

        leaves = flatten(init)[0]
        layouts = [how for how in Sharding(init).layouts if how is not None]
        placed = [placement for how in layouts for placement in how.placements]
        kinds, within = {type(p) for p in placed}, all(getattr(p, "dim", lane_dims) >= lane_dims for p in placed)
        one = len({leaf.dtype for leaf in leaves}) == 1 == len({how.mesh for how in layouts})
        cut = Shard in kinds and kinds <= {Shard, Replicate} and within
        return one and cut and sum(leaf.shape[lane_dims:].numel() for leaf in leaves) > 1

    @classmethod
    def or_whole(cls, tree: Any, lane_dims: int = 0, gives_value: bool = True) -> Sharding:
        """How the leaves of ``tree`` lie, in parts where that is possible."""
        return cls(tree, lane_dims, gives_value) if cls.possible(tree, lane_dims) else Sharding(tree)

    def inside(self, tree: Any) -> torch.Tensor:
        """One vector [*lanes, n] of a tree like ``init``; leaves that are not placed as its are put together before."""
        pairs = self._pairs(like_x(tree, self.like, self.spec, "there must be one number for every unknown"))
        vector: torch.Tensor = FlatOf.apply(self, *(t if layout_of(t) == how else recut(t, how) for t, how in pairs))
        return vector

    def vector_of(self, values: Sequence[torch.Tensor]) -> torch.Tensor:
        """The vector of tensors that broadcast to the leaves, each in parts or the same on every process."""
        grown = []
        for value, like, how in zip(values, self.like, self.layouts, strict=True):
            # what is as large as its leaf stays in parts; the gradient of what is smaller is a sum over processes
            own = value if value.shape == like.shape and how is not None else gathered(value)
            grown.append((own if how is None else everywhere(own, self.mesh)).expand(like.shape))
        vector: torch.Tensor = FlatOf.apply(self, *grown)
        return vector

    def diagonal(self, tree: Any) -> Any:
        """The same as a vector; of one number per lane, too."""
        if tree is None:
            return None
        values = []
        for value, like in zip(flatten(tree)[0], self.like, strict=True):
            more = len(like.shape) - value.ndim if value.ndim == len(self.lanes) else 0
            values.append(value.reshape((*value.shape, *[1] * more)))
        return self.vector_of(values)

    def outside(self, x: torch.Tensor) -> Any:
        """The tree of a vector."""
        return unflatten(LeavesOf.apply(x, self, False), self.spec)

    def given(self, x: torch.Tensor) -> Any:
        """The same; processes with copies of an entry compare what they say of it."""
        return unflatten(LeavesOf.apply(x, self, True), self.spec)

    def put_together(self, result: Any) -> Any:
        """The whole of a value; of a residual or map the vector in parts."""
        if self.gives_value:
            return super().put_together(result)
        leaves = like_x(result, self.like, self.spec)
        self.compare_copies("value", leaves)
        return self.vector_of(leaves)

    def leaves(self, flat: Any) -> tuple[torch.Tensor, ...]:
        """DTensors, or plain tensors where ``init`` had some, that are views of a vector."""
        from torch.distributed.tensor import DTensor

        found = []
        columns = flat.local.split(self.sizes, -1), self.here, self.like, self.layouts
        for part, here, like, how in zip(*columns, strict=True):
            local = part.reshape(here).contiguous()  # of one problem it is a view
            if how is not None:
                local = DTensor.from_local(local, *how[:2], run_check=False, shape=like.shape, stride=like.stride)
            found.append(local)
        return tuple(found)

    def flat(self, leaves: Sequence[Any]) -> Parts:
        """The vector of some leaves, in whatever placements they are."""
        parts = []
        for (leaf, how), size in zip(self._pairs(leaves), self.sizes, strict=True):
            part = gathered(leaf) if how is None else leaf.redistribute(placements=how[1]).to_local()
            parts.append(part.reshape(*self.lanes, size))
        return Parts(torch.cat(parts, -1), self.cut)

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
