"""How a solve ends: lanes that only rounding moves are seen, and the status of a batch names its lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from implicitlayer.base._solution import SolverResult
from implicitlayer.base._status import Status
from implicitlayer.base._tree import leaves_norm, name_lanes
from implicitlayer.base._types import Leaves
from implicitlayer.solvers._leaves import cosine, minus

# NOTE [rounding]: where rounding is all that is left (a start at the solution of the problem before, with a tolerance
# relative to a gradient that is all rounding), steps go on for ever. A lane whose value has not fallen by more than its
# rounding errors, nor its gradient below the least so far, for so many steps has stalled. (Chance alone sets a record
# in the k-th of random numbers with probability 1/k; a slow but steady descent sets one at every step. One that is
# slower than rounding needs patience, so a lane that came far gets more of it.) Methods that are not steady say which
# steps prove something, and how much: see :func:`contradiction`. A value that grows by more than rounding is no stall
# but divergence, or a ripple of the momentum, unless x hardly moves: near 0, values have hardly any rounding errors.
# Newton's steps at least halve the gradient near a minimum, so three that together do not have met rounding errors:
# chance alone, which sets records, takes four times the steps to say so.
PATIENCE = 20
_PATIENCE_OF_NEWTON, _HALF = 3, 0.5
_SHARE = 0.1  # of the steps that a lane has made
_LITTLE = 0.05  # what a step without gain counts if it proves nothing: a cycle of rounding errors ends some time
NOISE = 256  # a sum over m data rounds by about sqrt(m) eps: this covers 65,000 of them
_ULPS = 64  # moves of x below these are rounding
_SURE = 0.9  # of what a convex function promises: less than that is no rounding of the promise


class StallWatch:
    """Lanes that only move by rounding errors, by NOTE [rounding].

    Args:
        norm: of the gradients at the start, or infinite; float64 [*lanes].
        value: of the objective there, or infinite; float64 [*lanes].
        eps: of the dtype.
        halving: whether every step near a minimum at least halves the gradient.
    """

    STATE: tuple[str, ...] = ("norm", "before", "value", "idle", "steps", "gained")

    def __init__(self, norm: torch.Tensor, value: torch.Tensor, eps: float, halving: bool = False) -> None:
        self.norm, self.value, self.eps = norm, value, eps  # the least norm, and the value at the last gain
        self.before = norm  # when a step last gained enough
        self.share, self.patience = (_HALF, _PATIENCE_OF_NEWTON) if halving else (1.0, PATIENCE)
        self.idle, self.steps = torch.zeros_like(norm), torch.zeros_like(norm)
        self.gained = torch.ones_like(norm, dtype=torch.bool)  # the lanes that the last look found better

    @classmethod
    def unset(cls, norm: torch.Tensor, dtype: torch.dtype) -> StallWatch:
        """One whose first look is a gain."""
        never = torch.full_like(norm, torch.inf)
        return cls(never, never, torch.finfo(dtype).eps)

    def look(
        self,
        lanes: torch.Tensor,
        norm: torch.Tensor,
        value: torch.Tensor,
        weight: Callable[[], torch.Tensor],
        move: Callable[[], torch.Tensor],
        on_host: bool,
    ) -> torch.Tensor:
        """The lanes that have stalled.

        Args:
            lanes: those that made a step.
            norm, value: at the point reached.
            weight: what a step without gain counts, float64 [*lanes]; asked only where there is one.
            move: length of the last step over that of x, likewise.
            on_host: whether asking costs nothing.
        """
        noise = NOISE * self.eps * value.abs()
        lower = value < self.value - noise
        self.gained = here = lanes & (lower | (norm < self.norm))
        enough = here & (lower | (norm < self.share * self.before))
        self.steps = self.steps + lanes
        self.value = torch.where(here, value, self.value)
        self.norm = torch.where(here, torch.minimum(norm, self.norm), self.norm)
        self.before = torch.where(enough, self.norm, self.before)
        no_gain = lanes & ~enough
        if on_host and not bool(no_gain.any()):
            self.idle = torch.where(enough, 0.0, self.idle)
            return no_gain
        level = value.isfinite() & ((value <= self.value + noise) | (move() <= _ULPS * self.eps))
        self.idle = torch.where(enough, 0.0, self.idle + torch.where(no_gain & level, weight(), 0.0))
        return lanes & (self.idle >= (_SHARE * self.steps).clamp_min(self.patience))


def contradiction(
    point: Leaves, gradient: Leaves, before: tuple[Leaves, Leaves] | None, curvature: Any, lane_dims: int
) -> torch.Tensor:
    """1 where two gradients cannot be those of a convex function, little elsewhere; float64 [*lanes].

    With s the way between two points and d the change of the gradient, a convex function of curvature at most L has
    ``s'd >= ||d||^2 / L``. Steps with momentum may pass many points where the gradient grows, but none where this
    fails; the rounding errors of two gradients know nothing of s, so where they are all that is left it fails often.
    """
    if before is None:
        return torch.ones_like(leaves_norm(gradient, lane_dims))
    s, d = minus(point, before[0]), minus(gradient, before[1])
    way, change = leaves_norm(s, lane_dims), leaves_norm(d, lane_dims)
    return torch.where(cosine(s, d, (way, change), lane_dims) * way * curvature > _SURE * change, _LITTLE, 1.0).double()


def relative_move(point: Leaves, move: Leaves | None, lane_dims: int) -> torch.Tensor:
    """Length of a move over that of the point, float64 [*lanes]; infinite where there was no move or no length."""
    size = leaves_norm(point, lane_dims)
    if move is None:
        return torch.full_like(size, torch.inf)
    return torch.where(size > 0, leaves_norm(move, lane_dims) / size, torch.inf)


def outcome(
    value: Any, steps: int | torch.Tensor, codes: torch.Tensor, words: dict[Status, str] | None = None
) -> SolverResult:
    """The result of a solve: the status of the worst lane, and a message that names the lanes that have it.

    ``steps`` are those of every lane, or of the slowest; ``codes`` as of :func:`codes_of`; ``words`` are messages in
    place of the usual ones, with ``{where}``.
    """
    if isinstance(steps, torch.Tensor):
        steps = int(steps.max()) if steps.numel() else 0
    status = Status(int(codes.max())) if codes.numel() else Status.CONVERGED
    said = {**_WORDS, **(words or {})}.get(status, "")
    message = said.format(where=name_lanes(codes == int(status)))
    return SolverResult(value, status, steps, message, nonfinite=codes == int(Status.NONFINITE))


def codes_of(
    wanted: bool, reached: torch.Tensor, finite: torch.Tensor, stalled: torch.Tensor | None = None
) -> torch.Tensor:
    """A :class:`Status` per lane, int64 [*lanes], of masks [*lanes]; ``wanted``: whether a tolerance was asked for."""
    missed = Status.MAX_STEPS_REACHED if wanted else Status.STEP_LIMIT
    codes = torch.where(reached, int(Status.CONVERGED if wanted else missed), int(missed))
    if stalled is not None:
        codes = torch.where(stalled, int(Status.STAGNATED), codes)
    return torch.where(finite, codes, int(Status.NONFINITE))


_WORDS = {
    Status.MAX_STEPS_REACHED: "The step limit came before the tolerance{where}.",
    Status.STAGNATED: "The gradient stopped falling{where}: it is as small as rounding errors allow, or the steps do "
    "not lead down. A start at a solution has no smaller one to offer: give atol in place of rtol there.",
    Status.NONFINITE: "The objective, its gradient or the point reached is not finite{where}.",
}


def finite_leaves(leaves: Leaves, lane_dims: int) -> torch.Tensor:
    """Lanes whose leaves hold finite numbers only, bool [*lanes]."""
    flat = [leaf.reshape(*leaf.shape[:lane_dims], leaf.shape[lane_dims:].numel()) for leaf in leaves]
    return torch.stack([part.isfinite().all(-1) for part in flat]).all(0)
