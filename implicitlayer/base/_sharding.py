"""DTensors: unknowns that an objective sees in parts, one per process, and everybody else as a whole."""

# NOTE [sharded objectives]: solvers, checks and linear solves decide by numbers, and processes that decide differently
# wait for each other for ever. So they work on whole plain tensors, the same bits on every process (or on vectors of
# which nothing but sums can be known, see _divided), and only the objective sees DTensors: its unknowns are cut at its
# door and its value is put together there. With x the whole tensor and the parts P x, f(P x) has the gradient
# P' f'(P x), and P' is the gathering of the parts, whatever torch has left to be done: a value or gradient with the
# placement Partial, of which every process holds a summand, is summed. The transposes of the two are each other, so
# each Function is the backward of the other one, to any order.

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from implicitlayer import _torch
from implicitlayer._errors import ImplicitLayerWarning, ObjectiveError, UnsupportedTransformError, warn
from implicitlayer.base._tree import FlatOf, LeavesOf, flatten, is_data, tree_map, unflatten

P = ParamSpec("P")
R = TypeVar("R")

OfOutputs = Callable[[Any], "Sharding"]
WHOLE = {torch.Tensor, torch.nn.Parameter, type(None)}  # classes of what is sure to lie on one process


def is_sharded(value: Any) -> bool:
    """Whether ``value`` is a DTensor, also inside transforms of torch.func, which hide it."""
    inside = _torch.innermost(value)
    return hasattr(inside, "device_mesh") and hasattr(inside, "full_tensor")


def anywhere(mask: Any) -> bool:
    """Whether an entry is true, on any process; ``bool`` of a DTensor looks at what lies here (torch 2.13)."""
    return bool(gathered(mask.sum()))


class Layout(NamedTuple):
    """How a DTensor, or the gradient of one, lies on processes; a pair as in NOTE [one vector]."""

    mesh: Any
    placements: tuple[Any, ...]
    compare_copies: Callable[..., None] | None = None

    def leaves(self, whole: torch.Tensor) -> tuple[torch.Tensor]:
        """The parts, as one leaf, of a tensor that is the same on every process."""
        from torch.distributed.tensor import DTensor, Replicate

        cut: Any = DTensor.from_local(whole, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        return (cut.redistribute(placements=self.placements),)

    def flat(self, leaves: Sequence[Any]) -> torch.Tensor:
        """The whole of one leaf, in whatever placements it is."""
        whole: torch.Tensor = leaves[0].full_tensor()
        return whole


class Largest(NamedTuple):
    """The largest entries along a dimension (kept), as the leaf of a DTensor in NOTE [one vector]: constants."""

    dim: int

    def leaves(self, vector: Any) -> tuple[torch.Tensor]:
        """Torch's own is an error on a process that holds nothing, while the others wait, and may lose NaN."""
        from torch.distributed.tensor import DTensor, Replicate

        found, placed = self.of(vector.to_local()), list(vector.placements)
        for i, placement in enumerate(vector.placements):
            if placement.is_shard(self.dim % vector.ndim):
                found, placed[i] = of_all(found, vector.device_mesh.get_group(i)).amax(0), Replicate()
        like = torch.empty(vector.shape, device="meta").sum(self.dim, True)
        how: Any = {"run_check": False, "shape": like.shape, "stride": like.stride()}
        return (DTensor.from_local(found, vector.device_mesh, placed, **how),)

    def of(self, vector: torch.Tensor) -> torch.Tensor:
        """Those of a tensor on one process; -inf of nothing."""
        return vector.amax(self.dim, True) if vector.shape[self.dim] else vector.sum(self.dim, True) - torch.inf


def largest(vector: torch.Tensor, dim: int) -> torch.Tensor:
    """The largest entry along ``dim`` (kept), a constant; -inf of nothing."""
    vector, of = vector.detach(), Largest(dim)
    return LeavesOf.apply(vector, of, False)[0] if is_sharded(vector) else of.of(vector)


def layout_of(value: Any) -> Layout | None:
    """Mesh and placements of the gradient of a DTensor, which is whole where it is in summands; None for others."""
    if not is_sharded(value):
        return None
    from torch.distributed.tensor import Replicate

    inside = _torch.innermost(value)
    return Layout(inside.device_mesh, tuple(Replicate() if p.is_partial() else p for p in inside.placements))


def mesh_of(values: Iterable[Any]) -> Any:
    """The mesh of the first DTensor among ``values``, which is an error inside vmap and forward mode; None without."""
    hidden = _torch.transforms_active()
    for value in values:
        if (hidden or value.__class__ not in WHOLE) and is_sharded(value):
            if _torch.forward_mode_active() or _torch.num_map_levels():
                raise UnsupportedTransformError(
                    "vmap over a layer that is given DTensors is not possible, nor is forward mode (jvp, jacfwd, "
                    "hessian): torch can neither map what lies on several processes nor give it a tangent. Use reverse "
                    "mode (backward, grad, vjp), batch_dims= for many problems at once, or a loop over calls."
                )
            return _torch.innermost(value).device_mesh
    return None


def beside(tree: Any, like: Any) -> Any:
    """``tree`` with its tensors, the same on every process, as DTensors where ``like`` has some: torch mixes no two."""
    mesh = mesh_of(flatten(like)[0])
    return tree if mesh is None else everywhere(tree, mesh)


def everywhere(tree: Any, mesh: Any) -> Any:
    """``tree`` with its plain tensors, the same on every process of a mesh, as DTensors that are whole on each."""
    from torch.distributed.tensor import Replicate

    layout = Layout(mesh, (Replicate(),) * mesh.ndim)
    return tree_map(lambda t: recut(t, layout) if is_data(t) and not is_sharded(t) else t, tree)


def on_whole_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, of data alone, for DTensors too: it is given whole tensors, and what it returns lies everywhere."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        mesh = mesh_of((*args, *kwargs.values()))
        if mesh is None:
            return function(*args, **kwargs)
        found: R = everywhere(function(*whole(args), **whole(kwargs)), mesh)
        return found

    return call


def of_all(mine: torch.Tensor, group: Any) -> torch.Tensor:
    """A tensor [processes, ...] of what all processes of a group have, in the same order everywhere."""
    import torch.distributed as dist

    everybody = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybody, mine, group=group)
    return torch.stack(everybody)


