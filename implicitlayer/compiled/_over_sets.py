"""What is compiled of a layer over a set or with a regulariser, whose prox acts on every entry by itself."""

# The equation is that of constrained/_prox_equation.py, F = x - prox(y), y = x - eta grad f(x), so that with D the
# derivative of the prox, here a diagonal, J = I - D (I - eta H). An entry with D = 0 is held, any other is free:
#     J e = F:     e = F on the held entries,   (H + E) e = F / (eta D) - H F_held   on the free ones,
#     J'u = v:     u = z / (eta D) on the free entries, where (H + E) z = v there, and z = 0 on the held ones,
#                  u = v - H z on the held ones,
# with E = (1/D - 1) / eta, the curvature of the regulariser. So the system is symmetric, and conjugate gradients solve
# it. The gradient is (d prox(x - eta grad f(x, theta), theta) / d theta)' u.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from implicitlayer.base._tree import TreeSpec, flatten, positive, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.compiled._program import MARGIN, Problem, is_tight, measure
from implicitlayer.constrained._constrained import ROUNDINGS, ProxLayer
from implicitlayer.constrained._prox_equation import FLOOR, step_of
from implicitlayer.equation._distance import GROWN, NEAR
from implicitlayer.equation._flat import Signature
from implicitlayer.equation._residual import vjp
from implicitlayer.equation._traced import TracedProblem
from implicitlayer.layer._verdict import CHANGES
from implicitlayer.linear._common import lane_norm
from implicitlayer.linear._operator import lane_dot, lane_scale
from implicitlayer.linear._traced import TracedSystem
from implicitlayer.sets._term import ProximalTerm, largest_of, resolve, signs


