"""Methods that look at the adapted parameters only: first-order MAML and Reptile."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from implicitlayer._tree import flatten, tree_map
from implicitlayer._types import InnerSolver, PyTree
from implicitlayer.meta._method import MetaMethod, TaskLoss, num_tasks, one_per_task, proximal_term


@dataclass(frozen=True, eq=False)
class _FirstOrder(MetaMethod):
    task_loss: TaskLoss
    inner_solver: InnerSolver
    _: KW_ONLY
    strength: float = 0.0

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError(
                f"strength={self.strength} must be non-negative: it weighs ½‖φ − θ‖². 0 leaves the term out."
            )

    def inner_objective(self, phi: PyTree, theta: PyTree, support: PyTree) -> torch.Tensor:
        """The support loss, and the proximal term where a strength was given; [B]."""
        loss = self.task_loss(phi, support)
        return loss if self.strength == 0 else loss + proximal_term(phi, theta, self.strength)

    def _solve(self, theta: PyTree, support: PyTree) -> PyTree:
        start = tree_map(torch.Tensor.detach, theta)
        with torch.enable_grad():
            result = self.inner_solver(self.inner_objective, one_per_task(start, num_tasks(support)), start, support)
        return tree_map(torch.Tensor.detach, getattr(result, "value", result))


@dataclass(frozen=True, eq=False)
class FirstOrderMAML(_FirstOrder):
    """First-order MAML: the Jacobian of adaptation is taken to be the identity.

    Args:
        task_loss: ``task_loss(params, batch) -> [B]``.
        inner_solver: a solver that takes all tasks at once, such as ``il.solvers.GradientDescent``.
        strength: proximal strength of the inner problem; 0, plain fine-tuning, is the original method. With a
            strength λ this is :class:`iMAML` with zero CG steps.

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

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Adapted parameters whose Jacobian in theta is the identity."""
        phi = self._solve(theta, support)
        return tree_map(lambda p, t: p + (t - t.detach()), phi, theta)


@dataclass(frozen=True, eq=False)
class Reptile(_FirstOrder):
    """Reptile: theta moves towards the adapted parameters, its "gradient" is the mean of ``theta − phi_i``.

    The losses [B] that it returns have the value of the query loss (for the curves) and the gradient
    ``theta − phi_i``.

    Args:
        task_loss: ``task_loss(params, batch) -> [B]``.
        inner_solver: a solver that takes all tasks at once.
        strength: proximal strength of the inner problem; 0 is the original method.

    Source: Nichol, Achiam, Schulman, "On First-Order Meta-Learning Algorithms", arXiv:1803.02999, algorithm 1. With a
    strength λ and a solved inner problem, theta − phi is the support gradient over λ: first-order MAML on the
    support loss.
    """

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Adapted parameters, constants."""
        return self._solve(theta, support)

    def query_losses(self, theta: PyTree, phi: PyTree, query: PyTree) -> torch.Tensor:
        """Query losses [B] in value, ``theta − phi`` in gradient."""
        with torch.no_grad():
            value = self.task_loss(phi, query)
        distance = proximal_term(phi, theta, 1.0) if flatten(theta)[0] else value
        return value + (distance - distance.detach())
