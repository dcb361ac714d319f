"""Limited-memory BFGS inside a box: its quadratic model is minimised under the bounds."""

# Legend: lo = lower - x and hi = upper - x, steps to the bounds; g the gradient; S, Y [*lanes, k, n] the pairs, oldest
# first, of steps and gradient changes, scaled to s'y = 1.
#
# NOTE [model in a box]: the model g's + 1/2 s'B s has the compact BFGS matrix (Byrd, Nocedal and Schnabel 1994)
#     B = t I - W'M W,   W = [Y; t S],   M^-1 = [-D L'; L t S S'],   D = diag(s_i'y_i),   L_ij = s_i'y_j for i > j,
# whose part in the free entries F has the inverse (Sherman, Morrison, Woodbury; W_F is W with the others zero)
#     (B_FF)^-1 r = r / t + W_F' (M^-1 - W_F W_F' / t)^-1 W_F r / t^2.
# Entries are held where the step goes beyond a bound and let go where their multiplier g + B s points inside, all of
# them at once (Hintermueller, Ito and Kunisch 2002, the primal-dual active set step), until nothing changes: no
# evaluation is spent on finding the bounds that hold. x + s lies in the box, so all of the way to it does; s leads
# down because it minimises a convex model. Where the rounds end before that, s is clamped, and where it does not lead
# down, the projected gradient step does.

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from implicitlayer.base._solution import SolverResult
from implicitlayer.base._tree import flatten, ravel, unflatten
from implicitlayer.base._types import Leaves
from implicitlayer.linear._common import times
from implicitlayer.linear._operator import lane_dot
from implicitlayer.sets._shapes import ends_of_box, require_box
from implicitlayer.sets._term import resolve
from implicitlayer.solvers._descent import Descent, Method, descend, pair_scales
from implicitlayer.solvers._leaves import Problem
from implicitlayer.solvers._line_search import LineSearch, Pair

_PAIRS, _FEW = 10, 32  # kept by default; up to so many unknowns as many as these
_ROUNDS = 10  # changes of the set of bounds that hold, within one model
_ROUNDING = 4  # eps of x: nearer to a bound than this is on it


def in_a_box(
    settings: Any, objective: Callable[..., Any], init: Any, theta: tuple[Any, ...], curvature: float
) -> SolverResult | None:
    """The solve of ``settings`` (:class:`LBFGS`) inside its bounds or those of the layer; None where there are none.

    ``curvature``: of the line search.

    Raises:
        TypeError: a constraint of the layer that is no box.
        ValueError: bounds beside a constraint.
    """
    ends = _ends(settings.bounds, objective, init, theta)
    if ends is None:
        return None
    problem = _BoxProblem(objective, init, theta, *ends)
    n = problem.start.shape[-1]
    memory = settings.memory if settings.memory is not None else max(n, _PAIRS) if n <= _FEW else _PAIRS
    return descend(settings, problem, _BoxMethod(problem, memory), curvature, _BoxDescent)


def check_bounds(bounds: Any) -> None:
    """Raise TypeError unless the bounds are a box, or a function that may return one."""
    if bounds is not None and not callable(bounds):
        require_box(resolve(bounds, (), "bounds"), "LBFGS stays inside")


def _ends(own: Any, objective: Any, init: Any, theta: tuple[Any, ...]) -> tuple[Leaves, Leaves] | None:
    """The leaves of both bounds, in the shapes of init."""
    of_layer = getattr(objective, "terms", None)
    if own is None and of_layer is None:
        return None
    if own is not None and of_layer is not None and own is not of_layer:
        raise ValueError("bounds= of LBFGS beside constraint= of the layer: which one? Leave out bounds=.")
    term = resolve(own if own is not None else of_layer, theta, "bounds")
    require_box(term, "LBFGS stays inside")
    return ends_of_box(term.prox if of_layer is None else lambda y, step: objective.prox(y, step, *theta), init)


class _BoxProblem(Problem):
    """A problem that starts inside of the bounds, whose ``norm`` leaves out the gradients that press on one.

    ``held`` [*lanes, n]: the entries at a bound that press on it, at the point evaluated last.
    """

    def __init__(
        self, objective: Callable[..., Any], init: Any, theta: tuple[Any, ...], lower: Leaves, upper: Leaves
    ) -> None:
        leaves, spec = flatten(init)
        inside = [leaf.detach().clamp(lo, hi) for leaf, lo, hi in zip(leaves, lower, upper, strict=True)]
        super().__init__(objective, unflatten(inside, spec), theta)
        self.lower, self.upper = ravel(lower, self.lane_dims), ravel(upper, self.lane_dims)
        self._press(self.start, self.first_gradient)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, gradient = super().__call__(x)
        self._press(x, gradient)
        return value, gradient

    def _press(self, x: torch.Tensor, gradient: torch.Tensor) -> None:
        self.held = ((x <= self.lower) & (gradient > 0)) | ((x >= self.upper) & (gradient < 0))

    def norm(self, gradient: torch.Tensor) -> torch.Tensor:
        """Of the entries that are free to move down."""
        return super().norm(torch.where(self.held, 0.0, gradient))


