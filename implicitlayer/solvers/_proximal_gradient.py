"""Proximal gradient steps for smooth objectives plus a simple set or regulariser, one problem or many at once."""

# Legend: z extrapolated points (gradients are taken there), L step 1/L, t and m the momentum, per lane.
#     x_{k+1} = prox_{r/L}(z_k - grad f(z_k) / L)          z_{k+1} = x_{k+1} + m (x_{k+1} - x_k)
# z - prox(z - g/L) vanishes at solutions only; times L it is the gradient where r is zero.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from implicitlayer.base._solution import SolverResult
from implicitlayer.base._tree import flatten, lane_reduce, leaves_norm, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.equation._residual import pull_back
from implicitlayer.sets._term import expand_like, resolve
from implicitlayer.solvers._leaves import (
    Momentum,
    add,
    check_num_steps,
    check_unknowns,
    choose,
    minus,
    value_and_gradient,
)
from implicitlayer.solvers._outcome import StallWatch, codes_of, contradiction, finite_leaves, outcome, relative_move
from implicitlayer.solvers._progress import Iteration, Settings, reporting

_MAX_DOUBLINGS = 200
_NOISE = 16  # rounding errors of a sum, in units of eps
_DROWNED = 100  # a change of the objective below this many rounding errors is not tested by values

Prox = Callable[[Leaves, torch.Tensor], Leaves]


