"""Implicit MAML: the meta-gradient from the inner problem's solution, never from the path that led to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch

from implicitlayer._types import InnerSolver, OnFailure, PyTree
from implicitlayer.implicit import MatrixStrength, Proximal, argmin, proximal
from implicitlayer.linear import ConjugateGradient
from implicitlayer.meta._method import MetaMethod, Strength, TaskLoss, learnable, num_tasks, one_per_task


@dataclass(frozen=True, eq=False)
class iMAML(MetaMethod):
    """Meta-learning with implicit gradients, computed for all tasks of a batch at once.

    Adaptation solves ``phi_i = argmin_phi task_loss(phi, support_i) + (strength/2) ||phi - theta||^2`` with any solver,
    started at ``theta``. The meta-gradient of task i is ``(I + H_i/strength)^-1 v_i``, with ``H_i`` the Hessian of the
    support loss and ``v_i`` the gradient of the query loss, both at ``phi_i``; conjugate gradients find it with
    Hessian-vector products only. Zero CG steps give first-order MAML.

    Args:
        task_loss: ``task_loss(params, batch) -> [B]``, one loss per task.
        inner_solver: any solver of the library, or a callable ``solver(objective, init, *theta) -> x``.
        strength: proximal strength λ > 0; a number, a tensor or a pytree with one entry per leaf of theta, or a
            :class:`MatrixStrength`. A tensor that requires a gradient gets one, so the strength can be learned; a
            callable without arguments (such as :class:`LearnedStrength`) is asked at every call and can keep it
            positive.
        linear_solver: for the meta-gradient; the paper uses 5 CG steps.
        on_failure: what negative curvature and missed tolerances do: "ignore" (the trainer still shows them), "warn" or
            "raise". A truncated inner solve is this method's normal state, so its stationarity is not judged unless
            ``stationarity_rtol`` is given.
        stationarity_rtol: see :func:`implicitlayer.argmin`.

    Source: Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", NeurIPS 2019, algorithms 1 and 2.
    The authors' released code solves another system (2I + H/12) after one proximal step; this is the paper's.

    Example:
        Two tasks with the loss ½(φ − a)². With λ = 1 the adapted φ is (a + θ)/2, the query loss ½(φ − 1)² has the
        gradient φ − 1, and (I + H/λ)⁻¹ = ½.

        >>> import torch, implicitlayer as il
        >>> def task_loss(params, target):
        ...     return 0.5 * ((params["w"] - target) ** 2).sum(1)
        >>> method = il.meta.iMAML(task_loss, il.solvers.GradientDescent(step_size=0.5, max_steps=40), strength=1.0)
        >>> theta = {"w": torch.zeros(1, dtype=torch.float64, requires_grad=True)}
        >>> a = torch.tensor([[4.0], [8.0]], dtype=torch.float64)
        >>> losses = method(theta, a, torch.ones_like(a))
        >>> losses.tolist()                              # phi = 2 and 4
        [0.5, 4.5]
        >>> losses.sum().backward()
        >>> theta["w"].grad.item()                       # ½·1 + ½·3
        2.0
    """

    task_loss: TaskLoss
    inner_solver: InnerSolver
    _: KW_ONLY
    strength: Strength | Callable[[], Strength] = 2.0
    linear_solver: Any = ConjugateGradient(max_steps=5)
    on_failure: OnFailure = "ignore"
    stationarity_rtol: float | None = None

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Task parameters, differentiable in theta (and a learned strength) by the implicit function theorem."""
        with torch.no_grad():
            init = one_per_task(theta, num_tasks(support))
        layer = argmin(
            self._objective(),
            self.inner_solver,
            linear_solver=self.linear_solver,
            batch_dims=1,
            on_failure=self.on_failure,
            stationarity_rtol=self.stationarity_rtol,
        )
        return layer(init, theta, support)

    def inner_objective(self, phi: PyTree, theta: PyTree, support: PyTree) -> torch.Tensor:
        """The proximal objective ``task_loss(phi, support) + (strength/2) ||phi - theta||^2``, [B]."""
        return self._objective()(phi, theta, support)

    def parameters(self) -> list[torch.Tensor]:
        """The tensors of a learned strength."""
        if isinstance(self.strength, torch.nn.Module):
            return list(self.strength.parameters())
        if isinstance(self.strength, MatrixStrength):
            return learnable(self.strength.tensors)
        return learnable(self.strength)

    def _objective(self) -> Proximal:
        # made at every call: a strength that is learned may have become negative, which is an error here
        return proximal(self.task_loss, self.strength() if callable(self.strength) else self.strength)
