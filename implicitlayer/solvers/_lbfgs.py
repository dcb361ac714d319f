"""Limited-memory BFGS with a strong Wolfe line search, for one problem or many at once."""

# Legend: s = x_{k+1} - x_k, y = g_{k+1} - g_k, rho = 1 / y's; oldest pair first. lanes: bool [*lanes].

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch

from implicitlayer.base._parts import Parts
from implicitlayer.base._solution import SolverResult
from implicitlayer.base._types import Leaves
from implicitlayer.equation._traced import TracedProblem
from implicitlayer.linear._common import times
from implicitlayer.linear._operator import lane_dot
from implicitlayer.solvers._bounded import check_bounds, in_a_box
from implicitlayer.solvers._descent import Limited, Method, descend, pair_scales, rounds_between_syncs, traced_descent
from implicitlayer.solvers._leaves import Problem, choose
from implicitlayer.solvers._line_search import LineSearch, Pair

_CURVATURE = 0.9  # c2 of the Wolfe conditions, the usual choice for quasi-Newton directions
_PAIRS = 10  # kept by default: more save few gradients of large problems
_FEW = 32  # unknowns up to which a whole matrix is cheaper than ten pairs


@dataclass(frozen=True)
class LBFGS(Limited):
    """The quasi-Newton method for smooth objectives of many unknowns: gradients only, superlinear in practice.

    ``x <- x - a H g``, H the inverse-Hessian approximation from the last ``memory`` pairs of steps and gradient
    changes, a from a line search for the strong Wolfe conditions (1e-4 and 0.9), which keep H positive definite. With
    at least as many pairs as unknowns, and where the values along a line are those of a quadratic, a is the exact
    minimum: quadratics of n unknowns then take about 2 n gradients (20 unknowns of condition 1e2, 1e3, 1e4: 41, 42,
    43; with ten pairs 74, 241, 639; SciPy's BFGS 37, 37, 36).

    Stops a lane when ``||g||_2 <= max(atol, rtol * ||g at init||_2)``. Where the line search finds no lower point the
    memory is dropped once and then the lane stops, status ``STAGNATED``: with no tolerance that is where rounding
    errors stop it. Batched: with an objective that returns one value per lane, every lane has its own memory and its
    own line search, all are evaluated together, and a finished lane is frozen.

    Args:
        max_steps: limit of steps; each takes one gradient, at times two or three.
        rtol, atol: tolerances on the norm of the gradient, see above; both 0 means none.
        memory: pairs to keep, at least 1; costs ``2 memory`` copies of the unknowns. None: all of them for up to 32
            unknowns (two n x n matrices, so more steps do not take longer), else ten.
        bounds: an ``il.sets.Box`` or ``NonNegative``, a pytree of them like x, or a function of theta that returns one;
            None takes the box of the layer that calls (``constraint=``), if it has one. Every point is inside, and the
            gradient that the tolerances are about leaves out the entries that press on a bound. The default memory
            is then that of n pairs for up to 32 unknowns, at least ten. In a layer leave it out: one that knows nothing
            of the bounds cannot differentiate.
        callback: called with an :class:`Iteration` at the start and after every step.
        progress: show a bar (needs tqdm, extra ``implicitlayer[progress]``).

    Raises:
        ValueError: a memory below 1, a negative limit or tolerance, bounds beside those of the layer.
        TypeError: bounds, or a constraint of the layer, that are no box.
        ImportError: ``progress=True`` without tqdm.

    Source: Nocedal & Wright, Numerical Optimization, 2006, algorithms 7.4 and 7.5 (two-loop recursion, scaled by
    s'y / y'y), 3.5 and 3.6 (line search). Difference to SciPy's L-BFGS-B: all pairs for few unknowns, the line search
    trusts slopes where values differ by rounding errors, so small tolerances are reached, and with bounds the model is
    minimised in the box by changes of the active set in place of a Cauchy point.

    Example:
        >>> import torch, implicitlayer as il
        >>> def rosenbrock(x):
        ...     return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()
        >>> x = il.solvers.LBFGS(rtol=1e-12)(rosenbrock, torch.tensor([-1.2, 1.0], dtype=torch.float64))
        >>> [round(v, 9) for v in x.tolist()]
        [1.0, 1.0]
    """

    _: KW_ONLY
    memory: int | None = None
    bounds: Any = None

    # bounds of its own are not those of the layer, which knows its lanes, and how its unknowns lie on processes
    batched: ClassVar[Any] = property(lambda self: self.bounds is None)
    in_parts: ClassVar[Any] = property(lambda self: self.bounds is None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self.bounds)
        if self.memory is not None and not self.memory >= 1:
            raise ValueError(f"memory={self.memory} must be at least 1. For none use GradientDescent.")

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        found = in_a_box(self, objective, init, theta, _CURVATURE)
        if found is not None:
            return found
        problem = Problem(objective, init, theta)
        n = problem.start.shape[-1]
        if self.memory is None and n <= _FEW and not isinstance(problem.start, Parts):
            return descend(self, problem, _Matrices(problem.start), _CURVATURE)
        return descend(self, problem, self._two_loop(problem.start), _CURVATURE)

    def traced(self, problem: TracedProblem) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a compiler; see :func:`implicitlayer.compile`."""
        if self.bounds is not None:
            raise ValueError("bounds= of LBFGS cannot be compiled. Call the layer itself.")
        n = problem.start.shape[-1]
        if self.memory is None and n <= _FEW:
            return traced_descent(self, problem, lambda: _Matrices(problem.start), _CURVATURE)

        def method() -> _TwoLoop:
            made, nothing = self._two_loop(problem.start), torch.zeros_like(problem.start)
            made.pairs, made.on_host = [[nothing, nothing, made.gamma]] * made.memory, False
            return made

        return traced_descent(self, problem, method, _CURVATURE)

    def _two_loop(self, start: torch.Tensor) -> _TwoLoop:
        memory = _PAIRS if self.memory is None else self.memory
        return _TwoLoop(start, memory, conjugate=memory >= start.shape[-1], on_host=rounds_between_syncs(start) == 1)


class _TwoLoop(Method):
    """The pairs of every lane; a lane that has fewer than the others has zeros in front, which change nothing."""

    STATE = ("pairs", "gamma")

    def __init__(self, like: torch.Tensor, memory: int, *, conjugate: bool = False, on_host: bool = True) -> None:
        self.memory, self.conjugate, self.on_host = memory, conjugate, on_host
        self.pairs: list[Leaves] = []
        # y's / y'y of the newest pair, 0 without one
        self.gamma = torch.zeros(like.shape[:-1], dtype=torch.float64, device=like.device)

    def direction(self, lanes: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor, norm: torch.Tensor) -> Pair:
        """-H g and the first trial 1; without a pair -g and a trial of length 1."""
        known = self.gamma > 0
        q = gradient
        alphas = []
        for s, y, rho in reversed(self.pairs):
            alpha = rho * lane_dot(s, q)
            alphas.append(alpha)
            q = q - times(alpha, y)
        q = times(torch.where(known, self.gamma, 1.0), q)
        for (s, y, rho), alpha in zip(self.pairs, reversed(alphas), strict=True):
            q = q + times(alpha - rho * lane_dot(y, q), s)
        return -q, torch.where(known, 1.0, 1 / norm)

    def moved(self, lanes: torch.Tensor, step: torch.Tensor, change: torch.Tensor, search: LineSearch) -> None:
        rho, gamma, good = pair_scales(lanes, step, change, search)
        self.gamma = torch.where(good, gamma, self.gamma)
        if self.on_host and bool(good.all()):
            self.pairs = [*self.pairs, [step, change, rho]][-self.memory :]
            return
        here, nothing = good.unsqueeze(-1), torch.zeros_like(step)
        newest = [torch.where(here, step, nothing), torch.where(here, change, nothing), torch.where(good, rho, 0.0)]
        # only some lanes move on: theirs shift by one place, the others keep theirs
        if len(self.pairs) < self.memory:
            self.pairs.insert(0, [nothing, nothing, torch.zeros_like(rho)])
        following = [*self.pairs[1:], newest]
        self.pairs = [choose(good, new, old) for new, old in zip(following, self.pairs, strict=True)]

    def forget(self, lanes: torch.Tensor) -> torch.Tensor:
        had_some = lanes & (self.gamma > 0)
        self.gamma = torch.where(lanes, 0.0, self.gamma)
        self.pairs = [choose(lanes, [torch.zeros_like(part) for part in pair], pair) for pair in self.pairs]
        return had_some


class _Matrices(Method):
    """All pairs since a lane began or forgot: the two-loop recursion multiplied out, two matrices per lane.

    One pair makes ``H_new = V'H V + rho s s'`` of H, V = I - rho y s'. From ``H = gamma I`` all of them make
    ``H = gamma P'P + R`` with P and R that do not depend on gamma: ``P_new = P V``, ``R_new = V'R V + rho s s'``.
    """

    STATE = ("P", "R", "gamma")
    conjugate = True

    def __init__(self, like: torch.Tensor) -> None:
        self.lanes, self.n = like.shape[:-1], like.shape[-1]
        self.identity = torch.eye(self.n, dtype=like.dtype, device=like.device)
        self.P = self.identity.repeat(self.lanes.numel(), 1, 1)
        self.R = torch.zeros_like(self.P)
        self.gamma = like.new_zeros(self.lanes, dtype=torch.float64)  # y's / y'y of the newest pair, 0 without one

    def direction(self, lanes: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor, norm: torch.Tensor) -> Pair:
        """-H g and the first trial 1; without a pair -g and a trial of length 1."""
        known = self.gamma > 0
        g = self._columns(gradient)
        direction = times(self.gamma, self._rows(self.P.mT @ (self.P @ g))) + self._rows(self.R @ g)
        return -torch.where(known.unsqueeze(-1), direction, gradient), torch.where(known, 1.0, 1 / norm)

    def moved(self, lanes: torch.Tensor, step: torch.Tensor, change: torch.Tensor, search: LineSearch) -> None:
        """Take in the pair of these lanes where its curvature is positive; a pair of zeros changes nothing."""
        rho, gamma, good = pair_scales(lanes, step, change, search)
        rho, here = torch.where(good, rho, 0.0), good.unsqueeze(-1)
        s, y = (self._columns(torch.where(here, vector, 0.0)) for vector in (step, change))
        self.gamma = torch.where(good, gamma, self.gamma)
        factor = rho.reshape(-1, 1, 1).to(step.dtype)
        # V'R V + rho s s' = R + a s' - rho s (Ry)' with a = (rho + rho^2 y'Ry) s - rho Ry
        Ry = self.R @ y
        a = factor * ((1 + factor * (y.mT @ Ry)) * s - Ry)
        self.P = torch.baddbmm(self.P, self.P @ y, factor * s.mT, alpha=-1)
        self.R = torch.baddbmm(self.R, torch.cat([a, -factor * s], -1), torch.cat([s, Ry], -1).mT)

    def forget(self, lanes: torch.Tensor) -> torch.Tensor:
        had_some = lanes & (self.gamma > 0)
        here = lanes.reshape(-1, 1, 1)
        self.P, self.R = torch.where(here, self.identity, self.P), torch.where(here, 0.0, self.R)
        self.gamma = torch.where(lanes, 0.0, self.gamma)
        return had_some

    def _columns(self, vectors: torch.Tensor) -> torch.Tensor:
        """[*lanes, n] as [number of lanes, n, 1]."""
        return vectors.reshape(self.lanes.numel(), self.n, 1)

    def _rows(self, columns: torch.Tensor) -> torch.Tensor:
        return columns.reshape(*self.lanes, self.n)