class _BoxDescent(Descent):
    """The descent whose trials lie in the box."""

    problem: _BoxProblem

    def trial(self, length: torch.Tensor) -> torch.Tensor:
        """As without bounds; what rounding keeps off a bound is on it."""
        trial, lower, upper = super().trial(length), self.problem.lower, self.problem.upper
        near = _ROUNDING * torch.finfo(trial.dtype).eps * (trial.abs() + self.x.abs())
        trial = torch.where((self.direction < 0) & (trial <= lower + near), lower, trial)
        return torch.where((self.direction > 0) & (trial >= upper - near), upper, trial)

    def turn(self, lanes: torch.Tensor, found: Pair | None) -> None:
        """As without bounds, no further than the first bound on the way."""
        super().turn(lanes, found)
        bound = torch.where(self.direction > 0, self.problem.upper, self.problem.lower)
        room = torch.where(self.direction != 0, (bound - self.x) / self.direction, torch.inf)
        self.search.limit(room.amin(-1).double())


class _BoxMethod(Method):
    """The pairs of every lane, and the minimum of their model in the box; see NOTE [model in a box]."""

    STATE = ("S", "Y", "curvature")

    def __init__(self, problem: _BoxProblem, memory: int) -> None:
        self.problem, self.memory = problem, memory
        self.S = self.Y = problem.start.new_zeros(*problem.start.shape[:-1], 0, problem.start.shape[-1])
        self.curvature = torch.zeros_like(problem.unit)  # y'y / s'y of the newest pair, 0 without one

    def direction(self, lanes: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor, norm: torch.Tensor) -> Pair:
        """The minimum of the model in the box, and the first trial 1; without a pair -g in a step of length 1."""
        t = torch.where(self.curvature > 0, self.curvature, norm)
        lo, hi = self.problem.lower - x, self.problem.upper - x
        low, high = (x <= self.problem.lower) & (gradient > 0), (x >= self.problem.upper) & (gradient < 0)
        model = _Model(self.S, self.Y, t)
        step = torch.zeros_like(x)
        for _ in range(_ROUNDS):
            held = low | high
            fixed = torch.where(low, lo, torch.where(high, hi, 0.0))
            slope = gradient + model.times(fixed)
            step = torch.where(held, fixed, -model.free_inverse(~held, slope))
            force = gradient + model.times(step)
            before = low, high
            low = torch.where(held, low & (force > 0), step < lo)
            high = torch.where(held, high & (force < 0), step > hi)
            if bool((((low == before[0]) & (high == before[1])).all(-1) | ~lanes).all()):
                break
        step = step.clamp(lo, hi)
        down = lane_dot(gradient, step) < 0
        step = torch.where(down.unsqueeze(-1), step, (-times(1 / t, gradient)).clamp(lo, hi))
        return step, torch.ones_like(t)

    def moved(self, lanes: torch.Tensor, step: torch.Tensor, change: torch.Tensor, search: LineSearch) -> None:
        rho, gamma, good = pair_scales(lanes, step, change, search)
        if not bool(good.any()):
            return
        here, root = good[..., None, None], torch.where(good, rho, 0.0).sqrt()
        newest = times(root, step).unsqueeze(-2), times(root, change).unsqueeze(-2)
        pad = self.S.shape[-2] < self.memory and not bool(good.all())
        kept = []
        for rows, new in zip((self.S, self.Y), newest, strict=True):
            grown = torch.cat([rows, new], -2)
            old = torch.cat([torch.zeros_like(new), rows], -2) if pad else rows
            grown = grown if grown.shape[-2] <= self.memory else grown[..., 1:, :]
            kept.append(grown if bool(good.all()) else torch.where(here, grown, old))
        self.S, self.Y = kept
        self.curvature = torch.where(good, 1 / gamma, self.curvature)

    def forget(self, lanes: torch.Tensor) -> torch.Tensor:
        had_some = lanes & (self.curvature > 0)
        self.curvature = torch.where(lanes, 0.0, self.curvature)
        self.S, self.Y = (torch.where(lanes[..., None, None], 0.0, rows) for rows in (self.S, self.Y))
        return had_some


class _Model:
    """Products with B, and with the inverse of its part in some entries; a pair of zeros changes nothing."""

    def __init__(self, S: torch.Tensor, Y: torch.Tensor, t: torch.Tensor) -> None:
        self.t, self.W = t, torch.cat([Y, times(t, S.flatten(-2)).reshape(S.shape)], -2)
        inner, missing = (S @ Y.mT).double(), (S == 0).all(-1)
        D = torch.where(missing, 1.0, inner.diagonal(dim1=-2, dim2=-1))
        squares = t[..., None, None] * (S @ S.mT).double() + torch.diag_embed(missing.double())
        L = inner.tril(-1)
        self.inverse = torch.cat([torch.cat([-torch.diag_embed(D), L.mT], -1), torch.cat([L, squares], -1)], -2)

    def times(self, s: torch.Tensor) -> torch.Tensor:
        """B s."""
        return times(self.t, s) - self._through(self.inverse, self.W, s)

    def free_inverse(self, free: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        """(B_FF)^-1 r in the free entries, zero in the others."""
        W, r = self.W * free.unsqueeze(-2), torch.where(free, r, 0.0)
        t = self.t[..., None, None]
        inner = self.inverse - (W @ W.mT).double() / t
        return times(1 / self.t, r) + times(1 / (self.t * self.t), self._through(inner, W, r))

    @staticmethod
    def _through(matrix: torch.Tensor, W: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """W' matrix^-1 W s."""
        if not W.shape[-2]:
            return torch.zeros_like(s)
        inner, _ = torch.linalg.solve_ex(matrix, (W @ s.unsqueeze(-1)).double())
        product: torch.Tensor = (W.mT @ inner.to(s.dtype)).squeeze(-1)
        return product
