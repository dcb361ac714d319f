"""A residual or map of pytrees as a function of one tensor [*lanes, n], and what the solvers of roots share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch

from implicitlayer._errors import ObjectiveError
from implicitlayer.base._solution import RecordingSolver, SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import flatten, leaves_norm, ravel, unflatten, unravel
from implicitlayer.base._types import Leaves
from implicitlayer.equation._flat import like_x
from implicitlayer.equation._jacobian import Jacobian
from implicitlayer.equation._residual import Residual
from implicitlayer.linear._operator import FlatOperator
from implicitlayer.solvers._inputs import check_limits
from implicitlayer.solvers._outcome import outcome
from implicitlayer.solvers._progress import Iteration, Report

_WORDS = {
    Status.STAGNATED: "No step lowers the residual further{where}: it is as small as rounding errors allow, or this is "
    "a minimum of its norm that is no root.",
    Status.NONFINITE: "The residual is not finite{where}.",
}


class RootProblem:
    """``function(x, *theta)`` on vectors; lanes as the layer says, or ``batch_dims`` where no layer is involved."""

    def __init__(self, function: Callable[..., Any], init: Any, theta: tuple[Any, ...], batch_dims: int) -> None:
        leaves, self._spec = flatten(init)
        self._like = [leaf.detach() for leaf in leaves]
        self._function, self._theta = function, theta
        self.lane_dims: int = getattr(function, "lane_dims", batch_dims)
        lanes = self._like[0].shape[: self.lane_dims]
        if any(leaf.shape[: self.lane_dims] != lanes or leaf.ndim < self.lane_dims for leaf in self._like):
            raise ObjectiveError(
                f"with batch_dims={self.lane_dims} every leaf of init needs the same {self.lane_dims} leading "
                f"dimensions, got shapes {[tuple(leaf.shape) for leaf in self._like]}."
            )
        self.start = ravel(self._like, self.lane_dims).clone()
        self._takes_derivatives = False

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The function's value, detached, [*lanes, n]."""
        points = unravel(x, self._like, self.lane_dims)
        if self._takes_derivatives:
            points = [leaf.detach().requires_grad_() for leaf in points]
        try:
            with torch.enable_grad():
                leaves = self._leaves(points, [])
        except RuntimeError as error:  # of torch.autograd.grad in x, which needs a graph that reaches it
            if self._takes_derivatives or "does not require grad" not in str(error):
                raise
            self._takes_derivatives = True
            return self(x)
        return ravel([leaf.detach() for leaf in leaves], self.lane_dims)

    def _leaves(self, x: Leaves, _: Leaves) -> Leaves:
        return like_x(self._function(unflatten(x, self._spec), *self._theta), x, self._spec)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """Euclidean norm per lane, float64; infinite where there is a NaN."""
        return leaves_norm([x], self.lane_dims)

    def jacobian(self, x: torch.Tensor) -> FlatOperator:
        """The derivative at x as an operator on [*lanes, n]."""
        residual = Residual(self._leaves, is_gradient=False, lane_dims_of_function=self.lane_dims)
        at = unravel(x, self._like, self.lane_dims)
        return Jacobian(residual, len(at), transposed=False).linearize(at)

    def tree(self, x: torch.Tensor) -> Any:
        """x in the structure of ``init``."""
        return unflatten(unravel(x, self._like, self.lane_dims), self._spec)

    def tell(self, report: Report | None, step: int, norm: torch.Tensor, x: torch.Tensor) -> None:
        """One call of the callback."""
        if report is not None:
            report(Iteration(step, norm, norm, self.tree(x.clone())))

    def result(
        self, x: torch.Tensor, norm: torch.Tensor, reached: torch.Tensor, gave_up: torch.Tensor, steps: int
    ) -> SolverResult:
        """The answer, with the status of the worst lane; ``gave_up``: bool [*lanes]."""
        finite, stalled = norm.isfinite(), gave_up & ~reached
        return outcome(self.tree(x), steps, wanted=True, reached=reached, finite=finite, stalled=stalled, words=_WORDS)


def line_search(
    problem: RootProblem,
    x: torch.Tensor,
    value: torch.Tensor,
    direction: torch.Tensor,
    running: torch.Tensor,
    max_halvings: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, F(x) and whether ``||F(x + t d)|| <= (1 - 1e-4 t) ||F(x)||`` was met by a t = 1, 1/2, 1/4, ...

    ``max_halvings``: int [*lanes].
    """
    before = problem.norm(value)
    t = torch.ones_like(before)
    searching, found = running, torch.zeros_like(running)
    halvings = 0
    while bool(searching.any()):
        trial = x + torch.where(searching, t, 0.0).to(x.dtype).unsqueeze(-1) * direction
        trial = torch.where(searching.unsqueeze(-1), trial, x)
        after = problem(trial)
        better = searching & (problem.norm(after) <= (1 - 1e-4 * t) * before)
        x = torch.where(better.unsqueeze(-1), trial, x)
        value = torch.where(better.unsqueeze(-1), after, value)
        found, searching = found | better, searching & ~better & (halvings < max_halvings)
        halvings += 1
        t = torch.where(searching, t / 2, t)
    return x, value, found


@dataclass(frozen=True)
class RootSolver(RecordingSolver):
    """Settings that the solvers of roots and fixed points have in common; see their docstrings."""

    _: KW_ONLY
    max_steps: int = 200
    rtol: float = 1e-12
    atol: float = 0.0
    batch_dims: int = 0
    callback: Callable[[Iteration], None] | None = None
    progress: bool = False

    finds: ClassVar[Literal["root", "fixed point"]] = "root"
    batched: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_limits(self)

    def tolerance(self, norm: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the norm per lane is to fall to, from that at init; an rtol below rounding counts as four eps."""
        rtol = max(self.rtol, 4 * torch.finfo(dtype).eps) if self.rtol > 0 else 0.0
        return torch.clamp(rtol * norm, min=self.atol)
