"""Implicit MAML: the meta-gradient from the inner problem's solution, never from the path that led to it."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any
from weakref import WeakSet

import torch

from implicitlayer.api import argmin
from implicitlayer.base._types import InnerSolver, OnFailure, PyTree
from implicitlayer.equation._jacobian import Curvature
from implicitlayer.equation._repair import NegativeCurvature
from implicitlayer.layer import Proximal
from implicitlayer.linear import ConjugateGradient
from implicitlayer.meta._first_order import LastStep, StepSizeGradient, check_step_size_gradient
from implicitlayer.meta._method import (
    MetaMethod,
    PerTask,
    StrengthLike,
    TaskLoss,
    check_strength,
    learned_tensors,
    num_tasks,
    one_per_task,
    regularised,
    tensors_of,
)
from implicitlayer.meta._recording import RecordedCall, ReplayedProducts, recordings_of
from implicitlayer.meta._settings import EXECUTION
from implicitlayer.solvers._gradient_descent import GradientDescent

_KNOWN: WeakSet[MetaMethod] = WeakSet()  # methods whose tasks were looked at: whether one reads another


@dataclass(frozen=True, eq=False)
class iMAML(MetaMethod):
    """Meta-learning with implicit gradients, computed for all tasks of a batch at once.

    Adaptation solves ``phi_i = argmin_phi task_loss(phi, support_i) + (strength/2) ||phi - theta||^2`` with any solver,
    started at ``theta``. The meta-gradient of task i is ``(I + H_i/strength)^-1 v_i``, with ``H_i`` the Hessian of the
    support loss and ``v_i`` the gradient of the query loss, both at ``phi_i``; conjugate gradients find it with
    Hessian-vector products only. Zero CG steps give first-order MAML.

    Args:
        task_loss: ``task_loss(params, batch) -> [B]``, one loss per task.
        inner_solver: any solver of the library, or a callable ``solver(objective, init, *theta) -> x``. With
            ``il.solvers.NewtonCG(max_steps=..., cg_steps=5)`` this is iMAML-HF (Hessian-free).
        strength: proximal strength λ > 0; a number, a tensor or a pytree with one entry per leaf of theta, a
            :class:`MatrixStrength` or an :class:`OperatorStrength`. A tensor that requires a gradient gets one, so the
            strength can be learned; a callable without arguments (such as :class:`LearnedStrength`) is asked at every
            call and can keep it positive.
        linear_solver: for the meta-gradient. The default is the paper's 5 CG steps, not the solve to a tolerance of
            :func:`implicitlayer.argmin`: the meta-gradient is biased by what they leave (6 % in one small task), and
            nothing is said. ``il.ConjugateGradient()`` solves to its tolerance.
        curvature: the matrix H_i of the meta-gradient: ``"hessian"``, or ``"gauss_newton"`` for a ``task_loss`` made by
            :func:`implicitlayer.composite` or :func:`implicitlayer.least_squares`. Gauss-Newton is never negative for a
            convex loss of the outputs, so conjugate gradients cannot break down, and need fewer steps; the
            meta-gradient is then exact only where the outputs are linear in phi or the support set is fitted.
        negative_curvature: what conjugate gradients do where H_i + λ is not positive definite; see
            :func:`implicitlayer.argmin`.
        on_failure: what numerical trouble gets. The default, unlike argmin's, is "ignore": nothing (the trainer still
            shows it). "warn": a warning where the gradient is an approximation (a missed tolerance), an error where it
            is none (negative curvature). "raise": always an error. A truncated inner solve is this method's normal
            state, so its stationarity is not judged unless ``stationarity_rtol`` is given.
        stationarity_rtol: see :func:`implicitlayer.argmin`.
        step_size_gradient: ``"last_step"`` learns the step size of a ``GradientDescent``: the query loss is
            differentiated through the last inner step alone, ``-v ∇G(φ_{K-1})``. The implicit gradient has no part in
            it: the solution does not depend on the step size.
        capture: on a CUDA device, record the inner steps and the Hessian-vector product of each shape of batch as CUDA
            graphs at the first call, and replay them from then on: no Python and no launch for each small operation.
            What cannot be recorded runs one by one, after a warning that says why. Python numbers that ``task_loss``
            reads from outside keep the values they had at the recording.

    Raises:
        ValueError: a negative strength; a step size that requires a gradient while ``step_size_gradient`` is None (it
            would stay untrained); ``"last_step"`` of a solver whose last step is not known.

    Source: Rajeswaran, Finn, Kakade, Levine, "Meta-Learning with Implicit Gradients", NeurIPS 2019, algorithms 1 and 2.
    The authors' released code solves another system (2I + H/12) after one proximal step; this is the paper's. The last
    step's derivative: Baydin et al., "Online Learning Rate Adaptation with Hypergradient Descent", ICLR 2018, with the
    query loss in place of the next training loss.

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
    strength: StrengthLike = 2.0
    linear_solver: Any = ConjugateGradient(max_steps=5)
    curvature: Curvature = "hessian"
    negative_curvature: NegativeCurvature = "raise"
    on_failure: OnFailure = "ignore"
    stationarity_rtol: float | None = None
    step_size_gradient: StepSizeGradient = None
    capture: bool = field(default=False, metadata=EXECUTION)

    @classmethod
    def examples(cls, *given: Any) -> list[iMAML]:
        """Inner problem and meta-gradient solved to the end."""
        return [cls(given[0], GradientDescent(0.3, max_steps=100), linear_solver=ConjugateGradient())]

    def __post_init__(self) -> None:
        check_strength(self.task_loss, self.strength)
        check_step_size_gradient(self.inner_solver, self.step_size_gradient)

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Task parameters, differentiable in theta (and a learned strength) by the implicit function theorem."""
        with torch.no_grad():
            init = one_per_task(theta, num_tasks(support))
        last_step = None if self.step_size_gradient is None else LastStep(self.inner_solver)  # type: ignore[arg-type]
        solver = last_step or self.inner_solver
        recorded = self._recorded(solver, (init, theta, support)) if self.capture else None
        names = ("on_failure", "stationarity_rtol", "curvature", "negative_curvature")
        how: dict[str, Any] = {name: getattr(self, name) for name in names}
        how["linear_solver"] = self.linear_solver if recorded is None else ReplayedProducts(recorded)
        layer = argmin(regularised(self.task_loss, self.strength), recorded or solver, batch_dims=1, **how)
        layer.knows_lanes = self in _KNOWN
        phi = layer(init, theta, support)
        if layer.knows_lanes:
            _KNOWN.add(self)
        return phi if last_step is None else last_step.attach(phi)

    def parameters(self) -> list[torch.Tensor]:
        """The tensors of a learned strength, then those of a learned step size."""
        step_size = None if self.step_size_gradient is None else self.inner_solver.step_size  # type: ignore[attr-defined]
        return learned_tensors(self.strength, step_size)

    def _recorded(self, solver: InnerSolver, data: tuple[PyTree, PyTree, PyTree]) -> RecordedCall | None:
        # a strength that is a callable is asked inside the recording, so that it follows the tensors it is made of
        if self.curvature != "hessian":
            recordings_of(self).tell(
                f'curvature="{self.curvature}" runs one by one: only Hessian products are recorded'
            )
            return None
        objective = Proximal(PerTask(self.task_loss), self.strength)
        recording = recordings_of(self).recording(objective, solver, tensors_of(self.strength), data)
        return None if recording is None else RecordedCall(recording, solver, self.linear_solver, *data[1:])
