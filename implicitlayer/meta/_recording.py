"""Inner steps and Hessian-vector products recorded as CUDA graphs, one for each shape of a batch of tasks."""

# B: tasks, n: entries of phi of one task

# NOTE [recordings]: a CUDA graph replays kernels at the addresses at which they were recorded, without Python and
# without waiting for the device. So all that it reads lies in buffers that stay where they are and are filled before a
# replay, and what it leaves is copied out after it. A tensor that the loss reads from elsewhere (a closure) would keep
# its old address when it is replaced by another: such a loss is not recorded.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from implicitlayer import _torch
from implicitlayer._errors import ImplicitLayerWarning, warn
from implicitlayer.base._solution import LinearSolution, RecordingSolver, SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import flatten, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves, PyTree
from implicitlayer.equation._capture import find_closed_over
from implicitlayer.linear._operator import FlatOperator, LinearSolver
from implicitlayer.solvers import GradientDescent
from implicitlayer.solvers._leaves import moves, present

Body = Callable[[], None]
Record = Callable[[Sequence[Body]], list[Callable[[], object]]]

_WARM_UP = 3  # runs before recording: cuDNN chooses its algorithms and libraries make their workspaces in the first


def recorder(device: torch.device) -> Record:
    if device.type != "cuda":
        raise RuntimeError(f"tensors on {device} cannot be recorded, only those on a CUDA device")
    return partial(_cuda_graphs, device)


def _cuda_graphs(device: torch.device, bodies: Sequence[Body]) -> list[Callable[[], object]]:
    """One graph for each body, in one memory pool: what a body leaves alive, the later ones may read."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            for body in bodies:
                body()
    torch.cuda.current_stream(device).wait_stream(stream)
    pool = torch.cuda.graph_pool_handle()
    graphs = [torch.cuda.CUDAGraph() for _ in bodies]
    for graph, body in zip(graphs, bodies, strict=True):
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool):
            body()
    return [graph.replay for graph in graphs]


class Recording:
    """The inner problem of B tasks of one shape: its descent and its Hessian-vector products, ready for replay.

    Args:
        objective: ``objective(phi, theta, support) -> [B]``.
        data: ``(init, theta, support)`` of a call.
        record: makes replays of bodies.
        solver: whose steps are recorded; None records none.
        with_products: whether Hessian-vector products are recorded.
    """

    def __init__(
        self,
        objective: Callable[..., torch.Tensor],
        data: tuple[PyTree, PyTree, PyTree],
        record: Record,
        solver: GradientDescent | None,
        with_products: bool,
    ) -> None:
        self._objective, self._solver = objective, solver
        leaves, self._phi_spec = flatten(data[0])
        self._like = [torch.empty_like(leaf, device="meta") for leaf in leaves]
        tensors, self._data_spec = flatten(data[1:])
        self._data = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        self._phi = ravel([leaf.detach() for leaf in leaves], 1).clone()
        self._vector, self._product = torch.zeros_like(self._phi), torch.empty_like(self._phi)
        self._descend = record([self._steps])[0] if solver is not None else None
        self._products = record([self._slope_at, self._pull]) if with_products else []

    @property
    def has_steps(self) -> bool:
        return self._descend is not None

    def descend(self, init: PyTree, theta: PyTree, support: PyTree) -> torch.Tensor:
        """The solver's steps from ``init``; [B, n]."""
        assert self._descend is not None
        self._fill(ravel(flatten(init)[0], 1), flatten((theta, support))[0])
        self._descend()
        return self._phi.clone()

    def products_at(self, phi: torch.Tensor, data: Leaves) -> Callable[[torch.Tensor], torch.Tensor]:
        """``v -> (d2 objective / d phi2) v``, [B, n] each; to be used up before anything else of this recording is."""
        ready = False

        def product(vector: torch.Tensor) -> torch.Tensor:
            nonlocal ready
            linearise, multiply = self._products
            if not ready:
                self._fill(phi, data)
                linearise()
                ready = True
            self._vector.copy_(vector)
            multiply()
            return self._product.clone()

        return product

    def unravel(self, phi: torch.Tensor) -> PyTree:
        """[B, n] in the structure of phi."""
        return unflatten(unravel(phi, self._like, 1), self._phi_spec)

    def _fill(self, phi: torch.Tensor, data: Leaves) -> None:
        with torch.no_grad():
            self._phi.copy_(phi)
            for buffer, value in zip(self._data, data, strict=True):
                buffer.copy_(value)

    def _gradient(self, phi: torch.Tensor, create_graph: bool) -> torch.Tensor:
        with torch.enable_grad():
            theta, support = unflatten(self._data, self._data_spec)
            value = self._objective(self.unravel(phi), theta, support).sum()
            return torch.autograd.grad(value, phi, create_graph=create_graph)[0]

    def _steps(self) -> None:
        assert self._solver is not None
        with torch.no_grad():
            for _ in range(self._solver.max_steps):
                gradient = self._gradient(self._phi.detach().requires_grad_(), create_graph=False)
                step_size, leaves = present(self._solver.step_size), unravel(gradient, self._like, 1)
                self._phi.sub_(ravel(moves(step_size, leaves, self._phi_spec, 1), 1))

    def _slope_at(self) -> None:
        self._point = self._phi.detach().requires_grad_()
        self._slope = self._gradient(self._point, create_graph=True)

    def _pull(self) -> None:
        how = {"retain_graph": True, "materialize_grads": True}
        (product,) = torch.autograd.grad(self._slope, self._point, self._vector, **how)
        self._product.copy_(product)


