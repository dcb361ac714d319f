"""The user's solver inside ``il.constrained_argmin``, and the problem at its answer: multipliers, polish, borders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from implicitlayer._errors import NonFiniteError
from implicitlayer.base._failures import over_lanes, refuse, replaced
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import TreeSpec, flatten, name_lanes, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.constrained._kkt_answer import Caller
from implicitlayer.constrained._kkt_lagrangian import ConstrainedProblem, Unknowns
from implicitlayer.equation._jacobian import Jacobian
from implicitlayer.equation._residual import Residual, gradient_of
from implicitlayer.programs._interior_point_step import norm_of
from implicitlayer.programs._kkt_active import ActiveConstraints, Conditions, Tolerances, length_of_step
from implicitlayer.programs._kkt_linear import KktSolver
from implicitlayer.programs._kkt_multipliers import multipliers_of_lanes


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
