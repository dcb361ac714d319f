"""The two functions of a compiled layer: from init to an answer that is checked, and from a cotangent to gradients."""

# Both end in one bool: whether every check of the layer that is not compiled would pass at once. Where it is false that
# layer judges the same answer, so nothing is told twice in two ways, and no error or remedy is written here.

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from implicitlayer import _torch
from implicitlayer._errors import ClosureError
from implicitlayer.base._status import Status
from implicitlayer.base._tree import ravel, unravel
from implicitlayer.base._types import FlatFunction, Leaves
from implicitlayer.equation._distance import GROWN, NOISE, TIGHT, Stationarity, change_along
from implicitlayer.equation._flat import Parts
from implicitlayer.equation._jacobian import inverse_diagonal
from implicitlayer.equation._residual import vjp
from implicitlayer.equation._traced import TracedProblem
from implicitlayer.layer._verdict import CHANGES
from implicitlayer.linear._common import lane_norm
from implicitlayer.linear._operator import lane_scale
from implicitlayer.linear._traced import TracedSystem

# The largest of a few Rayleigh quotients is not the largest eigenvalue: this much is left for it.
MARGIN = 10.0

# What :meth:`Problem.solve` has measured, [3, *lanes]: ||F||, the distance to a solution that is allowed, and the step
# of a layer over a set.
NUM_MEASURED = 3


@dataclass(frozen=True, eq=False)
class Problem:
    """What is compiled: everything about a call that is not a tensor.

    Attributes:
        function: objective ``(x leaves, theta leaves) -> value per lane``.
        parts: what it tells of itself.
        lane_dims: dimensions of lanes.
        solver, linear_solver: with a method ``traced``.
        damping, rtol: of the layer (``stationarity_rtol``).
        needed: which theta leaves get a gradient.
    """

    function: FlatFunction
    parts: Parts
    lane_dims: int
    solver: Any
    linear_solver: Any
    damping: float
    rtol: float | None
    needed: tuple[bool, ...]

    @property
    def checks(self) -> float | None:
        """``rtol`` where a derivative will be asked for."""
        return self.rtol if any(self.needed) else None

    def at(self, init: Leaves, theta: Leaves) -> TracedProblem:
        """The objective for this theta.

        It gets views: torch's tracer (2.13) keeps what is read of a tensor from outside of a loop, such as .mT, beyond
        the level of torch.func that it belongs to.
        """
        return TracedProblem(lambda x: self.function(x, [t.view_as(t) for t in theta]), init, self.lane_dims)

    def solve(self, init: Leaves, theta: Leaves) -> tuple[Any, ...]:
        """x leaves, whether all is well (bool, 0-d), a :class:`Status` per lane, and what was measured."""
        traced = self.at(init, theta)
        x, codes = self.solver.traced(traced)
        fine, measured = self.judge(traced, x, theta)
        fine = fine & (codes <= int(Status.TRUNCATED)) & x.isfinite().all(-1)
        return unravel(x, init, self.lane_dims), fine.all(), codes, measured

    def judge(self, traced: TracedProblem, x: torch.Tensor, theta: Leaves) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether every check of the layer passes, bool [*lanes], and what was measured."""
        gradient, pull = vjp(traced.gradient, x)
        norm = lane_norm(gradient)
        fine, allowed = norm.isfinite(), torch.full_like(norm, torch.inf)
        if self.checks is not None:
            size = torch.maximum(lane_norm(x), lane_norm(x - traced.start))
            size = torch.clamp(size, min=NOISE * torch.finfo(x.dtype).eps * max(x.shape[-1], 1) ** 0.5)
            at = measure(gradient, lambda unit: pull(unit)[0], norm, size)
            steady = is_tight(at, x) | (change_along(at, x, traced.gradient) <= CHANGES * self.checks)
            fine, allowed = fine & (at.relative <= self.checks) & steady, self.checks * size
        return fine, torch.stack([norm, allowed, torch.ones_like(norm)])

    def pull(self, x: Leaves, theta: Leaves, cotangent: Leaves, measured: torch.Tensor) -> tuple[Leaves, torch.Tensor]:
        """Gradients of the needed theta leaves, and whether all is well; ``measured``: of :meth:`solve`."""
        traced, lane_dims = self.at(x, theta), self.lane_dims
        flat, rhs = traced.start, ravel(cotangent, lane_dims)
        gradient = traced.gradient(flat)

        def product(v: torch.Tensor) -> torch.Tensor:
            return traced.curvature(flat, v) + self.damping * v

        inverse = None if self.parts.metric is None else inverse_diagonal(self.parts.metric(x, theta), x, lane_dims)
        solution = self.linear_solver.traced(TracedSystem(product, rhs, inverse, gradient))
        fine = solution.sure & rhs.isfinite().all(-1) & (lane_norm(gradient) <= GROWN * measured[0])
        if self.damping == 0:
            fine = fine & (MARGIN * solution.reach <= measured[1])
        found = self.pulled(lambda full: self.at(x, full).gradient(flat), theta, -solution.value)
        return found, fine.all()

    def pulled(self, function: Callable[[Leaves], torch.Tensor], theta: Leaves, u: torch.Tensor) -> Leaves:
        """The derivative of ``u' function(theta)`` in the needed theta leaves."""
        chosen = [i for i, need in enumerate(self.needed) if need]

        def of_needed(some: Leaves) -> torch.Tensor:
            full = list(theta)
            for i, leaf in zip(chosen, some, strict=True):
                full[i] = leaf
            return function(full)

        _, back = vjp(of_needed, [theta[i] for i in chosen])
        (found,) = back(u)
        return list(found)


