"""DTensors: unknowns that an objective sees in parts, one per process, and everybody else as a whole."""

# NOTE [sharded objectives]: solvers, checks and linear solves decide by numbers, and processes that decide differently
# wait for each other for ever. So they work on whole plain tensors, the same bits on every process (or on vectors of
# which nothing but sums can be known, see _divided), and only the objective sees DTensors: its unknowns are cut at its
# door and its value is put together there. With x the whole tensor and the parts P x, f(P x) has the gradient
# P' f'(P x), and P' is the gathering of the parts, whatever torch has left to be done: a value or gradient with the
# placement Partial, of which every process holds a summand, is summed. The transposes of the two are each other, so
# each Function below is the backward of the other one, to any order.

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch

from implicitlayer import _torch
from implicitlayer._errors import ImplicitLayerWarning, ObjectiveError, UnsupportedTransformError
from implicitlayer.base._tree import flatten, is_data, tree_map, unflatten
from implicitlayer.base._warn import warn

P = ParamSpec("P")
R = TypeVar("R")

WHOLE = {torch.Tensor, torch.nn.Parameter, type(None)}  # classes of what is sure to lie on one process


def is_sharded(value: Any) -> bool:
    """Whether ``value`` is a DTensor, also inside transforms of torch.func, which hide it."""
    inside = _torch.innermost(value)
    return hasattr(inside, "device_mesh") and hasattr(inside, "full_tensor")


