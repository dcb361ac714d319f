"""Anderson acceleration of fixed-point iterations, one problem or many at once."""

# Legend: g(x) the map, f = g(x) - x, per lane; dx, df the last changes of x and f as rows. With gamma the
# least-squares solution of gamma df = f and beta the mixing,
#     x_new = x + beta f - gamma (dx + beta df):
# the point whose linearised residual is smallest among those that the last steps span, and beta of that residual.

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch

from implicitlayer.base._parts import numbers, products
from implicitlayer.base._solution import SolverResult
from implicitlayer.linear._common import Keep
from implicitlayer.solvers._outcome import PATIENCE
from implicitlayer.solvers._progress import reporting
from implicitlayer.solvers._roots import RootProblem, RootSolver

_RIDGE = 50.0  # rounding errors, on the Gram matrix of rows of length 1: parallel ones leave it regular
_NEIGHBOUR = 4.0  # residuals within so many of their own rounding errors are not told apart
_GROWTH = 10.0  # of the residual over the best so far, after which a lane forgets its history


@dataclass(frozen=True)
class AndersonAcceleration(RootSolver):
    """Anderson's acceleration of ``x <- map(x)``: the plain iteration, extrapolated from its last few steps.

    Converges where the plain iteration is slow, and often where it does not converge; on linear maps it is GMRES as
    long as the memory lasts. Stops a lane when ``||map(x) - x||_2 <= max(atol, rtol * that at init)``, and returns that
    x. A lane whose residual grows tenfold over its best goes back to that best point and starts a new history. One
    without a better point for 20 steps ends, status ``STAGNATED``, if its residual is no larger than that of the floats
    beside it. Batched.

    Args:
        memory: steps that are remembered, 0 for the plain iteration.
        mixing: beta, in (0, 1]: below 1 damps a map that overshoots.
        max_steps: limit of steps.
        rtol, atol: tolerances on the norm of ``map(x) - x``; an rtol below four eps of the dtype counts as that.
        batch_dims: leading dimensions of init that enumerate independent problems; a layer knows them by itself.
        callback: called with an :class:`Iteration` at the start and after every step; ``value`` and ``gradient_norm``
            are the norm of ``map(x) - x``.
        progress: show a bar (needs tqdm).

    Raises:
        ValueError: a negative limit, memory or tolerance; a mixing outside of (0, 1].

    Source: D. G. Anderson, J. ACM 12 (1965); H. F. Walker and P. Ni, SIAM J. Numer. Anal. 49 (2011), type II.

    Example:
        >>> import torch, implicitlayer as il
        >>> x = il.solvers.AndersonAcceleration()(torch.cos, torch.ones(1, dtype=torch.float64))
        >>> round(x.item(), 10)  # cos x = x
        0.7390851332
    """

    _: KW_ONLY
    memory: int = 5
    mixing: float = 1.0
    max_steps: int = 500

    finds: ClassVar[Literal["fixed point"]] = "fixed point"
    in_parts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory < 0:
            raise ValueError(f"memory={self.memory} must be non-negative. 0 is the plain iteration.")
        if not 0 < self.mixing <= 1:
            raise ValueError(f"mixing={self.mixing} must be above 0 and at most 1.")

    def run(self, map: Callable[..., Any], init: Any, *theta: Any) -> SolverResult:
        """The same, with status and step count."""
        problem = RootProblem(map, init, theta, self.batch_dims)
        x = best = problem.start
        f = best_f = problem(x) - x
        norm = best_norm = problem.norm(f)
        tolerance = self.tolerance(norm, x.dtype)
        history = _History(x, min(self.memory, self.max_steps), self.mixing)
        gained, gave_up = torch.zeros_like(norm), torch.zeros_like(norm, dtype=torch.bool)
        keep, step = Keep((norm > tolerance) & norm.isfinite()), 0  # a lane that has stopped stays at its best
        with reporting(self.callback, self.progress, self.max_steps) as report:
            problem.tell(report, 0, norm, x)
            while step < self.max_steps and bool(keep.running.any()):
                x_new = keep.vectors(history.moved(x, f), x)
                f_new = keep.vectors(problem(x_new) - x_new, f)
                norm = keep(problem.norm(f_new), best_norm)
                step += 1
                problem.tell(report, step, norm, x_new)
                history.add(x_new - x, f_new - f)
                lost = norm > _GROWTH * best_norm
                if bool(lost.any()):
                    history.forget(lost)
                    if self.memory:
                        x_new = torch.where(lost.unsqueeze(-1), best + self.mixing * best_f, x_new)
                        f_new = torch.where(lost.unsqueeze(-1), problem(x_new) - x_new, f_new)
                        norm = torch.where(lost, problem.norm(f_new), norm)
                better = norm < best_norm
                if bool((better if keep.all else better | ~keep.running).all()):
                    best, best_f, best_norm = x_new, f_new, norm
                else:
                    best = torch.where(better.unsqueeze(-1), x_new, best)
                    best_f = torch.where(better.unsqueeze(-1), f_new, best_f)
                    best_norm = torch.where(better, norm, best_norm)
                gained.masked_fill_(better, step)
                x, f, running = x_new, f_new, best_norm > tolerance
                running = running if keep.all else running & keep.running
                if step >= PATIENCE and bool((asking := running & (step - gained >= PATIENCE)).any()):
                    stuck = asking & (best_norm <= _NEIGHBOUR * _rounding(problem, best, best_f))
                    x, f = (torch.where(stuck.unsqueeze(-1), *pair) for pair in ((best, x), (best_f, f)))
                    gave_up, running = gave_up | stuck, running & ~stuck
                    gained.masked_fill_(asking, step)
                keep = Keep(running)
        return problem.result(best, best_norm, best_norm <= tolerance, gave_up, step)