@dataclass(frozen=True, eq=False, kw_only=True)
class ProxProblem(Problem):
    """The same with a term.

    Attributes:
        terms, name: set or regulariser, and what the user called it.
        rebuild: theta leaves -> the user's arguments.
        spec: structure of the unknowns.
        step_size: eta where the user has fixed it.
    """

    terms: Any
    name: str
    rebuild: Callable[[Leaves], tuple[Any, ...]]
    spec: TreeSpec
    step_size: float | None

    def term(self, theta: Leaves) -> ProximalTerm:
        """The term at this theta."""
        return resolve(self.terms, self.rebuild([t.view_as(t) for t in theta]), self.name)

    def at(self, init: Leaves, theta: Leaves) -> TracedProblem:
        """The objective for this theta, with the prox of the term."""
        objective = Problem.at(self, init, theta)
        objective.prox = partial(self._flat, lambda y, step: self.term(theta).prox(y, step, self.lane_dims), init)
        return objective

    def _flat(self, what: Callable[..., Any], like: Leaves, y: torch.Tensor, *step: torch.Tensor) -> torch.Tensor:
        """What the term says of a vector [*lanes, n], as one."""
        return ravel(flatten(what(self._tree(y, like), *step))[0], self.lane_dims)

    def _tree(self, y: torch.Tensor, like: Leaves) -> Any:
        return unflatten(unravel(y, like, self.lane_dims), self.spec)

    def judge(self, traced: TracedProblem, x: torch.Tensor, theta: Leaves) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether every check of the layer passes, bool [*lanes], and what was measured."""
        prox, term, dims = traced.prox, self.term(theta), self.lane_dims
        assert prox is not None
        outside = term.violation(self._tree(x, traced.like), dims)
        gradient, pull = vjp(traced.gradient, x)
        curve = lambda v: pull(v)[0]  # noqa: E731
        w = ravel(signs(traced.like), dims)
        step = self._step(x, gradient, curve(w))
        eta = step.unsqueeze(-1)
        y = x - eta * gradient
        F = x - prox(y, step)
        norm, allowed = lane_norm(F), torch.full(x.shape[:-1], torch.inf, dtype=torch.float64, device=x.device)
        reached = largest_of(x)
        if self.checks is None:
            inside = ~outside.isnan() if self.rtol is None else outside <= self.rtol * reached
            return norm.isfinite() & inside, torch.stack([norm, allowed, step.double()])
        eps = torch.finfo(x.dtype).eps
        free = self._flat(lambda at, by: term.diagonal(at, by, dims), traced.like, y, step)
        extent = torch.maximum(reached, term.magnitude(self._tree(y, traced.like), dims))
        size = torch.maximum(lane_norm(x), lane_norm(x - traced.start))
        size = torch.maximum(size, (eps**FLOOR * extent).double())

        at = measure(F, lambda u: u - free * u + eta * curve(free * u), norm, size)
        part = torch.where(norm > 0, at.distance / positive(lane_norm(at.product)), 0.0).to(x.dtype).unsqueeze(-1)
        there = x - part * at.product
        moved = there - prox(there - eta * traced.gradient(there), step)
        unit = lane_scale(F)
        change = 2 * lane_dot(F / unit, moved / unit).abs() / positive(lane_dot(F / unit, F / unit))
        # where the layer looks at kinks: they are to be further away than the answer is from a solution
        tolerance = torch.maximum(
            torch.maximum(eps**0.5 * extent, ROUNDINGS * eps * largest_of(y)), 2 * norm.to(eta.dtype)
        )
        margins = flatten(term.activity(self._tree(y, traced.like), step, dims)[1])[0]
        nearest = ravel(margins, dims).amin(-1)
        # NOTE [second-order condition] of constrained/_constrained.py
        p = free * w
        bend = lane_dot(p / positive(lane_scale(p)), w - p + eta * curve(p))
        inside = outside <= self.checks * positive(torch.maximum(reached, eps**FLOOR * extent))
        steady = is_tight(at, x) | (change <= CHANGES * self.checks)
        fine = (at.relative <= self.checks) & steady & (nearest > tolerance) & (bend >= 0) & inside & norm.isfinite()
        allowed = torch.minimum(self.checks * size, nearest.double() / NEAR)
        return fine, torch.stack([norm, allowed, step.double()])

    def _step(self, x: torch.Tensor, gradient: torch.Tensor, curved: torch.Tensor) -> torch.Tensor:
        if self.step_size is not None:
            return x.new_full(x.shape[:-1], self.step_size)
        return step_of([x], [gradient], [curved], x.ndim - 1)

    def pull(self, x: Leaves, theta: Leaves, cotangent: Leaves, measured: torch.Tensor) -> tuple[Leaves, torch.Tensor]:
        """Gradients of the needed theta leaves, and whether all is well; ``measured``: of :meth:`solve`."""
        traced, dims, term = self.at(x, theta), self.lane_dims, self.term(theta)
        assert traced.prox is not None
        flat, v, step = traced.start, ravel(cotangent, dims), measured[2].to(traced.dtype)
        eta = step.unsqueeze(-1)
        gradient, curve = traced.gradient(flat), partial(traced.curvature, flat)
        y = flat - eta * gradient
        F = flat - traced.prox(y, step)
        diagonal = self._flat(lambda at, by: term.diagonal(at, by, dims), x, y, step)
        free = diagonal > 0
        scaled = torch.where(free, eta * torch.where(free, diagonal, 1.0), 1.0)  # eta D
        bent = torch.where(free, (1 - diagonal) / scaled, 0.0)  # E

        def product(u: torch.Tensor) -> torch.Tensor:
            inside = torch.where(free, u, 0.0)
            return torch.where(free, curve(inside) + bent * inside, u / eta)

        held = torch.where(free, 0.0, F)
        rest = torch.where(free, F / scaled - curve(held), 0.0)
        solution = self.linear_solver.traced(TracedSystem(product, torch.where(free, v, 0.0), None, rest))
        z = solution.value
        u = torch.where(free, z / scaled, v - curve(z))
        fine = solution.sure & v.isfinite().all(-1) & (lane_norm(F) <= GROWN * measured[0])
        fine = fine & (MARGIN * solution.reach + lane_norm(held) <= measured[1])

        def near(full: Leaves) -> torch.Tensor:
            objective = self.at(x, full)
            assert objective.prox is not None
            return objective.prox(flat - eta * objective.gradient(flat), step)

        return self.pulled(near, theta, u), fine.all()


def with_terms(layer: ProxLayer, init: Any, theta: tuple[Any, ...]) -> dict[str, Any]:
    """What :class:`ProxProblem` has more than others, for calls like this one.

    Raises:
        TypeError: a term that looks at several entries together.
    """
    term, (leaves, spec) = resolve(layer.terms, theta, layer.terms_name), flatten(init)
    if term.diagonal(init, leaves[0].new_ones(()), 0) is None:
        raise TypeError(
            f"{layer.terms_name}={type(term).__name__} has no compiled form: only terms that act on every entry by "
            "itself have one (il.sets.Box, il.sets.NonNegative, il.L1, il.ElasticNet, and pytrees of these). The layer "
            "itself takes any."
        )
    rebuild = Signature.of(theta).slots.rebuild
    more = {"terms": layer.terms, "name": layer.terms_name, "rebuild": rebuild, "spec": spec}
    return {**more, "step_size": layer.step_size}
