"""Nesterov's accelerated gradient method, for one problem or many at once."""

# Legend: x_k iterates, y_k extrapolated points (gradients are taken there), L step 1/L, t_k and m the momentum.
#     x_{k+1} = y_k - grad f(y_k) / L          y_{k+1} = x_{k+1} + m (x_{k+1} - x_k)

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from implicitlayer.base._solution import SolverResult
from implicitlayer.base._tree import flatten, leaves_norm, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.solvers._descent import rounds_between_syncs
from implicitlayer.solvers._leaves import (
    Momentum,
    add,
    choose,
    cosine,
    leads_uphill,
    minus,
    value_and_gradient,
)
from implicitlayer.solvers._outcome import StallWatch, codes_of, contradiction, finite_leaves, outcome, relative_move
from implicitlayer.solvers._progress import Iteration, Report, Settings, reporting

_MAX_CHANGES = 40  # of the curvature estimate in one search: 2^40, in the first one 2^2560, beyond any number
_NOISE = 16  # rounding errors of a sum, in units of eps: a decrease below them cannot be tested
_DROWNED = 8  # nor can one of a few times their size
_TURNED = 1e-3  # L may be below the curvature by this much: rounding of the gradient must not double it


@dataclass(frozen=True)
class AcceleratedGradient(Settings):
    """Nesterov's method for smooth convex objectives: about ``sqrt(kappa)`` steps where gradient descent makes kappa.

    ``x_new = y - g(y) / L``, ``y_new = x_new + m (x_new - x)``. With both constants known, kappa = beta / mu and
    m = (sqrt(kappa) - 1) / (sqrt(kappa) + 1); started at 0, ``2 sqrt(kappa) log(2 kappa ||x*|| / delta)`` steps come
    within delta of the solution. Without mu, m = (t_k - 1) / t_{k+1} with t_{k+1} = (1 + sqrt(1 + 4 t_k^2)) / 2,
    restarted at t = 1 whenever the step goes uphill (``<g(y), x_new - x> > 0``). Without beta, L is doubled until
    ``f(x_new) <= f(y) - ||g||^2 / (2 L)``, starting from the curvature along the first gradient.

    Stops a lane when ``||g(y)||_2 <= max(atol, rtol * ||g at init||_2)`` and returns that y, at most
    ``||g|| / mu`` away from the solution. Without a tolerance it makes exactly ``max_steps`` steps and, unless it has
    to find L, never looks at a number but at the end (one host synchronisation). With one, a lane that only rounding
    errors move any more (gradients that contradict convexity, none smaller) stops, status ``STAGNATED``. Batched: with
    an objective that returns one value per lane, all lanes step together, each with its own L and momentum, and a
    finished lane is frozen.

    Args:
        smoothness: beta > 0, an upper bound of the Hessian's largest eigenvalue over the region of the search; None
            finds it by backtracking, at the price of one more evaluation of the objective per step. Too small a number
            makes the iteration diverge.
        strong_convexity: 0 < mu <= beta, a lower bound of its smallest eigenvalue; None uses adaptive restarts. Too
            large a number costs speed, and convergence of objectives that are not quadratic.
        max_steps: limit of steps; without a tolerance, their number.
        rtol, atol: tolerances on the norm of the gradient, see above; both 0 means none.

    Also ``callback`` (given an :class:`Iteration`, at the extrapolated point where the gradient is taken) and
    ``progress`` (a bar).

    Raises:
        ValueError: a constant that is not positive and finite, mu above beta, a negative limit or tolerance.

    Source: Nesterov, Introductory Lectures on Convex Optimization, 2004, section 2.2; the count of steps: Rajeswaran et
    al. 2019 (arXiv:1909.04630), Lemma 2; restarts: O'Donoghue & Candes 2015 (arXiv:1204.3982), the gradient scheme;
    backtracking: Beck & Teboulle 2009 (FISTA). Difference: decreases that drown in rounding pass the test of L.

    Example:
        >>> import torch, implicitlayer as il
        >>> curvature = torch.tensor([1.0, 100.0], dtype=torch.float64)
        >>> solver = il.solvers.AcceleratedGradient(smoothness=100.0, strong_convexity=1.0, rtol=1e-12)
        >>> x = solver(lambda x: (0.5 * curvature * (x - 3) ** 2).sum(), torch.zeros(2, dtype=torch.float64))
        >>> [round(v, 9) for v in x.tolist()]
        [3.0, 3.0]
    """

    smoothness: float | None = None
    _: KW_ONLY
    strong_convexity: float | None = None

    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("smoothness", "strong_convexity"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be positive and finite. Leave it out where it is not known.")
        beta, mu = self.smoothness, self.strong_convexity
        if beta is not None and mu is not None and mu > beta:
            raise ValueError(
                f"strong_convexity={mu} must be at most smoothness={beta}: they bound the smallest and the largest "
                "eigenvalue of the same Hessian. Have they been exchanged?"
            )
        super().__post_init__()

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        with reporting(self.callback, self.progress, self.max_steps) as report:
            return self._run(objective, init, theta, report)

    def _run(
        self, objective: Callable[..., torch.Tensor], init: Any, theta: tuple[Any, ...], report: Report | None
    ) -> SolverResult:
        leaves, spec = flatten(init)
        problem = _Problem(objective, spec, theta)
        x = [leaf.detach().clone() for leaf in leaves]
        y = [leaf.clone() for leaf in x]
        momentum = Momentum(self.strong_convexity)
        curvature: float | torch.Tensor | None = self.smoothness
        tolerance: torch.Tensor | None = None
        running: torch.Tensor | None = None
        before: tuple[Leaves, Leaves] | None = None
        # finished lanes stand still, so asking rarely changes the count only; on an accelerator asking is a host sync
        every = rounds_between_syncs(x[0])
        lane_dims = 0
        for step in range(self.max_steps + self.has_tolerance):
            value, gradient = problem.value_and_gradient(y)
            lane_dims = value.ndim
            needed = self.has_tolerance or self.smoothness is None or report is not None
            norm = leaves_norm(gradient, lane_dims) if needed else value
            if report is not None:
                report(Iteration(step, value, norm, unflatten([leaf.clone() for leaf in y], spec)))
            if self.has_tolerance:
                if tolerance is None:
                    tolerance = torch.clamp(self.rtol * norm, min=self.atol)
                    watch = StallWatch.unset(norm, x[0].dtype)
                    running = torch.ones_like(norm, dtype=torch.bool)
                    stalled = ~running
                assert running is not None
                doubt = partial(contradiction, y, gradient, before, curvature, lane_dims)
                move = partial(relative_move, y, before and minus(y, before[0]), lane_dims)
                stalled = stalled | watch.look(running, norm, value.double(), doubt, move, every == 1)
                before = y, gradient
                running = (norm > tolerance) & ~stalled
                x = choose(running, x, y)  # a lane that has arrived stays where its gradient was measured
                if step == self.max_steps or (step % every == 0 and not bool(running.any())):
                    reached, finite = norm <= tolerance, norm.isfinite() & finite_leaves(x, lane_dims)
                    codes = codes_of(True, reached, finite, stalled & ~reached)
                    return outcome(unflatten(x, spec), step, codes)
            if self.smoothness is None:
                active = norm.isfinite() & (norm > 0) & value.isfinite()
                active = active if running is None else active & running
                curvature = problem.search(y, value, gradient, norm, curvature, active, self.strong_convexity or 0.0)
            assert curvature is not None
            x_new = add(y, gradient, -1 / curvature)
            change = minus(x_new, x)
            y_new = add(x_new, change, momentum.next(partial(leads_uphill, gradient, change, lane_dims), curvature))
            x, y = choose(running, x_new, x), choose(running, y_new, y)
        finite = finite_leaves(x, lane_dims)
        return outcome(unflatten(x, spec), self.max_steps, codes_of(False, finite, finite))


class _Problem:
    """The objective of lists of leaves, with gradients of the sum over lanes (lanes are independent)."""

    def __init__(self, objective: Callable[..., torch.Tensor], spec: Any, theta: tuple[Any, ...]) -> None:
        self.objective, self.spec, self.theta = objective, spec, theta

    def value(self, x: Leaves) -> torch.Tensor:
        """Value per lane, [*lanes]."""
        with torch.enable_grad():  # an objective may use autograd inside
            return self.objective(unflatten(x, self.spec), *self.theta).detach()

    def value_and_gradient(self, x: Leaves) -> tuple[torch.Tensor, Leaves]:
        return value_and_gradient(self.objective, x, self.spec, self.theta)

    def search(
        self,
        y: Leaves,
        value: torch.Tensor,
        gradient: Leaves,
        norm: torch.Tensor,
        curvature: float | torch.Tensor | None,
        active: torch.Tensor,
        lower: float,
    ) -> torch.Tensor:
        """The smallest L = estimate * 2^k, k >= 0, with f(y - g/L) <= f(y) - ||g||^2 / (2 L), for every active lane.

        The first search also goes down: its L is within a factor of 2 of the curvature along the gradient. Where that
        decrease drowns in the rounding of f, the gradient at the new point must not point back in its place, which is
        the same test for a quadratic: ``<g_new, g> >= 0``.
        """
        # y itself is rounded: that alone changes f by ||g|| eps ||y||, which is more than eps f where f is nearly 0
        size = leaves_norm(y, value.ndim)
        slack = _NOISE * torch.finfo(value.dtype).eps * (value.double().abs() + norm * size)

        def enough(trial: torch.Tensor) -> torch.Tensor:
            point, decrease = add(y, gradient, -1 / trial), norm * (norm / (2 * trial))
            drowned = active & (decrease <= _DROWNED * slack)
            if not bool(drowned.any()):
                return self.value(point).double() <= value.double() - decrease + slack
            reached, slope = self.value_and_gradient(point)
            unit = torch.where(active, norm, 1.0)
            turned = cosine(slope, gradient, (unit, unit), value.ndim)
            return torch.where(drowned, turned >= -_TURNED, reached.double() <= value.double() - decrease + slack)

        def grow(estimate: torch.Tensor, factor: float) -> torch.Tensor:
            for _ in range(_MAX_CHANGES):
                growing = active & ~enough(estimate)
                if not bool(growing.any()):
                    break
                estimate = torch.where(growing, factor * estimate, estimate)
            return estimate

        if isinstance(curvature, torch.Tensor):
            return grow(curvature, 2.0)
        # Nothing is known of the units where y = 0: coarse changes first.
        estimate = torch.where(active, norm / torch.where(size > 0, size, 1.0), 1.0).clamp_min(lower)
        estimate = grow(estimate, 2.0**64)
        for factor in (2.0**64, 2.0**8, 2.0):
            shrinking = active
            for _ in range(_MAX_CHANGES):
                less = estimate / factor
                shrinking = shrinking & (less > lower) & enough(less)
                if not bool(shrinking.any()):
                    break
                estimate = torch.where(shrinking, less, estimate)
        return estimate
