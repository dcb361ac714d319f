"""First-order MAML and Reptile, and a step size that is learned by the last inner step of a solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

import torch

from implicitlayer.api import argmin
from implicitlayer.base._solution import RecordingSolver, SolverResult
from implicitlayer.base._tree import flatten, tree_map, unflatten
from implicitlayer.base._types import InnerSolver, PyTree
from implicitlayer.layer import proximal
from implicitlayer.meta._method import (
    MetaMethod,
    Strength,
    TaskLoss,
    check_strength,
    learned_tensors,
    num_tasks,
    one_per_task,
    regularised,
)
from implicitlayer.solvers._gradient_descent import GradientDescent
from implicitlayer.solvers._leaves import moves, present, value_and_gradient

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


@dataclass(frozen=True, eq=False)
class _FirstOrder(MetaMethod):
    task_loss: TaskLoss
    inner_solver: InnerSolver
    _: KW_ONLY
    strength: Strength = 0.0

    exact = False

    @classmethod
    def examples(cls, *given: Any) -> list[Any]:
        """A few steps of gradient descent."""
        return [cls(given[0], GradientDescent(0.1, max_steps=3))]

    def __post_init__(self) -> None:
        check_strength(self.task_loss, self.strength)
        if learned_tensors(self.strength):
            raise ValueError(
                "strength requires a gradient, but a first-order method does not differentiate the inner problem: it "
                "would never be trained. Use il.meta.iMAML or il.meta.MAML, or pass strength.detach()."
            )

    def _solve(self, solver: InnerSolver, theta: PyTree, support: PyTree) -> PyTree:
        """The same call of the solver as iMAML makes, with all its checks, and no derivative."""
        objective = regularised(self.task_loss, self.strength)
        with torch.no_grad():
            layer = argmin(objective, solver, batch_dims=1, stationarity_rtol=None)
            return layer(one_per_task(theta, num_tasks(support)), theta, support)


@dataclass(frozen=True, eq=False)
class FirstOrderMAML(_FirstOrder):
    """First-order MAML: the Jacobian of adaptation is taken to be the identity.

    Args:
        task_loss, inner_solver: as in :class:`iMAML`.
        strength: proximal strength of the inner problem, in the fixed forms of :class:`iMAML`; 0, plain fine-tuning, is
            the original method. With a strength λ this is :class:`iMAML` with zero CG steps.
        step_size_gradient: ``"last_step"`` learns the step size of a ``GradientDescent``, as in :class:`iMAML`.

    Raises:
        ValueError: a negative strength; a strength or a step size that would stay untrained.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017, section 5.2.

    Example:
        >>> import torch, implicitlayer as il
        >>> loss = lambda params, target: 0.5 * ((params["w"] - target) ** 2).sum(1)
        >>> method = il.meta.FirstOrderMAML(loss, il.solvers.GradientDescent(step_size=0.5, max_steps=1))
        >>> theta = {"w": torch.zeros(1, requires_grad=True)}
        >>> method(theta, torch.tensor([[4.0]]), torch.tensor([[1.0]])).sum().backward()
        >>> theta["w"].grad.item()                       # phi = 2, and the query gradient there is 2 - 1
        1.0
    """

    _: KW_ONLY
    step_size_gradient: StepSizeGradient = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step_size_gradient(self.inner_solver, self.step_size_gradient)

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Adapted parameters whose Jacobian in theta is the identity."""
        if self.step_size_gradient is None:
            phi = self._solve(self.inner_solver, theta, support)
        else:
            last_step = LastStep(self.inner_solver)  # type: ignore[arg-type]
            phi = last_step.attach(self._solve(last_step, theta, support))
        return tree_map(lambda p, t: p + (t - t.detach()), phi, theta)

    def parameters(self) -> list[torch.Tensor]:
        """The tensors of a learned step size."""
        return [] if self.step_size_gradient is None else learned_tensors(self.inner_solver.step_size)  # type: ignore[attr-defined]


@dataclass(frozen=True, eq=False)
class Reptile(_FirstOrder):
    """Reptile: theta moves towards the adapted parameters, its "gradient" is the mean of ``theta − phi_i``.

    The losses [B] that it returns have the value of the query loss (for the curves) and the gradient ``theta − phi_i``.

    Args:
        task_loss, inner_solver: as in :class:`iMAML`.
        strength: as in :class:`FirstOrderMAML`; 0 is the original method.

    Raises:
        ValueError: a negative strength; a strength or a step size that would stay untrained.

    Source: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", arXiv:1803.02999, algorithm 1. With a
    strength λ and a solved inner problem, theta − phi is the support gradient over λ: first-order MAML on the
    support loss (Rajeswaran et al. 2019, appendix A).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if learned_tensors(getattr(self.inner_solver, "step_size", None)):
            raise ValueError(
                "the step size of inner_solver requires a gradient, but Reptile has no gradient for it: it would never "
                "be trained. Pass step_size.detach(), or learn it with il.meta.MAML or il.meta.iMAML."
            )

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Adapted parameters, constants."""
        return self._solve(self.inner_solver, theta, support)

    def query_losses(self, theta: PyTree, phi: PyTree, query: PyTree) -> torch.Tensor:
        """Query losses [B] in value, ``theta − phi`` in gradient."""
        with torch.no_grad():
            value = super().query_losses(theta, phi, query)
        distance = proximal(self.task_loss, 1.0).coupling(1)(phi, theta)
        return value + (distance - distance.detach())