@dataclass(frozen=True)
class ProximalGradient(Settings):
    """FISTA with restarts and backtracking: minimises ``objective(x) + r(x)``, or objective over a set.

    Stops a lane when ``L ||z - x_new||_2 <= max(atol, rtol * scale)`` (that is the norm of the gradient where r is
    zero), with ``scale`` the larger of this number and the gradient's norm at the start. Without a tolerance it goes on
    until ``max_steps``, or a step of zero; with one, a lane that only rounding errors move any more stops, status
    ``STAGNATED``. In a layer with ``constraint=`` or ``regularizer=`` it takes that of the layer, and all lanes of a
    batch step together; with a term of its own, any other layer calls it lane by lane.

    Args:
        regularizer: a set or regulariser (``il.sets``, ``il.L1``, ...), a pytree of them, or a function of theta that
            returns one; None takes that of the layer.
        accelerated: Nesterov's momentum, restarted whenever it points uphill; False for plain steps.
        step_size: 1/L, positive, in units of 1 / curvature; None finds it by backtracking.
        max_steps: limit of steps; without a tolerance, their number.
        rtol, atol: tolerances, see above; both 0 means none.
        callback: called with an :class:`Iteration` after every step; ``value`` is the smooth objective at z and
            ``gradient_norm`` the number of the stopping test.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: no term at all, a step size that is not positive, a negative limit or tolerance.
        TypeError: unknowns that are no floating tensors, a limit of steps that is no integer.
        ObjectiveError: an objective whose gradient autograd cannot see.

    Source: A. Beck and M. Teboulle, SIAM J. Imaging Sci. 2 (2009); restarts: O'Donoghue & Candes 2015
    (arXiv:1204.3982), the gradient scheme. Difference: where a decrease drowns in rounding, L is tested by gradients.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.ProximalGradient(il.L1(1.0), rtol=1e-12)
        >>> y = torch.tensor([3.0, 0.5], dtype=torch.float64)
        >>> solver(lambda x: 0.5 * ((x - y) ** 2).sum(), torch.zeros(2, dtype=torch.float64)).tolist()
        [2.0, 0.0]
    """

    regularizer: Any = None
    _: KW_ONLY
    accelerated: bool = True
    step_size: float | None = None

    batched: ClassVar[Any] = property(lambda self: self.regularizer is None)  # a term of the layer, which knows lanes
    in_parts: ClassVar[Any] = batched

    def __post_init__(self) -> None:
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ValueError(f"step_size={self.step_size} must be positive and finite. Leave it out to have it found.")
        super().__post_init__()
        check_num_steps(self.max_steps)
        if self.regularizer is not None and not callable(self.regularizer):
            resolve(self.regularizer, (), "regularizer")

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        leaves, spec = flatten(init)
        check_unknowns(leaves)
        prox = self._prox(objective, spec, theta)
        x = [leaf.detach().clone() for leaf in leaves]
        z = x
        value, slope = value_and_gradient(objective, z, spec, theta)
        lane_dims = value.ndim
        if self.step_size is None:
            curvature = _curvature_along(objective, z, slope, spec, theta, lane_dims)
        else:
            curvature = torch.full(value.shape, 1 / self.step_size, dtype=torch.float64, device=value.device)
        momentum = Momentum(None)
        tolerance: torch.Tensor | None = None
        running = torch.ones(value.shape, dtype=torch.bool, device=value.device)
        reached = stalled = ~running
        watch = StallWatch.unset(curvature, z[0].dtype)
        before: tuple[Leaves, Leaves] | None = None
        norm = torch.full_like(curvature, math.inf)
        step = 0
        with reporting(self.callback, self.progress, self.max_steps) as report:
            for step in range(1, self.max_steps + 1):
                if step > 1:
                    value, slope = value_and_gradient(objective, z, spec, theta)
                new = _stepped(prox, z, slope, curvature)
                if self.step_size is None:
                    at = lambda p: value_and_gradient(objective, p, spec, theta)  # noqa: E731
                    curvature, new = _backtrack(at, prox, z, value, slope, curvature, new, running)
                norm = curvature * leaves_norm(minus(z, new), lane_dims)
                if report is not None:
                    report(Iteration(step, value, norm, unflatten(new, spec)))
                if tolerance is None:
                    scale = torch.maximum(norm, leaves_norm(slope, lane_dims))
                    tolerance = torch.clamp(self.rtol * scale, min=self.atol)
                if self.has_tolerance:
                    doubt = partial(contradiction, z, slope, before, curvature, lane_dims)
                    move = partial(relative_move, z, before and minus(z, before[0]), lane_dims)
                    stalled = stalled | watch.look(running, norm, value.double(), doubt, move, True)
                    before = z, slope
                change = minus(new, x)
                uphill = _dot(minus(z, new), change, lane_dims) > 0
                ahead = momentum.next(lambda: uphill, curvature) if self.accelerated else 0.0  # noqa: B023
                x, z = choose(running, new, x), choose(running, add(new, change, ahead), z)
                reached = reached | (running & (norm <= tolerance))
                running = running & ~reached & ~stalled
                if not bool(running.any()):
                    break
        finite = finite_leaves(x, lane_dims) & (norm.isfinite() | (step == 0))
        return outcome(unflatten(x, spec), step, codes_of(self.has_tolerance, reached, finite, stalled & ~reached))

    def _prox(self, objective: Callable[..., Any], spec: Any, theta: tuple[Any, ...]) -> Prox:
        """The layer's own operator where the term is the layer's: it knows lanes and closed-over tensors."""
        of_layer = getattr(objective, "terms", None)
        operator: Callable[..., Any]
        if of_layer is not None and (self.regularizer is None or self.regularizer is of_layer):
            operator = lambda y, step: objective.prox(y, step, *theta)  # type: ignore[attr-defined]  # noqa: E731
        elif self.regularizer is not None:
            term = resolve(self.regularizer, theta, "regularizer")
            operator = lambda y, step: term.prox(y, step, step.ndim)  # noqa: E731
        else:
            raise ValueError(
                f"{type(self).__name__}() without a set or regulariser takes that of the layer that calls it, and "
                "there is none. Give it one, or use il.solvers.AcceleratedGradient."
            )

        def apply(y: Leaves, curvature: torch.Tensor) -> Leaves:
            with torch.no_grad():
                near = operator(unflatten(y, spec), (1 / curvature).to(y[0].dtype))
            return list(flatten(near)[0])

        return apply