def measure(
    F: torch.Tensor, transposed: Callable[[torch.Tensor], torch.Tensor], norm: torch.Tensor, size: torch.Tensor
) -> Stationarity:
    """As equation/_distance.py has it, which reads numbers on the way; ``transposed``: v -> J'v."""
    scale = lane_scale(F)
    product = transposed(F / scale)
    distance = torch.where(norm > 0, (norm / scale[..., 0]) ** 2 / lane_norm(product) * scale[..., 0], 0.0)
    return Stationarity(F, product * scale, norm, distance, distance / size, size)


def is_tight(at: Stationarity, x: torch.Tensor) -> torch.Tensor:
    """Lanes, bool [*lanes], so near to a solution that no change on the way there matters."""
    tight: torch.Tensor = at.distance <= torch.finfo(x.dtype).eps ** TIGHT * at.size
    return tight


def shaped(leaves: Leaves, shapes: list[torch.Size]) -> Leaves:
    return [leaf.reshape(shape) for leaf, shape in zip(leaves, shapes, strict=True)]


def closed_over(count: int) -> ClosureError:
    """The error of an objective that reads weights from outside."""
    return ClosureError(
        f"the objective closes over {count} tensor{'s' * (count > 1)} that require a gradient (module weights?), and a "
        "compiled layer differentiates its arguments only. Pass them as one more theta: "
        "torch.func.functional_call(module, weights, x) with weights = dict(module.named_parameters()). The layer "
        "itself, not compiled, finds them."
    )


@dataclass(eq=False)
class Program:
    """``solve`` and ``pull`` of one problem, compiled when first called.

    Attributes:
        shapes: of the leaves of x and of theta, which come as tensors of one entry where they are numbers.
        one_at_a_time: a lock for the calls that compile, so that two threads do not compile the same.
        outside: constant tensors that the objective closes over, with their versions at the first call.
        num_compilations: how often the compiler has been asked.
        has_solved, has_pulled: whether each has run, so that a next call compiles nothing.
    """

    problem: Problem
    shapes: tuple[list[torch.Size], list[torch.Size]]
    backend: str
    options: dict[str, Any]
    one_at_a_time: Any
    outside: Sequence[tuple[torch.Tensor, int]]
    num_compilations: int = 0
    has_solved: bool = False
    has_pulled: bool = False
    solve: Callable[..., Any] = field(init=False)
    pull: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        of_x, of_theta = self.shapes

        def solve(init: Leaves, theta: Leaves) -> Any:
            return self.problem.solve(shaped(init, of_x), shaped(theta, of_theta))

        def pull(x: Leaves, theta: Leaves, v: Leaves, measured: torch.Tensor) -> Any:
            return self.problem.pull(shaped(x, of_x), shaped(theta, of_theta), shaped(v, of_x), measured)

        self.solve, self.pull = self._compiled(solve), self._compiled(pull)

    def num_changes(self) -> int:
        """How often the constant tensors that the objective closes over have been changed in place."""
        return sum(tensor._version for tensor, _ in self.outside)

    def _compiled(self, function: Any) -> Callable[..., Any]:
        # the compiler keeps its results by code objects, and few for each: every program has its own
        own = types.FunctionType(function.__code__.replace(), globals(), None, None, function.__closure__)
        compiled: Callable[..., Any] = torch.compile(own, backend=self._backend, dynamic=False, fullgraph=True)
        return compiled

    def _backend(self, graph: Any, inputs: Sequence[Any]) -> Any:
        """The compiler of torch, after a look at what the objective reads: what is given requires no gradient."""
        self.num_compilations += 1
        count = sum(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)
        if count:
            raise closed_over(count)
        if self.backend == "eager":
            return graph.forward
        return _torch.inductor()(graph, inputs, config_patches={**_torch.kept_loops(), **self.options})
