"""Meta-parameters that are DTensors: which processes hold a copy of them together, and gradients in parts."""

# C: copies of theta. The mesh [C, ...] has one more dimension than those along which some leaf of theta is cut.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from implicitlayer.base._sharding import gathered, is_sharded
from implicitlayer.base._tree import flatten_with_names


@dataclass(frozen=True, eq=False)
class Copies:
    """How processes hold copies of theta.

    Attributes:
        mesh: the processes as [C, ...]: those of a row hold one copy together.
        of_theta: the mesh of theta's DTensors.
        dims: dimensions of ``of_theta`` along which some leaf is cut.
    """

    mesh: Any
    of_theta: Any
    dims: tuple[int, ...]

    @classmethod
    def of(cls, theta: Any, own: Sequence[torch.Tensor] = ()) -> Copies | None:
        """Those of DTensors in ``theta`` and the method's ``own``; None without any. All processes make this call."""
        pairs = [
            *zip(*flatten_with_names(theta, "theta"), strict=True),
            *((t, "a parameter of the method") for t in own),
        ]
        named = [(leaf, name) for leaf, name in pairs if is_sharded(leaf)]
        if not named:
            return None
        mesh = named[0][0].device_mesh
        for leaf, name in named:
            if leaf.device_mesh != mesh or any(placement.is_partial() for placement in leaf.placements):
                raise ValueError(
                    f"{name} lies on {leaf.device_mesh} as {leaf.placements}, and {named[0][1]} on {mesh}: all "
                    "DTensors of theta must be Shard or Replicate on one mesh, so that it is clear which processes "
                    "work on the same tasks. Make them with distribute_tensor(leaf, mesh, ...)."
                )
        from torch.distributed.device_mesh import DeviceMesh

        dims = tuple(d for d in range(mesh.ndim) if any(leaf.placements[d].is_shard() for leaf, _ in named))
        place = mesh.get_coordinate()
        row = mesh.mesh[tuple(slice(None) if d in dims else place[d] for d in range(mesh.ndim))].tolist()
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, row)
        ranks = torch.tensor(sorted([r for i, r in enumerate(rows) if r not in rows[:i]]))
        if sorted(ranks.flatten().tolist()) != list(range(len(rows))):
            raise ValueError(
                f"theta lies on the processes {rows}, a row as each process sees it: every process of the group must "
                "hold a part of exactly one copy of theta. Make the mesh of all processes, such as "
                'init_device_mesh("cpu", (copies, parts)).'
            )
        names = ("copies", *(f"parts {d}" for d in dims))
        return cls(DeviceMesh(mesh.device_type, ranks, mesh_dim_names=names), mesh, dims)

    @property
    def index(self) -> int:
        """Which copy this process holds a part of."""
        return int(self.mesh.get_local_rank("copies"))

    @property
    def count(self) -> int:
        return int(self.mesh.size(0))

    @property
    def is_first(self) -> bool:
        """Whether this is the first of the processes that hold its copy."""
        return not any(self.mesh.get_coordinate()[1:])

    def alike(self) -> list[int]:
        """For each process the first one that holds the same part."""
        rows = self.mesh.mesh.reshape(self.count, -1).tolist()
        first = {rank: of_first for row in rows for rank, of_first in zip(row, rows[0], strict=True)}
        return [first[rank] for rank in range(len(first))]

    def seen(self, leaf: Any) -> Any:
        """One copy of a leaf; the gradient is a summand of that of all copies."""
        from torch.distributed.tensor import DTensor, Partial

        if not is_sharded(leaf):
            return leaf
        summands = tuple(how if d in self.dims else Partial() for d, how in enumerate(leaf.placements))
        part = leaf.to_local(grad_placements=summands)
        if not self.dims:
            return part
        placements = [leaf.placements[d] for d in self.dims]
        return DTensor.from_local(
            part, self._mesh_of_copy(), placements, run_check=False, shape=leaf.shape, stride=leaf.stride()
        )

    def part_of_gradient(self, leaf: Any) -> torch.Tensor:
        """What lies here of ``leaf.grad``, to be summed over copies."""
        if not is_sharded(leaf):
            return gathered(leaf.grad)  # torch gives summands where a plain number meets DTensors
        gradient = leaf.grad if self.count > 1 else leaf.grad.redistribute(placements=leaf.placements)
        part: torch.Tensor = gradient.to_local()
        return part

    def whole_gradient(self, leaf: Any, part: torch.Tensor) -> torch.Tensor:
        """The gradient of ``leaf``, placed as it is."""
        from torch.distributed.tensor import DTensor

        if not is_sharded(leaf):
            return part
        layout = leaf.device_mesh, leaf.placements
        return DTensor.from_local(part, *layout, run_check=False, shape=leaf.shape, stride=leaf.stride())

    def _mesh_of_copy(self) -> Any:
        if len(self.dims) == self.of_theta.ndim:
            return self.of_theta
        names = self.of_theta.mesh_dim_names  # the user's own mesh, where it can be had
        return self.of_theta[tuple(names[d] for d in self.dims)] if names else self.mesh[self.mesh.mesh_dim_names[1:]]