@dataclass(eq=False)
class RecordedCall(RecordingSolver):
    """One call: the inner solver of the layer, by replay where its steps were recorded; it remembers where it ended."""

    recording: Recording
    inner_solver: Any
    linear_solver: Any
    theta: PyTree
    support: PyTree
    phi: torch.Tensor | None = None

    @property
    def batched(self) -> bool:
        return bool(getattr(self.inner_solver, "batched", False))

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        if self.recording.has_steps:
            self.phi = self.recording.descend(init, self.theta, self.support)
            return SolverResult(self.recording.unravel(self.phi), Status.STEP_LIMIT, self.inner_solver.max_steps)
        solve = self.inner_solver.run if isinstance(self.inner_solver, RecordingSolver) else self.inner_solver
        found = solve(objective, init, *theta)
        result = found if isinstance(found, SolverResult) else SolverResult(found)
        self.phi = ravel([leaf.detach() for leaf in flatten(result.value)[0]], 1).clone()
        return result


@dataclass(eq=False)
class ReplayedProducts(LinearSolver):
    """The linear solver of the layer, with the recorded products in place of the operator's own."""

    call: RecordedCall

    def __getattr__(self, name: str) -> Any:
        return getattr(self.call.linear_solver, name)

    def solve(self, operator: FlatOperator, rhs: torch.Tensor) -> LinearSolution:
        call = self.call
        assert call.phi is not None
        data = [leaf.detach() for leaf in flatten((call.theta, call.support))[0]]
        product = call.recording.products_at(call.phi, data)
        replayed = replace(operator, matvec=product, transpose_matvec=product)
        return call.linear_solver(replayed, rhs)  # type: ignore[no-any-return]


@dataclass(eq=False)
class Recordings:
    """All recordings of one method, and why there is none where there is none."""

    kept: dict[Any, Recording | None] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def recording(
        self,
        objective: Callable[..., torch.Tensor],
        inner_solver: Any,
        own: Sequence[torch.Tensor],
        data: tuple[PyTree, PyTree, PyTree],
    ) -> Recording | None:
        """That of ``data``, (init, theta, support), made at its first call; None, after a warning, where there is none.

        ``own``: the tensors that the objective may read besides its arguments, because they are changed in place only.
        """
        leaves, with_products = flatten(data)[0], torch.is_grad_enabled()
        key = (with_products, *((t.shape, t.dtype, t.device) if isinstance(t, torch.Tensor) else None for t in leaves))
        if key in self.kept:
            return self.kept[key]
        self.kept[key] = None
        obstacle = _obstacle(objective, own, data)
        by = inner_solver if isinstance(inner_solver, GradientDescent) else None
        fixed = by is not None and not (by.has_tolerance or by.line_search or by.callback or by.progress)
        solver = by if fixed else None
        if obstacle is None:
            try:
                self.kept[key] = Recording(objective, data, recorder(leaves[0].device), solver, with_products)
            except RuntimeError as error:
                obstacle = f"recording failed ({str(error).splitlines()[0]})"
        if obstacle is not None:
            self.tell(f"inner steps and products run one by one: {obstacle}")
        elif solver is None:
            self.tell(
                f"inner steps run one by one: {type(inner_solver).__name__} as it is set decides while it runs. "
                "Products are recorded, and so is GradientDescent with max_steps alone"
            )
        return self.kept[key]

    def tell(self, message: str) -> None:
        if message not in self.told:
            self.told.add(message)
            warn(f"capture=True: {message}.", ImplicitLayerWarning, message)


_of_methods: WeakKeyDictionary[Any, Recordings] = WeakKeyDictionary()


def recordings_of(method: Any) -> Recordings:
    """Those of a method, kept beside it as long as it lives: a copy of it makes its own."""
    return _of_methods.setdefault(method, Recordings())


def _obstacle(
    objective: Callable[..., torch.Tensor], own: Sequence[torch.Tensor], data: tuple[PyTree, PyTree, PyTree]
) -> str | None:
    leaves = flatten(data)[0]
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        return "support holds objects that are no tensors"
    if len({leaf.dtype for leaf in flatten(data[0])[0]}) > 1 or len({leaf.device for leaf in leaves}) > 1:
        return "the tensors have several dtypes or devices"
    if _torch.transforms_active():
        return "a transform of torch.func is active"
    closed, known = find_closed_over(objective, data), {id(tensor) for tensor in own}
    foreign = [t for t in (*closed, *(t for t, _ in closed.constants)) if id(t) not in known]
    if foreign:
        return (
            f"task_loss closes over a tensor of shape {tuple(foreign[0].shape)}, and a recording would go on "
            "reading it after it was replaced. Pass it in the batch"
        )
    return None
