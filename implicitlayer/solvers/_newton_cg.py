"""Newton's method for one problem or many at once: a whole matrix for few unknowns, else conjugate gradients."""

# Legend: g gradient, B curvature matrix + damping; conjugate gradients on B d = -g: d direction, r residual, p search.
#
# NOTE [few unknowns]: conjugate gradients need up to n products, one after the other, and their time is that of
# Python. All n of them side by side are one pass, and a Cholesky factor gives the direction to the last digit: the
# solution of a quadratic after one step. With D = diag(B)^-1/2 the factor is that of D B D, whose pivots lie between
# 0 and 1 whatever the units of the unknowns: d = -D (D B D)^-1 D g. Lanes without a positive definite B, by more than
# rounding, keep to conjugate gradients. Side by side are also n copies of what the objective computes, so there must
# not be much of it.

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch

from implicitlayer import _torch
from implicitlayer.base._parts import Parts
from implicitlayer.base._solution import SolverResult
from implicitlayer.equation._flat import Signature
from implicitlayer.equation._traced import TracedProblem
from implicitlayer.linear._common import NOISE, times
from implicitlayer.linear._dense import materialise
from implicitlayer.linear._operator import FlatOperator, lane_dot
from implicitlayer.solvers._descent import Limited, Method, descend, rounds_between_syncs, traced_descent
from implicitlayer.solvers._leaves import Curvature, Problem
from implicitlayer.solvers._line_search import Pair

# NOTE [forcing]: in a narrow curved valley the gradient is that of the steep walls, and a loose direction takes it down
# without following the valley: Rosenbrock's function of two unknowns then takes twice the products. The tight rule for
# ever costs large problems more products than it saves steps, so only the first few products are held to it.
_TIGHT = 0.1
_FEW = 5

# Unknowns of a lane, unknowns of all lanes, numbers in theta; see NOTE [few unknowns].
_SMALL, _SMALL_LANES, _SMALL_DATA = 32, 2**11, 2**20

_CURVATURES = {"armijo": math.inf, "wolfe": 0.9}


