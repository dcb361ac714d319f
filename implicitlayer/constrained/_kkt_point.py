"""The user's solver inside ``il.constrained_argmin``, and the problem at its answer: multipliers, polish, borders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from implicitlayer._errors import NonFiniteError, SolverOutputError
from implicitlayer.base._failures import FailedResult, marks, over_lanes, refuse, replaced
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import TreeSpec, flatten, flatten_with_names, name_lanes, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.constrained._kkt_lagrangian import ConstrainedProblem, Form, Unknowns
from implicitlayer.equation._jacobian import Jacobian
from implicitlayer.equation._residual import Residual, gradient_of
from implicitlayer.layer._forward import _check_leaf, called
from implicitlayer.programs._interior_point_step import norm_of
from implicitlayer.programs._kkt_active import ActiveConstraints, Conditions, Tolerances, length_of_step
from implicitlayer.programs._kkt_linear import KktSolver, Known, multipliers_of_lanes


@dataclass(frozen=True, eq=False)
class PointOfProblem:
    """A problem, or one per lane, to be looked at where the solver ended."""

    problem: ConstrainedProblem
    spec: TreeSpec
    theta: tuple[Any, ...]
    init: Leaves

    def flat(self, leaves: Leaves) -> torch.Tensor:
        """Leaves as [*lanes, n]."""
        return ravel(leaves, self.problem.lane_dims)

    def conditions(self, x: Leaves) -> Conditions:
        """The terms of the optimality conditions at x."""
        points = [leaf.detach().requires_grad_() for leaf in x]
        with torch.enable_grad():  # lanes are independent: the gradient of their sum holds that of each
            value = self.problem(unflatten(points, self.spec), *self.theta).sum()
            gradient = self._grad(value, points, create_graph=True)
            slope = self.flat(gradient)
            product = along = [torch.zeros_like(p) for p in points]
            if slope.requires_grad:
                direction = self.flat([p.detach() for p in points])
                product = self._grad((slope * direction).sum(), points, create_graph=False, retain_graph=True)
                along = self._grad((slope * slope.detach()).sum(), points, create_graph=False)
        h, rows_h = self.problem.rows(0, x, self.spec, self.theta)
        g, rows_g = self.problem.rows(1, x, self.spec, self.theta)
        flat, start = self.flat(x).double(), self.flat(self.init).double()
        slope, eps = slope.detach().double(), torch.finfo(x[0].dtype).eps
        pull = length_of_step(slope, self.flat(along).double())
        found = Conditions(
            flat, flat - start, slope, self.flat(product).double(), h, rows_h, g, rows_g, eps, pull,
        )  # fmt: skip
        # a step of rounding to the minimum of the objective alone: the gradient is H times that of x
        still = (pull > 0) & (pull <= 16 * eps * found.size)
        found = replace(found, at_rest=torch.where(still, norm_of(slope) * found.size / pull, 0.0))
        terms = torch.cat([found.gradient, found.h, rows_h.flatten(-2), found.g, rows_g.flatten(-2)], -1)
        finite = terms.isfinite().all(-1)
        if not bool(finite.all()):
            error = NonFiniteError(
                "the objective, a constraint or one of their gradients holds NaN or Inf at the solver's answer"
                f"{name_lanes(~finite)}. Check theta for NaN, and that the functions are differentiable there."
            )
            refuse(~finite, error)
            # a masked lane: anything finite does
            finite_parts: dict[str, Any] = {
                name: torch.where(over_lanes(finite, t), t, 0.0)
                for name in Conditions.__dataclass_fields__
                if isinstance(t := getattr(found, name), torch.Tensor)
            }
            found = replace(found, **finite_parts)
        return found

    def error(self, x: Leaves, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Distance from the solution that the gradient left of the Lagrangian implies, [*lanes], by one product."""
        points, dtype = [leaf.detach().requires_grad_() for leaf in x], x[0].dtype
        rest = (y.to(dtype), z.to(dtype), torch.ones_like(z, dtype=dtype))
        with torch.enable_grad():
            value = self.problem.scalar(Unknowns(unflatten(points, self.spec), *rest), *self.theta).sum()
            slope = self.flat(self._grad(value, points, create_graph=True))
            product = [torch.zeros_like(p) for p in points]
            if slope.requires_grad:
                product = self._grad((slope * slope.detach()).sum(), points, create_graph=False)
        return length_of_step(slope.detach().double(), self.flat(product).double())

    @staticmethod
    def _grad(value: torch.Tensor, points: Leaves, create_graph: bool, retain_graph: bool | None = None) -> Leaves:
        if not value.requires_grad:
            return [torch.zeros_like(p) for p in points]
        return list(
            torch.autograd.grad(
                value, points, create_graph=create_graph, retain_graph=retain_graph, materialize_grads=True
            )
        )

    def newton_step(
        self, x: Leaves, y: torch.Tensor, z: torch.Tensor, held: torch.Tensor
    ) -> tuple[Leaves, torch.Tensor, torch.Tensor] | None:
        """x and multipliers after a Newton step on the conditions with this active set, in the lanes that it improves.

        None if it improves none.
        """
        dtype, lane_dims, k = x[0].dtype, self.problem.lane_dims, len(x)
        at = [*x, *(t.to(dtype) for t in (y, z, held))]
        spec = flatten(Unknowns(unflatten(x, self.spec), y, z, held))[1]

        def slopes(leaves: Leaves, _: Leaves) -> Leaves:
            return gradient_of(self.problem.scalar(unflatten(leaves, spec), *self.theta), leaves)

        # the matrix is symmetric: its transpose has the cheaper products
        residual = Residual(slopes, is_gradient=False, lane_dims_of_function=lane_dims)

        def flat_slopes(leaves: Leaves) -> torch.Tensor:
            return ravel([leaf.detach() for leaf in residual.attached(leaves, []).value], lane_dims)

        with torch.enable_grad():
            slope = flat_slopes(at)
            operator = Jacobian(residual, len(at)).linearize(at)
            solver = KktSolver(self.flat(x).shape[-1], y.shape[-1], z.shape[-1])
            solution = solver(operator, slope)
            moved = unravel(ravel(at, lane_dims) - solution.value, at, lane_dims)
            after = flat_slopes(moved)
        better = (solution.codes <= Status.STAGNATED) & (norm_of(after) < norm_of(slope))  # usable, see Status
        if not bool(better.any()):
            return None
        chosen = replaced(better, at, moved)
        return chosen[:k], chosen[k].double(), chosen[k + 1].double()


