"""MAML: back-propagation through the steps of the inner solver. The rival whose memory grows with every step."""

# Legend: G inner objective, x_k iterates, y_k the points where gradients are taken, P step size, m_k momentum.
#     x_{k+1} = y_k - P grad G(y_k)          y_{k+1} = x_{k+1} + m_k (x_{k+1} - x_k),   x_0 = y_0 = theta

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch

from implicitlayer.base._surroundings import out_of_inference
from implicitlayer.base._tree import check_integer, flatten, unflatten
from implicitlayer.base._types import Leaves, PyTree
from implicitlayer.meta._method import (
    MetaMethod,
    StrengthLike,
    TaskLoss,
    check_strength,
    learned_tensors,
    num_tasks,
    one_per_task,
    regularised,
)
from implicitlayer.solvers._leaves import StepSize, check_step_size, moves, present

Momentum = float | torch.Tensor | Callable[[], torch.Tensor] | Literal["nesterov"]


@dataclass(frozen=True, eq=False)
class MAML(MetaMethod):
    """MAML: ``num_steps`` of gradient descent from theta, and the meta-gradient through all of them.

    With momentum the steps are Nesterov's, ``x_new = y - α ∇G(y)``, ``y_new = x_new + m (x_new - x)``.

    Args:
        task_loss: ``task_loss(params, batch) -> [B]``.
        step_size: inner step size α > 0: a number, a tensor that broadcasts to every task's parameters, a pytree like
            theta (one per tensor, or per entry: Meta-SGD), or an ``il.MatrixStrength`` or ``il.OperatorStrength`` that
            multiplies the gradient (a preconditioner). A tensor that requires a gradient gets one; a callable without
            arguments (such as ``il.LearnedStrength``, which stays positive) is asked at every call.
        num_steps: inner steps.
        strength: proximal strength of the inner problem, in any form of :class:`iMAML`; 0 is the original method.
        momentum: m in 0 ≤ m < 1, constant; for a condition number κ (√κ − 1)/(√κ + 1) is the best. A 0-d tensor that
            requires a gradient gets one. ``"nesterov"``: m_k = (t_k − 1)/t_{k+1} with t_{k+1} = (1 + √(1 + 4 t_k²))/2
            and t_0 = 1, which needs no κ.

    Raises:
        ValueError: a number outside its range, or a step size that does not fit the parameters.

    Source: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning", ICML 2017, algorithm 1; learned step sizes: Li, Zhou,
    Chen, Li, "Meta-SGD", arXiv:1707.09835; momentum: Nesterov, Introductory Lectures on Convex Optimization, 2004,
    section 2.2.

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
    step_size: StepSize
    num_steps: int
    strength: StrengthLike = 0.0
    momentum: Momentum = 0.0

    @classmethod
    def examples(cls, *given: Any) -> list[Any]:
        """Three steps."""
        return [cls(given[0], step_size=0.3, num_steps=3)]

    def __post_init__(self) -> None:
        check_integer("num_steps", self.num_steps, 0)
        check_strength(self.task_loss, self.strength)
        check_step_size(self.step_size)
        _check_momentum(self.momentum)

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Adapted parameters with the graph of every inner step."""
        if torch.is_inference_mode_enabled():
            return _outside_inference(self.adapt, theta, support)
        path = _Path(self, theta, support)
        path.advance(self.num_steps)
        return path.phi

    def parameters(self) -> list[torch.Tensor]:
        """The tensors of a learned step size, strength or momentum."""
        return learned_tensors(self.step_size, self.strength, self.momentum)