@dataclass(frozen=True)
class NewtonCG(Limited):
    """Hessian-free Newton: each direction is an approximate solution of ``(H + damping) d = -g`` by a few products.

    With up to 32 unknowns (2,048 in all lanes, and a million numbers in theta) the products with all unit vectors are
    made side by side, and a lane whose ``H + damping`` is positive definite gets the exact solution, by a Cholesky
    factor. Otherwise conjugate gradients start at d = 0 and stop when
    ``||r|| <= min(1/2, sqrt(||g|| / ||g at init||)) ||g||``, which makes the convergence superlinear (a tenth of that
    for the first five products, which are cheap beside a step that does not follow a curved valley), or after exactly
    ``cg_steps`` products. A direction p of negative curvature cuts them off (Steihaug): what was found so far is the
    direction, at first ``-g`` times ``g'g / |g'H g|``. Then ``x <- x + a d`` with a from a line search that tries 1
    first.

    Stops a lane when ``||g||_2 <= max(atol, rtol * ||g at init||_2)``, or where the line search finds no lower point,
    status ``STAGNATED``: with no tolerance that is where rounding errors stop it. Batched: with an objective that
    returns one value per lane, every lane has its own direction and line search, all are evaluated together, and a
    finished lane is frozen.

    Args:
        max_steps: limit of steps; each takes a gradient, at times two, and the products of its direction.
        rtol, atol: tolerances on the norm of the gradient, see above; both 0 means none.
        cg_steps: products for each direction, at least 1 (5 in iMAML-HF), never a whole matrix; None: as many as the
            rule above asks for, at most twice the number of unknowns.
        curvature: ``"hessian"``, or ``"gauss_newton"`` for an objective made by ``il.least_squares`` or
            ``il.composite``: never negative for a convex loss.
        damping: non-negative, added to the diagonal, in units of curvature.
        line_search: ``"armijo"`` only cuts steps back; ``"wolfe"`` also lengthens them, for starts far from a minimum.
        callback: called with an :class:`Iteration` at the start and after every step.
        progress: show a bar (needs tqdm, extra ``implicitlayer[progress]``).

    Raises:
        ValueError: a setting outside its range or none of those listed.
        ObjectiveError: ``curvature="gauss_newton"`` of an objective that does not tell its model.
        ImportError: ``progress=True`` without tqdm.

    Source: Nocedal & Wright, Numerical Optimization, 2006, algorithm 7.1; Steihaug 1983 (SIAM J. Numer. Anal. 20);
    iMAML-HF: Rajeswaran et al. 2019 (arXiv:1909.04630), section 4. Difference to SciPy's Newton-CG: the test of the
    directions is relative to the first gradient, not to the units of the objective, and products reuse one graph.

    Example:
        >>> import torch, implicitlayer as il
        >>> x = il.solvers.NewtonCG(rtol=1e-12)(
        ...     lambda x, t: (torch.exp(x) - t * x).sum(),
        ...     torch.zeros(2, dtype=torch.float64),
        ...     torch.tensor([1.0, 2.0], dtype=torch.float64),
        ... )
        >>> [round(v, 9) for v in x.tolist()]  # (0, log 2)
        [0.0, 0.693147181]
    """

    max_steps: int = 100
    _: KW_ONLY
    cg_steps: int | None = None
    curvature: Curvature = "hessian"
    damping: float = 0.0
    line_search: Literal["armijo", "wolfe"] = "armijo"

    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cg_steps is not None and not self.cg_steps >= 1:
            raise ValueError(f"cg_steps={self.cg_steps} must be at least 1. For no product use GradientDescent.")
        if not 0 <= self.damping < math.inf:
            raise ValueError(f"damping={self.damping} must be non-negative and finite.")
        if self.curvature not in ("hessian", "gauss_newton"):
            raise ValueError(f'curvature={self.curvature!r} must be "hessian" or "gauss_newton".')
        if self.line_search not in _CURVATURES:
            raise ValueError(f'line_search={self.line_search!r} must be "armijo" or "wolfe".')

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        problem = Problem(objective, init, theta, self.curvature)
        return descend(self, problem, _Truncated(self, problem), _CURVATURES[self.line_search])

    def traced(self, problem: TracedProblem) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for a compiler, without whole matrices; see :func:`implicitlayer.compile`."""
        if self.curvature != "hessian":
            raise TypeError(f'curvature={self.curvature!r} is not compiled. Use curvature="hessian".')
        method = partial(_TracedTruncated, self, problem)
        return traced_descent(self, problem, method, _CURVATURES[self.line_search])


# r, d, p [*lanes, n], ||r||^2 and the lanes that go on [*lanes]
_State = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class _Truncated(Method):
    """Directions by conjugate gradients on the curvature at the point that was evaluated last."""

    def __init__(self, settings: NewtonCG, problem: Problem | TracedProblem) -> None:
        self.settings, self.problem = settings, problem
        self.halving = settings.cg_steps is None and not settings.damping and settings.curvature == "hessian"
        self.damping = (settings.damping / problem.unit).unsqueeze(-1).to(problem.start.dtype)
        self.first_norm = problem.norm(problem.first_gradient)
        self.small = settings.cg_steps is None and isinstance(problem, Problem) and _are_few(problem)

    def direction(self, lanes: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor, norm: torch.Tensor) -> Pair:
        """The Newton direction, exact or truncated, and the first trial 1."""
        if not self.small:
            return self._truncated(lanes, x, gradient, norm)
        matrix = materialise(FlatOperator(partial(self._product, x), prepare=lambda: None), x)
        matrix.diagonal(dim1=-2, dim2=-1).add_(self.damping)
        exact, definite = newton_direction(matrix, gradient)
        rest = lanes & ~definite
        if not bool(rest.any()):
            return exact, torch.ones_like(norm)
        truncated, one = self._truncated(rest, x, gradient, norm)
        return torch.where(definite.unsqueeze(-1), exact, truncated), one

    def _truncated(self, lanes: torch.Tensor, x: torch.Tensor, gradient: torch.Tensor, norm: torch.Tensor) -> Pair:
        eps = torch.finfo(gradient.dtype).eps
        if self.settings.cg_steps is not None:
            loose = limit = eps * norm
            most = self.settings.cg_steps
        else:
            asked, most = (norm / self.first_norm).sqrt(), 2 * gradient.shape[-1]
            loose, limit = asked.clamp(max=0.5) * norm, _TIGHT * asked.clamp(max=1.0) * norm
        r = torch.where(lanes.unsqueeze(-1), -gradient, torch.zeros_like(gradient))
        rr = lane_dot(r, r)
        state = r, torch.zeros_like(r), r, rr, lanes & (rr > 0)
        return self._solve(x, state, norm, (limit, loose), most), torch.ones_like(norm)

    def _solve(self, x: torch.Tensor, state: _State, norm: torch.Tensor, limits: Pair, most: int) -> torch.Tensor:
        every = rounds_between_syncs(x)
        for k in range(most):
            if (k % every == 0 and (k > 0 or every == 1)) and not bool(state[-1].any()):
                break
            state = self._step(x, state, limits[k + 1 >= _FEW], norm if k == 0 else None)
        return state[1]

    def _product(self, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.problem, Problem)
        return self.problem.product(p)  # of its graph at x, the point evaluated last

    def _step(self, x: torch.Tensor, state: _State, limit: torch.Tensor, first: torch.Tensor | None) -> _State:
        """One product; ``first``: the norm of the gradient, at the first one."""
        r, d, p, rr, active = state
        product = self._product(x, p) + self.damping * p
        curvature = lane_dot(p, product)
        good = active & (curvature > 0) & curvature.isfinite()
        if first is not None:
            known = curvature.isfinite() & (curvature != 0)
            length = torch.where(known, rr / curvature.abs(), 1 / first)
            d = torch.where((active & ~good).unsqueeze(-1), times(length, p), d)
        here = good.unsqueeze(-1)
        alpha = rr / curvature
        d = torch.where(here, d + times(alpha, p), d)
        r = torch.where(here, r - times(alpha, product), r)
        rr_next = lane_dot(r, r)
        active = good & (rr_next.sqrt() > limit)
        p = torch.where(active.unsqueeze(-1), r + times(rr_next / rr, p), p)
        return r, d, p, rr_next, active


def newton_direction(matrix: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-B^-1 g [*lanes, n] of B [*lanes, n, n], and the lanes in which it is one; see NOTE [few unknowns]."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, 1.0).rsqrt().unsqueeze(-1)
    factor, info = torch.linalg.cholesky_ex(scale * ((matrix + matrix.mT) / 2) * scale.mT)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    noise = (matrix.shape[-1] + NOISE) * torch.finfo(gradient.dtype).eps
    definite = (info == 0) & (pivots * pivots > noise).all(-1)
    direction = scale * torch.cholesky_solve(-scale * gradient.double().unsqueeze(-1), factor)
    return direction[..., 0].to(gradient.dtype), definite


def _are_few(problem: Problem) -> bool:
    x = problem.start
    few = x.shape[-1] <= _SMALL and x.numel() <= _SMALL_LANES and not isinstance(x, Parts)
    return few and sum(t.numel() for t in Signature.tensors_of(problem.theta)) <= _SMALL_DATA


class _TracedTruncated(_Truncated):
    """The same for a compiler."""

    def _product(self, x: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        assert isinstance(self.problem, TracedProblem)
        return self.problem.curvature(x, p) / self.problem.scale

    def _solve(self, x: torch.Tensor, state: _State, norm: torch.Tensor, limits: Pair, most: int) -> torch.Tensor:
        def going(k: torch.Tensor, *state: torch.Tensor) -> torch.Tensor:
            return (k < most) & state[-1].any()

        def body(k: torch.Tensor, r: Any, d: Any, p: Any, rr: Any, active: Any) -> tuple[torch.Tensor, ...]:
            return (k + 1, *self._step(x, (r, d, p, rr, active), torch.where(k + 1 < _FEW, *limits), None))

        state = self._step(x, state, limits[0], norm)
        one = torch.ones((), dtype=torch.int64, device=x.device)
        found = _torch.while_loop(going, body, (one, *(part.clone() for part in state)))
        direction: torch.Tensor = found[2]
        return direction
