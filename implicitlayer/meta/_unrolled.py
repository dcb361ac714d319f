"""MAML: back-propagation through the steps of the inner solver. The rival whose memory grows with every step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch

from implicitlayer._tree import flatten, unflatten
from implicitlayer._types import PyTree
from implicitlayer.meta._method import MetaMethod, TaskLoss, learnable, num_tasks, one_per_task, proximal_term


@dataclass(frozen=True, eq=False)
class MAML(MetaMethod):
    """MAML: ``num_steps`` of gradient descent from theta, and the meta-gradient through all of them.

    Args:
        task_loss: ``task_loss(params, batch) -> [B]``.
        step_size: inner step size α > 0; a tensor that requires a gradient gets one.
        num_steps: inner steps.
        strength: proximal strength of the inner problem; 0 is the original method.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017, algorithm 1.

    Example:
        One step on ½(φ − a)²: φ = θ − ½(θ − a), whose Jacobian is ½.

        >>> import torch, implicitlayer as il
        >>> loss = lambda params, target: 0.5 * ((params["w"] - target) ** 2).sum(1)
        >>> theta = {"w": torch.zeros(1, requires_grad=True)}
        >>> method = il.meta.MAML(loss, step_size=0.5, num_steps=1)
        >>> method(theta, torch.tensor([[4.0]]), torch.tensor([[1.0]])).sum().backward()
        >>> theta["w"].grad.item()                       # ½ · (2 − 1)
        0.5
    """

    task_loss: TaskLoss
    _: KW_ONLY
    step_size: float | torch.Tensor
    num_steps: int
    strength: float | torch.Tensor = 0.0

    def __post_init__(self) -> None:
        if self.num_steps < 0:
            raise ValueError(f"num_steps={self.num_steps} must be non-negative. 0 leaves theta as it is.")

    def inner_objective(self, phi: PyTree, theta: PyTree, support: PyTree) -> torch.Tensor:
        """The support loss, and the proximal term where a strength was given; [B]."""
        loss = self.task_loss(phi, support)
        if not isinstance(self.strength, torch.Tensor) and self.strength == 0:
            return loss
        return loss + proximal_term(phi, theta, self.strength)

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Adapted parameters with the graph of every inner step."""
        return self._descend(theta, one_per_task(theta, num_tasks(support)), support, self.num_steps)

    def parameters(self) -> list[torch.Tensor]:
        """A learned step size or strength."""
        return learnable(self.step_size, self.strength)

    def _descend(self, theta: PyTree, phi: PyTree, support: PyTree, num_steps: int) -> PyTree:
        record = torch.is_grad_enabled()
        leaves, spec = flatten(phi)
        for _ in range(num_steps):
            with torch.enable_grad():
                if not record:
                    leaves = [leaf.detach() for leaf in leaves]
                # a leaf that needs no gradient outside is made one that does, so that the inner step can be taken
                leaves = [leaf if leaf.requires_grad else leaf.detach().requires_grad_() for leaf in leaves]
                total = self.inner_objective(unflatten(leaves, spec), theta, support).sum()
                gradients = torch.autograd.grad(total, leaves, create_graph=record)
            leaves = [leaf - self.step_size * gradient for leaf, gradient in zip(leaves, gradients, strict=True)]
        return unflatten(leaves, spec)


@dataclass(frozen=True, eq=False)
class TruncatedMAML(MAML):
    """Truncated back-propagation: the meta-gradient through the last ``num_backward_steps`` inner steps only.

    Args:
        task_loss, step_size, num_steps: as in :class:`MAML`.
        strength: proximal strength λ > 0. The start is cut off, so theta acts through the proximal term alone.
        num_backward_steps: steps that are differentiated; all of them makes this MAML without the start's share.

    Source: Shaban, Cheng, Hatch, Boots, "Truncated Back-propagation for Bilevel Optimization", AISTATS 2019.
    """

    _: KW_ONLY
    num_backward_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.strength, torch.Tensor) and self.strength <= 0:
            raise ValueError(
                f"strength={self.strength} must be positive: without a proximal term the truncated steps do not "
                "contain theta."
            )
        if not 0 < self.num_backward_steps <= self.num_steps:
            raise ValueError(
                f"num_backward_steps={self.num_backward_steps} must lie in 1...num_steps={self.num_steps}."
            )

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Adapted parameters with the graph of the last steps."""
        with torch.no_grad():
            start = one_per_task(theta, num_tasks(support))
            phi = self._descend(theta, start, support, self.num_steps - self.num_backward_steps)
        return self._descend(theta, phi, support, self.num_backward_steps)