def _rounding(problem: RootProblem, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """How much ``map(x) - x`` changes to the floats beside x, up and down in turn; float64 [*lanes].

    Where the residual is no larger than that, no step can be expected to make it smaller.
    """
    ulp = torch.finfo(x.dtype).eps * torch.maximum(x.abs(), x.abs().sum(-1, keepdim=True) / x.shape[-1])
    beside = x + (1 - 2 * (numbers(x) % 2)) * ulp
    return problem.norm(problem(beside) - beside - f)


class _History:
    """The last changes as rows of length 1, [lanes, memory, n]: u = df / |df|, and w = (dx + beta df) / |df|.

    A lane that stands still adds rows of zeros, which nothing is made of.
    """

    def __init__(self, x: torch.Tensor, memory: int, mixing: float) -> None:
        self._mixing, self._memory, self._made = mixing, memory, 0
        self._u, self._w = (x.new_zeros(x.shape[:-1].numel(), memory, x.shape[-1]) for _ in range(2))
        self._ridge = _RIDGE * torch.finfo(x.dtype).eps * torch.eye(memory, dtype=x.dtype, device=x.device)

    def add(self, dx: torch.Tensor, df: torch.Tensor) -> None:
        """One more change, in the place of the oldest."""
        if not self._memory:
            return
        size = torch.linalg.vector_norm(df, dim=-1, keepdim=True)
        size.masked_fill_(size == 0, 1.0)
        row = self._made % self._memory
        for rows, change in ((self._u, df), (self._w, torch.add(dx, df, alpha=self._mixing))):
            torch.div(change, size, out=rows[:, row].view(df.shape))
        self._made += 1

    def forget(self, lanes: torch.Tensor) -> None:
        """Nothing is left of these lanes, [*lanes] bool."""
        for rows in (self._u, self._w):
            rows.masked_fill_(lanes.reshape(-1, 1, 1), 0.0)

    def moved(self, x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        """x_new; gamma by the normal equations, with a ridge that lets parallel rows share what they explain."""
        plain = torch.add(x, f, alpha=self._mixing)
        m = min(self._made, self._memory)
        if not m:
            return plain
        u, w, ridge = self._u[:, :m], self._w[:, :m], self._ridge[:m, :m]
        right = products(u, f.reshape(len(u), 1, f.shape[-1]))
        wide = torch.promote_types(x.dtype, torch.float32)  # shorter floats have no factorisation
        gamma = torch.linalg.solve_ex((ridge + products(u, u)).to(wide), right.to(wide))[0].to(x.dtype)
        return torch.baddbmm(plain.view(len(u), 1, x.shape[-1]), gamma.mT, w, alpha=-1).view(x.shape)