def _curvature_along(
    objective: Callable[..., Any], x: Leaves, slope: Leaves, spec: Any, theta: Any, lane_dims: int
) -> torch.Tensor:
    """``||H g|| / ||g||`` per lane, a first guess of L that is never too large; 1 where that says nothing."""
    points = [leaf.detach().requires_grad_() for leaf in x]
    _, gradient = value_and_gradient(objective, points, spec, theta, create_graph=True)
    size = leaves_norm(slope, lane_dims)
    unit = [g / expand_like(torch.where(size > 0, size, 1.0), g) for g in slope]
    curvature = leaves_norm(pull_back(gradient, points, unit), lane_dims)
    return torch.where((curvature > 0) & curvature.isfinite(), curvature, 1.0)


def _backtrack(
    at: Callable[[Leaves], tuple[torch.Tensor, Leaves]],
    prox: Prox,
    z: Leaves,
    value: torch.Tensor,
    slope: Leaves,
    curvature: torch.Tensor,
    new: Leaves,
    running: torch.Tensor,
) -> tuple[torch.Tensor, Leaves]:
    """Double L until ``f(new) <= f(z) + <g, d> + L/2 ||d||^2``, d = new - z, for every running lane.

    Near a solution this drowns in the rounding of f, and a step that is too long would go unseen: there
    ``<g(new) - g, d> <= L ||d||^2`` takes its place, which is the same for a quadratic.
    """
    eps = torch.finfo(value.dtype).eps
    norm = leaves_norm(slope, value.ndim)
    # z itself is rounded: that alone changes f by ||g|| eps ||z||, which is more than eps f where f is nearly 0
    slack = _NOISE * eps * (value.double().abs() + norm * leaves_norm(z, value.ndim))
    gradient_noise = _NOISE * eps * norm
    for _ in range(_MAX_DOUBLINGS):
        change = minus(new, z)
        size = leaves_norm(change, value.ndim)
        bend = curvature * size * size
        value_new, slope_new = at(new)
        by_value = value_new.double() - value.double() - _dot(slope, change, value.ndim) <= bend / 2
        turned = _dot(minus(slope_new, slope), change, value.ndim)
        enough = torch.where(bend > _DROWNED * slack, by_value, turned <= bend + gradient_noise * size)
        short = running & ~enough & value.isfinite() & (size > 0)
        if not bool(short.any()):
            break
        curvature = torch.where(short, 2 * curvature, curvature)
        new = choose(short, _stepped(prox, z, slope, curvature), new)
    return curvature, new


def _stepped(prox: Prox, z: Leaves, slope: Leaves, curvature: torch.Tensor) -> Leaves:
    return prox([a - g / expand_like(curvature, a) for a, g in zip(z, slope, strict=True)], curvature)


def _dot(a: Leaves, b: Leaves, lane_dims: int) -> torch.Tensor:
    parts = [lane_reduce((x * y).double(), lane_dims) for x, y in zip(a, b, strict=True)]
    return torch.stack(parts).sum(0)


class ProjectedGradient(ProximalGradient):
    """Minimise a smooth objective over a set: :class:`ProximalGradient`, whose prox is the projection.

    Args:
        constraint: a set (``il.sets``), a pytree of sets, or a function of theta that returns one; None takes that of
            the layer.
        settings: as in :class:`ProximalGradient`.

    Example:
        >>> import torch, implicitlayer as il
        >>> solver = il.solvers.ProjectedGradient(il.sets.Box(0.0, 1.0), rtol=1e-12)
        >>> solver(lambda x: ((x - 3) ** 2).sum(), torch.zeros(2, dtype=torch.float64)).tolist()
        [1.0, 1.0]
    """

    def __init__(self, constraint: Any = None, **settings: Any) -> None:
        super().__init__(constraint, **settings)