def layout_of(value: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Mesh and placements of a DTensor; None for anything else."""
    if not is_sharded(value):
        return None
    inside = _torch.innermost(value)
    return inside.device_mesh, inside.placements


def placed_like(tensor: torch.Tensor, like: Any) -> torch.Tensor:
    """A constant that is the same on every process, cut as ``like`` is; itself for a plain one."""
    layout = layout_of(like)
    return tensor if layout is None else _cut(tensor, *layout)


def mesh_of(values: Iterable[Any]) -> Any:
    """The mesh of the first DTensor among ``values``, which is an error inside vmap and forward mode; None without."""
    hidden = _torch.transforms_active()
    for value in values:
        if (hidden or value.__class__ not in WHOLE) and is_sharded(value):
            if _torch.forward_mode_active() or _torch.num_map_levels():
                _refuse_transform()
            return _torch.innermost(value).device_mesh
    return None


def beside(tree: Any, like: Any) -> Any:
    """``tree`` with its tensors, the same on every process, as DTensors where ``like`` has some: torch mixes no two."""
    mesh = mesh_of(flatten(like)[0])
    return tree if mesh is None else everywhere(tree, mesh)


def everywhere(tree: Any, mesh: Any) -> Any:
    """``tree`` with its plain tensors, the same on every process of a mesh, as DTensors that are whole on each."""
    from torch.distributed.tensor import Replicate

    layout = mesh, (Replicate(),) * mesh.ndim
    return tree_map(lambda t: _Distribute.apply(t, *layout) if is_data(t) and not is_sharded(t) else t, tree)


def on_whole_tensors(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, of data alone, for DTensors too: it is given whole tensors, and what it returns lies everywhere."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        mesh = mesh_of((*args, *kwargs.values()))
        if mesh is None:
            return function(*args, **kwargs)
        found: R = everywhere(function(*whole(args), **whole(kwargs)), mesh)
        return found

    return call


def _cut(tensor: torch.Tensor, mesh: Any, placements: Sequence[Any]) -> torch.Tensor:
    from torch.distributed.tensor import DTensor, Replicate

    cut: torch.Tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return cut.redistribute(placements=_no_summands(placements))  # type: ignore[attr-defined,no-any-return]


def _no_summands(placements: Sequence[Any]) -> tuple[Any, ...]:
    """The placements of a gradient: whole where the tensor itself is in summands."""
    from torch.distributed.tensor import Replicate

    return tuple(Replicate() if placement.is_partial() else placement for placement in placements)


def _refuse_transform(*_: Any) -> Any:
    raise UnsupportedTransformError(
        "vmap over a layer that is given DTensors is not possible, nor is forward mode (jvp, jacfwd, hessian): torch "
        "can neither map what lies on several processes nor give it a tangent. Use reverse mode (backward, grad, vjp), "
        "batch_dims= for many problems at once, or a loop over calls of the layer."
    )


class _Distribute(torch.autograd.Function):
    """A whole tensor in parts, NOTE [sharded objectives]."""

    @staticmethod
    def forward(whole: torch.Tensor, mesh: Any, placements: Any, check: Any = None) -> torch.Tensor:
        return _cut(whole.detach(), mesh, placements)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.layout, ctx.check = inputs[1:3], inputs[3] if len(inputs) > 3 else None
        ctx.set_materialize_grads(False)  # torch's zeros would be no DTensor

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor | None) -> Any:
        if cotangent is None:
            return None, None, None, None
        gradient = _Gather.apply(cotangent, *ctx.layout)
        if ctx.check is not None:
            ctx.check(gradient)
        return gradient, None, None, None

    vmap = staticmethod(_refuse_transform)


class _Gather(torch.autograd.Function):
    """The whole of a tensor in parts or summands; ``placements``: how its gradient is cut."""

    @staticmethod
    def forward(parts: torch.Tensor, mesh: Any, placements: Any) -> torch.Tensor:
        return parts.detach().full_tensor()  # type: ignore[attr-defined,no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.layout = inputs[1:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, cotangent: torch.Tensor | None) -> Any:
        if cotangent is None:
            return None, None, None
        return _Distribute.apply(cotangent, *ctx.layout), None, None

    vmap = staticmethod(_refuse_transform)


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
        self.mesh = next(layout[0] for layout in self.layouts if layout is not None)
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

    def seen(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` of sharded unknowns as one of the layer's unknowns; see :meth:`put_together`."""

        def of_inside(x: Any, *theta: Any) -> Any:
            return self.put_together(function(self.given(x), *theta))

        of_inside.unknowns = self.outside  # type: ignore[attr-defined]  # how its user calls them
        return of_inside

    def given(self, x: Any) -> Any:
        """The unknowns of the layer as the user's function gets them."""
        leaves, spec = flatten(x)
        return unflatten([self._given(i, leaf) for i, leaf in enumerate(leaves)], spec)

    def put_together(self, result: Any) -> Any:
        """The whole of what the user's function returns, which must be the same on every process."""
        result = whole(result)
        self.compare("value", [leaf for leaf in flatten(result)[0] if is_data(leaf)], range(self.mesh.ndim))
        return result

    def _given(self, index: int, leaf: torch.Tensor) -> torch.Tensor:
        layout = self.layouts[index]
        if layout is None:
            return leaf
        every = range(self.mesh.ndim)
        cut: torch.Tensor = _Distribute.apply(
            leaf, *layout, lambda gradient: self.compare(f"gradient in leaf {index} of x", [gradient], every)
        )
        return cut

    def compare(self, what: str, tensors: Sequence[torch.Tensor], dims: Sequence[int]) -> None:
        """Raise on every process unless the first ``tensors`` called ``what`` are the same on all, up to rounding.

        ``dims``: those of the mesh along which they are compared.
        """
        if what in self._compared or not tensors:
            return
        self._compared.add(what)
        here = [_torch.innermost(t).detach() for t in tensors]
        plain = [(t.to_local() if is_sharded(t) else t).double() for t in here]
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
    leaves, spec = flatten(tree)
    return unflatten([gathered(leaf) if is_data(leaf) else leaf for leaf in leaves], spec)


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a DTensor, with its graph; any other tensor itself."""
    layout = layout_of(tensor)
    return tensor if layout is None else _Gather.apply(tensor, layout[0], _no_summands(layout[1]))


def recut(tensor: torch.Tensor, how: tuple[Any, ...] | None) -> torch.Tensor:
    """The whole of ``tensor``, and that in parts where a layout says how, with its graph."""
    all_of_it = gathered(tensor)
    return all_of_it if how is None else _Distribute.apply(all_of_it, *how)


def gathered_where_plain(
    gradients: Sequence[torch.Tensor | None], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """The gradients of plain tensors put together: torch gives parts or summands where DTensors were met on the way."""
    pairs = zip(gradients, tensors, strict=True)
    return [g if g is None or is_sharded(t) else gathered(g) for g, t in pairs]
