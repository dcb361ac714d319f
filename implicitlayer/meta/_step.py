"""A step size that is learned although the solver is not differentiated: the hypergradient of the last inner step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from implicitlayer.base._solution import RecordingSolver, SolverResult
from implicitlayer.base._tree import flatten, tree_map, unflatten
from implicitlayer.base._types import InnerSolver, PyTree
from implicitlayer.meta._method import learned_tensors
from implicitlayer.solvers import GradientDescent
from implicitlayer.solvers._leaves import value_and_gradient
from implicitlayer.solvers._step_size import moves, present

StepSizeGradient = Literal["last_step"] | None

# NOTE [last step]. The solution of the inner problem does not depend on the step size alpha, so the implicit gradient
# of alpha is zero. But K steps do not quite get there. With phi_K = phi_{K-1} - alpha g, g = grad G(phi_{K-1}), and the
# path up to phi_{K-1} held fixed, the query loss has the derivative
#     d L(phi_K) / d alpha = -v' g,   v = grad L(phi_K)
# (-v * g entry by entry where alpha has entries, -v g' for a matrix). It lowers alpha where the last step led away from
# what the query set wants. It is added to phi_K as the term s - s.detach() with s = -alpha g: nothing in value, and
# nothing in the gradient of anything but alpha.


def check_step_size_gradient(inner_solver: InnerSolver, mode: StepSizeGradient) -> None:
    """Raise ValueError where a step size would stay untrained, or its last step is not defined."""
    if mode not in ("last_step", None):
        raise ValueError(f'step_size_gradient={mode!r} must be "last_step" or None.')
    if mode is None:
        if learned_tensors(getattr(inner_solver, "step_size", None)):
            raise ValueError(
                "the step size of inner_solver requires a gradient, but the solution does not depend on it, and the "
                'path is not differentiated: it would never be trained. Pass step_size_gradient="last_step" for the '
                "derivative of the last inner step, pass step_size.detach(), or learn it with il.meta.MAML."
            )
        return
    plain = isinstance(inner_solver, GradientDescent) and inner_solver.line_search is None
    if not plain or inner_solver.has_tolerance or inner_solver.max_steps < 1:  # type: ignore[attr-defined]
        raise ValueError(
            'step_size_gradient="last_step" needs il.solvers.GradientDescent with max_steps >= 1, no tolerance and no '
            f"line search: the last step must be known. Got {inner_solver}."
        )


class LastStep(RecordingSolver):
    """Gradient descent that keeps its last move, differentiable in the step size; see NOTE [last step]."""

    batched = True

    def __init__(self, solver: GradientDescent) -> None:
        self._solver = solver
        self._moved: PyTree = None

    def run(self, objective: Callable[..., torch.Tensor], init: Any, *theta: Any) -> SolverResult:
        """The result of the solver."""
        with torch.no_grad():
            result = replace(self._solver, max_steps=self._solver.max_steps - 1).run(objective, init, *theta)
        leaves, spec = flatten(result.value)
        value, gradient = value_and_gradient(objective, leaves, spec, theta)
        with torch.enable_grad():
            step = [-move for move in moves(present(self._solver.step_size), gradient, spec, value.ndim)]
        self._moved = unflatten(step, spec)
        x = [leaf + move.detach() for leaf, move in zip(leaves, step, strict=True)]
        return SolverResult(unflatten(x, spec), result.status, self._solver.max_steps)

    def attach(self, phi: PyTree) -> PyTree:
        """``phi``, the answer of the last run, with the derivative in the step size."""
        return tree_map(_attach, phi, self._moved)


def _attach(phi: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
    if phi.shape != move.shape:
        raise ValueError(
            f'step_size_gradient="last_step" under torch.func.vmap: the parameters have shape {tuple(phi.shape)}, the '
            f"last step {tuple(move.shape)}. Give all tasks as one batch in place of vmap."
        )
    return phi + (move - move.detach())