class _Path:
    """The iterates of one adaptation; what is advanced with grad mode on is differentiable."""

    def __init__(self, method: MAML, theta: PyTree, support: PyTree) -> None:
        self._method, self._theta, self._support = method, theta, support
        self._x, self._spec = flatten(one_per_task(theta, num_tasks(support)))
        self._y = self._x
        self._t = 1.0

    @property
    def phi(self) -> PyTree:
        return unflatten(self._x, self._spec)

    def cut(self) -> None:
        """What comes next starts here: no gradient goes further back, the start included."""
        # not left to no_grad alone, under which torch marks a view of a leaf as requiring a gradient
        self._x, self._y = ([leaf.detach() for leaf in leaves] for leaves in (self._x, self._y))

    def advance(self, num_steps: int) -> None:
        record = torch.is_grad_enabled()
        objective = regularised(self._method.task_loss, self._method.strength)
        step_size, momentum = present(self._method.step_size), present(self._method.momentum)
        for _ in range(num_steps):
            with torch.enable_grad():
                # a leaf that needs no gradient outside is made one that does, so that the inner step can be taken
                y = [leaf if record and leaf.requires_grad else leaf.detach().requires_grad_() for leaf in self._y]
                total = objective(unflatten(y, self._spec), self._theta, self._support).sum()
                gradient = list(torch.autograd.grad(total, y, create_graph=record, materialize_grads=True))
            x = [leaf - move for leaf, move in zip(y, moves(step_size, gradient, self._spec, 1), strict=True)]
            self._y = self._extrapolated(x, momentum)
            self._x = x

    def _extrapolated(self, x: Leaves, momentum: float | torch.Tensor | str) -> Leaves:
        if isinstance(momentum, str):
            t, self._t = self._t, (1 + (1 + 4 * self._t**2) ** 0.5) / 2
            momentum = (t - 1) / self._t
        if not isinstance(momentum, torch.Tensor) and momentum == 0:
            return x
        return [new + momentum * (new - old) for new, old in zip(x, self._x, strict=True)]


def _outside_inference(adapt: Callable[[PyTree, PyTree], PyTree], *given: PyTree) -> PyTree:
    """``adapt(theta, support)`` under ``no_grad``: inference mode takes no gradients of inner steps."""
    with torch.inference_mode(False), torch.no_grad():
        leaves, spec = flatten(given)
        outside = [out_of_inference([leaf])[0] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return adapt(*unflatten(outside, spec))


def _check_momentum(momentum: Momentum) -> None:
    if isinstance(momentum, str):
        good = momentum == "nesterov"
    elif isinstance(momentum, torch.Tensor):
        good = momentum.ndim == 0 and bool(momentum >= 0) and bool(momentum < 1)
    else:
        number = isinstance(momentum, int | float) and not isinstance(momentum, bool)
        good = callable(momentum) or (number and 0 <= momentum < 1)
    if not good:
        raise ValueError(f'momentum={momentum!r} must be one number in 0 <= momentum < 1, or "nesterov".')


@dataclass(frozen=True, eq=False)
class TruncatedMAML(MAML):
    """Truncated back-propagation: the meta-gradient through the last ``num_backward_steps`` inner steps only.

    Args:
        task_loss, step_size, num_steps, momentum: as in :class:`MAML`.
        strength: proximal strength λ > 0. The start is cut off, so theta acts through the proximal term alone.
        num_backward_steps: steps that are differentiated; all of them makes this MAML without the start's share.

    Source: Shaban, Cheng, Hatch, Boots, "Truncated Back-propagation for Bilevel Optimization", AISTATS 2019.
    """

    _: KW_ONLY
    num_backward_steps: int = 1

    exact = False

    @classmethod
    def examples(cls, *given: Any) -> list[TruncatedMAML]:
        """Three steps, the last of them differentiated."""
        return [cls(given[0], step_size=0.3, num_steps=3, strength=1.0)]

    def __post_init__(self) -> None:
        super().__post_init__()
        leaves = [self.strength] if callable(self.strength) else flatten(self.strength)[0]
        if not any(torch.as_tensor(leaf != 0).any() for leaf in leaves):
            raise ValueError(
                f"strength={self.strength} must be positive: without a proximal term the truncated steps do not "
                "contain theta."
            )
        if not isinstance(self.num_backward_steps, int) or not 0 < self.num_backward_steps <= self.num_steps:
            raise ValueError(
                f"num_backward_steps={self.num_backward_steps} must be an integer in 1...num_steps={self.num_steps}."
            )

    def adapt(self, theta: PyTree, support: PyTree) -> PyTree:
        """Adapted parameters with the graph of the last steps."""
        if torch.is_inference_mode_enabled():
            return _outside_inference(self.adapt, theta, support)
        with torch.no_grad():
            path = _Path(self, theta, support)
            path.advance(self.num_steps - self.num_backward_steps)
        path.cut()
        path.advance(self.num_backward_steps)
        return path.phi