class Sharding:
    """How the unknowns of a layer lie on processes: NOTE [sharded objectives].

    Args:
        init: pytree of tensors, at least one of them a DTensor.
    """

    def __init__(self, init: Any) -> None:
        self.layouts = [layout_of(t) for t in flatten(init)[0]]
        self.mesh: Any = next((layout[0] for layout in self.layouts if layout is not None), None)
        self._compared: set[str] = set()
        if not _torch.SHARDS_HAVE_SECOND_DERIVATIVES:
            message = (
                f"torch {torch.__version__} has no second derivatives of DTensor.to_local() and full_tensor(), which "
                "modules under parallelize_module call too: with one of these in its function a layer has a wrong "
                "gradient. Use torch 2.13 or later; other functions of DTensors are right."
            )
            warn(message, ImplicitLayerWarning, "no second derivative")

    def inside(self, init: Any) -> Any:
        """The unknowns of the layer: whole ones."""
        return whole(init)

    def outside(self, tree: Any) -> Any:
        """A tree like ``init`` cut as ``init`` was."""
        leaves, spec = flatten(tree)
        return unflatten([recut(*pair) for pair in zip(leaves, self.layouts, strict=True)], spec)

    def seen(self, function: Callable[..., Any], of_outputs: OfOutputs | None = None) -> Callable[..., Any]:
        """``function`` of sharded unknowns as one of the layer's unknowns; see :meth:`put_together`.

        ``of_outputs``: how those of its model lie for the layer, where it tells its model: whole by default.
        """

        def of_inside(x: Any, *theta: Any) -> Any:
            return self.put_together(function(self.given(x), *theta))

        told: dict[str, Any] = {"unknowns": self.outside}  # how its user calls them
        if hasattr(function, "curvature_metric"):  # see NOTE [objectives with parts]
            told["curvature_metric"] = lambda x, *theta: self.diagonal(function.curvature_metric(self.given(x), *theta))
        composite = function.as_composite() if hasattr(function, "as_composite") else None
        if composite is not None:
            parts = self._seen_model(composite, of_outputs or Sharding)
            told["as_composite"] = lambda: parts
        of_inside.__dict__.update(told)
        return of_inside

    def diagonal(self, tree: Any) -> Any:
        """A diagonal matrix for the layer's unknowns, from its entries in the structure of ``init``, or None."""
        return whole(tree)

    def _seen_model(self, composite: Any, of_outputs: OfOutputs) -> Any:
        """The same model and loss of the layer's unknowns, and of outputs as ``of_outputs`` has them.

        The outputs are brought into one form, O o, and the loss takes O^-1 of it. With J of the model and L of the loss
        (O J)' (O^-1' L O^-1) (O J) = J' L J: the Gauss-Newton matrix of the whole data, wherever its rows lie.
        """
        lie: list[Sharding] = []  # known once the model has run, which it does before the loss

        def model(x: Any, *theta: Any) -> Any:
            outputs = composite.model(self.given(x), *theta)
            lie[:] = [of_outputs(outputs)]
            return lie[0].inside(outputs)

        def loss(outputs: Any, *theta: Any) -> Any:
            return self.put_together(composite.loss(lie[0].outside(outputs), *theta))

        return replace(composite, loss=loss, model=model)

    def given(self, x: Any) -> Any:
        """The unknowns of the layer as the user's function gets them."""
        leaves, spec = flatten(x)
        for i, how in enumerate(self.layouts):
            if how is not None:
                compares = how._replace(compare_copies=partial(self.compare_copies, first=i))
                leaves[i] = LeavesOf.apply(leaves[i], compares, True)[0]
        return unflatten(leaves, spec)

    def put_together(self, result: Any) -> Any:
        """The whole of what the user's function returns, which must be the same on every process."""
        result = whole(result)
        self.compare("value", [leaf for leaf in flatten(result)[0] if is_data(leaf)], range(self.mesh.ndim))
        return result

    def compare_copies(self, what: str, leaves: Sequence[Any], first: int = 0) -> None:
        """Raise unless processes that say that they hold the same entries of ``leaves`` have found the same of them."""
        for index, leaf in enumerate(leaves, first):
            placed = getattr(_torch.innermost(leaf), "placements", None)
            dims = [i for i in range(self.mesh.ndim) if placed is None or placed[i].is_replicate()]
            if dims:
                self.compare(f"{what} in leaf {index} of x", [leaf], dims)

    @torch.no_grad()  # to_local() would ask for a graph, which it cannot have within transforms
    def compare(self, what: str, tensors: Sequence[torch.Tensor], dims: Sequence[int]) -> None:
        """Raise on every process unless the first ``tensors`` called ``what`` are the same on all, up to rounding.

        ``dims``: those of the mesh along which they are compared.
        """
        if what in self._compared or not tensors:
            return
        self._compared.add(what)
        plain = [(t.to_local() if is_sharded(t) else t).double() for t in map(_torch.innermost, tensors)]
        # sums agree to their rounding, far below the root of eps times the sum of magnitudes; NaN is for others to tell
        mine = torch.stack([part for t in plain for part in (t.sum(), t.abs().sum())]).nan_to_num()
        rtol = max(torch.finfo(t.dtype).eps for t in tensors) ** 0.5
        for dim in dims:
            all_sums = of_all(mine, self.mesh.get_group(dim))  # [processes, 2 tensors]
            spread = all_sums.amax(0) - all_sums.amin(0)
            if bool((spread[::2] > rtol * all_sums.amax(0)[1::2]).any()):
                values = ", ".join(f"{theirs[0].item():.6g}" for theirs in all_sums)
                raise ObjectiveError(
                    f"the objective has another {what} on every process (sums of entries: {values}), but its unknowns "
                    "are DTensors, which are one problem: a sum over data that are spread over the processes was not "
                    "put together. Make the data DTensors too, distribute_tensor(data, mesh, [Shard(0)]), and leave "
                    "out .to_local()."
                )


def whole(tree: Any) -> Any:
    """``tree`` with every DTensor put together; its gradient is cut as it was."""
    return tree_map(lambda leaf: gathered(leaf) if is_data(leaf) else leaf, tree)


def summed_up(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor without summands: torch carries them on into every use, and those of its gradient into what it was."""
    how = layout_of(tensor)
    return tensor if how is None or how.placements == _torch.innermost(tensor).placements else recut(tensor, how)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, with its graph; any other tensor itself."""
    layout = layout_of(tensor)
    return tensor if layout is None else FlatOf.apply(layout, tensor)


def recut(tensor: torch.Tensor, how: Layout | None) -> torch.Tensor:
    """The whole of ``tensor``, and that in parts where a layout says how, with its graph."""
    all_of_it = gathered(tensor)
    return all_of_it if how is None else LeavesOf.apply(all_of_it, how, False)[0]