@dataclass(eq=False)
class Finder:
    """Makes z of NOTE [the scalar] of the answer of a solver.

    The lanes of vmap come here one at a time (``implicitlayer.layer._forward``) unless the solver is batched; those
    of ``batch_dims`` always come together, and what is done with the answer is done for all of them at once.

    Attributes:
        call: the user's solver.
        tolerances, hold_kinks, polish: as in :func:`constrained_argmin`.
        found: the active set of each call of this object.
        num_polished: Newton steps kept in all calls.
    """

    call: Caller
    tolerances: Tolerances
    hold_kinks: bool
    polish: int
    found: list[ActiveConstraints] = field(default_factory=list)
    num_polished: int = 0

    @property
    def batched(self) -> bool:
        """Whether this is to be called once for all lanes of vmap."""
        return self.call.batched

    def __call__(self, scalar: Callable[..., torch.Tensor], start: Unknowns, *theta: Any) -> SolverResult:
        """z with the shapes of ``start``, and how the solver ended."""
        problem = ConstrainedProblem(scalar, start, self.call.forms)
        init, spec = flatten(start.x)
        answer = self.call(problem, init, spec, theta, start.equality.shape[:-1])
        x, point = answer.x, PointOfProblem(problem, spec, theta, init)
        at = point.conditions(x)
        near = at.near(self.tolerances.active_rtol)
        y, z = multipliers_of_lanes(at.gradient, at.rows_h, at.rows_g, near, answer.known)
        for _ in range(self.polish):
            _, held = self._classify(at, y, z)
            better = point.newton_step(x, y, torch.where(held, z, 0.0), held)
            if better is None:
                break
            x, y, z = better
            self.num_polished += 1
            at = point.conditions(x)
        active, held = self._classify(at, y, z)
        rtol = self.tolerances.stationarity_rtol
        if rtol is not None and bool((active.stationarity <= rtol).any()):
            wrong_by = point.error(x, active.equality, active.inequality)
            # how far an answer is off that is none, nobody knows
            wrong_by = torch.where(active.stationarity <= rtol, wrong_by, 0.0)
            active, held = self._classify(at, y, z, wrong_by)
        self.found.append(active)
        rest = (active.equality, torch.where(held, active.inequality, 0.0), held)
        return answer.result(Unknowns(unflatten(x, spec), *(t.to(x[0].dtype) for t in rest)))

    def _classify(
        self, at: Conditions, y: torch.Tensor, z: torch.Tensor, wrong_by: torch.Tensor | None = None
    ) -> tuple[ActiveConstraints, torch.Tensor]:
        return at.active_set(y, z, self.tolerances.active_rtol, self.hold_kinks, wrong_by)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a solver returned.

    Attributes:
        x: leaves, with all lanes.
        known: its own multipliers of each lane, in the order of the lanes; None for what it did not give.
        results: how its calls ended, as it says itself.
    """

    x: Leaves
    known: list[Known]
    results: list[SolverResult]

    def result(self, value: Any) -> SolverResult:
        """``value``, with the worst status and the largest number of steps of all calls."""
        worst = max(self.results, key=lambda result: int(result.status or 0), default=SolverResult(None))
        counts = [result.num_steps for result in self.results if result.num_steps is not None]
        lanes = torch.tensor([result.status is Status.NONFINITE for result in self.results])
        nonfinite = lanes if len(lanes) > 1 else worst.nonfinite
        return SolverResult(value, worst.status, max(counts) if counts else None, worst.message, nonfinite=nonfinite)


@dataclass(frozen=True, eq=False)
class Caller:
    """Calls the user's solver: once with all lanes if it is batched, else lane by lane.

    Args:
        solver: the user's.
        forms: of equations and inequalities.
        names: of the leaves of x.
        returns_multipliers: whether the solver returns ``(x, (lambda, mu))``.
    """

    solver: Callable[..., Any]
    forms: tuple[Form, Form]
    names: list[str]
    returns_multipliers: bool

    @property
    def batched(self) -> bool:
        """Whether the user's solver takes all lanes at once."""
        return bool(getattr(self.solver, "batched", False))

    def __call__(
        self, problem: ConstrainedProblem, init: Leaves, spec: TreeSpec, theta: tuple[Any, ...], lanes: torch.Size
    ) -> Answer:
        """The answer for leaves of init [*lanes, ...]."""
        if self.batched or not lanes:
            found = self._call(problem, init, spec, theta, lanes)
        else:
            every = list(np.ndindex(lanes))
            one = torch.Size()
            parts = [self._call(problem.of_lane(lane), [t[lane] for t in init], spec, theta, one) for lane in every]
            x = [
                torch.stack([part.x[i] for part in parts]).reshape(like.shape) if parts else like
                for i, like in enumerate(init)
            ]
            found = Answer(x, [part.known[0] for part in parts], [part.results[0] for part in parts])
        return self._finite(found, init, lanes)

    def _call(
        self, problem: ConstrainedProblem, init: Leaves, spec: TreeSpec, theta: tuple[Any, ...], lanes: torch.Size
    ) -> Answer:
        answer = called(self.solver, problem, init, spec, theta, masks=not lanes and marks.failed is not None)
        if isinstance(answer, FailedResult):
            none = [self._vectors(None, form, lanes, init[0].device)[0] for form in self.forms]
            return Answer(flatten(answer.value)[0], [(none[0], none[1])], [answer])
        result = answer if isinstance(answer, SolverResult) else SolverResult(answer)
        try:
            x, given = self._read(result.value, init)
            known = [self._vectors(given[i], form, lanes, init[0].device) for i, form in enumerate(self.forms)]
        except SolverOutputError as error:
            if not problem.lane:
                raise
            raise SolverOutputError(
                f"{error} It is called lane by lane, here for lane {problem.lane}: theta comes whole, and "
                "t[problem.lane] is the part of this lane. A solver of all lanes says so by an attribute batched = "
                "True."
            ) from error
        return Answer(x, list(zip(*known, strict=True)), [result])

    def _read(self, answer: Any, like: Leaves) -> tuple[Leaves, tuple[Any, Any]]:
        """x leaves and what the solver gave as multipliers."""
        given: tuple[Any, Any] = (None, None)
        if self.returns_multipliers or getattr(self.solver, "returns_multipliers", False):
            if not isinstance(answer, tuple) or len(answer) != 2 or not isinstance(answer[1], tuple | list):
                raise SolverOutputError(
                    "with solver_returns_multipliers=True the solver must return (x, (lambda, mu)), got "
                    f"{type(answer).__name__}. Give None for multipliers that it does not know."
                )
            answer, pair = answer
            if len(pair) != 2:
                raise SolverOutputError(f"the solver must return two multipliers, (lambda, mu), got {len(pair)}.")
            given = (pair[0], pair[1])
        leaves, names = flatten_with_names(answer, "x")
        if names != self.names:
            raise SolverOutputError(
                f"the solver must return the structure of init: expected leaves {self.names}, got {names}. If it "
                "returns multipliers too, pass solver_returns_multipliers=True."
            )
        return [_check_leaf(leaf, name, t) for leaf, name, t in zip(leaves, names, like, strict=True)], given

    def _vectors(
        self, value: Any, form: Form, lanes: torch.Size, device: torch.device
    ) -> Sequence[torch.Tensor | None]:
        """Multipliers of each lane, [size]; None where the solver gave none."""
        if form.spec is None or value is None:
            none = torch.zeros(0, dtype=torch.float64, device=device) if form.spec is None else None
            return [none] * lanes.numel()
        parts = [torch.as_tensor(leaf).detach().to(device, torch.float64) for leaf in flatten(value)[0]]
        for part in parts:
            if part.shape[: len(lanes)] != lanes:
                raise SolverOutputError(
                    f"the solver returned multipliers of shape {tuple(part.shape)} for {form.name}; a batched solver "
                    f"returns them with the lanes {tuple(lanes)} in front."
                )
        flat = [part.reshape(lanes.numel(), part.shape[len(lanes) :].numel()) for part in parts]
        vectors = torch.cat(flat, -1) if flat else torch.zeros(lanes.numel(), 0, dtype=torch.float64, device=device)
        if vectors.shape[-1] != form.size:
            raise SolverOutputError(
                f"the solver returned {vectors.shape[-1]} multipliers for {form.name}, which has {form.size} entries."
            )
        return vectors.unbind(0)

    def _finite(self, found: Answer, init: Leaves, lanes: torch.Size) -> Answer:
        """The answer, with init in the place of what is not finite in masked lanes."""
        x = found.x
        for leaf, name in zip(found.x, self.names, strict=True):
            finite = leaf.isfinite().reshape(*lanes, leaf.shape[len(lanes) :].numel()).all(-1)
            if not bool(finite.all()):
                error = NonFiniteError(
                    f"the solver returned NaN or Inf in {name}{name_lanes(~finite)}: it diverged or failed."
                )
                refuse(~finite, error)
                x = replaced(~finite, x, init)
        for which, form in enumerate(self.forms):
            vectors = [pair[which] for pair in found.known]
            finite = torch.tensor([v is None or bool(v.isfinite().all()) for v in vectors], dtype=torch.bool)
            if not bool(finite.all()):
                where = name_lanes(~finite.reshape(lanes))
                raise NonFiniteError(f"the solver returned NaN or Inf in the multipliers of {form.name}{where}.")
        return replace(found, x=x)
